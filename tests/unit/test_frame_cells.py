"""Frames of packs as cells that can be drawn."""

from base64 import b64encode

from floe.cli.framecells import cells_of
from floe.cli.problems import problems


def plane(bits, frames):
    return b64encode(bits.to_bytes(-(-frames // 8), "little")).decode() if bits else ""


def pack(frames, here=0, touched=0, ahead=0, *, pinned=False, frame=1 << 20):
    planes = {name: plane(bits, frames) for name, bits in (("here", here), ("touched", touched), ("ahead", ahead))}
    return {"content_bytes": frames * frame, "frame_bytes": frame, "pinned": pinned, **planes}


def test_each_frame_has_a_cell_while_there_are_enough():
    found = cells_of([pack(4, 0b1011, 0b0001, 0b1000)], 160)
    assert found == ("9909", "9000", "0009", "0000")


def test_what_is_touched_but_gone_is_not_here():
    assert cells_of([pack(4, 0b0001, 0b1111)], 4).touched == "9000"


def test_some_is_never_drawn_as_none_and_all_but_some_never_as_all():
    frames = 1000
    assert cells_of([pack(frames, 1 << 500)], 1).here == "1"
    assert cells_of([pack(frames, (1 << frames) - 2)], 1).here == "8"
    assert cells_of([pack(frames, (1 << frames) - 1)], 1).here == "9"


def test_packs_share_the_cells_by_their_bytes_and_each_has_one_at_least():
    found = cells_of([pack(300, pinned=True), pack(100, (1 << 100) - 1), pack(1, 1)], 40)
    assert found.pinned == "1" * 29 + "0" * 9 + "0"
    assert found.here == "0" * 29 + "9" * 9 + "9"


def test_however_many_packs_there_are_the_map_is_bounded():
    assert len(cells_of([pack(4)] * 5000, 160).here) <= 512


def test_problems_name_what_mends_them_the_worst_first():
    status = {
        "packfs": {"running": True, "stalls": [{"path": "w", "seconds": 2.0, "cause": "store"}, {"path": "v", "seconds": 0.3, "cause": "store"}]},
        "snapshotter": {"running": True, "breaker": "open", "fallbacks": {"timeout": 3, "not_indexed": 9}},
        "damaged": [{"pack": "a" * 64, "sources": ["models/iris"], "frames": [1, 2]}],
        "index": {"kind": "redis", "state": "unreachable", "error": "no answer"},
    }  # fmt: skip
    found = problems(status)
    assert [one.level for one in found] == ["error", *["warning"] * 4]
    assert "models/iris" in found[0].text
    said = " ".join(one.text for one in found)
    assert "timeout" in said
    assert "not_indexed" not in said
    assert "read of w waited" in said
    assert "read of v" not in said
    assert "look-up; it is left alone" in said
    (later,) = problems({**well(), "snapshotter": {"running": True, "breaker": "probing"}})
    assert "left alone" not in later.text
    assert all(one.mend for one in found)


def well():
    return {
        "packfs": {"running": True},
        "snapshotter": {"running": True, "breaker": "closed"},
        "index": {"kind": "none", "state": "none"},
    }


def test_a_node_that_is_well_has_no_problems():
    assert problems(well()) == []
    assert [one.level for one in problems({})] == ["error", "warning"]
