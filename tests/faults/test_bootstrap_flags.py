"""bootstrap-node.sh with what cannot be meant: refused before anything is changed; and with --dry-run: nothing is."""

import fcntl
import json
import shutil
import zipfile
from http.server import BaseHTTPRequestHandler

import pytest
from support.loopback import Loopback
from support.own_root import ROOT, OwnRoot

RECORD = "/var/lib/floe/node/record.json"
PREPARE = ("--yes", "--image", "--disks", "none")
# Flags, and what is said of them. What a flag says about itself needs no look at the machine.
FLAGS = [
    (("--stoer", "s3://b"), "unrecognized arguments: --stoer"),
    (("--offl", "/srv"), "unrecognized arguments: --offl"),  # no abbreviations
    (("s3://bucket",), "unrecognized arguments: s3://bucket"),
    (("--store",), "--store: expected one argument"),
    (("--raid0=yes",), "--raid0: ignored explicit argument 'yes'"),
    (("--disks", ""), "--disks: '' is no device"),
    (("--disks", "sda"), "--disks: 'sda' is no device"),
    (("--disks", "/dev/"), "--disks: '/dev/' is no device"),
    (("--disks", "/dev/../etc/passwd"), "--disks: '/dev/../etc/passwd' is no device"),
    (("--disks", "auto,/dev/sda"), "--disks: 'auto' is no device"),
    (("--disks", "/dev/sda, /dev/sdb"), "--disks: ' /dev/sdb' is no device"),
    (("--disks", "/dev/sda,/dev/sda"), "--disks names /dev/sda twice"),
    (("--disks", "/dev/sda", "--raid0"), "--raid0 needs at least two disks"),
    (("--disks", "none", "--raid0"), "--raid0 needs disks"),
    (("--disks", "auto", "--set", "cache_dir=/srv"), "--disks and --set cache_dir both say"),
    (("--set", "cache_size"), "--set: 'cache_size' is not KEY=VALUE"),
    (("--set", "=1"), "--set: '=1' is not KEY=VALUE"),
    (("--set", "Cache-Size=1"), "--set: 'Cache-Size=1' is not KEY=VALUE"),
    (("--set", "workers=1", "--set", "workers=2"), "--set: workers is given twice"),
    (("--store", "s3://b", "--set", "store=s3://b"), "--set: store is given twice"),
    (("--set", "root=/srv"), "--set: root stands in the units as well"),
    (("--set", "run_dir=/srv"), "--set: run_dir stands in the units as well"),
    (("--runtime-handler", ""), "--runtime-handler: '' is no name"),
    (("--runtime-handler", "Runc_Floe"), "--runtime-handler: 'Runc_Floe' is no name"),
    (("--runtime-handler", "x" * 64), "is no name of a runtime handler"),
    (("--containerd-config", ""), "--containerd-config: '' is no absolute path"),
    (("--containerd-config", "config.toml"), "--containerd-config: 'config.toml' is no absolute path"),
    (("--containerd-main", "config.toml"), "--containerd-main: 'config.toml' is no absolute path"),
    (("--source", ""), "--source: '' is no absolute path"),
    (("--source", "/nonexistent"), "--source: there is no /nonexistent"),
    (("--source", "/etc"), "--source: /etc is no checkout of Floe"),
    (("--source", "/etc/passwd"), "--source: passwd is no wheel of Floe"),
    (("--offline", "/nonexistent"), "--offline: there is no directory /nonexistent"),
    (("--offline", "/etc/passwd"), "--offline: there is no directory /etc/passwd"),
    (("--offline", "/usr/bin"), "--offline: there are no wheels in /usr/bin"),
    (("--host-root", "/nonexistent"), "--host-root: there is no directory /nonexistent"),
    (("--host-root", "/usr/bin"), "--host-root: /usr/bin is no root of a system"),
    (("--verify-image", "busybox"), "--image starts nothing"),
    (("--boot",), "--boot is how floe-node.service starts this"),
    (("--uninstall",), "--uninstall goes without --image, --disks"),
]
# Settings, of which Floe's own code judges; given as flags here.
SETTINGS = {
    "store": [
        ("", "--store: '' is of an unknown kind"),
        ("ftp://host/x", "--store: 'ftp://host/x' is of an unknown kind"),
        ("memory://", "--store: 'memory://' is of an unknown kind"),
        ("file://relative", "--store: 'file://relative' is of an unknown kind"),
        ("file:///a/../b", "--store: store address"),
        ("s3://", "--store: store address 's3://' has no valid bucket name"),
        ("s3://key:hunter2@bucket", "--store: an s3:// store address must not hold credentials"),
        ("s3://bucket?regoin=x", "--store: store address has an unknown option 'regoin'"),
        ("s3://bucket?ca=x.pem", "--store: store address has ca='x.pem', not an absolute path"),
        ("s3://bucket?endpoint=host", "--store: endpoint 'host' is not http"),
        ("gs://b", "--store: store address 'gs://b' has no valid bucket name"),
    ],
    "index": [
        ("", "--index: '' is of an unknown kind"),
        ("mysql://host", "--index: 'mysql://host' is of an unknown kind"),
        ("sqlite:/", "--index: index address 'sqlite:/' is not sqlite:/abs/path"),
        ("redis://", "--index: index address: '' is not HOST[:PORT]"),
        ("redis://host:port", "--index: index address: 'host:port' is not HOST[:PORT]"),
        ("redis://host/5", "--index: index address: only database 0"),
        ("redis://host?ca=/ca.pem", "--index: index address: the option 'ca' needs TLS"),
    ],
    "cache_size": [("many", "'many' is not a size"), ("", "'' is not a size"), ("101%", "'101%' is not a size")],
    "cache_dir": [("srv/cache", "'srv/cache' is not an absolute path"), ("", "'' is not a text")],
    "cache_dirs": [("srv", "'srv' is not a list of absolute paths")],
    "workers": [("0", "is not a whole number above 0")],
    "store_timeout": [("never", "'never' is not a number of seconds above 0")],
    "readahead": [("-1", "'-1' is not a size")],
    "loop": [("maybe", "'maybe' is not one of auto, always, never")],
    "model_policy": [("llama", "'llama' is not a list of tables")],
    "trusted_keys": [("a,,b", "")],
    "packfs_metrics": [("0.0.0.0:9100", "metrics are served on loopback only")],
    "snapshotter_metrics": [("host", "'host' is no metrics address")],
    "cache_sise": [("1", "there is no such setting")],
}


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    with OwnRoot(tmp_path_factory.mktemp("node")) as node:
        yield node


