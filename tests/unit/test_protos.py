"""The generated stubs are those of the .proto files, and shadow nothing."""

import importlib.util
import sys
import sysconfig
import types
from pathlib import Path

import floe.protos
from floe.protos.gen.containerd import mount_pb2, snapshots_pb2

PROTOS = Path(floe.protos.__file__).resolve().parent


def content(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.suffix in (".py", ".pyi")
    }


def test_committed_stubs_are_up_to_date(tmp_path):
    spec = importlib.util.spec_from_file_location("floe_protos_generate", PROTOS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.generate(tmp_path / "gen")
    assert content(tmp_path / "gen") == content(PROTOS / "gen")


def test_types_is_the_standard_librarys():
    assert Path(types.__file__).parent == Path(sysconfig.get_paths()["stdlib"])
    assert sys.modules["types"] is types
    assert not [path for path in (PROTOS / "gen").rglob("*") if path.stem == "types"]


def test_packages_are_containerds():
    assert snapshots_pb2.DESCRIPTOR.package == "containerd.services.snapshots.v1"
    assert mount_pb2.DESCRIPTOR.package == "containerd.types"
    numbers = {
        name: {field.name: field.number for field in message.fields}
        for name, message in snapshots_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    assert numbers["PrepareSnapshotRequest"] == {"snapshotter": 1, "key": 2, "parent": 3, "labels": 4}
    assert numbers["CommitSnapshotRequest"] == {"snapshotter": 1, "name": 2, "key": 3, "labels": 4, "parent": 5}
    assert numbers["Info"] == {"name": 1, "parent": 2, "kind": 3, "created_at": 4, "updated_at": 5, "labels": 6}
    assert numbers["UpdateSnapshotRequest"] == {"snapshotter": 1, "info": 2, "update_mask": 3}
    assert numbers["ListSnapshotsRequest"] == {"snapshotter": 1, "filters": 2}
    assert numbers["UsageResponse"] == {"size": 1, "inodes": 2}
    assert {field.name: field.number for field in mount_pb2.Mount.DESCRIPTOR.fields} == {
        "type": 1,
        "source": 2,
        "target": 3,
        "options": 4,
    }
