"""The same for a host whose root is a directory here: from a pod, by the host's own mount namespace; else by chroot.

What is needed is put into the host, and the host's own Python runs it there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bootstrap import environment
from bootstrap.errors import NodeError
from bootstrap.flags import Options
from bootstrap.system import find

_PLACE = Path("/var/lib/floe-bootstrap")  # in the host
_HERE = Path(__file__).resolve().parent
_INTO_HOST = ("nsenter", "--target", "1", "--mount", "--uts", "--ipc", "--net", "--")
# A chroot needs these for Python and for containerd; in a mount namespace of their own they are gone with it.
_CHROOT = (
    'root=$1; shift; for d in proc sys dev; do mountpoint -q "$root/$d" || mount --rbind "/$d" "$root/$d"; done; '
    'exec chroot "$root" "$@"'
)
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def enter(options: Options, arguments: Sequence[str]) -> int:
    """Run there with the same flags, and end as that does. NodeError."""
    root = options.host_root
    assert root is not None
    if not (root / "bin/sh").exists() and not (root / "bin/sh").is_symlink():
        raise NodeError(f"{root} has no /bin/sh", "mount the host's / there")
    if not options.image and not _is_running(root) and (root / "run/systemd/system").is_dir():
        # A chroot would find it, and mount disks where nobody else sees them.
        raise NodeError(
            f"systemd runs {root}, and its processes are not to be seen here",
            "in a pod: hostPID: true; for a root that nothing runs: --image",
        )
    place = root / _PLACE.relative_to("/")
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700, parents=True)
        words = [*_without_paths(arguments), *_pack(options, place)]
        return _run(root, [str(_PLACE / "install/bootstrap-node.sh"), *words])
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """The command line without what names files here."""
    left, skip = [], False
    for word in arguments:
        if skip:
            skip = False
            continue
        name = word.partition("=")[0]
        if name in ("--host-root", "--source", "--offline"):
            skip = "=" not in word
            continue
        left.append(word)
    return left


def _pack(options: Options, place: Path) -> list[str]:
    """Put what is installed from into the host; the flags that name it there."""
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(_HERE, place / "install/bootstrap", ignore=skipped)
    shutil.copy2(_HERE.parent / "bootstrap-node.sh", place / "install/bootstrap-node.sh")
    units = _HERE.parent / "systemd"
    if units.is_dir():
        shutil.copytree(units, place / "install/systemd", ignore=skipped)
    if options.uninstall:
        return []
    flags = []
    source = environment.find_source(options.source, options.offline)
    environment.check_wheel(source)
    if source.is_file():
        (place / "source").mkdir()
        shutil.copy2(source, place / "source")
        flags += ["--source", str(_PLACE / "source" / source.name)]
    else:
        environment.copy_checkout(source, place / "source")
        flags += ["--source", str(_PLACE / "source")]
    if options.offline is not None:
        wheels = place / "wheels"
        wheels.mkdir()
        for wheel in options.offline.glob("*.whl"):
            shutil.copy2(wheel, wheels)
        flags += ["--offline", str(_PLACE / "wheels")]
    return flags


def _run(root: Path, command: list[str]) -> int:
    if _is_running(root):
        words = [*_INTO_HOST, "/bin/sh", *command]
    else:
        words = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "/bin/sh",
            "-c",
            _CHROOT,
            "sh",
            str(root),
            "/bin/sh",
            *command,
        ]
    program = find(words[0])
    if program is None:
        raise NodeError(f"there is no program {words[0]}", "install util-linux here")
    # The host's programs, and none of a container's variables but those that say what to do.
    environ = {key: value for key, value in os.environ.items() if key.startswith(("FLOE_", "PIP_", "GCE_METADATA_"))}
    for key in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "TERM", "LANG"):
        if key in os.environ:
            environ[key] = os.environ[key]
    done = subprocess.run([program, *words[1:]], check=False, env={**environ, "PATH": _PATH, "HOME": "/root"})
    if done.returncode < 0:
        raise NodeError(
            f"the run in {root} was ended by signal {-done.returncode}", "run it again: it goes on from there"
        )
    return done.returncode


def _is_running(root: Path) -> bool:
    """Whether `root` is that of process 1, so that its systemd and its mounts are to be had."""
    with contextlib.suppress(OSError):
        return Path("/proc/1/root/.").samefile(root)
    return False
