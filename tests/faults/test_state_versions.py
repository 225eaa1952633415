"""What other versions of Floe left on a node: the version before is understood, a newer one understood or refused clearly."""

import json
from dataclasses import asdict

import pytest

from floe.mount.state import PACKFS, MountRecord, RunState
from floe.store.cache.bitmap import Bitmap
from floe.store.errors import UnsupportedError

# As the version before wrote them, byte for byte but for the boot id.
RECORD = (
    '{"bdi": "0:52", "boot": "BOOT", "device": "0:52", "digest": "d1", "directio": true, "loops": [["/dev/loop3", "/c/x"]], '
    '"mode": "packfs", "packs": ["p1"], "packfs_device": "0:51", "server": ""}'
)
OWNER = '{"boot": "BOOT", "owner": "snapshot-7"}'
BITMAP = bytes.fromhex(
    "464c4f4542495453"
    "0100"
    "01"
    "00"
    "00000200"
    "0000140000000000"
    "31316464336334302d303030302d343030302d383030302d303030303030303030303030"
    "00000000"
    "0700"
    "1800"
)


@pytest.fixture
def state(tmp_path):
    return RunState(tmp_path)


def put(state, place, text, **more):
    path = state.trees.parent / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**json.loads(text.replace("BOOT", state.boot)), **more}))


def test_records_of_the_version_before_are_read(state):
    put(state, "mounts/d1.json", RECORD)
    put(state, "owners/d1/snapshot-7", OWNER)
    record = state.record("d1")
    assert record.mode == PACKFS
    assert record.loops == (("/dev/loop3", "/c/x"),)
    assert state.owners("d1") == {"snapshot-7"}
    state.save(record)
    written = json.loads((state.trees.parent / "mounts" / "d1.json").read_text())
    assert written == json.loads(RECORD.replace("BOOT", state.boot))  # so that version reads what this one writes


def test_what_a_newer_version_adds_to_a_record_is_ignored(state):
    put(state, "mounts/d1.json", RECORD, colour="blue")
    put(state, "lingering/d1.0:52.json", RECORD, colour="blue")
    assert state.record("d1").device == "0:52"
    assert [asdict(record)["digest"] for _, record in state.lingering()] == ["d1"]


def test_a_record_of_a_newer_version_is_refused_by_name(state):
    put(state, "mounts/d1.json", RECORD, version=2)
    with pytest.raises(UnsupportedError, match=r"d1\.json has version 2; this Floe knows version 1") as caught:
        state.records()
    assert "run the newer Floe" in caught.value.hint


def test_a_record_that_was_written_half_counts_for_nothing(state):
    (state.trees.parent / "mounts" / "d1.json").write_text(RECORD[:40])
    assert state.record("d1") is None
    assert MountRecord.parse(json.loads(RECORD)).digest == "d1"


def test_a_bitmap_of_the_version_before_is_read_and_a_newer_one_is_not_believed():
    bits = Bitmap.decode(BITMAP)
    assert (bits.frame_size, bits.content_size, bits.count, bits.clean) == (128 << 10, 10 << 17, 10, True)
    assert (bits.trusted, bits.suspect) == (b"\x07\x00", b"\x18\x00")
    assert bits.encode() == BITMAP
    assert Bitmap.decode(BITMAP[:8] + b"\x02" + BITMAP[9:]) is None  # its pack is fetched anew
