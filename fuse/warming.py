"""Warm orders in the worker: trees whose frames shall be in the node cache, whether anybody mounts them or not.

Who gives an order asks again and again how far it is; a worker's successor knows nothing of it, is asked the same, and finds
in the cache what is missing. An order that nobody asked about for a while is forgotten. One daemon thread looks after them; the
frames come by background completion (store/completion.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from floe.fuse.held import FrameSizes, frame_counts, table_of, verified
from floe.fuse.joined import Completing
from floe.fuse.scrub import scrub
from floe.fuse.startup import Politely, image_of
from floe.store.cache import Writer
from floe.store.completion import DONE, Order
from floe.store.errors import BadInputError, FloeError
from floe.store.replay import Run, plan
from floe.store.threads import try_start
from floe.store.treecontent import Content, content_of, filled, whole_packs

_log = logging.getLogger(__name__)

_LOOK, _LOOK_DONE = 0.5, 30.0  # seconds between looks, with work to do and without
_AGAIN = 5.0  # seconds until what an order ended without is asked for again
_FORGOTTEN = 900.0  # seconds after which an order that nobody asks about is given up
_MOST = 256  # orders; trees of each
PLANNING, INCOMPLETE, FAILED = "planning", "incomplete", "failed"
STATES = (PLANNING, "waiting", "running", "full", "resting", INCOMPLETE, FAILED, DONE)
"""What `warm` answers; those in the middle are a completion's. DONE: every frame is in the cache, verified."""


class Wish(NamedTuple):
    """What an order asks for: `trees`, which are on this node with their packs' indexes.

    `profile`: only the frames that their start-up profiles name. `pinned`: the packs are pinned, so what was not used for
    longest goes for them. `fetch` off: only say what is here; `deep`: hash what is here, too.
    """

    trees: tuple[str, ...]
    profile: bool = False
    pinned: bool = False
    fetch: bool = True
    deep: bool = False

    @classmethod
    def decode(cls, value: Mapping[str, Any]) -> Wish:
        """As it came over the control socket; BadInputError."""
        trees = value.get("trees")
        if not isinstance(trees, list) or not trees or len(trees) > _MOST or not all(isinstance(t, str) for t in trees):
            raise BadInputError(f"warm needs a list of 1 to {_MOST} trees")
        flags = {name: value.get(name, default) for name, default in cls._field_defaults.items()}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise BadInputError(f"{', '.join(flags)} of warm are true or false")
        return cls(tuple(dict.fromkeys(trees)), **flags)


