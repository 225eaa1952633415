"""Models as programs use them, on every kind of store: `import floe`, export, verify, diff, copy, and fsspec's file system."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save, save_file
from support.somestore import catalog, google, url

import floe
from floe.cli.main import main
from floe.client.filesystem import FloeFileSystem
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError, FloeError, NotFoundError
from floe.store.index import open_index
from floe.store.nodes import CHUNK
from floe.store.objects import open_store

__all__ = ["catalog", "google", "url"]

BUCKETS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("s3", "gs")]
NOT_MEMORY = pytest.mark.parametrize("url", ["file", *BUCKETS], indirect=True)
FOLDER = pytest.mark.parametrize("url", ["file"], indirect=True)


@pytest.fixture
def options(url, tmp_path):
    home = tmp_path / "node"
    return {"store": url, "config": "", "cache_dir": str(home / "cache"), "run_dir": str(home / "run"), "index": "none"}


@pytest.fixture
def flags(options):
    return [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]


@pytest.fixture
def store(options):
    given = {**options}
    with floe.open_store(given.pop("store"), **given) as opened:
        yield opened


def make(home, *, seed=3):
    home.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors = {
        "b.bias": random.standard_normal(37).astype("float32"),
        "a.weight": random.standard_normal((1000, 1500)).astype("float32"),
        "empty": np.zeros((0, 4), "int64"),
        "scalar": np.array(7, "int32"),
    }
    save_file(tensors, str(home / "model.safetensors"), metadata={"format": "np"})
    (home / "model.safetensors").chmod(0o644)
    (home / "config.json").write_text('{"hidden": 128}')
    (home / "twin.json").hardlink_to(home / "config.json")
    (home / "sub").mkdir()
    (home / "sub" / "table.csv").write_text("a,b\n1,2\n3,4\n")
    (home / "sub" / "up").symlink_to("../config.json")
    (home / "large").write_bytes(random.bytes(CHUNK) + bytes(CHUNK) + b"end")
    (home / "empty").touch()
    (home / "sub").chmod(0o555)
    return tensors


def tree_of(home):
    """Everything that export promises to keep."""
    found, inodes = {}, {}
    for path in sorted(home.rglob("*")):
        told = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        twin = inodes.setdefault(told.st_ino, str(path.relative_to(home)))
        found[str(path.relative_to(home))] = (told.st_mode, told.st_mtime_ns, content, twin)
    return found


@NOT_MEMORY
def test_what_was_pushed_is_listed_read_and_exported(store, tmp_path):
    tensors = make(tmp_path / "m")
    pushed = store.push(tmp_path / "m", "org/iris:v1", labels={"license": "MIT"})
    assert [str(found) for found in store.models()] == ["org/iris:v1"]
    assert store.models() == [pushed]
    assert pushed.labels == {"license": "MIT"}
    model = store.model("org/iris:v1")
    assert [entry.name for entry in model.ls("sub")] == ["table.csv", "up"]
    assert model.stat("sub/up").path == "config.json"
    assert model.read("sub/../sub/up") == b'{"hidden": 128}'
    assert model.read("empty") == b""
    assert model.read("large") == (tmp_path / "m" / "large").read_bytes()
    assert {name: value.tolist() for name, value in model.tensors()} == {n: t.tolist() for n, t in tensors.items()}
    done = model.export(tmp_path / "out")
    assert (done.files, done.warnings) == (5, ())
    assert tree_of(tmp_path / "out") == tree_of(tmp_path / "m")
    # Zeros take no room.
    assert (tmp_path / "out" / "large").stat().st_blocks * 512 < 1.5 * CHUNK


@FOLDER
def test_a_file_is_an_io_object(store, tmp_path):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    model, data = store.model("iris"), (tmp_path / "m" / "large").read_bytes()
    with model.open("large") as file:
        assert file.seek(-3, os.SEEK_END) == len(data) - 3
        assert (file.read(), file.read(1)) == (b"end", b"")
        assert file.seek(CHUNK - 10) == CHUNK - 10
        assert file.read(20) == data[CHUNK - 10 : CHUNK + 10]
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
    with model.open("large", buffering=0) as raw:
        assert raw.read_at(5, 7) == data[5:12]
        assert (raw.read_at(len(data) + 1, 7), raw.tell()) == (b"", 0)
    with pytest.raises(ValueError, match="closed"):
        raw.read(1)
    for path, wrong in (("no", NotFoundError), ("config.json/x", NotFoundError), ("..", BadInputError)):
        with pytest.raises(wrong):
            model.open(path)
    with pytest.raises(BadInputError):
        model.open("sub")


@FOLDER
def test_a_version_stays_when_its_tag_moves(store, tmp_path):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    before = store.model("iris")
    (tmp_path / "m" / "config.json").write_text("{}")
    store.push(tmp_path / "m", "iris")
    assert before.read("config.json") == b'{"hidden": 128}'
    assert store.model("iris").read("config.json") == b"{}"
    assert store.model(f"iris@{before.digest}").read("config.json") == b'{"hidden": 128}'


@FOLDER
def test_another_process_reads_through_the_same_cache_and_so_does_a_child(store, options, tmp_path):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    model = store.model("iris")
    assert model.read("sub/table.csv").startswith(b"a,b")
    script = (
        "import json, os, sys, floe\n"
        "given = json.loads(sys.argv[1])\n"
        "with floe.open_store(given.pop('store'), **given) as store:\n"
        "    model = store.model('iris')\n"
        "    size = len(model.read('large'))\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        os._exit(0 if len(model.read('config.json')) == 15 and len(model.read('large')) == size else 1)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0\n"
        "    print(size)\n"
    )
    argv = [sys.executable, "-W", "ignore", "-c", script, json.dumps(options)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, str((tmp_path / "m" / "large").stat().st_size)), done.stderr


@FOLDER
def test_damage_is_never_handed_out_and_export_leaves_nothing(store, catalog, tmp_path, flags, capsys):
    make(tmp_path / "m")
    pushed = store.push(tmp_path / "m", "iris")
    assert main(["model", "verify", "iris", *flags]) == 0
    capsys.readouterr()
    pack = catalog.get_manifest(pushed.digest).packs[0].id
    data = bytearray(catalog.store.get(layout.pack_key(pack)))
    data[100] ^= 1
    catalog.store.put(layout.pack_key(pack), data)
    model = store.model("iris")
    with pytest.raises(DamagedError):
        model.read("large")
    with pytest.raises(DamagedError):
        model.export(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "node", "store"]
    assert main(["model", "verify", "iris", "--json", *flags]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["damaged"], [fault["pack"] for fault in found["faults"]]) == (True, [pack])
    assert found["faults"][0]["frames"] == [0]


@FOLDER
def test_export_refuses_what_it_would_overwrite(store, tmp_path):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    model = store.model("iris")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for target in (tmp_path / "m", tmp_path / "file", tmp_path / "link", tmp_path / "no" / "such"):
        with pytest.raises(BadInputError):
            model.export(target)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "there").mkdir()
    assert model.export(tmp_path / "there").files == 5


@NOT_MEMORY
def test_diff_tells_content_from_attributes_and_what_is_shared(store, tmp_path, flags, capsys):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris:a")
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "empty").unlink()
    (tmp_path / "m" / "new").write_bytes(b"x" * 10_000)
    (tmp_path / "m" / "large").chmod(0o755)
    store.push(tmp_path / "m", "iris:b")
    assert main(["model", "diff", "iris:a", "iris:b", "--json", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    changes = {change["path"]: change["change"] for change in found["changes"]}
    wanted = {
        "config.json": "changed",
        "twin.json": "changed",
        "empty": "removed",
        "new": "added",
        "large": "attributes",
    }
    assert changes == wanted
    assert (found["only_a_bytes"], found["only_b_bytes"], found["same"]) == (15, 10_002, 4)
    assert found["shared_bytes"] >= CHUNK
    assert main(["model", "diff", "iris:a", "iris:a", *flags]) == 0
    assert "iris:a and iris:a hold the same" in capsys.readouterr().out


@NOT_MEMORY
def test_fsspec_lists_and_reads(store, options, tmp_path):
    make(tmp_path / "m")
    pushed = store.push(tmp_path / "m", "org/iris:v1")
    store.push(tmp_path / "m", "plain:v2")
    store.close()  # its cache is the file system's now
    files = FloeFileSystem(**options, skip_instance_cache=True)
    assert sorted(files.ls("floe://", detail=False)) == ["org", "plain:v2"]
    assert files.ls("org", detail=False) == ["org/iris:v1"]
    assert sorted(files.find("floe://org/iris:v1/sub")) == ["org/iris:v1/sub/table.csv", "org/iris:v1/sub/up"]
    assert files.glob("org/iris:v1/*.json") == ["org/iris:v1/config.json", "org/iris:v1/twin.json"]
    assert files.cat_file("org/iris:v1/config.json", -4, -1) == b"128"
    assert files.info(f"org/iris@{pushed.digest}/sub/up")["size"] == 15
    with files.open("floe://org/iris:v1/sub/table.csv", "r") as text:
        assert text.read() == "a,b\n1,2\n3,4\n"
    files.get("org/iris:v1/sub", str(tmp_path / "got"), recursive=True)
    assert (tmp_path / "got" / "table.csv").read_text() == "a,b\n1,2\n3,4\n"
    for path in ("org/iris:v1/no", "org/no:v1/x", "no"):
        with pytest.raises(FileNotFoundError):
            files.info(path)
    with pytest.raises(OSError, match="read-only") as refused:
        files.open("org/iris:v1/new", "wb")
    assert refused.value.errno == errno.EROFS
    with pytest.raises(IsADirectoryError):
        files.open("org/iris:v1/sub")
    files._store.close()


def test_fsspec_finds_it_by_its_entry_point():
    assert fsspec.get_filesystem_class("floe") is FloeFileSystem


HEADERS = [
    b"",
    b"\0" * 7,
    (1 << 40).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"[]",
    (2).to_bytes(8, "little") + b"{",
    *(
        len(header).to_bytes(8, "little") + header + bytes(8)
        for header in (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,9]}}',
            b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}',
            b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
            b'{"a":{"dtype":"F32","shape":[1]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}}',
        )
    ),
]


@pytest.mark.parametrize("data", HEADERS, ids=range(len(HEADERS)))
def test_what_is_no_safetensors_file_is_refused(data):
    with pytest.raises(BadInputError):
        floe.SafeTensors(io.BytesIO(data))


def test_tensors_of_a_path_as_the_library_reads_them(tmp_path):
    tensors = make(tmp_path / "m")
    with floe.SafeTensors(tmp_path / "m" / "model.safetensors") as file:
        assert sorted(file.keys()) == sorted(tensors)
        assert file.metadata == {"format": "np"}
        for name, value in file.items():
            assert (value.dtype, value.shape) == (tensors[name].dtype, tensors[name].shape)
            assert (value == tensors[name]).all()
        with pytest.raises(NotFoundError):
            file.tensor("no")
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    half = floe.SafeTensors(io.BytesIO(len(header).to_bytes(8, "little") + header + b"\1\2\3\4"))
    assert half.read("a") == b"\1\2\3\4"
    with pytest.raises(FloeError, match="BF16"):
        half.tensor("a")
    assert len(floe.SafeTensors(io.BytesIO(save({})))) == 0


@NOT_MEMORY
def test_a_copy_is_whole_and_sends_nothing_twice(store, catalog, tmp_path, flags, capsys):
    make(tmp_path / "m")
    pushed = store.push(tmp_path / "m", "org/iris:v1")
    away = f"file://{tmp_path}/away"
    assert main(["model", "copy", "org/iris:v1", away, "--json", *flags]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["manifest"], first["previous"], first["new_packs"]) == (pushed.digest, None, 1)
    assert main(["model", "copy", f"org/iris@{pushed.digest}", away, "--as", "iris:v2", "--json", *flags]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["new_packs"], again["new_bytes"]) == (0, 0)
    assert main(["model", "verify", "iris:v2", *flags, f"--store={away}"]) == 0
    copied = Catalog(open_store(away), open_index(None))
    assert [str(ref) for ref, _ in copied.models()] == ["iris:v2", "org/iris:v1"]
    assert list(copied.store.list(layout.PUSHES)) == []
    copied.close()
    assert [path.name for path in (tmp_path / "node" / "cache" / "spool").iterdir()] == []


@FOLDER
def test_what_is_damaged_is_not_copied(store, catalog, tmp_path, flags):
    make(tmp_path / "m")
    pushed = store.push(tmp_path / "m", "iris")
    pack = catalog.get_manifest(pushed.digest).packs[0].id
    data = bytearray(catalog.store.get(layout.pack_key(pack)))
    data[-1] ^= 1
    catalog.store.put(layout.pack_key(pack), data)
    assert main(["model", "copy", "iris", f"file://{tmp_path}/away", *flags]) == 1
    assert not (tmp_path / "away" / "refs").exists()
    assert not (tmp_path / "away" / "packs").exists()
    assert main(["model", "copy", "iris", "nowhere", *flags]) == 2


@FOLDER
def test_a_name_more_says_who_gave_it_and_sizes_say_what_is_shared(store, catalog, tmp_path, flags, capsys):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris:v1")
    assert main(["model", "tag", "iris:v1", "prod/iris:live", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["previous"] is None

    def show(name):
        assert main(["model", "show", name, "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    shown = show("prod/iris:live")
    assert shown["aliases"] == ["iris:v1"]
    assert shown["by"].endswith(f"@{socket.gethostname()}")
    assert (shown["unique_bytes"], shown["shared_bytes"]) == (shown["stored_bytes"], 0)
    (tmp_path / "m" / "new").write_bytes(os.urandom(30_000))
    store.push(tmp_path / "m", "iris:v2")
    assert show("iris:v1")["unique_bytes"] == 0
    second = show("iris:v2")
    assert second["shared_bytes"] == shown["stored_bytes"]
    assert 30_000 <= second["unique_bytes"] < 40_000
    assert main(["model", "tag", "no:v1", "iris:v3", *flags]) == 1
    assert main(["model", "tag", "iris:v1", f"iris@{second['manifest']}", *flags]) == 2
