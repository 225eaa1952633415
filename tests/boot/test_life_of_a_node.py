"""A node from its first bootstrap to its uninstall, on a machine that boots. The tests follow each other: run all of them."""

import json
import threading

import pytest
from boot.machine import LONG, PATIENCE
from boot.node import CONFIG, FILES, LAZY, STORE, expected
from support.mounts import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4 * LONG)]
FLAGS = (
    "--yes", "--offline", "/srv/wheels", "--store", f"file://{STORE}", "--set", "completion=off",
    "--set", "readahead=4MiB",  # so that what nobody has read is not in the cache, and its readers need the daemons
    "--set", "prepare_timeout=60",  # after two seconds a slow machine's layers would be unpacked
    "--format", "--verify-image", LAZY, "--json",
)  # fmt: skip
DAEMONS = ("floe-packfs", "floe-snapshotter")
UNITS = ("floe-node", *DAEMONS)
MEMORY_OF_PACKFS, MEMORY_OF_SNAPSHOTTER = 4 << 30, 1 << 30  # bytes, as the units say


@pytest.fixture(scope="module")
def node(make_node):
    """With an empty disk, and one that somebody's data begin on."""
    return make_node(("empty", b""), ("used", b"somebody's data"))


@pytest.fixture(scope="module")
def state(node):
    return {}


def files_of(node):
    """All that a run may change, by what is in it and when it was written."""
    return node.sh(
        "find /etc /opt /usr/local /var/lib/floe/node -xdev -type f -printf '%p %T@ %i\\n' | sort;"
        "findmnt -rn -t ext4; blkid | sort"
    )


def processes_of(node):
    return {unit: node.show(unit, "MainPID") for unit in (*DAEMONS, "containerd")}


def test_a_disk_that_holds_data_is_refused_and_nothing_is_changed(node):
    before = files_of(node)
    disk = node.disks[1]
    done = node.bootstrap(*FLAGS, "--disks", disk.name, check=False)
    assert done.returncode == 1
    assert f"error: {disk.name} holds data" in done.stderr
    assert files_of(node) == before
    assert node.sh("head -c 15 $1", disk.name) == "somebody's data"


def test_an_empty_disk_is_not_formatted_without_a_yes(node):
    before = files_of(node)
    done = node.bootstrap(*[flag for flag in FLAGS if flag != "--format"], check=False)
    assert done.returncode == 1
    assert "empty, and would be formatted" in done.stderr
    assert files_of(node) == before


def test_one_command_makes_a_node(node, state):
    report = json.loads(node.bootstrap(*FLAGS).stdout)
    assert report["exit_status"] == 0
    assert report["warnings"] == []
    for unit in DAEMONS:
        assert node.show(unit, "ActiveState") == "active"
        assert node.show(unit, "UnitFileState") == "enabled"
    assert any("used" in note or "nvme1n1 holds data" in note for note in report["notes"])
    assert any(line.startswith(f"{LAZY}: pulled in") and "it runs" in line for line in report["done"])
    assert node.sh("findmnt -no SOURCE /mnt/floe-cache-0 | xargs basename") == node.sh(
        "readlink -f $1 | xargs basename", node.disks[0].name
    )
    assert node.sh("head -c 15 $1", node.disks[1].name) == "somebody's data"
    assert 'snapshotter = "floe"' in node.read(CONFIG)
    state["report"] = report


def test_a_second_run_changes_nothing(node):
    before, processes = files_of(node), processes_of(node)
    report = json.loads(node.bootstrap("--yes", "--offline", "/srv/wheels", "--json").stdout)
    assert report["done"] == []
    assert "all was as asked for; nothing was changed" in report["notes"]
    assert (files_of(node), processes_of(node)) == (before, processes)


def test_units_are_sound_and_their_limits_are_in_force(node):
    done = node.run("systemd-analyze", "verify", "--man=no", *(f"/etc/systemd/system/{unit}.service" for unit in UNITS))
    assert done.stdout + done.stderr == ""
    for unit, limit in (("floe-packfs", MEMORY_OF_PACKFS), ("floe-snapshotter", MEMORY_OF_SNAPSHOTTER)):
        folder = f"/sys/fs/cgroup{node.show(unit, 'ControlGroup')}"
        assert int(node.read(f"{folder}/memory.max")) == limit
        processes = node.read(f"{folder}/cgroup.procs").split()
        assert node.show(unit, "MainPID") in processes
        for process in processes:
            assert node.read(f"/proc/{process}/oom_score_adj").strip() == "-999"
            # Whatever the unit holds back: what they mount, containers see.
            assert node.sh("readlink /proc/$1/ns/mnt", process) == node.sh("readlink /proc/1/ns/mnt")


