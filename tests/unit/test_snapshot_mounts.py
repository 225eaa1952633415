"""Mounts, options and owners, without a kernel."""

from pathlib import Path

import pytest

from floe.snapshotter.mounts import (
    GID_MAPPING,
    UID_MAPPING,
    Places,
    lower_directories,
    needs_clones,
    overlay_options,
    root_owner,
    snapshot_mounts,
)
from floe.snapshotter.schema import Kind, Snapshot
from floe.store.errors import BadInputError

PLACES = Places(Path("/r"))


def snapshot(number, kind=Kind.COMMITTED, **fields):
    return Snapshot(number, str(number), 0, "", kind, fields.pop("labels", {}), 0, 0, **fields)


def options(kind, parents, labels=None, overlay=("index=off",)):
    lower = lower_directories(parents, PLACES)
    (mount,) = snapshot_mounts(snapshot(9, kind, labels=labels or {}), lower, PLACES, overlay)
    return mount.type, mount.source, ",".join(mount.options)


def test_as_overlayfs_does():
    one, two = snapshot(1), snapshot(2)
    assert options(Kind.ACTIVE, []) == ("bind", "/r/s/9/fs", "rw,rbind")
    assert options(Kind.VIEW, []) == ("bind", "/r/s/9/fs", "ro,rbind")
    assert options(Kind.VIEW, [one]) == ("bind", "/r/s/1/fs", "ro,rbind")
    upper = "workdir=/r/s/9/work,upperdir=/r/s/9/fs"
    assert options(Kind.ACTIVE, [one]) == ("overlay", "overlay", f"{upper},lowerdir=/r/s/1/fs,index=off")
    assert options(Kind.VIEW, [two, one]) == ("overlay", "overlay", "lowerdir=/r/s/2/fs:/r/s/1/fs,index=off")


def test_stubs_are_replaced_or_covered():
    stub, squashed = snapshot(1, model="t", alone=True), snapshot(2, model="t")
    assert options(Kind.VIEW, [stub]) == ("bind", "/r/s/1/m", "ro,rbind")
    assert options(Kind.VIEW, [squashed])[2] == "lowerdir=/r/s/2/m:/r/s/2/fs,index=off"


def test_id_mappings_come_first():
    labels = {UID_MAPPING: "0:1000:10", GID_MAPPING: "0:2000:10"}
    assert options(Kind.ACTIVE, [], labels)[2] == "uidmap=0:1000:10,gidmap=0:2000:10,rw,rbind"
    assert options(Kind.ACTIVE, [snapshot(1)], labels)[2].startswith("uidmap=0:1000:10,gidmap=0:2000:10,workdir=")
    assert root_owner(labels) == (1000, 2000)
    assert root_owner({}) is None
    assert root_owner({UID_MAPPING: "5:1:1,0:7:1"}) == (7, 0)


def test_only_overlays_above_trees_for_user_namespaces_need_clones():
    labels = {UID_MAPPING: "0:1000:10", GID_MAPPING: "0:2000:10"}
    lazy, one = snapshot(1, chain="c", tree="t"), snapshot(2)
    active, view = snapshot(9, Kind.ACTIVE, labels=labels), snapshot(9, Kind.VIEW, labels=labels)
    assert needs_clones(active, [one, lazy], PLACES)
    assert needs_clones(view, [one, lazy], PLACES)
    assert needs_clones(active, [snapshot(3, model="t", alone=True)], PLACES)
    assert not needs_clones(view, [lazy], PLACES)
    assert not needs_clones(active, [one], PLACES)
    assert not needs_clones(snapshot(9, Kind.ACTIVE), [one, lazy], PLACES)
    (mount,) = snapshot_mounts(active, [Path("/r/s/9/l/0")], PLACES, (), mapped=True)
    assert mount.options == ("workdir=/r/s/9/work", "upperdir=/r/s/9/fs", "lowerdir=/r/s/9/l/0")


@pytest.mark.parametrize("text", ["0:1", "a:b:c", "0:-1:5", "1:1000:10", "0:4294967295:1", "0:1:0", "0:1:1,", "0 :1:1"])
def test_bad_mappings(text):
    with pytest.raises(BadInputError):
        root_owner({UID_MAPPING: text, GID_MAPPING: "0:0:1"})


def test_kernel_options(tmp_path):
    whole, mapped = tmp_path / "whole", tmp_path / "mapped"
    whole.write_text("         0          0 4294967295\n")
    mapped.write_text("         0     100000      65536\n")
    (tmp_path / "index").write_text("N\n")
    assert overlay_options(tmp_path, whole) == ("index=off",)
    assert overlay_options(tmp_path, mapped) == ("userxattr", "index=off")
    assert overlay_options(tmp_path / "nowhere", whole) == ()
