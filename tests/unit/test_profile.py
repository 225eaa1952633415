"""The profile's bytes, and what merging promises."""

import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from floe.store import profile as module
from floe.store.errors import DamagedError, UnsupportedError
from floe.store.ids import digest
from floe.store.profile import PATH_MAX, Profile, Touch, is_news, merge

KEY = "profiles/trees/aa/x"

touches = st.builds(Touch, st.integers(0, 0xFFFFFFFF), st.integers(1, 0xFFFF))
frames = st.dictionaries(st.tuples(st.integers(0, 255), st.integers(0, 1 << 20)), touches, max_size=30)
pieces = st.dictionaries(st.tuples(st.binary(min_size=1, max_size=20), st.integers(0, 9999)), touches, max_size=30)
profiles = st.builds(
    Profile,
    starts=st.integers(0, 0xFFFFFFFF),
    source=st.sampled_from(["", "models/a", "images/höst/x@linux/amd64#0"]),
    prefix=st.sampled_from([b"", b"opt/model/", b"\xff/"]),
    frames=frames,
    pieces=pieces,
)


def recording(*numbers, starts=1):
    return Profile(
        starts, frames={(0, n): Touch(n, 1) for n in numbers}, pieces={(b"f", n): Touch(n, 1) for n in numbers}
    )


@given(profiles)
def test_what_is_encoded_is_decoded(profile):
    assert Profile.decode(profile.encode(), KEY) == profile


@given(profiles, profiles)
def test_merging_does_not_depend_on_the_order(one, other):
    assert merge(one, other) == merge(other, one)
    assert merge(one, other).encode() == merge(other, one).encode()


def test_merging_adds_starts_and_keeps_the_earliest():
    one = Profile(1, frames={(0, 1): Touch(9, 1), (0, 2): Touch(5, 1)}, pieces={(b"a", 0): Touch(3, 1)})
    other = Profile(2, "models/m", b"p/", {(0, 1): Touch(4, 2), (1, 1): Touch(0, 1)})
    assert merge(one, other) == Profile(
        3,
        "models/m",
        b"p/",
        {(0, 1): Touch(4, 3), (0, 2): Touch(5, 1), (1, 1): Touch(0, 1)},
        {(b"a", 0): Touch(3, 1)},
    )


def test_what_is_touched_no_more_fades():
    profile = recording(1, 2)
    for _ in range(40):
        profile = merge(profile, recording(2, 3))
        assert profile.starts <= module.STARTS_MAX
    assert profile.hot_frames() == [(0, 2), (0, 3)]
    assert (0, 1) not in profile.frames


@pytest.mark.parametrize("before", [1, 3, 8, 16, 30])
def test_a_program_that_changed_is_learned_within_the_documented_starts(before):
    profile = Profile()
    for _ in range(before):
        profile = merge(profile, recording(1))
    seen = []
    for _ in range(20):
        profile = merge(profile, recording(2))
        seen.append(profile.hot_frames())
    assert all((0, 2) in hot for hot in seen[3:])
    assert seen[-1] == [(0, 2)]


def test_the_order_is_that_of_need_and_rare_touches_are_not_replayed():
    profile = Profile(
        8,
        frames={(0, 7): Touch(50, 8), (1, 0): Touch(10, 2), (0, 3): Touch(10, 3), (0, 1): Touch(0, 1)},
        pieces={(b"late", 1): Touch(9, 8), (b"early", 2): Touch(1, 8), (b"rare", 0): Touch(0, 1)},
    )
    assert profile.hot_frames() == [(0, 3), (1, 0), (0, 7)]
    assert profile.hot_pieces() == [(b"early", 2), (b"late", 1)]
    assert Profile().hot_frames() == []


def test_the_limits_keep_what_most_starts_touch(monkeypatch):
    monkeypatch.setattr(module, "FRAMES_MAX", 2)
    monkeypatch.setattr(module, "PIECES_MAX", 3)
    monkeypatch.setattr(module, "PATHS_MAX", 8)
    one = Profile(
        2,
        frames={(0, 1): Touch(0, 1), (0, 2): Touch(9, 2), (0, 3): Touch(8, 1)},
        pieces={
            (b"aaaa", 0): Touch(1, 1),
            (b"bbbb", 0): Touch(9, 2),
            (b"bbbb", 1): Touch(8, 1),
            (b"cccc", 0): Touch(2, 1),
        },
    )
    merged = merge(one, Profile())
    assert set(merged.frames) == {(0, 1), (0, 2)}
    assert set(merged.pieces) == {(b"bbbb", 0), (b"aaaa", 0)}  # the third would be a third path


