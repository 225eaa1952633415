"""Where the cache goes on which machine: the choice alone, on descriptions of machines."""

import pytest
from bootstrap import disks
from bootstrap.disks import BOOT, FORMAT, OWN, PLATFORM, REUSE, choose
from bootstrap.errors import NodeError
from bootstrap.node import NETWORK, Kubelet
from bootstrap.plan import check_consent, derived
from support.bootstrapping import GB, LOCAL, boot_disk, entry, node

from floe.doctor import disk as doctors

TWO = (entry("/dev/nvme1n1", **LOCAL), entry("/dev/nvme2n1", **LOCAL))
BOTH = ("/dev/nvme1n1", "/dev/nvme2n1")


def taken(choice):
    return [(use.label, [disk.path for disk in use.members], use.action) for use in choice.uses]


def test_every_empty_local_disk_is_a_directory_of_the_cache():
    found = choose(node(boot_disk(), *TWO, empty=BOTH), "auto", raid0=False)
    assert found.kind == OWN
    assert taken(found) == [
        ("floe-cache-0", ["/dev/nvme1n1"], FORMAT),
        ("floe-cache-1", ["/dev/nvme2n1"], FORMAT),
    ]
    assert derived(found) == {
        "cache_dir": "/mnt/floe-cache-0/cache",
        "cache_dirs": "/mnt/floe-cache-1/cache",
        "cache_size": "95%",
        "cache_min_free": "3%",
    }
    assert not found.warnings


def test_disks_are_taken_in_the_order_of_their_numbers():
    many = [entry(f"/dev/nvme{number}n1", **LOCAL) for number in (10, 2, 1)]
    found = choose(node(boot_disk(), *many, empty=[disk["path"] for disk in many]), "auto", raid0=False)
    assert [use.members[0].path for use in found.uses] == ["/dev/nvme1n1", "/dev/nvme2n1", "/dev/nvme10n1"]


def test_raid0_makes_one_of_them():
    found = choose(node(boot_disk(), *TWO, empty=BOTH), "auto", raid0=True)
    assert taken(found) == [("floe-cache-0", list(BOTH), FORMAT)]
    assert found.uses[0].raid
    assert found.directories == ("/mnt/floe-cache-0/cache",)


def test_raid0_with_one_disk_uses_it_and_says_so():
    found = choose(node(boot_disk(), TWO[0], empty=BOTH), "auto", raid0=True)
    assert not found.uses[0].raid
    assert any("an array needs two" in note for note in found.notes)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"fstype": "ext4"}, "holds data (ext4)"),
        ({"fstype": "linux_raid_member"}, "holds data (linux_raid_member)"),
        ({"pttype": "gpt"}, "holds data (gpt partition table)"),
        ({"fstype": "xfs", "mountpoints": ["/data"]}, "is in use, mounted at /data"),
        ({"ro": True}, "is read-only"),
        ({"size": 1 << 30}, "is smaller than 8 GiB"),
        ({"children": [entry("/dev/nvme1n1p1", "part")]}, "has /dev/nvme1n1p1 on it"),
        ({"model": "Amazon Elastic Block Store"}, None),
        ({"model": "MSFT NVMe Accelerator v1.0"}, None),
        ({"model": "nvme_card-pd"}, None),
    ],
)
def test_what_is_not_an_empty_local_disk_is_left_alone(values, reason):
    disk = entry("/dev/nvme1n1", **{**LOCAL, **values})
    found = choose(node(boot_disk(), disk, empty=["/dev/nvme1n1"]), "auto", raid0=False)
    assert found.kind == BOOT
    assert not found.uses
    assert found.warnings
    if reason is None:
        assert not any("nvme1n1" in note for note in found.notes)  # a disk of somebody else's, and no candidate
    else:
        assert f"/dev/nvme1n1 {reason}: left alone" in found.notes


def test_a_disk_without_a_signature_that_is_not_all_zeros_holds_data():
    machine = node(boot_disk(), TWO[0])
    assert choose(machine, "auto", raid0=False).kind == BOOT
    with pytest.raises(NodeError, match="not all zeros") as caught:
        choose(machine, ["/dev/nvme1n1"], raid0=False)
    assert "blkdiscard -f /dev/nvme1n1" in caught.value.hint


def test_only_the_disk_with_data_is_left_alone():
    data = entry("/dev/nvme1n1", **LOCAL, fstype="ext4", label="mine")
    found = choose(node(boot_disk(), data, TWO[1], empty=BOTH), "auto", raid0=False)
    assert taken(found) == [("floe-cache-0", ["/dev/nvme2n1"], FORMAT)]
    assert found.notes == ("/dev/nvme1n1 holds data (ext4): left alone",)


def test_a_disk_of_floe_is_used_again_and_keeps_its_number():
    ours = entry("/dev/nvme1n1", **LOCAL, fstype="ext4", label="floe-cache-1", mountpoints=["/mnt/floe-cache-1"])
    found = choose(node(boot_disk(), ours, TWO[1], empty=["/dev/nvme2n1"]), "auto", raid0=False)
    assert taken(found) == [
        ("floe-cache-0", ["/dev/nvme2n1"], FORMAT),
        ("floe-cache-1", ["/dev/nvme1n1"], REUSE),
    ]


