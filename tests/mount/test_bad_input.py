"""Bad input through the command: one line that names the thing, a hint, the exit code, nothing published by half.

Beside every case another model of the same store is mounted, whose content has not been fetched yet: after the case it
is read a piece further.
"""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support import images, seaweed
from support.floe_node import Node, wait_until

from floe.store.objects import open_store

MIB = 1 << 20
PIECES = 64
NOWHERE = "s3://bucket/prefix?endpoint=http://127.0.0.1:1&region=r&path_style=true"
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_EC2_METADATA_DISABLED": "true"}
# Root, but bound by permissions like everybody else.
AS_ANYBODY = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")


@pytest.fixture
def target(world):
    """A mountpoint; what a test leaves there is unmounted."""
    place = world.home / "mnt"
    yield place
    if place.exists():
        subprocess.run(["umount", place], check=True)
        place.rmdir()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(5 * MIB))
    (folder / "config.json").write_text(os.urandom(8).hex())
    return folder


# -- what is pushed ----------------------------------------------------------------------------------------------------


@pytest.mark.one_store
def test_no_such_directory(world, tmp_path):
    missing = tmp_path / "missing"
    world.fails("model", "push", missing, "iris", code=1, names=["no directory", missing], hint="check the path")


@pytest.mark.one_store
def test_an_empty_directory(world, tmp_path):
    (tmp_path / "empty" / "below").mkdir(parents=True)
    world.fails(
        "model",
        "push",
        tmp_path / "empty",
        "iris",
        code=2,
        names=[tmp_path / "empty", "no file"],
        hint="check the path",
    )


@pytest.mark.one_store
@pytest.mark.parametrize("name", ["iris!", "Iris", "_iris", "iris:-v1", "iris:", "a" * 64, ""])
def test_a_bad_name_or_tag(world, model, name):
    world.fails("model", "push", model, name, code=2, names=[repr(name), "not valid"], hint="lower case")
    world.fails("model", "mount", name, model.parent / "mnt", code=2, names=[repr(name)], hint="lower case")
    world.fails("model", "push", model, "a/b/c", code=2, names=["'a/b/c'", "not valid"], hint="[ORG/]NAME")


@pytest.mark.one_store
def test_an_unreadable_file(world, model):
    (model / "secret").write_text("x")
    (model / "secret").chmod(0)
    world.fails(*("model", "push", model, "iris"), code=1, names=[model / "secret"], hint="may read", prefix=AS_ANYBODY)
    (model / "secret").unlink()
    (model / "closed").mkdir(mode=0)
    world.fails(*("model", "push", model, "iris"), code=1, names=[model / "closed"], hint="may read", prefix=AS_ANYBODY)


def grown(path):
    with path.open("ab") as file:
        file.write(b"more")


def shrunk(path):
    os.truncate(path, 3 * MIB)


def rewritten(path):
    with path.open("r+b") as file:
        file.write(b"other")


def replaced(path):
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [grown, shrunk, rewritten, replaced, os.unlink])
def test_a_file_that_changes_during_the_push(world, model, change):
    # Large enough that the push is still reading when it is stopped, right after it has looked at all files.
    block = os.urandom(MIB)
    with (model / "a").open("wb") as file:
        for number in range(160):
            file.write(number.to_bytes(8, "big") + block[8:])

    def change_it(process):
        spool = world.cache / "spool"
        until = time.monotonic() + 30
        while not (spool.is_dir() and any(spool.iterdir())):
            assert process.poll() is None
            assert time.monotonic() < until
        process.send_signal(signal.SIGSTOP)
        change(model / "weights")
        process.send_signal(signal.SIGCONT)

    world.fails(
        *("model", "push", model, "iris"), code=1, names=[model, "while it was read"], hint="again", meanwhile=change_it
    )
    assert "iris:latest" not in [listed["ref"] for listed in world.json("model", "ls")]


# -- where it is stored ------------------------------------------------------------------------------------------------


@pytest.mark.one_store
def test_an_unreachable_store(world, model, tmp_path):
    environ = {**KEYS, "FLOE_STORE": NOWHERE}
    for argv in (
        ("model", "push", model, "iris"),
        ("model", "ls"),
        ("model", "mount", "other", tmp_path / "mnt"),
        ("image", "index", images.build_oci(tmp_path / "image", [images.files({"x": "y"})]).source),
    ):
        world.fails(*argv, code=1, names=["s3://bucket/prefix"], hint="http://127.0.0.1:1", environ=environ)
    assert not (tmp_path / "mnt").exists()


