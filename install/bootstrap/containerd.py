"""containerd: Floe put into its configuration by Floe's own command, restarted without its containers, and tried."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

from bootstrap.environment import COMMAND, clean
from bootstrap.errors import NodeError, UsageError
from bootstrap.flags import NONE
from bootstrap.system import find, last_lines, property_of, run, say, systemctl

UNIT = "containerd.service"
CONFIG = "/etc/containerd/config.toml"
_VERIFY = "floe-bootstrap"  # containerd's namespace, and the container, of the trial
_VERSION = re.compile(r"\bv?(\d+)\.(\d+)")
_PULL, _START = 600.0, 60.0  # seconds


def program() -> str | None:
    """containerd itself."""
    return find("containerd")


def check_program(handler: str | None) -> None:
    """NodeError for a containerd that is none of Floe's, or that has no snapshotters of runtimes when one is asked for."""
    path = program()
    if path is None:
        raise NodeError(
            "there is no containerd on this system", "install containerd 1.6, 1.7 or 2.x, then run this again"
        )
    said = run(path, "--version").stdout
    version = _version(said)
    if not (1, 6) <= version < (3, 0):
        raise NodeError(
            f"{path} is none that Floe knows: {said.strip()}", "Floe works with containerd 1.6, 1.7 and 2.x"
        )
    if handler not in (None, NONE) and version < (1, 7):
        raise NodeError(
            f"containerd {version[0]}.{version[1]} has one snapshotter for all runtimes",
            "leave --runtime-handler out, or upgrade to containerd 1.7 or 2.x",
        )


def check_files(asked: dict[str, Any]) -> None:
    """UsageError for what can be no configuration file. Whether there is one yet does not matter."""
    for key, flag in (("containerd_config", "--containerd-config"), ("containerd_main", "--containerd-main")):
        path = Path(asked.get(key) or CONFIG)
        if path.exists() and not path.is_file():
            raise UsageError(f"{flag}: {path} is no file", "name containerd's configuration file")


def check_same_file(before: dict[str, Any], asked: dict[str, Any]) -> None:
    """UsageError when Floe is in one file already and another is named: the first would keep it."""
    old, new = (str(one.get("containerd_config") or CONFIG) for one in (before, asked))
    if old != new:
        raise UsageError(
            f"--containerd-config: Floe was put into {old}, not {new}", "--uninstall first, then give the other file"
        )


def arguments(asked: dict[str, Any]) -> list[str]:
    """Of `floe containerd configure`, for what was asked for."""
    found = []
    for key, flag in (("containerd_config", "--containerd-config"), ("containerd_main", "--main")):
        if asked.get(key):
            found += [flag, str(asked[key])]
    return found


def configure(asked: dict[str, Any], *, dry_run: bool = False, command: Path = COMMAND) -> dict[str, Any]:
    """Floe in containerd's configuration, as `floe containerd configure --json` answers. NodeError, in its words."""
    handler = asked.get("runtime_handler")
    words = [*arguments(asked), *(["--runtime", handler] if handler not in (None, NONE) else [])]
    return _floe(command, "configure", *words, *(["--dry-run"] if dry_run else []))


