"""Hashing frames that lie in the cache and count as verified: a disk may have changed them since."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import Protocol

from floe.fuse.held import table_of
from floe.store.cache import Writer
from floe.store.errors import FloeError, TransitDamageError
from floe.store.frames import FrameTable, VerifiedFrame

_log = logging.getLogger(__name__)


class Progress(Protocol):
    """Bytes `hashed` so far, `damaged` frames, and whether all was `looked` at."""

    hashed: int
    damaged: int
    looked: bool


def scrub(writer: Writer, masks: Mapping[str, int], progress: Progress, stopping: threading.Event) -> None:
    """Hash the frames in `masks`, by pack, that are here and count as verified, from the disk and not from memory.

    One that does not match is taken out of the cache, but where a native mount has its pack: it is counted, and stays.
    """
    for pack_id, mask in masks.items():
        table, pack = table_of(writer, pack_id), writer.pack(pack_id)
        if table is None or pack is None:
            continue
        for frame in range(mask.bit_length()):
            if stopping.is_set():
                return
            if not mask >> frame & 1 or not pack.bits.is_trusted(frame):
                continue
            generation = pack.generation
            try:
                _hash(pack.open().data, table, frame)
            except (OSError, FloeError) as error:
                if pack.generation != generation or not pack.bits.is_trusted(frame):
                    continue  # it was evicted meanwhile
                progress.damaged += 1
                _log.warning("frame %d of pack %s in the cache is not what it was: %s", frame, pack_id, error)
                writer.discard(pack_id, [frame])
            else:
                progress.hashed += table.content_length(frame)
    progress.looked = True


def _hash(fd: int, table: FrameTable, frame: int) -> None:
    """TransitDamageError when the frame does not match its digest, OSError when it cannot be read."""
    offset, length = frame * table.frame_size, table.content_length(frame)
    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
    content = os.pread(fd, length, offset)
    if len(content) != length:
        raise TransitDamageError(f"it ends after {len(content)} bytes")
    VerifiedFrame(content, table.entry(frame).digest)
