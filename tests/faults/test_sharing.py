"""What trees share, as a page asks for it: nobody waits, and what cannot be looked at counts as a whole."""

import threading

from support.floe_node import wait_until

from floe.cli import sharing
from floe.cli.sharing import Sharing
from floe.store.errors import DamagedError
from floe.store.treecontent import Content

FRAME = 4096
MAPS = {pack: {"frame_bytes": FRAME, "content_bytes": 10 * FRAME - 1} for pack in "pqr"}
PACKS = {"one": ["p", "q"], "two": ["p"], "bad": ["q"], "alone": ["r"]}
MASKS = {"one": {"p": 0b111, "q": 0b1100000000}, "two": {"p": 0b110}}


def test_frames_that_others_need_are_shared_when_that_is_known(monkeypatch, tmp_path):
    go, looked = threading.Event(), []

    def content_of(tree, _sizes, _pause):
        assert go.wait(60)
        looked.append(tree)
        if tree not in MASKS:
            raise DamagedError(f"tree {tree} is damaged")
        return Content((), MASKS[tree])

    monkeypatch.setattr(sharing, "image_of", lambda _path, tree: tree)
    monkeypatch.setattr(sharing, "content_of", content_of)
    shared = Sharing()
    first = shared.of(PACKS, MAPS, lambda tree: tmp_path / tree)
    assert (first["one"], first["alone"]) == ((None, ()), (0, ()))
    go.set()
    wait_until(lambda: shared.of(PACKS, MAPS, lambda tree: tmp_path / tree)["one"].bytes is not None)
    found = shared.of(PACKS, MAPS, lambda tree: tmp_path / tree)
    assert found == {
        "one": (2 * FRAME + 2 * FRAME - 1, ("bad", "two")),  # the last frame is short
        "two": (2 * FRAME, ("one",)),
        "bad": (2 * FRAME - 1, ("one",)),
        "alone": (0, ()),
    }
    assert sorted(looked) == ["bad", "one", "two"]  # each once, and none that has its packs for itself
    # A pack that was not known then is looked for in the tree again.
    more = {**PACKS, "two": ["p", "s"], "new": ["s"]}
    monkeypatch.setitem(MASKS, "two", {"p": 0b110, "s": 1})
    monkeypatch.setitem(MASKS, "new", {"s": 0b11})
    maps = {**MAPS, "s": MAPS["p"]}
    assert shared.of(more, maps, lambda tree: tmp_path / tree, patient=True)["two"] == (3 * FRAME, ("new", "one"))