class _Warm:
    """One order. `masks`: by pack, the frames wanted; None: not looked at. `problem`: for people."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.asked = time.monotonic()
        self.masks: dict[str, int] | None = None
        self.runs: tuple[Run, ...] = ()
        self.order: Order | None = None
        self.again_from = 0.0
        self.scrubber: threading.Thread | None = None  # takes the deep look
        self.hashed = 0  # bytes, of that look
        self.looked = False  # it is over
        self.damaged = 0  # frames that it found
        self.problem = ""


class Warming:
    """Fetches into the cache of `writer` through `reader`.

    `profile_of` tells the frames, (pack id, number) in order of need, that a tree's profile names; it may raise the store's
    errors. `damage`: frames by pack that are known to be damaged in the store. Thread-safe.
    """

    def __init__(
        self,
        writer: Writer,
        reader: Completing,
        *,
        profile_of: Callable[[str], Iterable[tuple[str, int]]],
        damage: Callable[[], Mapping[str, Iterable[int]]] = dict,
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._profile_of = profile_of
        self._damage = damage
        self._lock = threading.Lock()  # guards _warms
        self._warms: dict[str, _Warm] = {}
        self._orders: list[Order] = []
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def warm(self, name: str, wish: Wish) -> dict[str, Any]:
        """Have an order worked on, in place of another of that `name`, and say how far it is; returns at once.

        `state` (one of STATES), `content_bytes` wanted and `verified_bytes` of them in the cache, `damaged_frames` (found by a
        deep look), and a `problem` for people. BadInputError when there are too many.
        """
        with self._lock:
            known = self._warms.get(name)
            if known is None or known.wish != wish:
                if known is None and len(self._warms) >= _MOST:
                    raise BadInputError(f"there are {_MOST} warm orders", hint="wait until some are done")
                known = self._warms[name] = _Warm(wish)
                self._wake.set()
            known.asked = time.monotonic()
            if self._thread is None and not self._stopping.is_set():
                self._thread = try_start("floe-warm", self._run)
        return self._describe(known)

    def forget(self, name: str) -> None:
        """Give an order up; what it brought stays."""
        with self._lock:
            self._warms.pop(name, None)
        self._wake.set()

    def count(self) -> int:
        """Orders that are known."""
        return len(self._warms)

    def close(self) -> None:
        """Begin nothing more; waits for no network."""
        self._stopping.set()
        self._wake.set()

    # the thread

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            self._wake.wait(pause)
            self._wake.clear()
            try:
                pause = _LOOK if self._look() else _LOOK_DONE
            except Exception:
                if not self._stopping.is_set():  # else cache and store may just have been closed under us
                    _log.exception("warm orders could not be looked at")
                pause = _LOOK_DONE

    def _look(self) -> bool:
        """Have everything worked on; whether to look again soon."""
        with self._lock:
            given_up = [name for name, w in self._warms.items() if time.monotonic() - w.asked > _FORGOTTEN]
            for name in given_up:
                del self._warms[name]
            warms = list(self._warms.values())
        for name in given_up:
            _log.info("warm order %s is given up: nobody asks about it", name)
        for warm in warms:
            if self._stopping.is_set():
                return False
            if warm.masks is None:
                self._plan_safely(warm)
            if warm.masks is not None and warm.wish.deep and warm.scrubber is None:
                what = (self._writer, warm.masks, warm, self._stopping)
                warm.scrubber = try_start("floe-scrub", scrub, *what)
        orders = [order for warm in warms if (order := self._order(warm)) is not None]
        if orders != self._orders:
            self._orders = orders
            self._reader.complete(orders)
        return any(warm.masks is None or (warm.wish.fetch and not self._is_whole(warm)) for warm in warms)

    def _is_whole(self, warm: _Warm) -> bool:
        wanted, held = verified(self._writer, warm.masks or {})
        return wanted == held

    def _plan_safely(self, warm: _Warm) -> None:
        if time.monotonic() < warm.again_from:
            return
        try:
            self._plan(warm)
            warm.problem = ""
        except (FloeError, OSError) as error:
            warm.again_from = time.monotonic() + _AGAIN
            warm.problem = str(error)
        except Exception as error:  # one order must not keep the others from their work
            _log.exception("order for tree %s cannot be planned", warm.wish.trees[0])
            warm.again_from = time.monotonic() + _AGAIN
            warm.problem = f"it cannot be planned: {error!r}"

    def _plan(self, warm: _Warm) -> None:
        """Which frames are wanted, in the order of need: those of the first tree first."""
        masks: dict[str, int] = {}
        runs: list[Run] = []
        sizes = FrameSizes(self._writer)
        for tree in warm.wish.trees:
            path = self._writer.cache.tree_path(tree)
            if path is None:
                raise BadInputError(f"tree {tree} is not on this node")
            image = image_of(path, tree)
            unknown = [pack_id for pack_id, _ in image.packs if not sizes.get(pack_id)]
            if unknown:
                raise BadInputError(f"pack {unknown[0]} of tree {tree} has no index on this node")
            if warm.wish.profile:
                content = self._of_profile(tree, sizes)
            else:
                content = content_of(image, sizes, Politely(self._stopping))
                counts = frame_counts(self._writer, [content.masks])
                # As completion does: a pack that lacks a few foreign frames could not be mounted natively.
                content = filled(content, whole_packs([content.masks], counts), counts)
            runs += content.runs
            for pack_id, mask in content.masks.items():
                masks[pack_id] = masks.get(pack_id, 0) | mask
        warm.runs, warm.masks = tuple(runs), masks

    def _of_profile(self, tree: str, sizes: FrameSizes) -> Content:
        # A profile is nobody's word: frames that its packs do not have would be waited for, and make masks of any size.
        known = (frame for frame in self._profile_of(tree) if frame[1] < self._count(frame[0]))
        runs = tuple(plan(known, sizes.get))
        masks: dict[str, int] = {}
        for run in runs:
            masks[run.pack_id] = masks.get(run.pack_id, 0) | ((1 << run.stop - run.first) - 1) << run.first
        return Content(runs, masks)

    def _count(self, pack_id: str) -> int:
        table = self._writer.table(pack_id)
        return 0 if table is None else table.count

    def _order(self, warm: _Warm) -> Order | None:
        if warm.masks is None or not warm.wish.fetch:
            self._hash_suspects(warm)
            return None
        ended = warm.order is not None and warm.order.state == DONE
        if warm.order is None or (ended and not self._is_whole(warm) and time.monotonic() >= warm.again_from):
            warm.order = Order(warm.wish.trees[0], warm.runs, always=True, evicts=warm.wish.pinned)
            warm.again_from = time.monotonic() + _AGAIN
        return warm.order

    def _hash_suspects(self, warm: _Warm) -> None:
        """What an unclean stop of the machine left in doubt, of an order that fetches nothing."""
        for pack_id, mask in (warm.masks or {}).items():
            pack = self._writer.pack(pack_id)
            suspects = 0 if pack is None else mask & int.from_bytes(pack.bits.suspect, "little")
            for frame in range(suspects.bit_length()):
                if suspects >> frame & 1 and not self._stopping.is_set():
                    self._writer.recheck(pack_id, frame)

    # saying

    def _describe(self, warm: _Warm) -> dict[str, Any]:
        masks = warm.masks
        found = {"state": PLANNING, "content_bytes": 0, "verified_bytes": 0, "damaged_frames": 0}
        if masks is None:
            return {**found, "problem": warm.problem}
        wanted, held = verified(self._writer, masks)
        found |= {"content_bytes": wanted, "verified_bytes": held, "damaged_frames": warm.damaged}
        if warm.wish.deep and not warm.looked:
            return {**found, "state": "running", "verified_bytes": warm.hashed, "problem": warm.problem}
        found["state"], problem = self._state(warm, whole=wanted == held)
        return {**found, "problem": problem or warm.problem}

    def _state(self, warm: _Warm, *, whole: bool) -> tuple[str, str]:
        if warm.damaged:
            return FAILED, f"{warm.damaged} frames in the cache were not what they were when they were verified"
        if whole:
            return DONE, ""
        broken = self._broken(warm)
        if broken:
            return FAILED, f"{broken} frames are damaged in the store: push the model or index the image again"
        if not warm.wish.fetch:
            return INCOMPLETE, ""
        state = warm.order.state if warm.order is not None else PLANNING
        if state == DONE:
            return INCOMPLETE, "some frames could not be kept; they are asked for again"
        return state, _PROBLEMS.get(state, "")

    def _broken(self, warm: _Warm) -> int:
        """Frames that are wanted, not here, and damaged in the store."""
        found = 0
        for pack_id, frames in self._damage().items():
            mask = (warm.masks or {}).get(pack_id, 0)
            table = table_of(self._writer, pack_id) if mask else None
            found += sum(mask >> f & 1 and not self._writer.has(pack_id, f) for f in frames) if table else 0
        return found


_PROBLEMS = {
    "full": "the node cache has no room; only --pin makes some",
    "resting": "the store or the disk failed; it is tried again",
}
