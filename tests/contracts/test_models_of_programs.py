"""Models as programs use them, on every kind of store: `import floe`, export, verify, diff, copy, and fsspec's file system."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import multiprocessing
import operator
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from safetensors.numpy import save, save_file
from support.signing import signer
from support.somestore import catalog, google, url

import floe
from floe.cli.main import main
from floe.client import export
from floe.client.filesystem import FloeFileSystem
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError, FloeError, NotFoundError, UnsupportedError
from floe.store.ids import ModelRef, hexdigest
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


@NOT_MEMORY
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


@NOT_MEMORY
def test_a_child_reads_on_when_its_parent_has_ended_and_so_do_others(store, options, tmp_path):
    """As a program does that becomes a daemon: what the parent held of the cache must not be held by the child."""
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    store.close()
    script = (
        "import json, os, sys, time, floe\n"
        "given = json.loads(sys.argv[1])\n"
        "store = floe.open_store(given.pop('store'), **given)\n"
        "model = store.model('iris')\n"
        "model.read('config.json')\n"
        "parent = os.getpid()\n"
        "if os.fork():\n"
        "    os._exit(0)\n"
        "while os.getppid() == parent:\n"
        "    time.sleep(0.01)\n"
        "print(len(model.read('large')), flush=True)\n"
    )
    argv = [sys.executable, "-W", "ignore", "-c", script, json.dumps(options)]
    for _ in range(2):
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert done.stdout.strip() == str((tmp_path / "m" / "large").stat().st_size), done.stderr


@FOLDER
def test_a_closed_store_stays_closed(store, options, tmp_path):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    model = store.model("iris")
    file = model.open("large", buffering=0)
    assert file.read(10) == (tmp_path / "m" / "large").read_bytes()[:10]
    before = {*threading.enumerate()}
    store.close()
    store.close()
    for call in (
        lambda: model.read("config.json"),
        lambda: model.export(tmp_path / "out"),
        lambda: dict(model.tensors()),
        lambda: file.read(10),
        store.models,
        lambda: store.model("iris"),
        lambda: store.push(tmp_path / "m", "iris"),
        lambda: store.mount("iris", tmp_path / "mnt"),
        store.reader,
    ):
        with pytest.raises(BadInputError, match="the store is closed") as refused:
            call()
        assert "with block" in refused.value.hint
    assert {*threading.enumerate()} <= before
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mnt").exists()
    # Nothing holds the cache: it may be another store's.
    given = {**options, "store": f"file://{tmp_path}/other"}
    with floe.open_store(given.pop("store"), **given) as other:
        other.push(tmp_path / "m", "iris")
        assert other.model("iris").read("config.json") == b'{"hidden": 128}'


def test_settings_are_given_as_in_a_file(tmp_path):
    given = {
        "index": "none",
        "trusted_keys": [str(signer(1).public), str(signer(2).public)],
        "cache_dirs": (tmp_path / "a", f"{tmp_path}/b"),
        "model_policy": [{"name": "llama/*", "pin": True, "share": "40GiB"}, {"name": "iris"}],
        "node_labels": {"zone": "a"},
        "cache_size": 1 << 30,
        "store_timeout": 2.5,
        "signing_key": None,
    }
    home = tmp_path / "floe.toml"
    home.write_text(f"""