def test_news_is_what_changes_the_replay():
    known = merge(recording(1, 2), recording(1, 2))
    assert is_news(known, recording(1, 2))  # the first three always
    known = merge(known, recording(1, 2))
    assert not is_news(known, recording(1, 2))
    assert is_news(known, recording(1, 2, 3))
    assert is_news(known, recording(1))
    many = merge(merge(recording(*range(100)), recording(*range(100))), recording(*range(100)))
    assert not is_news(many, recording(*range(5, 100)))


def test_a_path_longer_than_linux_allows_is_damage():
    assert Profile.decode(Profile(1, pieces={(b"x" * PATH_MAX, 0): Touch(0, 1)}).encode(), "key").pieces
    with pytest.raises(DamagedError, match="cannot be parsed"):
        Profile.decode(Profile(1, pieces={(b"x" * (PATH_MAX + 1), 0): Touch(0, 1)}).encode(), "key")


def test_the_layout_is_the_documented_one():
    data = Profile(3, "models/m", b"p/", {(2, 7): Touch(5, 3)}, {(b"a/b", 4): Touch(6, 2)}).encode()
    assert (module.HEADER_BYTES, module.FRAME_BYTES, module.PIECE_BYTES) == (64, 12, 12)
    body = zstandard.ZstdDecompressor().decompress(data[64:])
    assert data[:64] == b"FLOEPROF" + struct.pack("<HHIIIII", 1, 0, len(body), 3, 1, 1, 0) + digest(body)
    assert body == b"".join(
        (
            struct.pack("<H", 8) + b"models/m" + struct.pack("<H", 2) + b"p/",
            struct.pack("<HHII", 2, 3, 5, 7),
            struct.pack("<H", 3) + b"a/b" + struct.pack("<I", 1) + struct.pack("<IIHH", 4, 6, 2, 0),
        )
    )


GOOD = recording(1, 2, 3).encode()


def sealed(body, *, starts=1, frames=0, files=0, version=1, flags=0, size=None):
    header = struct.pack("<8sHHIIIII32s", b"FLOEPROF", version, flags, len(body) if size is None else size, starts, frames, files, 0, digest(body))  # fmt: skip
    return header + zstandard.ZstdCompressor().compress(body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:63],
        GOOD[:-1],
        GOOD[:-1] + bytes([GOOD[-1] ^ 1]),
        b"X" + GOOD[1:],
        GOOD + b"more",
        sealed(bytes(4), size=1 << 31),
        sealed(bytes(4), size=5),
        sealed(bytes(5)),  # a byte too many
        sealed(bytes(4), frames=1),
        sealed(bytes(4), files=1),
        sealed(struct.pack("<H", 9) + b"short"),
        sealed(struct.pack("<H", 1) + b"\xff" + bytes(2)),  # a source that is no text
    ],
)
def test_damage_is_said(data):
    with pytest.raises(DamagedError, match="profiles/trees/aa/x") as caught:
        Profile.decode(data, KEY)
    assert caught.value.hint


@pytest.mark.parametrize("data", [sealed(bytes(4), version=2), sealed(bytes(4), flags=1)])
def test_what_a_newer_floe_wrote_is_not_damage(data):
    with pytest.raises(UnsupportedError, match="version"):
        Profile.decode(data, KEY)


def test_any_flipped_bit_is_noticed():
    for position in range(0, len(GOOD), 3):
        data = bytearray(GOOD)
        data[position] ^= 0x10
        try:
            found = Profile.decode(data, KEY)
        except (DamagedError, UnsupportedError):
            continue
        assert 16 <= position < 20 or 28 <= position < 32, position  # only the count of starts, or the reserved zeros
        assert found.frames == recording(1, 2, 3).frames