def test_a_disk_of_floe_that_somebody_mounted_elsewhere_is_theirs():
    ours = entry("/dev/nvme1n1", **LOCAL, fstype="ext4", label="floe-cache-0", mountpoints=["/data"])
    assert choose(node(boot_disk(), ours), "auto", raid0=False).kind == BOOT


def test_an_array_of_floe_is_used_again():
    array = entry("/dev/md127", "raid0", fstype="ext4", label="floe-cache-0")
    members = [entry(path, "disk", array, **LOCAL, fstype="linux_raid_member") for path in BOTH]
    found = choose(node(boot_disk(), *members), "auto", raid0=True)
    assert taken(found) == [("floe-cache-0", list(BOTH), REUSE)]
    assert found.uses[0].raid


def test_somebody_elses_array_is_left_alone():
    array = entry("/dev/md0", "raid0", fstype="ext4", mountpoints=["/data"])
    members = [entry(path, "disk", array, **LOCAL, fstype="linux_raid_member") for path in BOTH]
    found = choose(node(boot_disk(), *members), "auto", raid0=True)
    assert (found.kind, found.uses) == (BOOT, ())


def test_single_cache_disks_do_not_become_an_array():
    ours = entry("/dev/nvme1n1", **LOCAL, fstype="ext4", label="floe-cache-0")
    with pytest.raises(NodeError, match="no part of an array"):
        choose(node(boot_disk(), ours, TWO[1], empty=BOTH), "auto", raid0=True)


@pytest.mark.parametrize("above", [(), (entry("/dev/md127", "raid0"),)])
def test_what_an_interrupted_run_began_to_format_counts_as_empty(above):
    what = {"fstype": "linux_raid_member", "label": "any:floe"} if above else {}
    disk = entry("/dev/nvme1n1", "disk", *above, **LOCAL, **what)
    identity = f"serial of /dev/nvme1n1/{LOCAL['size']}"
    assert choose(node(boot_disk(), disk), "auto", raid0=False).kind == BOOT
    found = choose(node(boot_disk(), disk, being_formatted=[identity]), "auto", raid0=False)
    assert taken(found) == [("floe-cache-0", ["/dev/nvme1n1"], FORMAT)]


def test_but_not_one_that_is_in_use_since():
    disk = entry("/dev/nvme1n1", **LOCAL, fstype="xfs", mountpoints=["/data"])
    identity = f"serial of /dev/nvme1n1/{LOCAL['size']}"
    assert choose(node(boot_disk(), disk, being_formatted=[identity]), "auto", raid0=False).kind == BOOT


@pytest.mark.parametrize(
    "values",
    [
        {"fstype": "ext4", "label": "pgdata"},
        {"fstype": "LVM2_member"},
        {"fstype": "linux_raid_member", "label": "host:data"},
        {"pttype": "gpt"},
        {"fstype": "linux_raid_member", "label": "floe", "children": [entry("/dev/md0", "raid0", fstype="xfs")]},
    ],
)
def test_nor_one_that_somebody_has_put_something_on_since(values):
    disk = entry("/dev/nvme1n1", **{**LOCAL, **values})
    identity = f"serial of /dev/nvme1n1/{LOCAL['size']}"
    assert choose(node(boot_disk(), disk, being_formatted=[identity]), "auto", raid0=False).kind == BOOT


def test_nor_one_that_cannot_be_told_from_another():
    """Google's local SSDs may share a serial number, and partitions have the WWN of their disk."""
    alike = [entry(f"/dev/nvme{number}n1", **LOCAL, serial="nvme_card") for number in (1, 2)]
    identity = f"nvme_card/{LOCAL['size']}"
    assert choose(node(boot_disk(), *alike, being_formatted=[identity]), "auto", raid0=False).kind == BOOT
    alone = node(boot_disk(), alike[0], being_formatted=[identity])
    assert taken(choose(alone, "auto", raid0=False)) == [("floe-cache-0", ["/dev/nvme1n1"], FORMAT)]
    names = [entry(f"/dev/nvme{number}n1", **LOCAL, serial="nvme_card", wwid=f"nvme.{number}") for number in (1, 2)]
    machine = node(boot_disk(), *names, being_formatted=[f"nvme.2/{LOCAL['size']}"])
    assert taken(choose(machine, "auto", raid0=False)) == [("floe-cache-0", ["/dev/nvme2n1"], FORMAT)]
    parts = [entry(f"/dev/nvme1n1p{number}", "part", wwn="eui.1") for number in (1, 2)]
    assert len({disk.identity for disk in node(entry("/dev/nvme1n1", "disk", *parts, **LOCAL)).disks[0].above}) == 2