def test_a_lazy_container_starts_after_a_reboot_without_registry_and_store(node, state):
    cri = node.cri()
    cri.pull(LAZY)
    assert len(node.status()["mounts"]) == 2
    container = cri.run_container(cri.run_pod("before"), LAZY)
    assert cri.digests(container, range(4)) == expected(range(4))
    node.sh(f"mv {STORE} {STORE}.away; systemctl disable -q --now registry.socket; systemctl stop registry")
    node.reboot()
    begun = {unit: int(node.show(unit, "InactiveExitTimestampMonotonic")) for unit in (*UNITS, "containerd")}
    ready = {unit: int(node.show(unit, "ActiveEnterTimestampMonotonic")) for unit in UNITS}
    assert 0 < ready["floe-node"] <= begun["floe-packfs"]
    assert ready["floe-packfs"] <= begun["floe-snapshotter"]
    assert ready["floe-snapshotter"] <= begun["containerd"]
    assert node.sh("systemctl --failed --plain --no-legend") == ""
    assert node.sh("findmnt -no LABEL /mnt/floe-cache-0").strip() == "floe-cache-0"
    cri = state["cri"] = node.cri()
    container = state["container"] = cri.run_container(cri.run_pod("after"), LAZY)
    assert cri.digests(container, range(4)) == expected(range(4))
    node.sh(f"mv {STORE}.away {STORE}; systemctl enable -q --now registry.socket")
    assert cri.digests(container, range(4, 6)) == expected(range(4, 6))


def test_a_restart_of_snapshotter_and_containerd_leaves_a_container_alone(node, state):
    cri, container = state["cri"], state["container"]
    process = node.process_of(container)
    node.run("systemctl", "restart", "floe-snapshotter", "containerd")
    until(cri.ready, PATIENCE)
    assert node.process_of(container) == process
    assert cri.digests(container, range(6, 8)) == expected(range(6, 8))
    assert cri.run(cri.run_pod("another"), LAZY, ["md5sum", "/data/8"]) == (0, f"{expected([8])[0]}  /data/8\n")


def test_readers_wait_for_a_killed_keeper_s_successor(node, state):
    for killed in (["keeper"], ["worker"], ["keeper", "worker"]):
        pids = [node.read(f"/run/floe/{name}.pid").strip() for name in killed]
        number = state["next"] = state.get("next", 8) + 1
        node.run("kill", "-9", *pids)
        assert state["cri"].digests(state["container"], [number]) == expected([number])
        # While a living worker answers, the keeper's successor may still be on its way.
        node.until('test "$(systemctl show -p MainPID --value floe-packfs)" = "$(cat /run/floe/keeper.pid)"')
        assert all(node.run("kill", "-0", pid, check=False).returncode != 0 for pid in pids)


def test_readers_wait_from_a_stop_of_packfs_to_its_start(node, state):
    """The descriptor store of systemd 252 does not outlive a stop: the old keeper hands the mount over."""
    keeper = node.read("/run/floe/keeper.pid").strip()
    node.run("systemctl", "stop", "floe-packfs")
    assert node.run("kill", "-0", keeper, check=False).returncode == 0
    answers = []
    reader = threading.Thread(target=lambda: answers.append(state["cri"].digests(state["container"], [12])))
    reader.start()
    reader.join(5)
    assert reader.is_alive()
    node.run("systemctl", "start", "floe-packfs")
    reader.join(PATIENCE)
    assert answers == [expected([12])]
    assert node.run("kill", "-0", keeper, check=False).returncode != 0
    # And again: what was taken over once is as good as what was mounted.
    node.run("systemctl", "restart", "floe-packfs")
    assert state["cri"].digests(state["container"], [13]) == expected([13])
    node.run("kill", "-9", node.read("/run/floe/keeper.pid").strip())
    assert state["cri"].digests(state["container"], [14]) == expected([14])


def test_a_lazy_container_starts_after_a_power_cut(node, state):
    node.cut_power()
    cri = state["cri"] = node.cri()
    container = state["container"] = cri.run_container(cri.run_pod("after-the-cut"), LAZY)
    assert cri.digests(container, range(FILES)) == expected(range(FILES))


def test_a_node_in_use_is_not_uninstalled(node, state):
    before, processes = files_of(node), processes_of(node)
    done = node.bootstrap("--uninstall", "--yes", check=False)
    assert done.returncode == 1
    assert "need Floe and would not start without it" in done.stderr
    assert f"container {state['container'][:13]} of " in done.stderr
    assert f"image {LAZY} (k8s.io)" in done.stderr
    assert "hint: drain the node" in done.stderr
    assert (files_of(node), processes_of(node)) == (before, processes)
    assert state["cri"].digests(state["container"], [1]) == expected([1])


def test_an_uninstall_leaves_nothing(node, state):
    cri = state["cri"]
    cri.drain()
    # As it lies on the node, without the checkout.
    as_installed = ("python3", "-I", "-B", "/opt/floe/node/bootstrap")
    report = json.loads(node.bootstrap("--uninstall", "--yes", "--json", program=as_installed).stdout)
    assert report["exit_status"] == 0
    assert node.read(CONFIG) == node.before
    assert node.everything() == node.at_first
    assert node.sh("findmnt -rn | grep -i floe || true; blkid $1 || true", node.disks[0].name) == ""
    assert node.sh("ps -e -o args | grep -i '[f]loe' || true") == ""
    assert node.sh("head -c 15 $1", node.disks[1].name) == "somebody's data"
    until(cri.ready, PATIENCE)
    cri.pull(LAZY)
    assert cri.run(cri.run_pod("without"), LAZY, ["md5sum", "/data/8"]) == (0, f"{expected([8])[0]}  /data/8\n")
    cri.clean_up()
    cri.remove_image(LAZY)


def test_a_node_that_was_uninstalled_can_be_one_again(node):
    """On the disk that was emptied."""
    assert json.loads(node.bootstrap(*FLAGS).stdout)["exit_status"] == 0
    assert node.sh("findmnt -no LABEL /mnt/floe-cache-0").strip() == "floe-cache-0"
