"""Ordinary snapshots, against the snapshotter's own socket: names, kinds, parents, mounts."""

import os
from pathlib import Path

import pytest
from support.snapshots import Node, Status, mounted, status


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.stop()
    node.layers.close()


def test_active_without_parent_is_a_writable_bind(node):
    (mount,) = node.client.prepare("a", "")
    assert (mount.type, list(mount.options)) == ("bind", ["rw", "rbind"])
    with mounted([mount], node.base) as root:
        (root / "file").write_text("x")
    assert (Path(mount.source) / "file").read_text() == "x"
    assert node.client.mounts("a") == [mount]


def test_view_without_parent_is_a_read_only_bind(node):
    (mount,) = node.client.view("v", "")
    assert (mount.type, list(mount.options)) == ("bind", ["ro", "rbind"])


def test_active_above_parents_is_one_overlay_topmost_first(node):
    node.layer("one", files={"a": "1", "both": "one"})
    node.layer("two", "one", {"b": "2", "both": "two"})
    (mount,) = node.client.prepare("active", "two")
    assert (mount.type, mount.source) == ("overlay", "overlay")
    keys = [option.partition("=")[0] for option in mount.options]
    assert keys[:3] == ["workdir", "upperdir", "lowerdir"]
    assert ("index=off" in mount.options) == Path("/sys/module/overlay/parameters/index").exists()
    assert "userxattr" not in mount.options
    lower = mount.options[2].removeprefix("lowerdir=").split(":")
    assert [(Path(path) / "both").read_text() for path in lower] == ["two", "one"]
    with mounted([mount], node.base) as root:
        assert sorted(path.name for path in root.iterdir()) == ["a", "b", "both"]
        assert (root / "both").read_text() == "two"
        (root / "a").unlink()
    node.client.commit("three", "active")
    with mounted(node.client.view("v", "three"), node.base) as root:
        assert sorted(path.name for path in root.iterdir()) == ["b", "both"]


def test_view_of_one_parent_is_a_read_only_bind_of_it(node):
    node.layer("one", files={"a": "1"})
    (mount,) = node.client.view("v", "one")
    assert (mount.type, list(mount.options)) == ("bind", ["ro", "rbind"])
    with mounted([mount], node.base) as root, pytest.raises(OSError, match="Read-only"):
        (root / "a").write_text("2")


def test_view_of_several_parents_is_an_overlay_without_upper(node):
    node.layer("one", files={"a": "1"})
    node.layer("two", "one", {"b": "1"})
    (mount,) = node.client.view("v", "two")
    assert mount.type == "overlay"
    assert not any(option.startswith(("upperdir", "workdir")) for option in mount.options)
    with mounted([mount], node.base) as root, pytest.raises(OSError, match="Read-only"):
        (root / "a").write_text("2")


def test_128_layers_mount(node):
    parent = ""
    for number in range(128):
        (mount,) = node.client.prepare(f"k{number}", parent)
        (node.upper([mount]) / f"f{number}").write_text("x")
        parent = f"layer {number}"
        node.client.commit(parent, f"k{number}")
    with mounted(node.client.prepare("top", parent), node.base) as root:
        assert len(list(root.iterdir())) == 128


def test_paths_are_short(node):
    (mount,) = node.client.prepare("a", "")
    assert Path(mount.source).relative_to(node.config.root) == Path("s/1/fs")


def test_keys_are_opaque(node):
    keys = ["default/1/extract-123 sha256:abc", "../../etc", "/host/path with space", "ü\n", "%s'\"", "a" * 3000]
    for key in keys:
        node.client.prepare(key, "")
    assert node.client.names() == set(keys)
    assert {path.name for path in (node.config.root / "s").iterdir()} == {str(n + 1) for n in range(len(keys))}


def test_taken_key_is_already_exists(node):
    node.layer("one")
    node.client.prepare("a", "")
    for call in (node.client.prepare, node.client.view):
        assert status(call, "a", "") is Status.ALREADY_EXISTS
        assert status(call, "one", "") is Status.ALREADY_EXISTS
    assert status(node.client.commit, "one", "a") is Status.ALREADY_EXISTS


