"""Start-up profiles in the worker: what a mounted tree's users read first is recorded, told the store, and replayed.

All of it happens beside the reads, in daemon threads. Nothing waits for it but a worker that stops in order, for a moment;
nothing that goes wrong in it is more than a line in the log. A killed worker loses what it was recording.
"""

from __future__ import annotations

import logging
import mmap
import random
import threading
import time
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

from floe.store.cache import CacheWriter
from floe.store.erofs_inodes import Inodes
from floe.store.errors import AccessDeniedError, FloeError, NotFoundError
from floe.store.ids import is_hexdigest
from floe.store.profile import Profile, Touch
from floe.store.profilepaths import Read, locate, touched
from floe.store.profiles import ProfileStore
from floe.store.recorder import Recorder, Recording
from floe.store.replay import Run, plan

_log = logging.getLogger(__name__)
_LOOK_UPS = 4  # threads
_LOOK_PAUSE = 1.0  # seconds between looks whether a recording is over
_SPREAD = 10.0  # seconds, the longest before a recording is told the store: a fleet that starts at once is spread out
_STOP = 3.0  # seconds for the last recordings when the worker stops
_WORK, _REST = 0.001, 0.002  # seconds; evaluating a recording lets readers have the interpreter's lock
_DENIED_FOR = 3600.0  # seconds for which a refused permission is believed in
_COUNTS = ("profiles_found", "profiles_recorded", "profiles_published", "profile_used_frames", "profile_unused_frames")
ON, READ, OFF = "on", "read", "off"


class Replaying(Protocol):
    """See PackReader.replay."""

    def replay(self, runs: list[Run], fetched: set[tuple[str, int]]) -> None:
        """Fetch ahead."""
        ...