@pytest.fixture
def fresh(tmp_path):
    with OwnRoot(tmp_path) as node:
        yield node


def refused(node, *words, code=2, says="", **options):
    """The run ends with `code`, says what is wrong on what and what to do next, and changes nothing."""
    before = node.changed()
    done = node.bootstrap(*words, **options)
    assert (done.returncode, done.stdout) == (code, ""), done
    error, *more = done.stderr.splitlines()
    assert error.startswith("bootstrap-node: error: ")
    assert says in error
    hint = more[-1].partition("bootstrap-node: hint: ")[2]
    assert hint.strip(), done.stderr
    assert node.changed() == before
    return done


@pytest.mark.parametrize(("words", "says"), FLAGS, ids=[" ".join(words) for words, _ in FLAGS])
def test_a_wrong_flag(node, words, says):
    refused(node, *PREPARE, *words, says=says)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [(key, value, says) for key, wrong in SETTINGS.items() for value, says in wrong],
    ids=lambda text: text or "empty",
)
def test_a_wrong_setting(node, key, value, says):
    words = (f"--{key}", value) if key in ("store", "index") else ("--set", f"{key}={value}")
    done = refused(node, "--yes", "--image", *words, says=says)
    place = words[0] if key in ("store", "index") else f"--set {key}"
    assert f"error: {place}: " in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"FLOE_STORE": "ftp://host/x"}, "FLOE_STORE: 'ftp://host/x' is of an unknown kind"),
        ({"FLOE_STORE": "s3://"}, "FLOE_STORE: store address 's3://' has no valid bucket name"),
        ({"FLOE_INDEX": "redis://host:port"}, "FLOE_INDEX: index address"),
        ({"FLOE_CACHE_SIZE": "many"}, "FLOE_CACHE_SIZE: 'many' is not a size"),
        ({"FLOE_CACHE_DIR": "srv"}, "FLOE_CACHE_DIR: 'srv' is not an absolute path"),
        ({"FLOE_CACHE_DIR": "/srv", "FLOE_CACHE_DIRS": "/x:/srv"}, "/srv is named twice"),
        ({"FLOE_LOG_LEVEL": "loud"}, "FLOE_LOG_LEVEL: 'loud' is not one of"),
        ({"FLOE_STROE": "s3://bucket"}, "the environment variable FLOE_STROE is none of Floe's"),
        ({"FLOE_ROOT": "/srv"}, "environment: root stands in the units as well"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_variable(node, environ, says):
    refused(node, *PREPARE, environ=environ, says=says)


def test_a_flag_does_not_excuse_a_wrong_variable(node):
    refused(node, *PREPARE, "--store", "s3://bucket", environ={"FLOE_STORE": "ftp://x"}, says="FLOE_STORE: 'ftp://x'")


class Metadata(BaseHTTPRequestHandler):
    """An instance's attributes, as Google's server gives them."""

    def do_GET(self):
        body = json.dumps(self.server.attributes).encode()
        self.send_response(200)
        if self.server.flavor:
            self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def instance():
    with Loopback(Metadata) as server:
        server.attributes, server.flavor = {}, True
        server.environ = {"GCE_METADATA_HOST": f"127.0.0.1:{server.port}"}
        yield server


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("floe-store", "ftp://host/x", "instance metadata floe-store: 'ftp://host/x' is of an unknown kind"),
        ("floe-store", "s3://", "instance metadata floe-store: store address 's3://' has no valid bucket name"),
        ("floe-cache-size", "many", "instance metadata floe-cache-size: 'many' is not a size"),
        ("floe-root", "/srv", "instance metadata: root stands in the units as well"),
    ],
)
def test_wrong_metadata(node, instance, name, value, says):
    instance.attributes = {name: value, "ssh-keys": "somebody's"}
    refused(node, "--yes", environ=instance.environ, says=says)