index = "none"
trusted_keys = {json.dumps(given["trusted_keys"])}
cache_dirs = ["{tmp_path}/a", "{tmp_path}/b"]
model_policy = [{{name = "llama/*", pin = true, share = "40GiB"}}, {{name = "iris"}}]
node_labels = {{zone = "a"}}
cache_size = 1073741824
store_timeout = 2.5
""")
    place = f"file://{tmp_path}/store"
    with floe.open_store(place, config="", **given) as ours, floe.open_store(place, config=str(home)) as theirs:
        assert ours.settings == theirs.settings
    with pytest.raises(BadInputError, match="names no keys"):
        floe.open_store(place, config="", trusted_keys=[])


@NOT_MEMORY
def test_a_model_goes_to_a_spawned_process(store, tmp_path):
    """As to the workers of a torch DataLoader with multiprocessing_context="spawn"."""
    make(tmp_path / "m")
    store.push(tmp_path / "m", "org/iris:v1")
    model = store.model("org/iris:v1")
    (tmp_path / "m" / "config.json").write_text("{}")
    store.push(tmp_path / "m", "org/iris:v1")  # the model stays what it was
    assert model.read("config.json") == b'{"hidden": 128}'
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for path in ("config.json", "large", "sub/table.csv"):
            read = pool.submit(operator.methodcaller("read", path), model)
            assert read.result(60) == model.read(path)
    again, other = pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(model))
    assert (again.ref, again.digest, again.read("config.json")) == (model.ref, model.digest, b'{"hidden": 128}')
    assert again._store is other._store is pickle.loads(pickle.dumps(store))  # nobody closes it: so there is one
    again._store.close()
    fresh = pickle.loads(pickle.dumps(model))
    assert fresh.read("config.json") == b'{"hidden": 128}'
    fresh._store.close()
    store.close()
    with pytest.raises(BadInputError, match="closed"):
        pickle.dumps(model)


CHILD = """
import faulthandler, json, os, sys
import fsspec
import floe
from floe.store.errors import UnsupportedError

given = json.loads(sys.argv[1])
other = {**given, "cache_dir": given["cache_dir"] + "-other"}
folder = sys.argv[2]


def opened(**options):
    return floe.open_store(options.pop("store"), **options)


def read_by_url():
    with fsspec.open("floe://iris:latest/config.json", **given) as file:
        return file.read()


def in_child(call):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    faulthandler.dump_traceback_later(5, exit=True)
    try:
        call()
    except UnsupportedError as error:
        os._exit(10 if "forked" in str(error) and "spawn" in error.hint else 11)
    except OSError as error:  # fsspec's
        os._exit(10 if "forked" in str(error) and "spawn" in str(error) else 11)
    os._exit(0)


store = opened(**given)
if sys.argv[3] == "used":
    model = store.model("iris")
    model.read("config.json")
calls = {
    "models": store.models,
    "model": lambda: store.model("iris"),
    "push": lambda: store.push(folder, "iris:child"),
    "new": lambda: opened(**other).models(),
    "fsspec": read_by_url,
}
codes = {name: in_child(call) for name, call in calls.items()}
model = store.model("iris")
codes["read"] = in_child(lambda: model.read("large"))
print(json.dumps([codes, len(store.models()), len(model.read("large"))]))
"""


@pytest.mark.parametrize("used", ["used", "unused"])
@pytest.mark.parametrize("url", ["file", "s3", BUCKETS[1]], indirect=True)
def test_a_child_answers_or_says_why_not(store, options, tmp_path, used):
    """Requests to buckets are made by threads that stay in the parent: who waits for them in a child waits for ever."""
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    store.close()
    argv = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(options), str(tmp_path / "m"), used]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    codes, models, size = json.loads(done.stdout)
    refused = 10 if used == "used" and not options["store"].startswith("file:") else 0
    pushed = int(not refused)
    wanted = {**dict.fromkeys(("models", "model", "push", "new", "fsspec"), refused), "read": 0}
    assert (codes, models, size) == (wanted, 1 + pushed, (tmp_path / "m" / "large").stat().st_size), done.stderr


FORKED = """
import asyncio, faulthandler, json, os, sys
from floe.store.errors import FloeError
from floe.store.objects import open_store

store = open_store(sys.argv[1], retry=False)
proxied = open_store(sys.argv[1], retry=False)
data = bytes(store.get("obj"))
reader = store.open_range("obj", 0, 100)
reader.readinto(memoryview(bytearray(100)))
reader.close()  # whose connection is kept


def error_of(call, *arguments):
    try:
        call(*arguments)
    except FloeError as error:
        return type(error).__name__
    return None


