"""Frames in memory: those that are not on the cache's disk yet, and those that a stream will read.

Readers get them from here, without a system call and without the disk; the disk gets them behind the readers' backs
(writebehind.py). A frame goes when it is on the disk, one of a stream when it was read as well. It goes earlier when it
lay here for seconds, since a reader so slow may read the disk, and when memory runs out: first what the disk has, then what only
waits for the disk, since the cache can go without it and readers cannot wait.

Belongs to a fetcher's event loop, except `pieces` and `Held.frame`, which any thread may look at.
"""

from __future__ import annotations

from collections.abc import Callable

from floe.store.frames import VerifiedFrame
from floe.store.ids import Buffer
from floe.store.reading import Get

_PATIENCE = 5.0  # seconds that a frame waits for its reader, or for the disk
_LAG = 0.1  # seconds after which a frame is no longer on its way to the disk, but waits for a disk that is too slow
_LOOK = 1.0  # seconds between two looks


class Held:
    """A frame on hand; `frame` is None when it no longer is. `settled`: the cache has it, or could not keep it.

    `done`: its stream has read it, or left it behind; a frame without a stream is done from the beginning.
    """

    __slots__ = ("arrived", "done", "frame", "get", "number", "settled")

    def __init__(self, get: Get, number: int, frame: VerifiedFrame, arrived: float) -> None:
        self.get = get
        self.number = number
        self.frame: VerifiedFrame | None = frame
        self.arrived = arrived
        self.done = not get.streamed
        self.settled = False


class _Pack:
    __slots__ = ("frame_size", "frames")

    def __init__(self, frame_size: int) -> None:
        self.frame_size = frame_size
        self.frames: dict[int, Held] = {}


class OnHand:
    """The frames on hand, by pack. `clock` gives seconds, `call_later` runs something in the loop."""

    def __init__(self, clock: Callable[[], float], call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self._clock = clock
        self._call_later = call_later
        self._packs: dict[str, _Pack] = {}
        self._looking = False
        self.skipped = 0  # frames that memory was taken from before the disk had them

    def pieces(self, pack_id: str, offset: int, length: int) -> list[Buffer] | None:
        """The content from `offset` on, in order, when all of it is on hand. From any thread."""
        pack = self._packs.get(pack_id)
        if pack is None:
            return None
        size, frames = pack.frame_size, pack.frames
        number, skip = divmod(offset, size)
        found: list[Buffer] = []
        while length > 0:
            held = frames.get(number)
            frame = held.frame if held is not None else None
            if held is None or frame is None:
                return None
            piece = memoryview(frame.content)[skip : skip + length]
            found.append(piece)
            length -= len(piece)
            if skip + len(piece) == len(frame):
                held.done = True
            number, skip = number + 1, 0
        return found

    def find(self, pack_id: str, number: int) -> Held | None:
        """A frame that is on hand."""
        pack = self._packs.get(pack_id)
        return None if pack is None else pack.frames.get(number)

    def read(self, held: Held) -> None:
        """Its stream has it to its end."""
        held.done = True
        if held.settled and held.frame is not None:
            self._drop(held)

    def add(self, get: Get, number: int, frame: VerifiedFrame) -> None:
        """Keep a frame that has just arrived, and with it the memory of its request."""
        pack = self._packs.get(get.pack_id)
        if pack is None:
            pack = self._packs[get.pack_id] = _Pack(get.table.frame_size)
        if number in pack.frames:
            return
        get.hold()
        pack.frames[number] = Held(get, number, frame, self._clock())
        if not self._looking:
            self._looking = True
            self._call_later(_LOOK, self._look)

    def of(self, get: Get) -> list[Held]:
        """Those that came with this request, in order."""
        pack = self._packs.get(get.pack_id)
        found = (pack.frames.get(number) for number in range(get.first, get.first + get.count)) if pack else ()
        return [held for held in found if held is not None and held.get is get]

    def settle(self, batch: list[Held]) -> None:
        """The cache has these, or could not keep them."""
        for held in batch:
            held.settled = True
            if held.done and held.frame is not None:
                self._drop(held)

    def passed(self, pack_id: str, start: int, stop: int) -> None:
        """A stream has read what it wants of content bytes [start, stop)."""
        pack = self._packs.get(pack_id)
        if pack is None:
            return
        for held in [h for h in pack.frames.values() if start < (h.number + 1) * pack.frame_size <= stop]:
            self.read(held)

    def count_read(self, pack_id: str, start: int, stop: int) -> int:
        """How many frames within content bytes [start, stop) their stream has read."""
        pack = self._packs.get(pack_id)
        if pack is None:
            return 0
        frames, size = pack.frames, pack.frame_size
        return sum(n in frames and frames[n].done for n in range(start // size, -(-stop // size)))

    def make_room(self, need: int, spare: tuple[str, int, int] | None = None, *, urgent: bool = True) -> None:
        """Give up frames until `need` bytes of memory are free, if there are such.

        First what was read and is on the disk; then what is on the disk, the oldest first, since the streams that it was fetched
        for may have ended; then, if it is `urgent`, what was read and waits for a disk that lags behind. `spare`: a pack and the
        range of its content that the stream which wants the memory will read next.
        """
        every = sorted(
            (h for pack in self._packs.values() for h in pack.frames.values()), key=lambda held: held.arrived
        )
        late = self._clock() - _LAG
        on_disk = sorted((h for h in every if h.settled), key=lambda held: not held.done)
        lagging = (h for h in every if urgent and h.done and not h.settled and h.arrived < late)
        for held in [*on_disk, *lagging]:
            if spare is not None and not held.done and _is_within(held, *spare):
                continue
            if need <= 0:
                return
            need -= held.get.table.memory(held.number)
            self._give_up(held)

    def close(self) -> None:
        """Forget all; what is not on the disk yet does not come there."""
        for pack in list(self._packs.values()):
            for held in list(pack.frames.values()):
                self._drop(held)

    def _look(self) -> None:
        until = self._clock() - _PATIENCE
        for pack in list(self._packs.values()):
            for held in list(pack.frames.values()):
                if held.arrived <= until or (held.done and held.settled):
                    self._give_up(held)
        self._looking = bool(self._packs)
        if self._looking:
            self._call_later(_LOOK, self._look)

    def _give_up(self, held: Held) -> None:
        if not held.settled:
            self.skipped += 1
        self._drop(held)

    def _drop(self, held: Held) -> None:
        get = held.get
        pack = self._packs[get.pack_id]
        del pack.frames[held.number]
        if not pack.frames:
            del self._packs[get.pack_id]
        held.frame = None  # whoever still waits to write it must not keep the memory
        if get.streamed:
            get.give_back(get.table.memory(held.number))
        get.drop()


def _is_within(held: Held, pack_id: str, start: int, stop: int) -> bool:
    size = held.get.table.frame_size
    return held.get.pack_id == pack_id and start < (held.number + 1) * size and held.number * size < stop
