"""Start-up profiles in the worker: what a mounted tree's users read first is recorded, told the store, and replayed.

A tree that is expected is fetched before it is mounted: by its profile, or from the front where nobody recorded one.

All of it happens beside the reads, in daemon threads. Nothing waits for it but a worker that stops in order, for a moment;
nothing that goes wrong in it is more than a line in the log. A killed worker loses what it was recording.
"""

from __future__ import annotations

import logging
import mmap
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from floe.store.cache import Writer
from floe.store.erofs_inodes import Extent, Inodes
from floe.store.errors import AccessDeniedError, FloeError, NotFoundError
from floe.store.front import from_front
from floe.store.ids import is_hexdigest
from floe.store.profile import Profile, Touch
from floe.store.profilepaths import Read, locate, touched
from floe.store.profiles import ProfileStore
from floe.store.recorder import Recorder, Recording
from floe.store.replay import Run, plan
from floe.store.threads import try_start

_log = logging.getLogger(__name__)
_LOOK_UPS = 4  # threads
_LOOK_PAUSE = 1.0  # seconds between looks whether a recording is over
_SPREAD = 10.0  # seconds, the longest before a recording is told the store: a fleet that starts at once is spread out
_EXPECTED_MAX = 512  # trees remembered
_STOP = 3.0  # seconds for the last recordings when the worker stops
_WORK, _REST = 0.001, 0.002  # seconds; evaluating a recording lets readers have the interpreter's lock
_DENIED_FOR = 3600.0  # seconds for which a refused permission is believed in
_COUNTS = ("profiles_found", "profiles_recorded", "profiles_published", "profile_used_frames", "profile_unused_frames")
ON, READ, OFF = "on", "read", "off"


class Replaying(Protocol):
    """See PackReader.replay."""

    def replay(self, runs: list[Run], fetched: set[tuple[str, int]], *, later: bool = False) -> None:
        """Fetch ahead."""
        ...

    def stop_replay(self, fetched: set[tuple[str, int]]) -> None:
        """Undo that."""
        ...


class _Expected:
    """A tree that will be mounted some time soon; `nbytes`: what to fetch of it at most where there is no profile.

    Frames that were fetched: `replayed` by its profile, `from_front` without one.
    """

    def __init__(self, tree: str, nbytes: int) -> None:
        self.tree = tree
        self.nbytes = nbytes
        self.replayed: set[tuple[str, int]] = set()
        self.from_front: set[tuple[str, int]] = set()
        self.mounted = self.withdrawn = False


