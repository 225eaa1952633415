"""systemd's units of the daemons, as `systemctl show` has them, where systemd runs and they are installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from floe.doctor.finding import ERROR, OK, SKIPPED, WARNING, Finding, Node

_HOLD_MOUNTS = ("floe-packfs.service", "floe-snapshotter.service")
_AGENT = "floe-agent.service"
_UNITS = (*_HOLD_MOUNTS, "floe-csi.service", _AGENT)
_PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "NeedDaemonReload",
    "NRestarts",
    "KillMode",
    "Result",
)
_SECONDS = 10.0
_OFTEN = 3  # restarts since it was started by hand or at boot


def units(_node: Node, systemd: Path = Path("/run/systemd/system"), program: str = "systemctl") -> Iterator[Finding]:
    """Loaded, enabled, running, and such that stopping one ends no mount."""
    found = shutil.which(program)
    if not systemd.is_dir() or found is None:  # as sd_booted tells it
        yield Finding("systemd units", SKIPPED, "this machine was not booted by systemd")
        return
    command = [found, "show", f"--property={','.join(_PROPERTIES)}", *_UNITS]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_SECONDS, stdin=subprocess.DEVNULL
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(
            "systemd units", ERROR, f"{' '.join(command)} does not run: {error}", "systemctl is-system-running"
        )
        return
    if done.returncode != 0:
        text = f"{' '.join(command)} failed: {done.stderr.strip()[-300:] or 'it said nothing'}"
        yield Finding("systemd units", ERROR, text, "systemctl is-system-running")
        return
    for block in done.stdout.strip().split("\n\n"):
        shown = dict(line.partition("=")[::2] for line in block.splitlines())
        yield from _unit(shown.get("Id", "unknown"), shown)


def _unit(name: str, shown: dict[str, str]) -> Iterator[Finding]:
    load, active = shown.get("LoadState", ""), shown.get("ActiveState", "")
    if load == "not-found":
        yield Finding(name, SKIPPED, "not installed: the daemons are started in another way, or not at all")
        return
    if load == "masked":
        yield Finding(name, ERROR, "masked: it cannot be started", f"systemctl unmask {name}")
        return
    if load != "loaded":
        yield Finding(name, ERROR, f"systemd could not load it: {load}", f"systemd-analyze verify {name}")
        return
    problems = []
    if active == "failed":
        mend = f"journalctl -u {name} -n 50; then systemctl reset-failed {name} && systemctl start {name}"
        problems.append((ERROR, f"failed ({shown.get('SubState')})", mend))
    elif active == "activating" and shown.get("SubState") == "auto-restart":
        problems.append((ERROR, "ends as soon as it is started, again and again", f"journalctl -u {name} -n 50"))
    elif active == "inactive":
        if shown.get("Result") == "exec-condition":  # the agent's, where there is no fleet
            yield Finding(name, OK, "not needed here: this node's index is its own")
            return
        problems.append((WARNING, "not running", f"systemctl start {name}"))
    if shown.get("UnitFileState") == "disabled":
        problems.append((WARNING, "disabled: it does not start at boot", f"systemctl enable {name}"))
    if shown.get("KillMode") != "process" and name != _AGENT:
        text = (
            f"KillMode is {shown.get('KillMode')}: a stop ends mount processes and workers that containers read through"
        )
        problems.append((ERROR, text, f"take KillMode out of its drop-ins: systemctl cat {name}"))
    if shown.get("NeedDaemonReload") == "yes":
        problems.append((WARNING, "its file was changed since systemd read it", "systemctl daemon-reload"))
    restarts = shown.get("NRestarts", "")
    if restarts.isdecimal() and int(restarts) >= _OFTEN and active == "active":
        text = f"systemd restarted it {restarts} times since it was started"
        problems.append((WARNING, text, f"journalctl -u {name}; systemctl restart {name} begins counting anew"))
    for level, text, mend in problems:
        yield Finding(name, level, text, mend)
    if not problems:
        yield Finding(name, OK, f"{active}, {shown.get('UnitFileState') or 'of no file'}")
