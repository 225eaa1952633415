"""How fast one core decompresses and verifies frames, by the code that a read goes through."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from floe.selfbench.figures import Cpu
from floe.store import layout
from floe.store.frames import decode_frame, encode_frames
from floe.store.ids import Buffer
from floe.store.objects.base import ObjectStore
from floe.store.packindex import MODEL_FRAME, FrameEntry, PackIndex

_FRAMES = 32 << 20  # bytes as stored, at most


@dataclass(frozen=True)
class Sample:
    """Frames: as stored, their entries, bytes of content of each."""

    frames: Sequence[tuple[Buffer, FrameEntry, int]]
    of_the_store: bool

    @property
    def content(self) -> int:
        """Bytes of content."""
        return sum(length for _, _, length in self.frames)

    @property
    def stored(self) -> int:
        """Bytes as stored."""
        return sum(len(stored) for stored, _, _ in self.frames)


def sample_of(store: ObjectStore, pack_id: str) -> Sample:
    """Frames from the middle of a pack, at most 32 MiB. The store's errors, DamagedError."""
    index = PackIndex.decode(store.get(layout.pack_index_key(pack_id)), pack_id)
    offsets = index.stored_offsets
    middle = next(n for n in range(len(index.frames)) if offsets[n + 1] * 2 >= offsets[-1])
    first = next(n for n in range(len(index.frames)) if offsets[n] + _FRAMES // 2 >= offsets[middle])
    end = first + 1
    while end < len(index.frames) and offsets[end + 1] - offsets[first] <= _FRAMES:
        end += 1
    start = offsets[first]
    data = memoryview(store.get(layout.pack_key(pack_id), start, offsets[end] - start))
    return Sample(
        [
            (data[offsets[n] - start : offsets[n + 1] - start], index.frames[n], index.content_length(n))
            for n in range(first, end)
        ],
        of_the_store=True,
    )


def made_sample() -> Sample:
    """Frames of weights as they often are: four fifths of each cannot be compressed."""
    noise = MODEL_FRAME * 4 // 5
    contents = [os.urandom(noise) + bytes(MODEL_FRAME - noise) for _ in range(8)]
    return Sample([(stored, entry, MODEL_FRAME) for stored, entry in encode_frames(contents)], of_the_store=False)


def measure(sample: Sample, seconds: float) -> Cpu:
    """Decode the sample again and again in one thread for `seconds` of its processor time. TransitDamageError."""
    done = 0
    begun = time.thread_time()
    while not done or time.thread_time() - begun < seconds:
        for stored, entry, length in sample.frames:
            decode_frame(stored, entry, length)
        done += sample.content
    spent = max(time.thread_time() - begun, 1e-9)
    return Cpu(
        cores=len(os.sched_getaffinity(0)),
        frames=len(sample.frames),
        content_bytes=sample.content,
        of_the_store=sample.of_the_store,
        stored_share=sample.stored / sample.content,
        content_bytes_per_core_second=done / spent,
    )