def test_unknown_key_is_not_found(node):
    client = node.client
    for call in (client.stat, client.mounts, client.remove, client.usage):
        assert status(call, "nobody") is Status.NOT_FOUND
    assert status(client.commit, "name", "nobody") is Status.NOT_FOUND
    assert status(client.update, "nobody", {}) is Status.NOT_FOUND
    assert status(client.prepare, "a", "nobody") is Status.NOT_FOUND
    assert status(client.view, "a", "nobody") is Status.NOT_FOUND
    assert client.names() == set()


def test_parent_must_be_committed(node):
    node.client.prepare("a", "")
    assert status(node.client.prepare, "b", "a") is Status.INVALID_ARGUMENT
    assert status(node.client.view, "b", "a") is Status.INVALID_ARGUMENT


def test_only_actives_commit_and_only_actives_and_views_have_mounts(node):
    node.layer("one")
    node.client.view("v", "one")
    assert status(node.client.commit, "two", "v") is Status.FAILED_PRECONDITION
    assert status(node.client.commit, "two", "one") is Status.FAILED_PRECONDITION
    assert status(node.client.mounts, "one") is Status.FAILED_PRECONDITION


def test_remove_of_a_parent_with_children_is_refused(node):
    node.layer("one")
    node.layer("two", "one")
    assert status(node.client.remove, "one") is Status.FAILED_PRECONDITION
    node.client.view("v", "two")
    assert status(node.client.remove, "two") is Status.FAILED_PRECONDITION
    for name in ("v", "two", "one"):
        node.client.remove(name)
    assert node.client.names() == set()


def test_remove_frees_the_key_at_once_and_cleanup_the_disk(node):
    directory = Path(node.client.prepare("a", "")[0].source).parent
    node.client.remove("a")
    assert directory.exists()
    assert status(node.client.stat, "a") is Status.NOT_FOUND
    node.client.prepare("a", "")
    node.client.cleanup()
    assert not directory.exists()
    assert node.client.stat("a").kind == 2


def test_cleanup_leaves_what_is_mounted(node):
    mounts = node.client.prepare("a", "")
    inside = Path(mounts[0].source) / "mnt"
    inside.mkdir()
    bind = type(mounts[0])(type="bind", source=mounts[0].source, options=["rw"])
    node.client.remove("a")
    with mounted([bind], inside):
        node.client.cleanup()
        assert inside.exists()
    node.client.cleanup()
    assert not inside.exists()


def test_commit_and_update_do_not_walk_through_a_layer(node):
    upper = Path(node.client.prepare("a", "")[0].source)
    for number in range(20):
        (upper / f"f{number}").touch()
    node.client.commit("c", "a")
    node.client.update("c", {"k": "v"}, "labels")
    # A large one takes long: it is measured when its usage is asked for.
    assert node.snapshotter.stat("c").size is None
    assert node.client.usage("c").inodes == 21
    assert node.snapshotter.stat("c").size is not None


def test_commit_gives_a_parent_to_a_snapshot_made_without(node):
    node.layer("one", files={"a": "1"})
    node.client.prepare("k", "")
    node.client.prepare("other", "")
    assert status(node.client.commit, "two", "k", parent="nobody") is Status.NOT_FOUND
    assert status(node.client.commit, "two", "k", parent="other") is Status.FAILED_PRECONDITION
    node.client.commit("two", "k", parent="one")
    assert node.client.stat("two").parent == "one"
    node.client.prepare("m", "two")
    assert status(node.client.commit, "three", "m", parent="one") is Status.INVALID_ARGUMENT


def test_upper_root_has_its_parents_owner(node):
    mounts = node.client.prepare("a", "")
    Path(mounts[0].source).chmod(0o700)
    os.chown(mounts[0].source, 1234, 4321)
    node.client.commit("one", "a")
    with mounted(node.client.prepare("b", "one"), node.base) as root:
        found = root.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 4321, 0o755)


def test_layers_and_socket_are_their_owners(node):
    assert node.config.root.stat().st_mode & 0o777 == 0o700
    assert node.config.address.stat().st_mode & 0o777 == 0o600
