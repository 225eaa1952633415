"""install/gke, read by the programs that its files are for: systemd, Packer, containerd and Floe's own command."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.containerd import HOST_PATH, each_version

INSTALL = Path(__file__).resolve().parents[2] / "install"
GKE = INSTALL / "gke"
CONFIGS = Path(__file__).with_name("configs")


@pytest.mark.skipif(not shutil.which("systemd-analyze", path=HOST_PATH), reason="no systemd-analyze on this machine")
def test_systemd_reads_the_units(tmp_path):
    """As extras.sh puts them into a host, with the units that they stand between."""
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    subprocess.run([GKE / "extras.sh", "install", tmp_path, "runc-floe"], check=True, timeout=30)
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for path in (INSTALL / "systemd").iterdir():
        shutil.copy(path, units)
    (units / "containerd.service").write_text("[Service]\nExecStart=/usr/local/bin/floe\n")
    for path in units.rglob("*"):
        if path.is_file() and not path.is_symlink():
            text = path.read_text().replace("/usr/local/bin/floe", str(program))
            path.write_text(text.replace("/opt/floe-planted/copy-cache.sh", str(program)))
    for name in ("floe-planted.service", "containerd.service"):
        verified = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", units / name], capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"},
        )  # fmt: skip
        ours = [line for line in verified.stderr.splitlines() if str(units) in line or "floe" in line]
        assert (verified.returncode, ours) == (0, []), verified.stderr


@pytest.mark.skipif(not shutil.which("packer"), reason="no packer on this machine; tests/unit parses the definition")
def test_packer_accepts_the_definition(tmp_path):
    """Without its first block: what that asks for comes from the network."""
    tree = tmp_path / "install"
    shutil.copytree(INSTALL, tree)
    for name in ("bootstrap-node.sh", "bootstrap"):  # what it copies must be there
        if not (tree / name).exists():
            (tree / name).touch()
    (tmp_path / "wheels").mkdir()
    definition = tree / "gke/floe-node.pkr.hcl"
    definition.write_text(re.sub(r"^packer \{.*?^\}$", "", definition.read_text(), flags=re.DOTALL | re.MULTILINE))
    given = {"project_id": "p", "zone": "europe-west4-a", "source_image": "ubuntu-gke", "wheels": tmp_path / "wheels"}
    words = [word for name, value in given.items() for word in ("-var", f"{name}={value}")]
    done = subprocess.run(
        ["packer", "validate", *words, definition], capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "CHECKPOINT_DISABLE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@each_version()
def test_what_runs_before_containerd_puts_floe_back_each_time_the_file_is_written_anew(version, tmp_path):
    """The drop-in's command as it stands, on files as GKE writes them; with --runtime only where containerd knows such."""
    host = tmp_path / "host"
    (host / "etc").mkdir(parents=True)
    subprocess.run([GKE / "extras.sh", "install", host, "none"], check=True, timeout=30)
    drop_in = (host / "etc/systemd/system/containerd.service.d/50-floe.conf").read_text()
    prefix = "ExecStartPre=-/usr/local/bin/floe "
    (words,) = (line.removeprefix(prefix).split() for line in drop_in.splitlines() if line.startswith(prefix))
    file = tmp_path / "config.toml"
    more = ["--containerd-config", file, "--containerd", version.bin / "containerd", "--config", ""]
    for name in ("gke", "gke-streaming", "gke"):  # three boots
        file.write_text((CONFIGS / f"{name}.toml").read_text())
        for changed in (True, False):  # containerd may be started more than once in one
            before = file.read_text()
            done = subprocess.run(
                [sys.executable, "-m", "floe", *words, *more], capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode == 0, done.stderr
            assert (file.read_text() != before) == changed
        assert 'snapshotter = "floe"' in file.read_text()


def test_extras_refuse_what_they_do_not_know(tmp_path):
    (tmp_path / "etc").mkdir()
    for words in (
        ["install"],
        ["remove"],
        ["instal", tmp_path],
        ["install", tmp_path / "nothing"],
        ["install", tmp_path, "a; b"],
    ):
        done = subprocess.run([GKE / "extras.sh", *words], capture_output=True, text=True, check=False, timeout=30)
        assert (done.returncode, done.stderr.startswith("usage: ")) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["etc"]
