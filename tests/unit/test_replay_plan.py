"""In which order and in what requests a profile's frames are fetched."""

from hypothesis import given
from hypothesis import strategies as st

from floe.store import replay
from floe.store.replay import Run, plan

KIB = 1 << 10


def size(_pack):
    return 128 * KIB


def test_neighbours_needed_at_about_the_same_time_are_one_run():
    frames = [("a", 7), ("b", 1), ("a", 5), ("a", 6), ("b", 9)]
    assert list(plan(frames, size)) == [Run("a", 5, 8), Run("b", 1, 2), Run("b", 9, 10)]


def test_what_is_needed_first_comes_first():
    frames = [("a", 1000 - 10 * n) for n in range(50)]
    assert [run.first for run in plan(frames, size)] == [number for _, number in frames]


def test_what_is_needed_much_later_does_not_come_along():
    early = [("a", 2 * n) for n in range(replay._HORIZON)]
    assert next(plan([*early, ("a", 1)], size)) == Run("a", 0, 1)


def test_runs_are_no_longer_than_a_request():
    runs = list(plan([("a", n) for n in range(128)], size))
    assert runs == [Run("a", 0, 64), Run("a", 64, 128)]
    assert list(plan([("m", n) for n in range(8)], lambda _: 1 << 20)) == [Run("m", 0, 4), Run("m", 4, 8)]
    assert next(plan([("m", 0), ("m", 1)], lambda _: 8 << 20)) == Run("m", 0, 1)


def test_small_files_that_share_frames_do_not_cut_runs_short():
    frames = [("a", n // 30) for n in range(64 * 30)]  # thirty files in each frame
    assert list(plan(frames, size)) == [Run("a", 0, 64)]


def test_unknown_packs_are_passed_over_and_the_total_is_bounded(monkeypatch):
    monkeypatch.setattr(replay, "TOTAL_BYTES", 3 * 128 * KIB)
    frames = [("gone", 0), *(("a", 2 * n) for n in range(10))]
    assert len(list(plan(frames, lambda pack: 0 if pack == "gone" else 128 * KIB))) == 3


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 200)), max_size=300))
def test_every_frame_comes_once(frames):
    runs = list(plan(frames, size))
    found = [(run.pack_id, number) for run in runs for number in range(run.first, run.stop)]
    assert sorted(found) == sorted(set(frames))
