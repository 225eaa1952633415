"""The DaemonSet's installer with the real bootstrap-node.sh, on a host whose root is a directory: a chroot."""

import json
import os
import subprocess

import pytest
from support.containerd import versions
from support.own_root import ROOT, OwnRoot

NODE_SH = ROOT / "install/kubernetes/node.sh"
CONTAINERD = "/etc/containerd/config.toml"
THEIRS = "# theirs\nversion = 3\n"


@pytest.fixture
def host(tmp_path):
    """A host with a containerd that knows runtimes, and an earlier build of this Floe, so that none is built."""
    program = next((one.bin / "containerd" for one in versions() if one.is_2), None)
    if program is None:
        pytest.skip("there is no containerd 2.x on this machine")
    with OwnRoot(tmp_path) as host:
        host.put_program()
        host.path("/usr/local/bin/containerd").unlink(missing_ok=True)
        host.path("/usr/local/bin/containerd").symlink_to(program)
        host.write(CONTAINERD, THEIRS)
        yield host


def node_sh(host, *words, **more):
    """As in the pod: the host's root is elsewhere, and so are wheels and Secret."""
    for name in ("wheels", "secrets"):
        (host.scratch / name).mkdir(exist_ok=True)
    (host.scratch / "wheels/other-1-py3-none-any.whl").touch()
    places = {"HOST": host.root, "WHEELS": host.scratch / "wheels", "SECRETS": host.scratch / "secrets"}
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("FLOE_", "GCE_METADATA_"))}
    environ |= {f"FLOE_NODE_{name}": str(path) for name, path in places.items()} | more
    done = subprocess.run(
        host.beside(NODE_SH, *words), capture_output=True, text=True, check=False, timeout=100, env=environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installs_into_the_host_changes_nothing_twice_and_takes_all_back(host):
    before = host.changed()
    flags = ("install", "--image", "--runtime-handler", "runc-floe", "--disks", "none")
    (host.scratch / "secrets").mkdir()
    (host.scratch / "secrets/aws-credentials").write_text("[default]\n")
    said = node_sh(host, *flags, FLOE_STORE="s3://bucket/x", FLOE_LOG_LEVEL="debug")
    assert f"put Floe into {CONTAINERD}" in said
    assert 'log_level = "debug"' in host.path("/etc/floe/config.toml").read_text()
    assert "s3://bucket/x" in host.path("/etc/floe/config.toml").read_text()
    configured = host.path(CONTAINERD).read_text()
    assert configured.startswith("# theirs\n")
    assert "runc-floe" in configured
    assert (
        json.loads(host.path("/var/lib/floe/node/record.json").read_text())["asked"]["runtime_handler"] == "runc-floe"
    )
    for name in (
        "floe-packfs.service",
        "floe-packfs.service.d/secrets.conf",
        "floe-snapshotter.service",
        "floe-node.service",
    ):
        assert host.path(f"/etc/systemd/system/{name}").is_file()
    assert host.run("/usr/local/bin/floe", "version").returncode == 0
    assert not host.path("/var/lib/floe-bootstrap").exists()  # what was copied in to run from
    again = node_sh(host, *flags, FLOE_STORE="s3://bucket/x", FLOE_LOG_LEVEL="debug")
    assert "nothing was changed" in again
    # A setting that is no longer in the ConfigMap counts no more.
    node_sh(host, *flags, FLOE_STORE="s3://bucket/x")
    assert "log_level" not in host.path("/etc/floe/config.toml").read_text()
    node_sh(host, "uninstall")
    assert host.path(CONTAINERD).read_text() == THEIRS
    left = {name for name in set(host.changed()) - set(before) if not name.startswith((str(host.scratch), "/opt/floe"))}
    assert not [name for name in left if "floe" in name], left
