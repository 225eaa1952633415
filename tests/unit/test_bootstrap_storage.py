"""What --uninstall does to the members of an array: on a description of a machine, for kernels without RAID."""

import pytest
from bootstrap import storage
from bootstrap.record import Record
from bootstrap.survey import mark
from support.bootstrapping import LOCAL, boot_disk, entry, node

PATHS = ("/dev/nvme1n1", "/dev/nvme2n1")


class Machine:
    """Two members of Floe's array; `run` notes the commands and does what they do to what lsblk lists."""

    def __init__(self):
        self.array, self.members, self.ran = True, set(PATHS), []

    def survey(self, _devices, _being_formatted):
        array = entry("/dev/md127", "raid0", fstype="ext4", label="floe-cache-0")
        member = {"fstype": "linux_raid_member", "label": "any:floe"}
        disks = [
            entry(path, "disk", *([array] if self.array else []), **LOCAL, **(member if path in self.members else {}))
            for path in PATHS
        ]
        return node(boot_disk(), *disks, empty=set(PATHS) - self.members)

    def run(self, *words, **_):
        self.ran.append(" ".join(words[:2] if words[0] == "mdadm" else words[:1]) + f" {words[-1]}")
        if words[:2] == ("mdadm", "--stop"):
            self.array = False
        elif words[0] == "blkdiscard":
            self.members.discard(words[-1])


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(storage, "survey", machine.survey)
    monkeypatch.setattr(storage, "run", machine.run)
    monkeypatch.setattr(storage, "_others", lambda *_: [])
    return machine


@pytest.fixture
def record(tmp_path, machine):
    record = Record(tmp_path / "node")
    members = (one for path in PATHS if (one := machine.survey([], []).disk(path)))
    record.data["formatted"] = [one.identity for one in members]
    return record


def test_both_members_of_an_array_are_emptied(machine, record):
    assert storage.remove(record) == []
    assert machine.ran == [
        "mdadm --stop /dev/md127",
        *(f"{command} {path}" for path in PATHS for command in ("mdadm --zero-superblock", "blkdiscard")),
    ]
    assert (record.data["formatted"], record.data["formatting"]) == ([], [])


def test_one_that_is_left_of_an_interrupted_run_as_well(machine, record):
    storage._note(record, "formatting", mark(record.data["formatted"][1]))
    machine.array, machine.members = False, {PATHS[1]}
    assert storage.remove(record) == []
    assert machine.members == set()


def test_a_member_of_somebody_elses_array_stays(machine, record):
    machine.array = False
    (one, two) = storage.remove(record)
    assert "/dev/nvme1n1 was formatted for the cache once, holds something else now" in one
    assert "/dev/nvme2n1" in two
    assert machine.ran == []
