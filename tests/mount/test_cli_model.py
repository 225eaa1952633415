"""`floe model` as a user runs it: every command a process of its own, on private directories."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.floe_node import Node, wait_until

from floe.store.ids import hexdigest

NOBODY = 65534


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.clean_up()


def make_model(folder, *, seed=0, size=1 << 20):
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {f"layer.{i}.weight": random.standard_normal((size // 4096, 128)).astype("float32") for i in range(8)}
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text('{"hidden": 128}')
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "empty").touch()
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("config.json")
    return tensors


def test_push_list_show_remove(node, tmp_path):
    make_model(tmp_path / "m")
    told = node.floe("model", "push", tmp_path / "m", "Acme/Model-1B", "--label", "license=MIT").stdout
    shown = node.json("model", "show", "acme/model-1b")
    assert f"acme/model-1b:latest is {shown['manifest']}" in told
    assert shown["labels"] == {"floe.original-name": "Acme/Model-1B", "license": "MIT"}
    assert (shown["files"], shown["name"], shown["tag"]) == (3, "acme/model-1b", "latest")
    assert shown["content_bytes"] == sum(p.stat().st_size for p in (tmp_path / "m").glob("*.*"))
    assert [set(pack) for pack in shown["packs"]] == [{"id", "content_bytes", "stored_bytes", "frame_bytes"}]

    listed = node.json("model", "ls")
    assert [(m["ref"], m["manifest"]) for m in listed] == [("acme/model-1b:latest", shown["manifest"])]
    assert "acme/model-1b" in node.floe("model", "ls").stdout
    assert node.json("model", "show", f"acme/model-1b@{shown['manifest']}")["tree"] == shown["tree"]
    assert shown["packs"][0]["id"] in node.floe("model", "show", "Acme/Model-1B").stdout

    node.floe("model", "rm", "acme/model-1b")
    assert node.json("model", "ls") == []
    node.floe("model", "show", "acme/model-1b", code=1)
    node.floe("model", "rm", "acme/model-1b", code=1)


def test_pushing_again_moves_the_tag_and_names_both_digests(node, tmp_path):
    make_model(tmp_path / "m")
    first = node.json("model", "push", tmp_path / "m", "iris:v1")
    assert (first["previous"], first["new_packs"]) == (None, 1)
    again = node.json("model", "push", tmp_path / "m", "iris:v1")
    assert (again["previous"], again["manifest"], again["new_packs"]) == (first["manifest"], first["manifest"], 0)
    (tmp_path / "m" / "config.json").write_text('{"hidden": 129}')
    told = node.floe("model", "push", tmp_path / "m", "iris:v1").stdout
    moved = node.json("model", "show", "iris:v1")["manifest"]
    assert f"iris:v1 moved from {first['manifest']} to {moved}" in told
    assert node.json("model", "rm", f"iris@{moved}") == {"ref": f"iris@{moved}", "manifest": moved}
    assert node.json("model", "ls") == []


def test_a_model_is_mounted_where_no_daemon_runs_and_nothing_is_left(node, tmp_path):
    tensors = make_model(tmp_path / "m")
    node.floe("model", "push", tmp_path / "m", "iris")
    mountpoint = tmp_path / "mnt"
    mounted = node.json("model", "mount", "iris", mountpoint)
    assert (mounted["mountpoint"], mounted["packfs_started"], mounted["resident"]) == (str(mountpoint), True, False)

    status = node.json("status")
    assert status["packfs"]["running"]
    assert [(m["mode"], m["models"]) for m in status["mounts"]] == [("packfs", {str(mountpoint): "iris:latest"})]
    assert f"{mountpoint}  iris:latest" in node.floe("status").stdout

    found = load_file(str(mountpoint / "model.safetensors"))
    assert set(found) == set(tensors)
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    del found
    assert (mountpoint / "link").readlink() == Path("config.json")
    assert (mountpoint / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()
    with pytest.raises(OSError, match="Read-only"):
        (mountpoint / "new").touch()

    assert node.json("umount", mountpoint) == {"mountpoint": str(mountpoint), "packfs_stopped": True}
    wait_until(lambda: not node.processes())
    assert node.mounts() == []
    assert not mountpoint.exists()  # it was made for the mount
    assert node.json("status")["packfs"]["running"] is False
    node.floe("umount", mountpoint, code=1)


def test_the_last_umount_stops_what_the_first_mount_started(node, tmp_path):
    for number in (1, 2):
        make_model(tmp_path / f"m{number}", seed=number)
        node.floe("model", "push", tmp_path / f"m{number}", f"iris:v{number}")
    one, two, three = (tmp_path / f"mnt{number}" for number in (1, 2, 3))
    assert node.json("model", "mount", "iris:v1", one)["packfs_started"]
    assert not node.json("model", "mount", "iris:v1", two)["packfs_started"]
    assert not node.json("model", "mount", "iris:v2", three)["packfs_started"]
    assert not node.json("umount", one)["packfs_stopped"]
    assert hexdigest((two / "model.safetensors").read_bytes()) == hexdigest(
        (tmp_path / "m1/model.safetensors").read_bytes()
    )
    assert not node.json("umount", two)["packfs_stopped"]
    assert hexdigest((three / "model.safetensors").read_bytes()) == hexdigest(
        (tmp_path / "m2/model.safetensors").read_bytes()
    )
    assert node.json("umount", three)["packfs_stopped"]
    wait_until(lambda: not node.processes())
    assert node.mounts() == []


def test_a_pack_filesystem_that_somebody_else_started_runs_on(node, tmp_path):
    make_model(tmp_path / "m")
    node.floe("model", "push", tmp_path / "m", "iris")
    daemon = subprocess.Popen([sys.executable, "-m", "floe", "packfs"], env=node.environ, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: node.json("status")["packfs"]["running"])
        assert not node.json("model", "mount", "iris", tmp_path / "mnt")["packfs_started"]
        assert not node.json("umount", tmp_path / "mnt")["packfs_stopped"]
        assert node.json("status")["packfs"]["keeper_pid"] == daemon.pid
        # A second one for the same directory names the first.
        assert str(daemon.pid) in node.floe("packfs", code=1).stderr
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0
    wait_until(lambda: not node.processes())
    assert node.mounts() == []


def test_a_busy_mount_stays_and_says_who_uses_it(node, tmp_path):
    make_model(tmp_path / "m")
    node.floe("model", "push", tmp_path / "m", "iris")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    node.floe("model", "mount", "iris", mountpoint)
    with (mountpoint / "config.json").open() as file:
        told = node.floe("umount", mountpoint, code=1).stderr
        assert str(os.getpid()) in told
        assert file.read() == '{"hidden": 128}'
    assert node.json("status")["packfs"]["running"]
    node.floe("model", "mount", "iris", mountpoint, code=1)  # taken
    node.floe("umount", mountpoint)
    assert mountpoint.is_dir()  # it was there before
    wait_until(lambda: not node.processes())


def test_bad_mountpoints(node, tmp_path):
    make_model(tmp_path / "m")
    node.floe("model", "push", tmp_path / "m", "iris")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    for place, code in ((tmp_path / "file", 2), (tmp_path / "full", 2), (tmp_path / "no" / "parent", 2), ("/proc", 1)):
        node.floe("model", "mount", "iris", place, code=code)
    assert node.mounts() == []
    assert node.processes() == []
    assert (tmp_path / "full" / "precious").exists()


def test_nothing_is_mounted_there(node, tmp_path):
    node.floe("umount", tmp_path / "never", code=1)
    node.floe("umount", "/proc", code=1)
    assert Path("/proc/self").exists()


def no_directory(node, home):
    return home / "nowhere", "iris", 1


def a_file(node, home):
    (home / "file").write_text("x")
    return home / "file", "iris", 2


def an_empty_directory(node, home):
    (home / "empty").mkdir()
    return home / "empty", "iris", 2


def a_bad_name(node, home):
    return home / "m", "Not A Name", 2


def a_bad_tag(node, home):
    return home / "m", "iris:-v1", 2


def a_digest(node, home):
    return home / "m", f"iris@{'0' * 64}", 2


def a_store_that_is_a_file(node, home):
    (home / "blocked").write_text("x")
    node.environ["FLOE_STORE"] = f"file://{home}/blocked/store"
    return home / "m", "iris", 1


def an_unreachable_store(node, home):
    node.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    node.environ["FLOE_STORE"] = "s3://bucket/prefix?endpoint=http://127.0.0.1:1&region=r&path_style=true"
    return home / "m", "iris", 1


def an_address_of_no_kind(node, home):
    node.environ["FLOE_STORE"] = "ftp://host/x"
    return home / "m", "iris", 2


def an_unknown_setting(node, home):
    (home / "config.toml").write_text('cash_dir = "/x"\n')
    return home / "m", "iris", 2


def broken_settings(node, home):
    (home / "config.toml").write_text("store = [")
    return home / "m", "iris", 2


def a_mistyped_variable(node, home):
    node.environ["FLOE_CACHE_DRI"] = "/x"
    return home / "m", "iris", 2


def a_bad_label(node, home):
    return home / "m", "iris", 2, "--label", "nothing"


@pytest.mark.parametrize(
    "fault",
    [
        no_directory,
        a_file,
        an_empty_directory,
        a_bad_name,
        a_bad_tag,
        a_digest,
        a_store_that_is_a_file,
        an_unreachable_store,
        an_address_of_no_kind,
        an_unknown_setting,
        broken_settings,
        a_mistyped_variable,
        a_bad_label,
    ],
)
def test_a_push_that_cannot_be_publishes_nothing(node, tmp_path, fault):
    make_model(tmp_path / "m")
    node.floe("model", "push", tmp_path / "m", "other")
    before = node.refs()
    directory, name, code, *more = fault(node, tmp_path)
    node.floe("model", "push", directory, name, *more, code=code)
    assert node.refs() == before
    spool = node.cache / "spool"
    assert not spool.exists() or not list(spool.iterdir())


def test_an_unreadable_file_publishes_nothing(node, tmp_path):
    make_model(tmp_path / "m")
    node.floe("model", "push", tmp_path / "m", "iris")
    before = node.refs()
    (tmp_path / "m" / "config.json").write_text("changed")
    (tmp_path / "m" / "config.json").chmod(0)
    node.let_others_in()
    for path in (node.home, *node.home.rglob("*")):
        if not path.is_symlink() and path.name != "config.json":
            os.chown(path, NOBODY, NOBODY)
    told = node.floe("model", "push", tmp_path / "m", "iris", code=1, user=NOBODY, group=NOBODY).stderr
    assert "config.json" in told
    assert node.refs() == before


def test_names_that_are_not_utf_8(node, tmp_path):
    """A directory may be called so; what must be stored as text may not, and nothing is stored then."""
    raw, make = os.fsdecode(b"d\xff"), tmp_path / os.fsdecode(b"d\xff")
    make_model(make)
    assert node.json("model", "push", make, "raw")["source"] == "directory:d\\xff"
    before = node.refs()
    assert "not UTF-8" in node.floe("model", "push", make, "other", "--label", f"k={raw}", code=2).stderr
    assert "not UTF-8" in node.floe("image", "index", f"oci:{make}", code=2).stderr
    attach = ["image", "attach", f"oci:{tmp_path}/x", f"oci:{tmp_path}/y"]
    assert "not UTF-8" in node.floe(*attach, "--model", f"raw=/opt/{raw}", code=2).stderr
    assert "not UTF-8" in node.floe("image", "attach", "a", f"oci:{make}", "--model", "raw=/m", code=2).stderr
    assert node.refs() == before


def test_a_damaged_manifest_is_listed_as_such(node, tmp_path):
    make_model(tmp_path / "m")
    digest = node.json("model", "push", tmp_path / "m", "bad")["manifest"]
    (tmp_path / "m" / "config.json").write_text("{}")
    node.floe("model", "push", tmp_path / "m", "good")
    manifest = next(path for path in node.store.rglob(digest))
    manifest.chmod(0o600)
    manifest.write_bytes(manifest.read_bytes().replace(b"floe", b"flow", 1))
    found = subprocess.run(
        [sys.executable, "-m", "floe", "model", "ls", "--json"], env=node.environ, capture_output=True, check=False
    )
    assert found.returncode == 1
    listed = {model["ref"]: model for model in json.loads(found.stdout)}
    assert "digest" in listed["bad:latest"]["error"]
    assert listed["good:latest"]["files"] == 3
    node.floe("model", "show", "bad", code=1)
    node.floe("model", "mount", "bad", tmp_path / "mnt", code=1)
    assert not (tmp_path / "mnt").exists()


@pytest.mark.parametrize("spoilt", [b"{]", b'{"format":"floe.ref","manifest":5,"updated":"now","version":1}'])
def test_a_damaged_ref_is_listed_as_such_and_replaced_by_a_push(node, tmp_path, spoilt):
    make_model(tmp_path / "m")
    for name in ("bad", "good"):
        node.json("model", "push", tmp_path / "m", name)
    (node.store / "refs/models/_/bad/latest").unlink()
    (node.store / "refs/models/_/bad/latest").write_bytes(spoilt)
    argv = [sys.executable, "-m", "floe", "model", "ls"]
    found = subprocess.run([*argv, "--json"], env=node.environ, capture_output=True, check=False)
    assert found.returncode == 1
    listed = {model["ref"]: model for model in json.loads(found.stdout)}
    assert "refs/models/_/bad/latest" in listed["bad:latest"]["error"]
    assert listed["good:latest"]["files"] == 3
    found = subprocess.run(argv, env=node.environ, capture_output=True, check=False, text=True)
    assert found.returncode == 1
    assert "damaged" in found.stdout
    assert "refs/models/_/bad/latest" in found.stderr
    node.floe("model", "show", "bad", code=1)
    node.json("model", "push", tmp_path / "m", "bad")
    assert len(node.json("model", "ls")) == 2


def test_a_damaged_tree_or_pack_index_is_not_mounted(node, tmp_path):
    make_model(tmp_path / "m")
    shown = node.json("model", "push", tmp_path / "m", "iris")
    for name, folder in ((shown["tree"], "trees"), (shown["packs"][0]["id"], "indexes")):
        path = next((node.store / folder).rglob(name))
        whole = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        told = node.floe("model", "mount", "iris", tmp_path / "mnt", code=1).stderr
        assert name in told
        assert node.mounts() == []
        assert node.processes() == []
        path.write_bytes(whole)
    node.floe("model", "mount", "iris", tmp_path / "mnt")
    node.floe("umount", tmp_path / "mnt")


def test_a_store_that_is_gone_is_named(node, tmp_path):
    make_model(tmp_path / "m")
    node.floe("model", "push", tmp_path / "m", "iris")
    shutil.rmtree(node.store)
    told = node.floe("model", "ls", code=1).stderr
    assert str(node.store) in told
    assert "floe: hint: " in told
