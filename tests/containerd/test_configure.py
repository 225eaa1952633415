"""`floe containerd` on real files of containerd, GKE, kubeadm and Debian, and containerd's own word about the outcome."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.blobhost import BlobHost
from support.containerd import Containerd, each_version, versions
from support.floe_daemons import Daemons
from support.images import build_oci, busybox, files
from support.mounts import until

from floe.cli.main import main
from floe.containerd.record import Kept

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parent / "configs"
INSTALL = Path(__file__).resolve().parents[2] / "install/containerd"
NAMES = [
    "default",
    "gke-streaming",
    "debian",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gke", "kubeadm")),
]
TWO = [version for version in versions() if version.is_2]
each_2 = pytest.mark.parametrize(
    "version", TWO or [pytest.param(None, marks=pytest.mark.skip("no containerd 2.x"))], ids=str
)


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    for name in [name for name in os.environ if name.startswith("FLOE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLOE_CONFIG", "")


@pytest.fixture
def floe(tmp_path, capsys):
    """Run `floe containerd ...` on config.toml of tmp_path: exit code, what --json says, stderr."""

    def run(version, *argv):
        binary = () if version is None else ("--containerd", str(version.bin / "containerd"))
        file = ("--containerd-config", str(tmp_path / "config.toml"))
        code = main(["containerd", argv[0], *file, *binary, *argv[1:], "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    run.file = tmp_path / "config.toml"
    return run


def ask(version, *argv):
    command = [version.bin / "containerd", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def dump(version, path):
    return tomllib.loads(ask(version, "--config", path, "config", "dump"))


def text_of(version, name):
    return ask(version, "config", "default") if name == "default" else (CONFIGS / f"{name}.toml").read_text()


def images_of(config):
    plugins = config["plugins"]
    return plugins.get("io.containerd.cri.v1.images") or plugins["io.containerd.grpc.v1.cri"]["containerd"]


def folder(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("name", NAMES)
@each_version()
def test_merged_undone_byte_for_byte_and_containerd_goes_by_it(version, name, floe, tmp_path):
    text = text_of(version, name)
    floe.file.write_text(text)
    floe.file.chmod(0o640)
    os.chown(floe.file, 7, 8)
    was = dump(version, floe.file)
    code, dry, err = floe(version, "configure", "--dry-run")
    assert (code, err, folder(tmp_path)) == (0, "", {"config.toml": text.encode()})
    assert dry["changed"]
    assert not dry["written"]
    code, found, err = floe(version, "configure")
    assert (code, err) == (0, "")
    assert (found["written"], found["diff"], found["next"]) == (True, dry["diff"], "systemctl restart containerd")
    assert found["verified"].startswith("verified")
    # Containerd goes by it, and by all else as before.
    now = dump(version, floe.file)
    assert now["proxy_plugins"]["floe"]["address"] == "/run/floe/snapshotter.sock"
    assert (images_of(now)["snapshotter"], images_of(now)["discard_unpacked_layers"]) == ("floe", False)
    if version.is_2:
        assert {"platform", "snapshotter"} <= set(
            now["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"][-1]
        )
    assert now.get("required_plugins") == was.get("required_plugins")
    runtime = "io.containerd.cri.v1.runtime" if version.is_2 else "io.containerd.grpc.v1.cri"
    assert now["plugins"][runtime]["containerd"]["runtimes"] == was["plugins"][runtime]["containerd"]["runtimes"]
    # No line of it is lost, but those of keys that have another value.
    diff = found["diff"].splitlines()
    removed = [line for line in diff if line.startswith("-") and not line.startswith("---")]
    assert all(any(key in line for key in ("snapshotter =", "discard_unp", "disable_snap")) for line in removed)
    made = floe.file.stat()
    assert (made.st_mode & 0o7777, made.st_uid, made.st_gid) == (0o640, 7, 8)
    assert Path(found["backup"]).read_text() == text
    # A second time there is nothing to do.
    files_now = folder(tmp_path)
    assert floe(version, "configure")[1]["changed"] is False
    assert folder(tmp_path) == files_now
    assert floe(version, "show")[1]["state"] == "configured"
    # Undone.
    assert floe(version, "unconfigure")[0] == 0
    assert folder(tmp_path) == {"config.toml": text.encode()}
    assert floe.file.stat().st_mode & 0o7777 == 0o640
    assert floe(version, "show")[1]["state"] == "not configured"
    assert floe(version, "unconfigure")[1]["changed"] is False


@each_2
def test_one_runtime_alone(version, floe):
    text = text_of(version, "default").replace("SystemdCgroup = false", "SystemdCgroup = true")
    floe.file.write_text(text)
    code, found, _ = floe(version, "configure", "--runtime", "runc-floe")
    assert code == 0
    assert any("runtime-handler" in note for note in found["notes"])
    now = dump(version, floe.file)
    runtimes = now["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]
    assert runtimes["runc-floe"] == {**runtimes["runc"], "snapshotter": "floe"}
    assert runtimes["runc-floe"]["options"]["SystemdCgroup"] is True
    assert images_of(now)["snapshotter"] == "overlayfs"
    assert images_of(now)["runtime_platforms"]["runc-floe"]["snapshotter"] == "floe"
    unpack = now["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"]
    assert [entry["snapshotter"] for entry in unpack] == ["overlayfs", "floe"]
    # From one runtime to all: as if the file had been put back in between.
    assert floe(version, "configure", "--default")[0] == 0
    assert images_of(dump(version, floe.file))["snapshotter"] == "floe"
    assert "runc-floe" not in floe.file.read_text()
    assert floe(version, "unconfigure")[0] == 0
    assert floe.file.read_text() == text


@each_version()
def test_a_file_that_is_not_there_is_made_and_taken_away(version, floe, tmp_path):
    code, found, _ = floe(version, "configure")
    assert (code, found["backup"]) == (0, None)
    assert images_of(dump(version, floe.file))["snapshotter"] == "floe"
    assert floe(version, "unconfigure")[0] == 0
    assert folder(tmp_path) == {}


@pytest.mark.parametrize("name", sorted(path.name for path in INSTALL.glob("*.toml")))
def test_the_examples_are_what_the_command_writes(name, floe, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    shown = {
        "floe-1.x.toml": "1.6",
        "floe-2.x.toml": "2.0",
        "floe-1.7-runtime.toml": "1.7",
        "floe-2.x-runtime.toml": "2.0",
    }
    runtime = ("--runtime", "runc-floe") if "runtime" in name else ()
    code = floe(
        None, "configure", "--containerd-version", shown[name], "--containerd", sys.executable, *runtime, "--dry-run"
    )
    assert code[0] == 0
    added = [line[1:] for line in code[1]["diff"].splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert tomllib.loads("\n".join(added)) == tomllib.loads((INSTALL / name).read_text())


REFUSED = {
    "nonsense = [": "not valid TOML",
    'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n': "switches CRI off",
    'version = 2\ndisabled_plugins = ["cri"]\n': "switches CRI off",
    'version = 2\n[proxy_plugins.floe]\ntype = "snapshot"\naddress = "/elsewhere"\n': "'/elsewhere'",
    'version = 2\n[proxy_plugins.floe]\ntype = "content"\naddress = "/run/floe/snapshotter.sock"\n': "'content'",
    'root = "/var/lib/containerd"\n': "version 1",
    "version = 1\n": "version 1",
    "version = 4\n": "version 4",
    'version = 2\nimports = ["/nowhere/there.toml"]\n': "/nowhere/there.toml",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
@each_version()
def test_what_is_refused_changes_nothing(version, text, floe, tmp_path):
    floe.file.write_text(text)
    code, found, err = floe(version, "configure")
    assert code in (1, 2)
    assert found is None
    assert REFUSED[text] in err
    assert "floe: hint: " in err
    assert folder(tmp_path) == {"config.toml": text.encode()}


@each_version()
def test_docker_s_package_is_refused(version, floe):
    floe.file.write_text(text_of(version, "docker"))
    code, _, err = floe(version, "configure")
    assert code == 1
    assert "config migrate" in err or "config default" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--runtime", "runc-floe", "--containerd-version", "1.6"], "one snapshotter for all runtimes"),
        (["--runtime", "runc-floe", "--containerd-version", "2.0"], "config migrate"),
        (["--runtime", "Runc Floe"], "no name of a runtime handler"),
        (["--containerd-version", "1.5"], "none that Floe knows"),
        (["--containerd-version", "3.0"], "none that Floe knows"),
        (["--containerd-version", "newest"], "names no version"),
        (["--containerd", "/nowhere/containerd"], "no containerd at"),
        (["--main", "/nowhere/main.toml", "--containerd-version", "1.7"], "/nowhere/main.toml"),
    ],
)
def test_wrong_flags_are_refused(argv, said, floe, tmp_path):
    floe.file.write_text("version = 2\n")
    code, _, err = floe(None, "configure", *argv)
    assert code in (1, 2)
    assert said in err
    assert folder(tmp_path) == {"config.toml": b"version = 2\n"}


def test_only_root_may_and_may_look(floe, monkeypatch):
    floe.file.write_text("version = 2\n")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert floe(None, "configure", "--dry-run", "--containerd-version", "1.7")[0] == 0
    code, _, err = floe(None, "configure", "--containerd-version", "1.7")
    assert code == 1
    assert "only root" in err
    assert floe.file.read_text() == "version = 2\n"


@each_version()
def test_imports_have_the_last_word_as_this_containerd_has_it(version, floe, tmp_path):
    (tmp_path / "conf.d").mkdir()
    number, place = (3, '"io.containerd.cri.v1.images"') if version.is_2 else (2, '"io.containerd.grpc.v1.cri".cni')
    drop_in = tmp_path / "conf.d/99-other.toml"
    drop_in.write_text(f"version = {number}\n[plugins.{place}]\n")
    floe.file.write_text(f'version = {number}\nimports = ["{tmp_path}/conf.d/*.toml"]\n')
    if version.is_2:  # merged, so that another key of the same table does no harm
        drop_in.write_text(drop_in.read_text() + "max_concurrent_downloads = 5\n")
        assert floe(version, "configure")[0] == 0
        assert images_of(dump(version, floe.file))["max_concurrent_downloads"] == 5
        assert floe(version, "unconfigure")[0] == 0
        drop_in.write_text(drop_in.read_text() + 'snapshotter = "other"\n')
    else:  # its table replaces that of the main file
        drop_in.write_text(drop_in.read_text() + 'bin_dir = "/x"\n')
    before = floe.file.read_bytes()
    code, _, err = floe(version, "configure")
    assert code == 1
    assert str(drop_in) in err.splitlines()[0]
    assert floe.file.read_bytes() == before
    # As the hint says: the drop-in itself, seen from the main file.
    code, found, err = floe(version, "configure", "--containerd-config", str(drop_in), "--main", str(floe.file))
    assert (code, err) == (0, "")
    assert found["verified"].startswith("verified")
    assert images_of(dump(version, floe.file))["snapshotter"] == "floe"
    assert floe.file.read_bytes() == before


@each_version()
def test_a_file_that_others_changed_keeps_their_lines(version, floe):
    text = text_of(version, "kubeadm")
    floe.file.write_text(text)
    assert floe(version, "configure")[0] == 0
    theirs = '\n[metrics]\n  address = "127.0.0.1:1338"\n'
    floe.file.write_text("# mine\n" + floe.file.read_text() + theirs)
    assert floe(version, "show")[1]["state"] == "changed since"
    code, found, _ = floe(version, "unconfigure")
    assert code == 0
    assert any("only Floe's own keys" in note for note in found["notes"])
    left = floe.file.read_text()
    assert left.startswith("# mine\n")
    assert theirs.strip() in left
    assert tomllib.loads(left) == tomllib.loads("# mine\n" + text + theirs)
    assert "floe" not in left


@each_version()
def test_a_value_that_others_gave_stays_and_a_file_written_anew_is_configured_again(version, floe):
    floe.file.write_text(text_of(version, "gke"))
    assert floe(version, "configure")[0] == 0
    configured = floe.file.read_text()
    floe.file.write_text(configured.replace('snapshotter = "floe"', 'snapshotter = "native"', 1))
    code, found, _ = floe(version, "unconfigure")
    assert code == 0
    assert any("was given another value" in note for note in found["notes"])
    assert 'snapshotter = "native"' in floe.file.read_text()
    # GKE writes its file at each boot: the record of the last one is for another file.
    floe.file.write_text(text_of(version, "gke"))
    assert floe(version, "configure")[0] == 0
    again = text_of(version, "gke-streaming")
    floe.file.write_text(again)
    assert floe(version, "configure")[0] == 0
    assert images_of(dump(version, floe.file))["snapshotter"] == "floe"
    assert floe(version, "unconfigure")[0] == 0
    assert floe.file.read_text() == again


@each_version()
def test_what_containerd_does_not_go_by_is_put_back(version, floe, tmp_path):
    """A containerd that says something else than it was told: the file is as it was."""
    text = text_of(version, "kubeadm")
    floe.file.write_text(text)
    other = tmp_path / "other"
    other.mkdir()
    program = other / "containerd"
    real = version.bin / "containerd"
    program.write_text(f'#!/bin/sh\n"{real}" "$@" | sed "s,/run/floe/snapshotter.sock,/run/else.sock,"\n')
    program.chmod(0o755)
    code, found, err = floe(None, "configure", "--containerd", str(program))
    assert (code, found) == (1, None)
    assert "proxy_plugins.floe.address" in err
    assert "put back" in err
    shutil.rmtree(other)
    assert folder(tmp_path) == {"config.toml": text.encode()}


@each_version()
def test_a_symlink_stays_one(version, floe, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (real / "there.toml").write_text("version = 2\n")
    floe.file.symlink_to(real / "there.toml")
    assert floe(version, "configure")[0] == 0
    assert floe.file.is_symlink()
    assert "floe" in (real / "there.toml").read_text()
    assert floe(version, "unconfigure")[0] == 0
    assert folder(real) == {"there.toml": b"version = 2\n"}


class Stop(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("command", ["configure", "unconfigure"])
def test_interrupted_anywhere_a_second_run_finishes(command, floe, tmp_path, monkeypatch):
    """The process is killed before and after each rename and removal: what lies there then is what the next run finds."""
    version = versions()[-1]
    text = text_of(version, "kubeadm")
    floe.file.write_text(text)
    assert floe(version, "configure")[0] == 0
    done = folder(tmp_path)
    start, end = (
        ({"config.toml": text.encode()}, done) if command == "configure" else (done, {"config.toml": text.encode()})
    )
    steps, crashes = 0, 0
    while True:
        for path in tmp_path.iterdir():
            path.unlink()
        for name, data in start.items():
            (tmp_path / name).write_bytes(data)
        count = 0

        def count_and_stop(of, *args, at=steps, **kwargs):
            nonlocal count
            if count >= at:  # also what would be done on the way out: a killed process does nothing
                raise Stop
            count += 1
            return of(*args, **kwargs)

        with monkeypatch.context() as patched:
            for name in ("replace", "unlink"):
                real = getattr(Path, name)
                patched.setattr(Path, name, lambda *a, _real=real, **k: count_and_stop(_real, *a, **k))
            try:
                floe(version, command)
                finished = True
            except Stop:
                finished = False
        crashes += not finished
        here = {name: data for name, data in folder(tmp_path).items() if not name.startswith(".")}
        assert here["config.toml"] in (start["config.toml"], end["config.toml"])
        if finished:
            break
        assert floe(version, command)[0] == 0
        assert {name: data for name, data in folder(tmp_path).items() if not name.startswith(".")} == end
        steps += 1
    assert crashes >= 3


def test_a_containerd_of_another_version_than_is_said_is_not_asked(floe):
    version = versions()[0]
    floe.file.write_text("version = 2\n")
    said = "1.7" if version.name != "1.7" else "1.6"
    code, found, err = floe(None, "configure", "--containerd-version", said)
    assert (code, err) == (0, "")
    assert (found["containerd_version"], found["verified"]) == (said, "not verified: there is no containerd to ask")


def test_directories_are_made_for_what_is_written_alone(floe, tmp_path):
    file = ("--containerd-config", str(tmp_path / "etc/containerd/config.toml"), "--containerd-version", "1.7")
    assert floe(None, "unconfigure", *file)[1]["changed"] is False
    assert floe(None, "configure", *file, "--main", "/nowhere/main.toml")[0] == 1
    assert folder(tmp_path) == {}
    assert floe(None, "configure", *file)[0] == 0
    assert (tmp_path / "etc/containerd/config.toml").exists()


def test_two_at_once_are_not_let_in(floe):
    floe.file.write_text("version = 2\n")
    with Kept(floe.file).locked():
        code, _, err = floe(None, "configure", "--containerd-version", "1.7")
    assert code == 1
    assert "another floe" in err


@pytest.fixture
def daemons(tmp_path):
    made = Daemons(tmp_path / "h")
    yield made
    made.close()


PODS = [
    pytest.param(
        version,
        runtime,
        id=f"{version}-{runtime or 'all'}",
        marks=[] if runtime else [pytest.mark.slow],
    )
    for version in versions()
    for runtime in ((None, "runc-floe") if version.is_2 else (None,))
] or [pytest.param(None, None, marks=pytest.mark.skip("no containerd here: run install/setup.sh test"))]


@pytest.mark.parametrize(("version", "runtime"), PODS)
def test_pods_start_lazily_with_what_it_wrote(version, runtime, daemons, tmp_path):
    registry = BlobHost()
    image = build_oci(tmp_path / "image", [busybox(), files({"etc/word": "lazy\n"})], tag="1")
    reference = registry.add(image, "app")
    daemons.floe("image", "index", "--plain-http", reference)
    fetched = registry.layers_fetched()
    containerd = Containerd(version, tmp_path, registries=(registry.address,))
    try:
        cri = containerd.cri()
        containerd.terminate()
        flags = ("--runtime", runtime) if runtime else ()
        daemons.floe(
            "containerd",
            "configure",
            "--containerd-config",
            containerd.config,
            "--containerd",
            version.bin / "containerd",
            *flags,
        )
        if not runtime:
            containerd.snapshotter = "floe"
        containerd.start()
        until(cri.ready)
        if not runtime:  # an image belongs to the snapshotter it was unpacked for
            containerd.ctr("images", "rm", "--sync", "floe.test/pause:1")
            cri = containerd.cri()
        cri.pull(reference, runtime=runtime)
        assert registry.layers_fetched() == fetched
        assert [info for info in daemons.client.list() if info.labels.get("containerd.io/snapshot.ref")]
        assert cri.run(cri.run_pod("p", runtime=runtime), reference, ["cat", "/etc/word"]) == (0, "lazy\n")
        assert registry.layers_fetched() == fetched
        cri.clean_up()
    finally:
        containerd.stop()
        registry.close()
