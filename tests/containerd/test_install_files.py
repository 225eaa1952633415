"""The files in install/ that an administrator copies, read by the programs they are for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.containerd import HOST_PATH, each_version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

INSTALL = Path(__file__).resolve().parents[2] / "install"


def dump(version, path):
    """What containerd makes of a configuration file."""
    command = [version.bin / "containerd", "--config", path, "config", "dump"]
    return tomllib.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)


@each_version()
def test_containerd_reads_its_configuration(version):
    found = dump(version, INSTALL / f"containerd/floe-{version.name[0]}.x.toml")
    floe = found["proxy_plugins"]["floe"]
    assert (floe["type"], floe["address"]) == ("snapshot", "/run/floe/snapshotter.sock")
    plugins = found["plugins"]
    if version.is_2:
        # With any other list containerd would copy layers, or expect of Floe what it does not do (`rebase`).
        assert floe["capabilities"] == ["remap-ids"]
        assert floe["exports"]["root"] == "/var/lib/floe/snapshotter"
        images = plugins["io.containerd.cri.v1.images"]
        assert (images["snapshotter"], images["discard_unpacked_layers"]) == ("floe", False)
        (unpack,) = plugins["io.containerd.transfer.v1.local"]["unpack_config"]
        assert unpack["snapshotter"] == "floe"
    else:
        assert not floe.get("capabilities")
        cri = plugins["io.containerd.grpc.v1.cri"]["containerd"]
        assert (cri["snapshotter"], cri["discard_unpacked_layers"]) == ("floe", False)


@pytest.mark.skipif(not shutil.which("systemd-analyze", path=HOST_PATH), reason="no systemd-analyze on this machine")
@pytest.mark.parametrize("unit", sorted(path.name for path in (INSTALL / "systemd").iterdir()))
def test_systemd_reads_the_units(unit, tmp_path):
    floe = tmp_path / "floe"
    floe.write_text("#!/bin/sh\n")
    floe.chmod(0o755)
    for path in (INSTALL / "systemd").iterdir():
        (tmp_path / path.name).write_text(path.read_text().replace("/usr/local/bin/floe", str(floe)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert unit not in verified.stderr, verified.stderr
    assert "Failed" not in verified.stderr