def test_another_metadata_server_than_googles_is_said_and_not_believed(fresh, instance):
    instance.attributes, instance.flavor = {"floe-store": "s3://somebody-elses"}, False
    fresh.boots()
    done = fresh.bootstrap("--dry-run", environ=instance.environ)
    assert done.returncode == 0, done.stderr
    assert "warning: 127.0.0.1" in done.stdout
    assert "is no metadata server of Google's" in done.stdout
    assert "somebody-elses" not in done.stdout


def test_it_asks_nobody_where_there_is_no_terminal(node):
    refused(node, "--image", says="there is no terminal to ask at")


def test_json_needs_an_answer_beforehand(node):
    refused(node, "--json", "--image", says="--json asks no questions")


def test_whoever_is_not_root_is_told_so(node):
    before = node.changed()
    who = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set", "-all")
    done = node.run(*who, ROOT / "install/bootstrap-node.sh", "--dry-run", "--image")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: this needs root" in done.stderr
    assert "hint: run it again with sudo" in done.stderr
    assert node.changed() == before


def test_a_machine_that_systemd_does_not_run(node):
    refused(node, "--yes", code=1, says="systemd does not run here")


def test_two_wheels_of_floe(node):
    wheels = node.scratch / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        with zipfile.ZipFile(wheels / f"floe-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr("floe/__init__.py", "")
    refused(node, *PREPARE, "--offline", wheels, says="has 2 wheels of Floe")
    refused(node, *PREPARE, "--source", wheels / "floe-1.0-py3-none-any.whl", says="is no wheel of Floe")
    (wheels / "floe-2.0-py3-none-any.whl").write_bytes(b"no archive")
    refused(node, *PREPARE, "--source", wheels / "floe-2.0-py3-none-any.whl", says="is no wheel of Floe")


def test_a_directory_is_no_configuration_of_containerd(node):
    refused(node, *PREPARE, "--containerd-config", "/etc", says="--containerd-config: /etc is no file")
    refused(node, *PREPARE, "--containerd-main", "/etc", says="--containerd-main: /etc is no file")


@pytest.mark.parametrize(
    ("version", "words", "says"),
    [
        ("v1.5.9", (), "is none that Floe knows"),
        ("v3.0.1", (), "is none that Floe knows"),
        ("1.6.20~ds1", ("--runtime-handler", "runc-floe"), "has one snapshotter for all runtimes"),
    ],
)
def test_another_containerd(fresh, version, words, says):
    fresh.write(
        "/opt/other/containerd", f"#!/bin/sh\necho containerd github.com/containerd/containerd {version} x\n", 0o755
    )
    path = f"/opt/other:{fresh.environ['PATH']}"
    refused(fresh, *PREPARE, *words, code=1, says=says, environ={"PATH": path})


@pytest.mark.parametrize("program", ["apt-get", "systemctl"])
def test_a_system_of_another_kind(fresh, program):
    for place in ("/usr/bin", "/bin"):
        fresh.path(f"{place}/{program}").unlink(missing_ok=True)
    refused(fresh, *PREPARE, code=1, says="this system has no apt-get or no systemctl")


def test_container_optimized_os(fresh):
    fresh.path("/etc/os-release").unlink()
    fresh.write("/etc/os-release", "NAME=x\nID=cos\n")
    refused(fresh, *PREPARE, code=1, says="Container-Optimized OS has no Python")


def test_an_older_python(fresh):
    fresh.write("/opt/other/python3", "#!/bin/sh\nexit 1\n", 0o755)
    fresh.path("/opt/other/dirname").symlink_to("/usr/bin/dirname")
    refused(fresh, *PREPARE, code=1, says="there is no Python 3.10 or later", environ={"PATH": "/opt/other"})


def test_a_settings_file_that_cannot_be_edited(fresh):
    fresh.write("/etc/floe/config.toml", 'cache_size = """\n80%"""\n')
    refused(fresh, *PREPARE, "--set", "cache_size=70%", code=1, says="cache_size has several lines")


@pytest.mark.parametrize(
    ("text", "says"), [("{", "record.json cannot be read"), ('{"version": 99}', "is of version 99, not 1")]
)
def test_a_record_that_is_not_understood(fresh, text, says):
    fresh.write("/var/lib/floe/node/record.json", text)
    refused(fresh, *PREPARE, code=1, says=says)
    refused(fresh, "--yes", "--uninstall", code=1, says=says)


def test_another_one_at_work(fresh):
    lock = fresh.write("/run/floe-bootstrap.lock", "")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(fresh, *PREPARE, code=1, says="another bootstrap-node.sh runs")
        assert lock.exists()
    assert fresh.bootstrap("--dry-run", *PREPARE[1:]).returncode == 0


# --dry-run


def unchanged(node, *words, **options):
    """What a dry run says; it changes nothing."""
    before = node.changed()
    done = node.bootstrap("--dry-run", *words, **options)
    assert done.returncode == 0, done.stderr
    assert node.changed() == before
    return done.stdout


def test_a_dry_run_on_a_new_machine(fresh, instance):
    instance.attributes = {"floe-index": "redis://index.example:6379", "floe-owner": "me"}
    fresh.boots()
    environ = {**instance.environ, "FLOE_CACHE_SIZE": "70%"}
    said = unchanged(fresh, "--store", "s3://bucket/prefix", "--disks", "none", environ=environ)
    for line in (
        "would install Floe ",
        "would set store = s3://bucket/prefix (flag)",
        "would set cache_size = 70% (environment)",
        "would set index = redis://index.example:6379 (metadata)",
        "would install and enable the units floe-agent.service, floe-packfs.service",
        "would put Floe into /etc/containerd/config.toml, for all pods",
        "would start the daemons",
        "note: instance metadata floe-owner is none of Floe's settings, and ignored",
    ):
        assert line in said


def test_a_dry_run_in_a_disk_image_and_as_json(fresh):
    said = json.loads(unchanged(fresh, "--image", "--json"))
    assert said["exit_status"] == 0
    assert "start nothing" in said["would"]


def test_a_dry_run_for_a_host_below_a_directory(fresh):
    # Programs of the host are found where systems have them, whatever the PATH here is.
    fresh.path("/usr/local/bin/containerd").symlink_to(shutil.which("containerd"))
    assert "would put Floe into" in unchanged(fresh, "--image", "--host-root", "/")


@pytest.mark.slow
def test_dry_runs_where_there_is_floe(fresh):
    assert "there is nothing to undo" in unchanged(fresh, "--uninstall")
    fresh.put_program()
    done = fresh.bootstrap(*PREPARE, "--store", "file:///srv/store")
    assert done.returncode == 0, done.stderr
    said = unchanged(fresh, "--image", "--store", "s3://another", "--disks", "auto", "--format")
    assert "would set store = s3://another (flag)" in said
    assert "would take Floe out of containerd's configuration" in unchanged(fresh, "--uninstall")
    # And a second run has nothing to do.
    before = fresh.changed()
    done = fresh.bootstrap(*PREPARE)
    assert "nothing was changed" in done.stdout
    assert {**fresh.changed(), RECORD: None} == {**before, RECORD: None}