@pytest.fixture
def bucket(world, model, monkeypatch):
    """A store in S3 with a model in it: the environment that names it, and its objects."""
    server = seaweed.running()
    environ = server.environment() | {
        "FLOE_STORE": server.url(server.bucket(), "models"),
        "FLOE_INDEX": "none",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    with world.command("model", "push", model, "there", environ=environ) as process:
        assert process.communicate()[1] == ""
    with contextlib.closing(open_store(environ["FLOE_STORE"])) as store:
        before = sorted((info.key, info.size) for info in store.list(""))
        yield environ
        assert sorted((info.key, info.size) for info in store.list("")) == before


@pytest.mark.one_store
@pytest.mark.parametrize(
    "wrong",
    [
        {"AWS_SECRET_ACCESS_KEY": "wrong"},
        {"AWS_ACCESS_KEY_ID": "nobody"},
        {"AWS_ACCESS_KEY_ID": seaweed.READER_KEY, "AWS_SECRET_ACCESS_KEY": seaweed.READER_SECRET},
    ],
)
def test_wrong_credentials(world, model, bucket, wrong):
    (model / "config.json").write_text("changed")
    world.fails(
        *("model", "push", model, "there"), code=1, names=["s3://"], hint="access key", environ={**bucket, **wrong}
    )


@pytest.mark.one_store
def test_no_such_bucket(world, model, bucket):
    environ = {**bucket, "FLOE_STORE": bucket["FLOE_STORE"].replace("/models", "-not/models")}
    for argv in (("model", "push", model, "there"), ("model", "ls")):
        world.fails(*argv, code=1, names=["-not"], hint="create the bucket", environ=environ)


@pytest.mark.one_store
def test_a_store_below_a_file(world, model, tmp_path):
    (tmp_path / "file").touch()
    environ = {"FLOE_STORE": f"file://{tmp_path}/file/store", "FLOE_INDEX": "none"}
    world.fails(
        *("model", "push", model, "iris"), code=1, names=[tmp_path / "file/store"], hint="another", environ=environ
    )


# -- what the store holds ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flipped(world, key, at=-1):
    """One bit of an object is wrong; afterwards it is as it was, if nobody made it so before."""
    whole = world.objects.read(key)
    damaged = bytearray(whole)
    damaged[at] ^= 1
    world.objects.write(key, bytes(damaged))
    yield whole
    world.objects.write(key, whole)


def key_of(world, kind, name):
    """The key of the object `name` among those of a kind."""
    return next(key for key in world.objects.fingerprints() if key.startswith(f"{kind}/") and key.endswith(f"/{name}"))


@pytest.mark.parametrize("kind", ["manifests", "trees", "indexes"])
def test_a_damaged_object_is_named_and_pushing_again_repairs_it(world, model, target, kind):
    shown = world.json("model", "push", model, "victim")
    name = {"manifests": shown["manifest"], "trees": shown["tree"], "indexes": shown["packs"][0]["id"]}[kind]
    with flipped(world, key_of(world, kind, name)):
        world.fails("model", "mount", "victim", target, code=1, names=[name], hint="push its model")
        assert not target.exists()
        world.floe("model", "push", model, "victim")
        world.floe("model", "mount", "victim", target)
        assert (target / "weights").read_bytes() == (model / "weights").read_bytes()
        world.floe("umount", target)


def test_a_damaged_tag_and_a_damaged_store_record(world, model):
    world.floe("model", "push", model, "victim")
    with flipped(world, "refs/models/_/victim/latest"):
        world.fails("model", "show", "victim", code=1, names=["refs/models/_/victim/latest"], hint="push its model")
        assert world.json("model", "push", model, "victim")["ref"] == "victim:latest"
        world.floe("model", "show", "victim")
    with flipped(world, "floe.json", 3):
        world.fails("model", "ls", code=1, names=["floe.json"], hint="delete it")
        world.objects.delete("floe.json")
        world.floe("model", "push", model, "victim")
        assert len(world.json("model", "ls")) >= 2


def test_a_damaged_frame_fails_its_readers_alone(world, model, target):
    pushed = world.json("model", "push", model, "victim")
    pack = pushed["packs"][0]["id"]
    key = key_of(world, "packs", pack)
    world.floe("model", "mount", "victim", target)
    with flipped(world, key, 3 * MIB + 5):
        with pytest.raises(OSError, match=r"Input/output error") as caught:
            (target / "weights").read_bytes()
        assert caught.value.errno == errno.EIO
        assert (target / "config.json").read_text() == (model / "config.json").read_text()
        with (target / "weights").open("rb") as file:
            assert os.pread(file.fileno(), 4096, 0) == (model / "weights").read_bytes()[:4096]
        told = (world.run_dir / "packfs.log").read_text()
        assert f"pack {pack}" in told
        assert "; push its model or index its image again with --verify" in told
        argv = [sys.executable, "-m", "floe", "model", "verify", "victim"]
        found = subprocess.run(argv, env=world.environ, capture_output=True, text=True, check=False, timeout=60)
        assert found.returncode == 3
        assert pack in found.stdout
        assert "push it again with --verify" in found.stderr
        # What the hints say.
        assert f"healed pack {pack}" in world.floe("model", "push", model, "victim", "--verify").stdout
        world.floe("model", "verify", "victim")
        # Damage is believed in for a minute, by the worker that saw it.
        os.kill(int((world.run_dir / "worker.pid").read_text()), signal.SIGKILL)
        assert (target / "weights").read_bytes() == (model / "weights").read_bytes()
    world.floe("umount", target)


# -- the node ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.one_store
def test_a_full_spool(world, model, small_disk):
    environ = {"FLOE_SPOOL_DIR": str(small_disk / "spool")}
    world.fails(
        *("model", "push", model, "iris"),
        code=1,
        names=[small_disk, "no space left"],
        hint="--spool-dir",
        environ=environ,
    )
    assert list((small_disk / "spool").iterdir()) == []


@pytest.mark.one_store
def test_a_full_store(world, model, small_disk):
    environ = {"FLOE_STORE": f"file://{small_disk}/store", "FLOE_INDEX": "none"}
    world.fails(
        *("model", "push", model, "iris"), code=1, names=[small_disk, "no space left"], hint="free", environ=environ
    )
    assert not (small_disk / "store/refs").exists()


def test_a_full_cache_directory(world, tmp_path, small_disk):
    (tmp_path / "node").mkdir()
    node = Node(tmp_path / "node")
    node.environ |= {key: value for key, value in world.environ.items() if key.startswith("AWS_")}
    node.environ |= {"FLOE_CACHE_DIR": str(small_disk / "cache"), "FLOE_STORE": world.environ["FLOE_STORE"]}
    mountpoint = node.home / "mnt"
    with contextlib.suppress(OSError), (small_disk / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    world.fails(
        *("model", "mount", "other", mountpoint),
        code=1,
        names=[small_disk, "full"],
        hint="free some space",
        environ=node.environ,
    )
    assert not mountpoint.exists()
    # With room for the metadata alone the model can be read: the cache is no condition.
    os.truncate(small_disk / "fill", MIB)
    try:
        node.floe("model", "mount", "other", mountpoint)
        for piece in ("40", "41", "42", "43", "44", "45"):
            assert (mountpoint / piece).read_bytes() == (world.source / piece).read_bytes()
        node.floe("umount", mountpoint)
        wait_until(lambda: not node.processes())
    finally:
        node.clean_up()


@pytest.mark.one_store
def test_a_busy_mountpoint(world, tmp_path):
    world.fails(
        "model", "mount", "other", world.other, code=1, names=[world.other, "mountpoint already"], hint="umount"
    )
    world.fails("model", "mount", "other", "/proc", code=1, names=["/proc"], hint="another directory")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    world.fails("model", "mount", "other", tmp_path / "full", code=2, names=[tmp_path / "full"], hint="empty directory")
    assert (tmp_path / "full" / "precious").read_text() == "x"
    with (world.other / "00").open("rb"):
        world.fails("umount", world.other, code=1, names=[world.other, "in use"], hint=f"pid {os.getpid()}")
    world.fails("umount", tmp_path / "full", code=1, names=[tmp_path / "full"], hint="floe status")


@pytest.mark.parametrize("name", ["nothing", "other:v9", f"other@{'0' * 64}"])
def test_no_such_model(world, tmp_path, name):
    for argv in (("mount", name, tmp_path / "mnt"), ("show", name), ("rm", name)):
        world.fails("model", *argv, code=1, names=[name], hint="")
    assert not (tmp_path / "mnt").exists()