class StartUp:
    """Replays and records for trees as they are mounted, unless `mode` is OFF; with READ it publishes nothing.

    Trees that are expected are fetched whatever the mode; with OFF nobody asks for their profiles.

    `writer`: of the cache that trees and packs lie in. `recorder` is the `reader`'s. `told` is told of events, see EventLog.add. Thread-safe.
    """

    def __init__(
        self,
        profiles: ProfileStore,
        writer: Writer,
        reader: Replaying,
        recorder: Recorder,
        *,
        mode: str = ON,
        spread: float = _SPREAD,
        told: Callable[..., object] = lambda _kind, **_fields: None,
    ) -> None:
        self._profiles = profiles
        self._writer = writer
        self._reader = reader
        self._recorder = recorder
        self._mode = mode
        self._spread = spread
        self._told = told
        self._counts = recorder.counts
        self._counts.update(dict.fromkeys(_COUNTS, 0))
        self._wanted: SimpleQueue[Recording | _Expected] = SimpleQueue()
        self._lock = threading.Lock()  # guards what follows, and what is in it
        self._expected: dict[str, _Expected] = {}
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
        with self._lock:
            expected = self._expected.get(tree)
            if expected is not None and not expected.mounted:
                expected.mounted = True
                recording.replayed = expected.replayed  # judged by what this start reads, too
            if self._watcher is None:
                self._watcher = try_start("floe-record", self._watch)
        self._want(recording)

    def expected(self, tree: str, nbytes: int) -> None:
        """A tree that is on this node, with its packs' indexes, will be mounted some time soon. Returns at once.

        What a start needs by its profile is fetched, or without one at most `nbytes` of content from the front, as far
        as nothing in the cache has to go for it. Once for each tree, until `unexpected`.
        """
        if self._stopping.is_set() or not is_hexdigest(tree):
            return
        with self._lock:
            if tree in self._expected:
                return
            while len(self._expected) >= _EXPECTED_MAX:  # those that came first are mounted, or never will be
                del self._expected[next(iter(self._expected))]
            expected = self._expected[tree] = _Expected(tree, nbytes)
        self._want(expected)

    def unexpected(self, tree: str) -> None:
        """Nobody will mount that tree after all: what is not asked for yet is not fetched."""
        with self._lock:
            expected = self._expected.pop(tree, None)
            if expected is not None:
                expected.withdrawn = True
                self._reader.stop_replay(expected.replayed)
                self._reader.stop_replay(expected.from_front)

    def _want(self, wanted: Recording | _Expected) -> None:
        self._wanted.put(wanted)
        with self._lock:
            if self._threads < _LOOK_UPS and try_start("floe-profile", self._look_up) is not None:
                self._threads += 1

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
                wanted = self._wanted.get(timeout=_LOOK_PAUSE)
            except Empty:
                with self._lock:
                    if not self._wanted.empty():
                        continue
                    self._threads -= 1
                    return
            try:
                frames = self._frames_safely(wanted.tree) if self._mode != OFF else []
                if isinstance(wanted, _Expected):
                    self._fetch_early(wanted, frames)
                elif frames:
                    self._replay(wanted.tree, frames, wanted.replayed)
            except (FloeError, OSError) as error:
                _log.info("nothing of tree %s is fetched ahead: %s", wanted.tree, error)
            except Exception:
                if not self._stopping.is_set():
                    _log.exception("nothing of tree %s could be fetched ahead", wanted.tree)

    def _replay(self, tree: str, frames: list[tuple[str, int]], fetched: set[tuple[str, int]]) -> None:
        with self._lock:
            self._counts["profiles_found"] += 1
        self._told("replay", tree=tree, frames=len(frames))
        self._reader.replay(list(plan(frames, self._frame_size)), fetched)

    def _fetch_early(self, expected: _Expected, frames: list[tuple[str, int]]) -> None:
        runs = list(plan(frames, self._frame_size) if frames else self._front(expected))
        with self._lock:
            if expected.withdrawn or not runs:
                return
            self._told(
                "expected", tree=expected.tree, frames=sum(run.stop - run.first for run in runs), profile=bool(frames)
            )
            if frames:
                self._reader.replay(runs, expected.replayed)
            else:
                self._reader.replay(runs, expected.from_front, later=True)

    def _front(self, expected: _Expected) -> Iterator[Run]:
        """What to fetch of a tree that nobody recorded."""
        total = min(expected.nbytes, self._writer.room().free)
        image = self._image(expected.tree)
        if image is not None and total > 0:
            yield from plan(self._frames_at(from_front(image, Politely(self._stopping))), self._frame_size, total)

    def _frames_safely(self, tree: str) -> list[tuple[str, int]]:
        """See `frames`; none when the store does not tell."""
        try:
            return self.frames(tree)
        except NotFoundError as error:
            _log.debug("no start-up profile: %s", error)
        except (FloeError, OSError) as error:
            _log.info("tree %s starts without its profile: %s", tree, error)
        except Exception:
            if not self._stopping.is_set():  # else the store may just have been closed under us
                _log.exception("the profile of tree %s could not be replayed", tree)
        return []

    def frames(self, tree: str) -> list[tuple[str, int]]:
        """What a start of a tree needs, (pack id, frame) in order; empty without a profile.

        As its own starts tell, by frames or by path, or else those of its source. Raises the store's errors, DamagedError, OSError.
        """
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
        if profile.pieces:  # of the same files, before they were laid out anew
            return list(self._frames_at(locate(image, profile.hot_pieces())))
        of_source = self._profiles.of_source(profile.source) if profile.source else None
        if of_source is None:
            return []
        return list(self._frames_at(locate(image, of_source.hot_pieces(), profile.prefix)))

    def _frames_at(self, extents: Iterable[Extent]) -> Iterator[tuple[str, int]]:
        for pack_id, offset, length in extents:
            size = self._frame_size(pack_id) if pack_id else 0
            if pack_id and size:
                for frame in range(offset // size, (offset + length - 1) // size + 1):
                    yield pack_id, frame

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
        if recording.replayed or read:
            self._told(
                "prefetch", tree=recording.tree, used=used, unused=len(recording.replayed) - used, read=len(read)
            )
        if not recording.reads or self._mode != ON or time.monotonic() < self._denied_until:
            return
        image = self._image(recording.tree)
        if image is None:
            return
        found = touched(image, _reads(recording), sizes, Politely(self._stopping))
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
        return None if path is None else image_of(path, tree)

    def _frame_size(self, pack_id: str) -> int:
        table = self._writer.table(pack_id)
        return 0 if table is None else table.frame_size


def image_of(path: Path, tree: str) -> Inodes:
    """A tree's EROFS image, mapped from the node cache. OSError, DamagedError."""
    with path.open("rb") as file:
        return Inodes(memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)), f"tree {tree}")


class Politely:
    """Called now and then by work that takes long: it rests twice as long as it works, unless there is a hurry."""

    def __init__(self, hurry: threading.Event) -> None:
        self._hurry = hurry
        self._since = time.monotonic()

    def __call__(self) -> None:
        """Rest if it is time to."""
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
        began = min(when for *_, when in recording.reads)
        for pack_id, offset, length, when in recording.reads:
            yield Read(pack_id, offset, length, round((when - began) * 1000))
