"""What is mounted, and shall come to this node and stay here: orders for completion, pins and shares as models' policies say.

One daemon thread looks at what is mounted: a moment after something was, every few seconds while there is work, else once a
minute. A worker's successor finds all of it anew: in the mount table, in the bitmaps of the cache, and in the pins there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cachetools import LRUCache

from floe.fuse.held import FrameSizes, bytes_of, frame_counts, table_of
from floe.fuse.joined import Completing
from floe.fuse.pins import PolicyPins
from floe.fuse.startup import Politely, image_of
from floe.store.cache import Writer
from floe.store.completion import DONE, Order
from floe.store.erofs import read_device_table
from floe.store.errors import FloeError, UnavailableError
from floe.store.policy import ALWAYS, OFF, Policy, policy_for
from floe.store.treecontent import Content, content_of, filled, whole_packs

_log = logging.getLogger(__name__)

_SETTLE = 2.0  # seconds after a mount: an image's layers come one by one, and its start comes first
_LOOK, _LOOK_DONE = 5.0, 60.0  # seconds between looks, with work to do and without
_AGAIN = 600.0  # seconds until what could not be completed is tried again
_REMEMBERED = 4096  # trees whose packs are known without a look
COMPLETE, NEW, INCOMPLETE = "complete", "new", "incomplete"
STATES = (OFF, NEW, "waiting", "running", "full", "resting", INCOMPLETE, COMPLETE)
"""What `status` says of a tree; those in the middle are an order's."""


class Mounted(NamedTuple):
    """A mounted tree, and the model's name if it is known to have been mounted as one."""

    tree: str
    model: str | None


class _Tree:
    """What is known of a mounted tree. `content` None: not looked at. `problem`: for people."""

    def __init__(self, tree: str, model: str | None) -> None:
        self.tree = tree
        self.model = model
        self.known = False  # whether it is a model's, and whose
        self.policy: Policy | None = None
        self.completion = OFF
        self.content: Content | None = None
        self.order: Order | None = None
        self.again_from = 0.0
        self.told = False  # the log knows that all of it is here
        self.unreadable = ""  # the part of it that is about the tree itself
        self.problem = ""