def test_a_network_disk_that_is_named_is_used_with_a_warning():
    disk = entry("/dev/sdb", model="PersistentDisk", vendor="Google  ")
    found = choose(node(boot_disk(), disk, empty=["/dev/sdb"]), ["/dev/sdb"], raid0=False)
    assert found.kind == OWN
    assert any("Google Persistent Disk" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/dev/nvme9n1", "there is no block device"),
        ("/dev/nvme0n1", "is in use, mounted at /"),
        ("/dev/nvme0n1p1", "is in use, mounted at /"),
        ("/dev/md0", "is no disk but raid1"),
    ],
)
def test_a_named_device_that_cannot_be_used_is_refused(path, error):
    machine = node(boot_disk(), entry("/dev/sda", "disk", entry("/dev/md0", "raid1")))
    with pytest.raises(NodeError, match=error) as caught:
        choose(machine, [path], raid0=False)
    assert caught.value.hint


@pytest.mark.parametrize("transport", ["tcp", "rdma", "fc", ""])
def test_nvme_over_a_network_is_not_local(transport):
    disk = entry("/dev/nvme1n1", **{**LOCAL, "model": "Linux", "tran": transport})
    machine = node(boot_disk(), disk, empty=["/dev/nvme1n1"])
    assert choose(machine, "auto", raid0=False).kind == BOOT
    named = choose(machine, ["/dev/nvme1n1"], raid0=False)
    assert any("NVMe over" in warning and "over the network" in warning for warning in named.warnings)


def test_two_names_of_one_disk():
    machine = node(boot_disk(), TWO[0], empty=BOTH)
    machine.aliases["/dev/disk/by-id/one"] = "/dev/nvme1n1"
    with pytest.raises(NodeError, match="of one disk"):
        choose(machine, ["/dev/nvme1n1", "/dev/disk/by-id/one"], raid0=False)


def test_googles_local_ssd_behind_scsi_counts():
    disk = entry("/dev/sdb", vendor="Google", model="EphemeralDisk", size=375 * GB)
    assert choose(node(boot_disk(), disk, empty=["/dev/sdb"]), "auto", raid0=False).kind == OWN


def test_where_the_platform_uses_local_disks_the_cache_lies_beside_it():
    place = "/mnt/stateful_partition/kube-ephemeral-ssd"
    array = entry("/dev/md0", "raid0", fstype="ext4", mountpoints=[place], size=750 * GB, **{"maj:min": "9:0"})
    members = [entry(path, "disk", array, **LOCAL, fstype="linux_raid_member") for path in BOTH]
    machine = node(
        boot_disk(),
        *members,
        mounts={
            place: "9:0 /",
            "/var/lib/containerd": "9:0 /var/lib/containerd",
            "/var/lib/kubelet": "9:0 /var/lib/kubelet",
        },
        kubelet=Kubelet(),
    )
    found = choose(machine, "auto", raid0=False)
    assert (found.kind, found.uses) == (PLATFORM, ())
    assert derived(found) == {"cache_dir": f"{place}/floe-cache", "cache_min_free": "20%"}
    assert any("kubelet" in note and "15%" in note for note in found.notes)


def test_the_platforms_disk_over_the_network_is_no_better_than_the_boot_disk():
    data = entry(
        "/dev/sdb", model="Amazon Elastic Block Store", mountpoints=["/var/lib/containerd"], **{"maj:min": "8:16"}
    )
    machine = node(boot_disk(), data, mounts={"/var/lib/containerd": "8:16 /"})
    assert choose(machine, "auto", raid0=False).kind == BOOT


def test_without_a_local_disk_the_boot_disk_is_named_for_what_it_is():
    found = choose(node(boot_disk()), "auto", raid0=False)
    assert derived(found) == {}
    assert any("Google Persistent Disk" in warning and "over the network" in warning for warning in found.warnings)


def test_on_the_boot_disk_room_is_kept_for_kubelet():
    kubelet = Kubelet("evictionHard:\n  nodefs.available: 25%\n")
    found = choose(node(boot_disk(), kubelet=kubelet), "auto", raid0=False)
    assert derived(found) == {"cache_min_free": "30%"}


def test_none_takes_no_disk_and_does_not_complain():
    found = choose(node(boot_disk("a disk of some kind"), *TWO, empty=BOTH), "none", raid0=False)
    assert (found.kind, found.uses, found.warnings) == (BOOT, (), ())


def test_nothing_is_formatted_without_consent():
    found = choose(node(boot_disk(), *TWO, empty=BOTH), "auto", raid0=False)
    check_consent(found, consent=True)
    with pytest.raises(NodeError, match=r"/dev/nvme1n1 \(375 GB\), /dev/nvme2n1") as caught:
        check_consent(found, consent=False)
    assert "--format" in caught.value.hint


def test_the_doctor_knows_the_same_disks_over_the_network():
    assert NETWORK == doctors._NETWORK_DISKS


def test_a_device_mounted_by_the_platform_itself_is_found_without_a_whole_mount():
    disk = entry("/dev/nvme1n1", **LOCAL, fstype="ext4", mountpoints=["/var/lib/kubelet"], **{"maj:min": "259:77"})
    machine = node(boot_disk(), disk, mounts={"/var/lib/kubelet": "259:77 /"})
    found = choose(machine, "auto", raid0=False)
    assert (found.kind, found.directories) == (PLATFORM, ("/var/lib/kubelet/floe-cache",))
    assert disks.why_not(machine, machine.disk("/dev/nvme1n1")).startswith("is in use")