def unconfigure(asked: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
    """Its configuration as it was. NodeError, in the command's words: images may still need Floe, for example."""
    return _floe(COMMAND, "unconfigure", *arguments(asked), *(["--dry-run"] if dry_run else []))


def _floe(command: Path, *words: str) -> dict[str, Any]:
    done = run(command, "containerd", *words, "--json", check=False, environ=clean())
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        hints = [line.partition("hint: ")[2] for line in said if "hint: " in line]
        rest = [line.removeprefix("floe: error: ") for line in said if "hint: " not in line]
        raise NodeError("\n".join(rest) or f"floe containerd {words[0]} failed", "; ".join(hints))
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def check_restart() -> None:
    """NodeError when a restart of containerd would end its containers."""
    mode = property_of(UNIT, "KillMode")
    if property_of(UNIT, "ActiveState") == "active" and mode not in ("process", "none"):
        raise NodeError(
            f"{UNIT} has KillMode={mode or 'unknown'}: restarting it would end all containers",
            "systemctl edit containerd: KillMode=process in [Service]; it counts from systemctl daemon-reload on",
        )


def restart(*, wait: bool = True) -> str:
    """Have a running containerd go by its configuration; containers run on. What was done, or is to be done.

    `wait`: not from a unit that comes before containerd's: its start waits for that one to end.
    """
    if property_of(UNIT, "ActiveState") != "active":
        return f"{UNIT} does not run: it goes by its configuration when it is started"
    check_restart()
    if not wait:
        systemctl("--no-block", "restart", UNIT)
        return f"{UNIT} is restarted as soon as this has ended"
    before = shims()
    say("restarting containerd")
    systemctl("restart", UNIT)
    lost = before - shims()
    if lost:
        # A container may have ended by itself meanwhile; that is for people to judge.
        return (
            f"restarted containerd; {len(lost)} of {len(before)} containers' shims have ended meanwhile: {sorted(lost)}"
        )
    return f"restarted containerd; {len(before)} containers' shims run on"


def shims() -> set[int]:
    """The processes between containerd and containers."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            if Path(name).name.startswith("containerd-shim"):
                found.add(int(entry.name))
    return found


def verify(image: str) -> str:
    """Pull an image through Floe and start its command. What was seen; NodeError. Nothing is left of it."""
    say(f"pulling {image}")
    _clean_up(image)  # of a run that was killed
    try:
        begun = time.monotonic()
        _ctr("images", "pull", "--snapshotter", "floe", image, seconds=_PULL)
        pulled = time.monotonic() - begun
        say(f"starting {image}")
        _ctr("run", "--detach", "--snapshotter", "floe", image, _VERIFY, seconds=_START)
        state = _state()
        lazy = _lazy_layers()
        how = f"{lazy} lazy trees are mounted" if lazy else _why_not_lazy()
        return f"{image}: pulled in {pulled:.1f} s, started, {state}; {how}"
    finally:
        _clean_up(image)


def _version(said: str) -> tuple[int, int]:
    match = _VERSION.search(said.replace(".com", ""))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _why_not_lazy() -> str:
    if _version(run(program() or "containerd", "--version").stdout) < (2, 0):
        return "unpacked, as ctr of containerd 1.x does; what pods pull is lazy when it is indexed in this store"
    return "no layer of it is lazy: it is not indexed in this store"


def _state() -> str:
    until = time.monotonic() + _START
    while True:
        listed = _ctr("tasks", "ls").splitlines()
        words = next((line.split() for line in listed if line.startswith(_VERIFY)), [])
        state = words[2] if len(words) > 2 else ""
        if state == "RUNNING":
            return "it runs"
        if state == "STOPPED":
            return "it ran and ended"
        if time.monotonic() > until:
            raise NodeError(
                f"the container does not run: {state or 'there is no task'}", "journalctl -u containerd says why"
            )
        time.sleep(0.2)


def _lazy_layers() -> int:
    with contextlib.suppress(NodeError, ValueError, KeyError):
        return len(json.loads(run(COMMAND, "status", "--json", environ=clean()).stdout)["mounts"])
    return 0


def _ctr(*words: str, seconds: float = 60.0, check: bool = True) -> str:
    if find("ctr") is None:
        raise NodeError("there is no ctr to verify with", "it comes with containerd; or leave --verify-image out")
    done = run("ctr", "--namespace", _VERIFY, *words, check=False, seconds=seconds)
    if check and done.returncode != 0:
        raise NodeError(
            f"ctr {' '.join(words)} failed: {last_lines(done.stderr)}", "run it by hand; floe doctor says what is amiss"
        )
    return done.stdout


def _clean_up(image: str) -> None:
    with contextlib.suppress(NodeError):
        _ctr("tasks", "kill", "--signal", "SIGKILL", _VERIFY, check=False)
        _ctr("tasks", "rm", "--force", _VERIFY, check=False)
        _ctr("containers", "rm", _VERIFY, check=False)
        _ctr("images", "rm", "--sync", image, check=False)
        run("ctr", "namespaces", "rm", _VERIFY, check=False)