def attempts():
    found = [bytes(store.get("obj", 5, 5000)) == data[5:5005]]
    found.append(bytes(asyncio.run(store.get_async("obj", 5, 5000))) == data[5:5005])
    found += [error_of(store.get, key, 5, 5000) for key in ("none", "short")]
    found += [error_of(call, "obj") for call in (store.get, store.head, store.get_versioned, store.delete)]
    found += [error_of(store.put, "new", b"x"), error_of(store.put_if, "new", b"x", None), error_of(list, store.list(""))]
    os.environ["http_proxy"] = "http://127.0.0.1:9"  # where nobody listens
    os.environ["no_proxy"] = ""
    found.append(error_of(proxied.get, "obj", 5, 5000))
    return found


reader, writer = os.pipe()
pid = os.fork()
if not pid:
    faulthandler.dump_traceback_later(10, exit=True)
    os.write(writer, json.dumps(attempts()).encode())
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert bytes(store.get("obj", 5, 5000)) == bytes(asyncio.run(store.get_async("obj", 5, 5000))) == data[5:5005]
print(code, os.read(reader, 1 << 16).decode() if not code else "", flush=True)
os._exit(0)  # a thread of obstore's that is still busy with the last request would abort an ordinary end
"""


@pytest.mark.parametrize("url", ["s3", BUCKETS[1]], indirect=True)
def test_a_child_of_a_process_that_used_a_bucket_reads_ranges_and_is_refused_the_rest(catalog, url):
    """What a model that was opened before is read by."""
    catalog.store.put("obj", os.urandom(20_000))
    catalog.store.put("short", b"x" * 100)
    argv = [sys.executable, "-W", "ignore", "-c", FORKED, url]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    code, _, found = done.stdout.partition(" ")
    assert code == "0", done.stderr
    *ranges, missing, short = json.loads(found)[:4]
    assert (ranges, missing, short) == ([True, True], "NotFoundError", "DamagedError")
    *others, listed, proxied = json.loads(found)[4:]
    assert set(others) == {proxied} == {"UnsupportedError"}
    assert listed == ("UnsupportedError" if url.startswith("s3:") else None)  # of Google, lists need no obstore


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


@FOLDER
def test_export_refuses_what_a_rename_cannot_take_the_place_of(store, tmp_path, monkeypatch):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    model, work = store.model("iris"), tmp_path / "work"
    names = ["bound", "disk", "here"]
    for name in names:
        (work / name).mkdir(parents=True)
    (work / "way").symlink_to(".")
    subprocess.run(["mount", "--bind", work / "bound", work / "bound"], check=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "floe-test", work / "disk"], check=True)
        try:
            for target in (work / "bound", work / "disk", work / "way" / "disk"):
                with pytest.raises(BadInputError, match="mounted") as refused:
                    model.export(target)
                assert "below it" in refused.value.hint
            assert list((work / "disk").iterdir()) == []
            assert model.export(work / "disk" / "new").files == 5
        finally:
            subprocess.run(["umount", work / "disk"], check=True)
    finally:
        subprocess.run(["umount", work / "bound"], check=True)
    monkeypatch.chdir(work / "here")  # who stands in it would see the old one, empty
    for target in (".", "", work / "here", work / "way" / "here"):
        with pytest.raises(BadInputError, match="current directory") as refused:
            model.export(target)
        assert "below it" in refused.value.hint
    assert sorted(path.name for path in work.iterdir()) == [*names, "way"]
    assert model.export("new").directory == work / "here" / "new"


@FOLDER
def test_an_export_that_is_interrupted_ends_at_once(store, tmp_path, monkeypatch):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    monkeypatch.setattr(export, "_PIECE", 16 << 10)
    written = []

    def advance(_):
        written.append(1)
        if len(written) == 20:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.01)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            store.model("iris").export(tmp_path / "out", progress=SimpleNamespace(total=print, advance=advance))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(written) < 120  # of 850
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "node", "store"]


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


@NOT_MEMORY
def test_fsspec_lists_what_is_beside_a_link_that_leads_nowhere(store, options, tmp_path):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris")
    model = store.model("iris")
    store.close()
    files = FloeFileSystem(**options, skip_instance_cache=True)
    stat = type(model).stat

    def broken(self, path=""):  # no push takes such a link; weights that were detached from an image bring theirs
        if path == "sub/up":
            raise BadInputError("'sub/up' leads out of iris")
        return stat(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "stat", broken)
        assert sorted(files.ls("iris:latest/sub", detail=False)) == ["iris:latest/sub/table.csv", "iris:latest/sub/up"]
        assert "iris:latest/sub/table.csv" in files.find("iris:latest")
        assert {one["type"] for one in files.ls("iris:latest/sub") if one["name"].endswith("up")} == {"other"}
    with files.open("iris:latest/config.json") as file:
        inner = file.raw._file
    assert inner.closed
    files._store.close()


@FOLDER
def test_fsspec_goes_through_no_link_that_leads_back_up(store, options, tmp_path):
    make(tmp_path / "m")
    for name, target in (("a", "."), ("b", "."), ("sub/back", "..")):
        (tmp_path / "m" / name).symlink_to(target)
    store.push(tmp_path / "m", "iris:v1")
    names = {f"iris:v1/{entry.path}" for entry in store.model("iris:v1").walk() if entry.kind != "directory"}
    store.close()
    files = FloeFileSystem(**options, skip_instance_cache=True)
    bounded, listings = files.ls, []

    def ls(*given, **named):
        listings.append(given)
        assert len(listings) < 100, "it never ends"
        return bounded(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "ls", ls)
        found = files.find("iris:v1", detail=True)
        assert set(found) == names
        for name in ("a", "b", "sub/back"):
            assert (found[f"iris:v1/{name}"]["type"], found[f"iris:v1/{name}"]["islink"]) == ("other", True)
        assert files.glob("iris:v1/**/table.csv") == ["iris:v1/sub/table.csv"]
        assert [path for path, _, _ in files.walk("iris:v1")] == ["iris:v1", "iris:v1/sub"]
        sizes = [path.stat().st_size for path in (tmp_path / "m").rglob("*") if path.is_file()]
        assert files.du("iris:v1") == sum(sizes)
        files.get("iris:v1", str(tmp_path / "got"), recursive=True)
    assert (tmp_path / "got" / "sub" / "table.csv").read_text() == "a,b\n1,2\n3,4\n"
    assert list((tmp_path / "got" / "a").iterdir()) == []
    # The path itself is a directory still.
    assert files.isdir("iris:v1/a")
    assert "iris:v1/sub/back/config.json" in files.ls("iris:v1/sub/back", detail=False)
    assert files.cat_file("iris:v1/a/b/config.json") == b'{"hidden": 128}'
    files._store.close()


@FOLDER
def test_fsspec_reads_blocks_and_knows_no_file_that_is_missing(store, options, tmp_path):
    make(tmp_path / "m")
    pushed = store.push(tmp_path / "m", "org/iris:v1")
    store.close()
    files = FloeFileSystem(**options, skip_instance_cache=True)
    table = "org/iris:v1/sub/table.csv"
    assert files.read_block(table, 4, 100) == b"1,2\n3,4\n"
    assert files.read_block(table, 0, None) == b"a,b\n1,2\n3,4\n"
    assert files.read_block(table, 1, 4, b"\n") == b"1,2\n"
    assert files.created(table).isoformat().startswith(pushed.created[:19])
    assert files.modified(table).timestamp() == pytest.approx(files.info(table)["mtime"], abs=1e-5)
    assert files.ukey("floe://org/iris:v1/sub/up") == f"{pushed.digest}/sub/up"
    assert files.ukey("floe://org") == "org"
    for ask in (files.created, files.modified, files.ukey):
        for path in ("org/iris:v1/no", "org/no:v1/config.json", "no"):
            with pytest.raises(FileNotFoundError, match=path):
                ask(path)
    files._store.close()


WRITING = {
    "open": lambda files, path: files.open(path, "wb"),
    "open+": lambda files, path: files.open(path, "r+b"),
    "append": lambda files, path: files.open(path, "a"),
    "mkdir": lambda files, path: files.mkdir(path, create_parents=False),
    "makedir": lambda files, path: files.makedir(path),
    "makedirs": lambda files, path: files.makedirs(path, exist_ok=True),
    "mkdirs": lambda files, path: files.mkdirs(path),
    "rmdir": lambda files, path: files.rmdir(path),
    "rm": lambda files, path: files.rm(path, recursive=True),
    "rm of many": lambda files, path: files.rm([path]),
    "rm_file": lambda files, path: files.rm_file(path),
    "delete": lambda files, path: files.delete(path),
    "cp_file": lambda files, path: files.cp_file(path, "iris:v1/b"),
    "copy": lambda files, path: files.copy("iris:v1/config.json", path),
    "copy of a directory": lambda files, path: files.copy("iris:v1/sub", path, recursive=True),
    "mv": lambda files, path: files.mv(path, "iris:v1/b"),
    "mv to itself": lambda files, path: files.mv(path, path),
    "put_file": lambda files, path: files.put_file(__file__, path),
    "put": lambda files, path: files.put(__file__, path),
    "put of a directory": lambda files, path: files.put(os.path.curdir, path, recursive=True),
    "pipe": lambda files, path: files.pipe({path: b"x"}),
    "pipe_file": lambda files, path: files.pipe_file(path, b"x", mode="create"),
    "write_text": lambda files, path: files.write_text(path, "x"),
    "write_bytes": lambda files, path: files.write_bytes(path, b"x"),
    "touch": lambda files, path: files.touch(path),
    "touch, truncating nothing": lambda files, path: files.touch(path, truncate=False),
}


@FOLDER
@pytest.mark.parametrize("verb", WRITING)
def test_fsspec_s_verbs_that_write_are_refused(store, options, tmp_path, verb):
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris:v1")
    store.close()
    files = FloeFileSystem(**options, skip_instance_cache=True)
    for path in ("iris:v1/config.json", "iris:v1/sub/new"):
        with pytest.raises(OSError, match=r"cannot .*read-only.*push another version") as refused:
            WRITING[verb](files, path)
        assert refused.value.errno == errno.EROFS
        assert path in str(refused.value)
    files._store.close()


@FOLDER
def test_fsspec_s_own_ways_of_reading(store, options, tmp_path):
    """By URL, ranges at once, pickled into other processes, and awaited: what pandas, datasets and dask do with it."""
    make(tmp_path / "m")
    store.push(tmp_path / "m", "iris:v1")
    store.close()
    url, large = "floe://iris:v1/large", (tmp_path / "m" / "large").read_bytes()
    with fsspec.open("floe://iris:v1/sub/table.csv", "rt", **options) as text:
        assert text.readlines() == ["a,b\n", "1,2\n", "3,4\n"]
    files, path = fsspec.url_to_fs(url, **options)
    starts, ends = [0, len(large) - 5, CHUNK - 1], [4, None, CHUNK + 1]
    wanted = [large[start:end] for start, end in zip(starts, ends, strict=True)]
    assert files.cat_ranges([path] * 3, starts, ends) == wanted
    (failure,) = files.cat_ranges(["iris:v1/no"], [0], [1], on_error="return")
    assert isinstance(failure, FileNotFoundError)
    assert pickle.loads(pickle.dumps(files)) is files  # one object for the same settings
    script = "import pickle, sys; print(len(pickle.load(sys.stdin.buffer).cat_file('iris:v1/large')))"
    argv = [sys.executable, "-c", script]
    done = subprocess.run(argv, input=pickle.dumps(files), capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, str(len(large)).encode()), done.stderr
    waiting = AsyncFileSystemWrapper(files, asynchronous=True)
    assert asyncio.run(waiting._cat_ranges([path] * 3, starts, ends)) == wanted
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
            b'{"__metadata__":null}',
            b'{"__metadata__":[1]}',
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


def test_tensors_for_torch_are_made_of_the_file_s_bytes_in_their_own_type(monkeypatch):
    """What torch is asked: no torch is installed here."""
    made = SimpleNamespace(reshape=lambda shape: ("shaped", shape))
    asked = []
    torch = SimpleNamespace(
        bfloat16="bf16",
        frombuffer=lambda data, dtype: asked.append((bytes(data), dtype)) or made,
        empty=lambda shape, dtype: ("empty", shape, dtype),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    header = json.dumps(
        {
            "a": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
            "none": {"dtype": "BF16", "shape": [0], "data_offsets": [4, 4]},
            "small": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [4, 5]},
        }
    ).encode()
    file = floe.SafeTensors(io.BytesIO(len(header).to_bytes(8, "little") + header + b"\1\2\3\4\5"))
    assert file.tensor("a", "torch") == ("shaped", (1, 2))
    assert asked == [(b"\1\2\3\4", "bf16")]
    assert file.tensor("none", "torch") == ("empty", (0,), "bf16")
    with pytest.raises(UnsupportedError, match="F8_E4M3"):  # which this torch is too old for
        file.tensor("small", "torch")
    with pytest.raises(BadInputError, match="jax"):
        file.tensor("a", "jax")


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
def test_a_copy_has_the_bytes_of_a_manifest_that_a_later_floe_wrote(store, catalog, tmp_path, flags):
    make(tmp_path / "m")
    pushed = store.push(tmp_path / "m", "iris")
    later = json.loads(bytes(catalog.manifest_bytes(pushed.digest))) | {"later": {"more": 1}}
    data = json.dumps(later).encode()
    digest = hexdigest(data)
    catalog.store.put(layout.manifest_key(digest), data)
    catalog.move_model(ModelRef("iris", "later"), digest, None)
    assert main(["model", "copy", "iris:later", f"file://{tmp_path}/away", *flags]) == 0
    copied = Catalog(open_store(f"file://{tmp_path}/away"), open_index(None))
    assert copied.resolve_model(ModelRef("iris", "later"))[0] == digest
    assert bytes(copied.manifest_bytes(digest)) == data
    copied.close()


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


@NOT_MEMORY
def test_what_a_tag_named_when_and_who_moved_it(store, catalog, tmp_path, flags, capsys):
    make(tmp_path / "m")
    first = store.push(tmp_path / "m", "org/iris:v1")
    store.push(tmp_path / "m", "org/iris:v1")  # which moves nothing
    (tmp_path / "m" / "new").write_bytes(b"new")
    second = store.push(tmp_path / "m", "org/iris:v1")
    assert main(["model", "tag", f"org/iris@{first.digest}", "org/iris:live", *flags]) == 0
    assert main(["model", "tag", "org/iris:v1", "iris:v1", *flags]) == 0
    capsys.readouterr()

    def history(name, code=0):
        assert main(["model", "history", name, "--json", *flags]) == code
        return json.loads(capsys.readouterr().out)

    now, before = history("org/iris:v1")
    assert (now["manifest"], before["manifest"]) == (second.digest, first.digest)
    assert (now["since"], now["until"]) == (second.updated, None)
    assert (before["since"], before["until"]) == (first.updated, second.updated)
    assert [move["stored"] for move in (now, before)] == [True, True]
    assert all(move["by"].endswith(f"@{socket.gethostname()}") for move in (now, before))
    assert sorted((move["ref"], move["until"] is None) for move in history("Org/Iris")) == [
        ("org/iris:live", True),
        ("org/iris:v1", False),
        ("org/iris:v1", True),
    ]
    # Back to what it was, by what the history says.
    assert main(["model", "tag", f"org/iris@{before['manifest']}", "org/iris:v1", *flags]) == 0
    capsys.readouterr()
    assert [move["manifest"] for move in history("org/iris:v1")] == [first.digest, second.digest, first.digest]
    catalog.store.delete(layout.manifest_key(second.digest))
    assert [move["stored"] for move in history("org/iris:v1")] == [True, False, True]
    assert main(["model", "history", "org/iris", *flags]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["TAG", "DIGEST", "SINCE", "UNTIL", "BY", "STORED"]
    assert sum(second.digest in line and line.endswith("no") for line in table) == 1
    assert sum(" now " in line for line in table) == 2
    for name, code in (("org/iris:v9", 1), ("nobody", 1), (f"org/iris@{first.digest}", 2)):
        assert main(["model", "history", name, *flags]) == code
        assert "hint" in capsys.readouterr().err
    catalog.store.put("refs/models/org/iris/spoilt", b"{]")
    assert len(history("org/iris", code=1)) == 4


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