class Residency:
    """Completes trees over packs of `writer` through `reader`; `completion` is the node's way, `policies` come before it.

    `mounted` tells what is mounted, the newest first; `source_of` the source (see profiles.py) of a tree, of which it may raise
    the store's errors. Thread-safe.
    """

    def __init__(
        self,
        writer: Writer,
        reader: Completing,
        *,
        mounted: Callable[[], Iterable[Mounted]],
        source_of: Callable[[str], str | None],
        completion: str = OFF,
        policies: Sequence[Policy] = (),
        settle: float = _SETTLE,
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._mounted = mounted
        self._source_of = source_of
        self._completion = completion
        self._policies = tuple(policies)
        self._settle = settle
        self._pins = PolicyPins(writer.cache, self._policy)
        self._trees: dict[str, _Tree] = {}  # replaced, never changed; the newest first
        self._orders: list[Order] = []
        self._unanswered = ""
        self._devices: LRUCache[str, tuple[str, ...]] = LRUCache(_REMEMBERED)
        self._devices_lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin with what is mounted already."""
        self._pins.keep_wanted()
        if self._completion != OFF or self._policies:
            self._thread = threading.Thread(target=self._run, name="floe-residency", daemon=True)
            self._wake.set()
            self._thread.start()

    def mounted(self, _tree: str, _packs: Sequence[str]) -> None:
        """A tree is about to be mounted. Returns at once."""
        self._wake.set()

    def close(self) -> None:
        """Begin nothing more; waits for no network."""
        self._stopping.set()
        self._wake.set()

    def _policy(self, model: str | None) -> Policy | None:
        return policy_for(model, self._policies)

    # looking

    def _run(self) -> None:
        pause = 0.0
        while not self._stopping.is_set():
            if self._wake.wait(pause):
                self._wake.clear()
                self._stopping.wait(self._settle)
                woken = True
            else:
                woken = False
            try:
                pause = _LOOK if self._look() or woken else _LOOK_DONE  # woken: the mount may still be on its way
            except Exception:
                if not self._stopping.is_set():  # else cache and store may just have been closed under us
                    _log.exception("what is mounted could not be looked at")
                pause = _LOOK_DONE

    def _look(self) -> bool:
        """See what is mounted, and have it completed; whether to look again soon."""
        before = self._trees
        found = {m.tree: before.get(m.tree) or _Tree(m.tree, m.model) for m in self._mounted()}
        self._unanswered = ""
        for tree in found.values():
            if self._stopping.is_set():
                return False
            try:
                self._learn(tree)
                tree.unreadable = ""
            except (FloeError, OSError) as error:
                tree.unreadable = str(error)
            if tree.unreadable or tree.policy is None:
                self._tell(tree, tree.unreadable)
        self._trees = found
        self._set_bounds()
        counts = self._counts()
        whole = whole_packs([t.content.masks for t in found.values() if t.content is not None], counts)
        orders = [order for tree in found.values() if (order := self._order(tree, whole, counts)) is not None]
        if orders != self._orders:
            self._orders = orders
            self._reader.complete(orders)
        return any(not tree.known for tree in found.values()) or any(order.state != DONE for order in orders)

    def _learn(self, tree: _Tree) -> None:
        """Whose it is, what that means, and what it needs."""
        if not tree.known:
            if self._policies and tree.model is None:
                source = self._ask_source(tree.tree) or ""
                tree.model = source.removeprefix("models/") if source.startswith("models/") else None
            tree.policy = self._policy(tree.model)
            tree.completion = (tree.policy and tree.policy.completion) or self._completion
            tree.known = True
        if tree.content is None and tree.completion != OFF:
            path = self._writer.cache.tree_path(tree.tree)
            if path is not None:
                tree.content = content_of(image_of(path, tree.tree), FrameSizes(self._writer), Politely(self._stopping))

    def _ask_source(self, tree: str) -> str | None:
        """The source of a tree. When the store did not tell one, the others of this look do not wait for it, too."""
        if self._unanswered:
            raise UnavailableError(self._unanswered)
        try:
            return self._source_of(tree)
        except FloeError as error:
            self._unanswered = str(error)
            raise

    def _order(self, tree: _Tree, whole: set[str], counts: Mapping[str, int]) -> Order | None:
        if tree.content is None or tree.completion == OFF:
            return None
        content = filled(tree.content, whole & tree.content.masks.keys(), counts)
        more = content.masks != tree.content.masks
        tree.content = content
        again = False
        if tree.order is not None and tree.order.state == DONE:
            is_here = self._is_here(tree)
            if is_here and not tree.told:
                _log.info("tree %s%s is here as a whole", tree.tree, _whose(tree))
            tree.told = is_here
            again = not is_here and time.monotonic() >= tree.again_from
        if tree.order is None or more or again:
            tree.order = Order(tree.tree, content.runs, always=tree.completion == ALWAYS)
            tree.again_from = time.monotonic() + _AGAIN
        return tree.order

    def _counts(self) -> dict[str, int]:
        """Frames, by pack, of the packs that trees refer to."""
        trees = self._trees.values()
        return frame_counts(self._writer, (tree.content.masks for tree in trees if tree.content is not None))

    def _set_bounds(self) -> None:
        """Pins and shares of the models that are mounted; those of others stay until another tree of theirs is."""
        models: dict[str, list[_Tree]] = {}
        for tree in self._trees.values():
            if tree.model is not None and tree.policy is not None:
                models.setdefault(tree.model, []).append(tree)
        for name, trees in models.items():
            policy = trees[0].policy
            assert policy is not None
            try:
                packs = {tree.tree: self.packs_of(tree.tree) for tree in trees}
                self._writer.shares.set(name, policy.share, {pack for of_tree in packs.values() for pack in of_tree})
                problem = self._pins.pin(name, packs) if policy.pin else ""
            except (FloeError, OSError) as error:
                problem = str(error)
            for tree in trees:
                self._tell(tree, tree.unreadable or problem)

    def _tell(self, tree: _Tree, problem: str) -> None:
        if problem and problem != tree.problem:
            _log.warning("tree %s%s: %s", tree.tree, _whose(tree), problem)
        tree.problem = problem

    def packs_of(self, tree: str) -> tuple[str, ...]:
        """The packs of a tree that is on this node. DamagedError, OSError."""
        with self._devices_lock:
            known = self._devices.get(tree)
        if known is None:
            path = self._writer.cache.tree_path(tree)
            if path is None:
                return ()
            known = tuple(pack_id for pack_id, _ in read_device_table(path))
            with self._devices_lock:
                self._devices[tree] = known
        return known

    # saying

    def status(self) -> dict[str, Any]:
        """By tree: `model`, `completion`, `state` (one of STATES), `content_bytes` it needs and `here_bytes` of them.

        `native_next`: whether its next mount is native. `pinned`, `share_bytes`: as its policy says. `problem`: for people.
        """
        known = self._trees
        found = {}
        for mounted in self._mounted():
            tree = known.get(mounted.tree) or _Tree(mounted.tree, mounted.model)
            try:
                found[mounted.tree] = self._describe(tree)
            except (FloeError, OSError) as error:
                found[mounted.tree] = {"state": NEW, "problem": str(error)}
        return found

    @staticmethod
    def states(status: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """How many trees of a `status` are in each of STATES."""
        found = [tree["state"] for tree in status.values()]
        return {state: found.count(state) for state in STATES}

    def _describe(self, tree: _Tree) -> dict[str, Any]:
        content, here = self._held(tree)
        packs = [self._writer.packs.get(pack_id) for pack_id in self.packs_of(tree.tree)]
        return {
            "model": tree.model,
            "completion": tree.completion,
            "state": self._state(tree, content, here),
            "content_bytes": content,
            "here_bytes": here,
            "native_next": bool(packs) and all(pack is not None and pack.complete for pack in packs),
            "pinned": self._pins.holds(tree.tree),
            "share_bytes": tree.policy.share if tree.policy is not None else None,
            "problem": tree.problem,
        }

    def _state(self, tree: _Tree, content: int, here: int) -> str:
        if not content and self._writer.cache.tree_path(tree.tree) is None:
            return NEW
        if here == content:
            return COMPLETE
        if tree.completion == OFF:
            return OFF if tree.known or not self._thread else NEW
        if tree.order is None:
            return NEW
        return INCOMPLETE if tree.order.state == DONE else tree.order.state

    def _is_here(self, tree: _Tree) -> bool:
        content, here = self._held(tree)
        return content == here

    def _held(self, tree: _Tree) -> tuple[int, int]:
        """Bytes of content that a tree needs, and how many of them are here."""
        masks: Mapping[str, int] = tree.content.masks if tree.content is not None else {}
        content = here = 0
        for pack_id in masks or self.packs_of(tree.tree):
            size = self._writer.cache.content_size(pack_id)
            pack = self._writer.packs.get(pack_id)
            if size is None:
                continue
            if pack is None:
                table = table_of(self._writer, pack_id)
                frame_size, present = (table.frame_size, 0) if table is not None else (size, 0)
            else:
                bits = pack.bits
                frame_size = bits.frame_size
                present = int.from_bytes(bits.trusted, "little") | int.from_bytes(bits.suspect, "little")
            mask = masks.get(pack_id, (1 << -(-size // frame_size)) - 1)
            content += bytes_of(mask, frame_size, size)
            here += bytes_of(mask & present, frame_size, size)
        return content, here


def _whose(tree: _Tree) -> str:
    return f" of model {tree.model}" if tree.model else ""
