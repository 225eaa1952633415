"""The daemons, their directories, and the containerd that calls them."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from floe.containerd.configure import DEFAULT_FILE, Configuration
from floe.containerd.status import CHANGED, status_of
from floe.containerd.version import detect, find_binary
from floe.containerd.wanted import NAME
from floe.doctor.finding import ERROR, OK, SKIPPED, WARNING, Finding, Node
from floe.store import mounttable
from floe.store.errors import FloeError, NotFoundError, PreconditionError
from floe.store.process import refuse_own_mount


def own_files(node: Node) -> Iterator[Finding]:
    """Whether Floe itself lies on what Floe serves."""
    try:
        refuse_own_mount(node.run_dir)
    except PreconditionError as error:
        yield Finding("own files", ERROR, str(error), error.hint)
    else:
        yield Finding("own files", OK, "Floe's program lies on no Floe mount")


def running(node: Node) -> Iterator[Finding]:
    """Sockets and who answers them. None has to: models are mounted without."""
    if not node.run_dir.is_dir():
        mend = "systemctl start floe-packfs floe-snapshotter"
        yield Finding(
            "run directory", WARNING, f"there is no {node.run_dir}: no daemon has run since the last boot", mend
        )
    elif stat.S_IMODE(node.run_dir.stat().st_mode) & 0o022:
        mend = f"chmod go-w {node.run_dir}"
        yield Finding("run directory", ERROR, f"others may write to {node.run_dir}", mend)
    else:
        yield Finding("run directory", OK, str(node.run_dir))
    for name, ask in (("packfs", node.packfs), ("snapshotter", node.snapshotter)):
        found = ask()
        if found["running"]:
            yield Finding(name, OK, f"floe {name} answers")
        else:
            level = WARNING if found["state"] == "not running" else ERROR
            verb = "start" if level == WARNING else "restart"
            yield Finding(name, level, f"floe {name}: {found['state']}", f"systemctl {verb} floe-{name}")
    if node.socket.exists() and not stat.S_ISSOCK(node.socket.stat().st_mode):
        yield Finding("snapshotter", ERROR, f"{node.socket} is no socket", f"rm {node.socket}")


def agent(node: Node) -> Iterator[Finding]:
    """Whether this node tells the fleet how it is. Nothing waits for that."""
    check = "agent"
    known, pid = node.agent()
    if pid is not None:
        yield Finding(check, OK, f"floe agent runs, process {pid}")
    elif known:
        yield Finding(check, WARNING, "floe agent died, and nobody started it again", "systemctl restart floe-agent")
    elif node.index.startswith("redis"):
        text = "floe agent does not run: `floe nodes` does not list this node, and no warm order reaches it"
        yield Finding(check, SKIPPED, text, "systemctl enable --now floe-agent")
    else:
        yield Finding(check, SKIPPED, "not needed: this node's index is its own")


def containerd(node: Node) -> Iterator[Finding]:
    """Its version, and whether what it goes by leads to this snapshotter."""
    check = "containerd"
    try:
        binary = find_binary(node.containerd)
        version = detect(binary, None)
    except NotFoundError:
        yield Finding(check, WARNING, "there is no containerd on this machine", "install containerd, or go without it")
        return
    except FloeError as error:
        yield Finding(check, ERROR, str(error), error.hint or "install containerd 1.6, 1.7 or 2.x")
        return
    yield Finding(check, OK, f"containerd {version}, {binary}")
    file = node.containerd_config
    try:
        found = status_of(Configuration(file, file, binary), version)
    except FloeError as error:
        yield Finding(
            "containerd configuration", ERROR, str(error), error.hint or f"{binary} --config {file} config dump"
        )
        return
    flags = "" if file == DEFAULT_FILE else f" --containerd-config {file}"
    if found["runtime"] is not None:  # without it Floe would be put there for all pods, and that handler taken out
        flags += f" --runtime {found['runtime']}"
    mend = f"floe containerd configure{flags} && systemctl restart containerd"
    yield from _configuration(found, node, mend, merges=version.is_2)


def _configuration(found: dict[str, object], node: Node, mend: str, *, merges: bool) -> Iterator[Finding]:
    check, problems = "containerd configuration", []
    if found["cri_disabled"]:
        problems.append(
            (ERROR, f"CRI is switched off: disabled_plugins has {found['cri_disabled']}", f"edit {found['file']}")
        )
    if found["address"] is None and (found["snapshotter"] == NAME or found["runtimes"]):
        text = f"{found['file']} uses the snapshotter floe and has no proxy plugin of that name: no pod of it starts"
        problems.append((ERROR, text, mend))
    elif found["address"] is None:
        problems.append((WARNING, f"{found['file']} does not name Floe: containerd does not use it", mend))
    elif found["address"] != str(node.socket):
        text = f"containerd dials {found['address']}, and the snapshotter listens at {node.socket}"
        problems.append((ERROR, text, "set address in /etc/floe/config.toml to the same, or: " + mend))
    elif found["snapshotter"] != NAME and not found["runtimes"]:
        problems.append((WARNING, f"CRI uses {found['snapshotter']}, for all runtimes", mend))
    else:
        if found["discards_layers"]:
            text = "discard_unpacked_layers is true: images cannot be unpacked for another snapshotter"
            problems.append((ERROR, text, mend))
        unpacked = found["unpacked_for"]
        if merges and isinstance(unpacked, list) and NAME not in unpacked:
            problems.append((ERROR, "the transfer service unpacks for no floe: pulls will fail", mend))
    if found["state"] == CHANGED:
        text = f"{found['file']} was changed since Floe was put into it: undoing takes out Floe's keys only"
        problems.append((WARNING, text, mend))
    for level, text, how in problems:
        yield Finding(check, level, text, how)
    if not problems:
        uses = "all pods" if found["snapshotter"] == NAME else ", ".join(map(str, found["runtimes"]))  # type: ignore[call-overload]
        yield Finding(check, OK, f"Floe for {uses}, as containerd itself says")


def directories(node: Node) -> Iterator[Finding]:
    """Whether the daemons' directories can be written, and where they lie."""
    for name, path in (*(("cache directory", path) for path in node.cache_dirs), ("snapshotter's root", node.root)):
        place = path
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            yield Finding(name, ERROR, f"{place} is no directory", f"mv {place} {place}.old")
        elif not os.access(place, os.W_OK | os.X_OK):
            yield Finding(name, ERROR, f"{place} cannot be written", "run as root, or remount it read-write")
        elif (mount := mount_of(place)) is not None and mount.fstype in mounttable.TREE_TYPES:
            yield Finding(name, ERROR, f"{path} lies on a Floe mount", "choose another in /etc/floe/config.toml")
        else:
            yield Finding(name, OK, f"{path}{'' if path.exists() else ', not made yet'}")
    if shutil.which("fusermount3") is None and os.geteuid() != 0:
        yield Finding(
            "fusermount3",
            SKIPPED,
            "users who are not root need it for floe model mount --portable",
            "apt install fuse3",
        )


def mount_of(path: Path) -> mounttable.Mount | None:
    """The mount that a path lies on."""
    real = os.path.realpath(path)
    found = [m for m in mounttable.mounts() if real == m.target or real.startswith(m.target.rstrip("/") + "/")]
    return max(found, key=lambda mount: len(mount.target), default=None)