class StartUp:
    """Replays and records for trees as they are mounted, unless `mode` is OFF; with READ it publishes nothing.

    `writer`: of the cache that trees and packs lie in. `recorder` is the `reader`'s. Thread-safe.
    """

    def __init__(
        self,
        profiles: ProfileStore,
        writer: CacheWriter,
        reader: Replaying,
        recorder: Recorder,
        *,
        mode: str = ON,
        spread: float = _SPREAD,
    ) -> None:
        self._profiles = profiles
        self._writer = writer
        self._reader = reader
        self._recorder = recorder
        self._mode = mode
        self._spread = spread
        self._counts = recorder.counts
        self._counts.update(dict.fromkeys(_COUNTS, 0))
        self._mounted: SimpleQueue[Recording] = SimpleQueue()
        self._lock = threading.Lock()  # guards what follows
        self._threads = 0
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()
        self._denied_until = 0.0

    def mounted(self, tree: str, packs: Sequence[str]) -> None:
        """A tree over these packs is about to be mounted. Returns at once."""
        if self._mode == OFF or self._stopping.is_set() or not is_hexdigest(tree):
            return
        recording = self._recorder.begin(tree, packs)
        if recording is None:
            return
        self._mounted.put(recording)
        with self._lock:
            if self._threads < _LOOK_UPS:
                self._threads += 1
                threading.Thread(target=self._look_up, name="floe-profile", daemon=True).start()
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="floe-record", daemon=True)
                self._watcher.start()

    def close(self) -> None:
        """Tell the store what was recorded so far, if that is quickly done."""
        self._stopping.set()
        with self._lock:
            watcher = self._watcher
        if watcher is not None:
            watcher.join(_STOP)

    # replaying

    def _look_up(self) -> None:
        while True:
            try:
                recording = self._mounted.get(timeout=_LOOK_PAUSE)
            except Empty:
                with self._lock:
                    if not self._mounted.empty():
                        continue
                    self._threads -= 1
                    return
            try:
                self._replay(recording)
            except NotFoundError as error:
                _log.debug("no start-up profile: %s", error)
            except (FloeError, OSError) as error:
                _log.info("tree %s starts without its profile: %s", recording.tree, error)
            except Exception:
                if not self._stopping.is_set():  # else the store may just have been closed under us
                    _log.exception("the profile of tree %s could not be replayed", recording.tree)

    def _replay(self, recording: Recording) -> None:
        frames = self._frames(recording.tree)
        if frames:
            with self._lock:
                self._counts["profiles_found"] += 1
            self._reader.replay(list(plan(frames, self._frame_size)), recording.replayed)

    def _frames(self, tree: str) -> list[tuple[str, int]]:
        """What to fetch, in order: as the tree's own starts tell, or else those of its source."""
        profile = self._profiles.of_tree(tree)
        if profile is None:
            return []
        image = self._image(tree)
        if image is None:
            return []
        own = profile.hot_frames()
        if own:
            ids = [pack_id for pack_id, _ in image.packs]
            return [(ids[pack], frame) for pack, frame in own if pack < len(ids)]
        of_source = self._profiles.of_source(profile.source) if profile.source else None
        if of_source is None:
            return []
        found = []
        for pack_id, offset, length in locate(image, of_source.hot_pieces(), profile.prefix):
            size = self._frame_size(pack_id) if pack_id else 0
            if pack_id and size:
                found += [(pack_id, frame) for frame in range(offset // size, (offset + length - 1) // size + 1)]
        return found

    # recording

    def _watch(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(_LOOK_PAUSE)
            recordings = self._recorder.finished(all_of_them=stopping)
            if recordings and self._mode == ON:
                self._stopping.wait(random.uniform(0, self._spread))
            for recording in recordings:
                self._evaluate_safely(recording)
            with self._lock:
                if not self._recorder.active:
                    self._watcher = None
                    return

    def _evaluate_safely(self, recording: Recording) -> None:
        try:
            self._evaluate(recording)
        except (FloeError, OSError) as error:
            _log.info("what tree %s started with is not kept: %s", recording.tree, error)
        except Exception:
            if not self._stopping.is_set():  # else the store may just have been closed under us
                _log.exception("what tree %s started with could not be kept", recording.tree)

    def _evaluate(self, recording: Recording) -> None:
        sizes = {pack_id: size for pack_id in recording.packs if (size := self._frame_size(pack_id))}
        read = _frames_of(recording, sizes)
        with self._lock:
            used = len(recording.replayed & read)
            self._counts["profile_used_frames"] += used
            self._counts["profile_unused_frames"] += len(recording.replayed) - used
        if not recording.reads or self._mode != ON or time.monotonic() < self._denied_until:
            return
        image = self._image(recording.tree)
        if image is None:
            return
        found = touched(image, _reads(recording), sizes, _Politely(self._stopping))
        if not found.frames:
            return
        with self._lock:
            self._counts["profiles_recorded"] += 1
        recorded = Profile(
            starts=1,
            frames={key: Touch(first, 1) for key, first in found.frames.items()},
            pieces={key: Touch(first, 1) for key, first in found.pieces.items()},
        )
        try:
            written = self._profiles.add(recording.tree, recorded)
        except AccessDeniedError as error:
            self._denied_until = time.monotonic() + _DENIED_FOR
            _log.info("start-up profiles are not kept: this node may not write to the store (%s)", error)
            return
        if written:
            with self._lock:
                self._counts["profiles_published"] += 1

    # the tree

    def _image(self, tree: str) -> Inodes | None:
        path = self._writer.cache.tree_path(tree)
        if path is None:
            return None
        with path.open("rb") as file:
            return Inodes(memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)), f"tree {tree}")

    def _frame_size(self, pack_id: str) -> int:
        table = self._writer.table(pack_id)
        return 0 if table is None else table.frame_size


class _Politely:
    """Called now and then by work that takes long: it rests twice as long as it works, unless there is a hurry."""

    def __init__(self, hurry: threading.Event) -> None:
        self._hurry = hurry
        self._since = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._since >= _WORK and not self._hurry.is_set():
            time.sleep(_REST)
            self._since = time.monotonic()


def _frames_of(recording: Recording, sizes: dict[str, int]) -> set[tuple[str, int]]:
    return {
        (pack_id, frame)
        for pack_id, offset, length, _ in recording.reads
        if pack_id in sizes
        for frame in range(offset // sizes[pack_id], (offset + length - 1) // sizes[pack_id] + 1)
    }


def _reads(recording: Recording) -> Iterator[Read]:
    if recording.reads:
        began = min(read.when for read in recording.reads)
        for pack_id, offset, length, when in recording.reads:
            yield Read(pack_id, offset, length, round((when - began) * 1000))
