"""What mounted trees have in common, frame by frame: packs hold content of several, and not all that lies in one is shared."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cachetools import LRUCache

from floe.fuse.held import bytes_of
from floe.fuse.startup import Politely, image_of
from floe.store.errors import FloeError
from floe.store.treecontent import content_of

_TREES = 4096  # whose frames are remembered; some KiB for each pack of theirs
_log = logging.getLogger(__name__)
Masks = Mapping[str, int]  # by pack, a bit for each frame
Frames = Mapping[str, "tuple[int, int]"]  # by pack, the bytes of a frame and of its content


class Shared(NamedTuple):
    """`bytes` of a tree's content in frames that others need, too, and the `trees` that do; None while that is found out."""

    bytes: int | None
    trees: tuple[str, ...]


class Sharing:
    """Looks at the trees that have packs in common, each once, in a thread that nobody waits for. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        # By tree, and with the packs that were known then.
        self._masks: LRUCache[str, tuple[Masks, frozenset[str]]] = LRUCache(_TREES)
        self._thread: threading.Thread | None = None

    def of(
        self,
        packs: Mapping[str, Sequence[str]],
        maps: Mapping[str, Mapping[str, Any]],
        path_of: Callable[[str], Path | None],
        *,
        patient: bool = False,
    ) -> dict[str, Shared]:
        """By tree, what it shares. `packs` of each tree, `maps` as PackfsClient.frames gives them; `patient`: wait for it."""
        users: dict[str, list[str]] = {}
        for tree, of_tree in packs.items():
            for pack_id in dict.fromkeys(of_tree):
                users.setdefault(pack_id, []).append(tree)
        common = {pack_id: trees for pack_id, trees in users.items() if len(trees) > 1 and pack_id in maps}
        involved = list(dict.fromkeys(tree for trees in common.values() for tree in trees))
        frames = {
            tree: {p: (int(maps[p]["frame_bytes"]), int(maps[p]["content_bytes"])) for p in packs[tree] if p in maps}
            for tree in involved
        }
        masks = self._known(frames)
        missing = {tree: (path_of(tree), of_tree) for tree, of_tree in frames.items() if tree not in masks}
        if missing:
            self._look(missing, patient=patient)
            masks = self._known(frames)
        found: dict[str, Shared] = {}
        for tree in packs:
            beside = list(dict.fromkeys(o for p in packs[tree] for o in common.get(p, ()) if o != tree))
            if any(other not in masks for other in (tree, *beside) if beside):
                found[tree] = Shared(None, ())
                continue
            ours = {pack_id: masks[tree].get(pack_id, 0) for pack_id in packs[tree] if pack_id in common}
            theirs = {other: {p: mask & masks[other].get(p, 0) for p, mask in ours.items()} for other in beside}
            union = dict.fromkeys(ours, 0)
            for of_other in theirs.values():
                for pack_id, mask in of_other.items():
                    union[pack_id] |= mask
            whole = sum(bytes_of(mask, *frames[tree][pack_id]) for pack_id, mask in union.items())
            found[tree] = Shared(whole, tuple(sorted(o for o, of_other in theirs.items() if any(of_other.values()))))
        return found

    def _known(self, trees: Mapping[str, Frames]) -> dict[str, Masks]:
        with self._lock:
            known = {tree: self._masks[tree] for tree in trees if tree in self._masks}
        return {tree: masks for tree, (masks, packs) in known.items() if packs >= trees[tree].keys()}

    def _look(self, trees: Mapping[str, tuple[Path | None, Frames]], *, patient: bool) -> None:
        hurry = threading.Event()
        if patient:
            hurry.set()

        def run() -> None:
            for tree, (path, frames) in trees.items():
                # One that cannot be looked at needs, for all that is known, all of its packs.
                masks: Masks = {pack_id: (1 << -(-content // size)) - 1 for pack_id, (size, content) in frames.items()}
                try:
                    if path is not None:
                        sizes = {pack_id: size for pack_id, (size, _) in frames.items()}
                        masks = content_of(image_of(path, tree), sizes, Politely(hurry)).masks
                except (FloeError, OSError) as error:
                    _log.debug("what tree %s needs cannot be told: %s", tree, error)
                with self._lock:
                    self._masks[tree] = masks, frozenset(frames)

        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=run, name="floe-sharing", daemon=True)
                self._thread.start()
            thread = self._thread
        if patient:
            thread.join()
