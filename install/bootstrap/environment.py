"""Floe in a virtual environment of its own, one for each version: built beside the one in use, then put in its place.

    /opt/floe/versions/ID    an environment; `complete` in it is written last
    /opt/floe/current        a link to the one in use
    /opt/floe/node           this program, for boots and for --uninstall

Running daemons keep the files that they were started from; an environment goes when no process uses it any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from bootstrap.errors import NodeError, UsageError
from bootstrap.flags import check_source
from bootstrap.record import Record
from bootstrap.system import run, say, sync_folder, write_file

OPT = Path("/opt/floe")
CURRENT, VERSIONS, NODE = OPT / "current", OPT / "versions", OPT / "node"
COMMAND = Path("/usr/local/bin/floe")
_HERE = Path(__file__).resolve().parent
# What a wheel is built from.
_OF_CHECKOUT = ("pyproject.toml", "README.md", "LICENSE", "floe", "fuse", "snapshotter", "protos")
_SECONDS = 1800.0  # for a slow network
_SKIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")


def find_source(given: Path | None, offline: Path | None) -> Path:
    """What to install from: as given, else a wheel among those of --offline, else the checkout this lies in. UsageError."""
    if given is not None:
        return given
    if offline is not None:
        wheels = sorted(offline.glob("floe-*-py3-none-any.whl"))
        if len(wheels) > 1:
            raise UsageError(f"--offline: {offline} has {len(wheels)} wheels of Floe", "name one by --source")
        if wheels:
            return wheels[0]
    checkout = _HERE.parent.parent
    try:
        check_source(checkout)
    except UsageError as error:
        raise UsageError("this lies in no checkout of Floe", "name a checkout or a wheel by --source") from error
    return checkout


def identity(source: Path) -> str:
    """A name for what would be installed: version, Python, and a digest of the code."""
    total = hashlib.sha256(sys.version.encode())
    if source.is_file():
        total.update(source.read_bytes())
        version = source.name.split("-")[1]
    else:
        for name in _OF_CHECKOUT:
            for path in _files(source / name):
                total.update(os.fsencode(path.relative_to(source)) + b"\0" + path.read_bytes())
        version = _version(source)
    return f"{version}-py{sys.version_info.major}.{sys.version_info.minor}-{total.hexdigest()[:12]}"


def _version(checkout: Path) -> str:
    for line in (checkout / "floe/__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.partition("=")[2].strip().strip("\"'")
    raise NodeError(f"{checkout}/floe/__init__.py names no version", "name a whole checkout by --source")


def _files(path: Path) -> list[Path]:
    """Regular files, through the links of a checkout, in order."""
    if path.is_file():
        return [path]
    found = []
    for folder, names, files in os.walk(path, followlinks=True):
        names[:] = sorted(name for name in names if name != "__pycache__" and not name.startswith("."))
        found += [
            Path(folder, name) for name in sorted(files) if not name.startswith(".") and not name.endswith(".pyc")
        ]
    return found


def lacks_pip() -> bool:
    """Whether this Python makes no environment with pip in it: Debian and Ubuntu have that in python3-venv."""
    return importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None


def pip_wheel(offline: Path | None) -> Path | None:
    """pip itself among the wheels, where there is no other."""
    return max(offline.glob("pip-*-py3-none-any.whl"), default=None) if offline is not None else None


def is_built(name: str) -> bool:
    """Whether that environment is whole."""
    return (VERSIONS / name / "complete").is_file()


def build(name: str, source: Path, offline: Path | None, record: Record) -> None:
    """Have the environment `name`. An incomplete one is made anew. NodeError."""
    place = VERSIONS / name
    if is_built(name):
        return
    record.folder(VERSIONS)
    shutil.rmtree(place, ignore_errors=True)
    say(f"installing Floe into {place} (a minute or two)")
    pip = _make(place, offline)
    with tempfile.TemporaryDirectory(prefix="floe-bootstrap-") as scratch:
        wheel = source if source.is_file() else _build_wheel(pip, source, Path(scratch), offline)
        _pip(pip, "install", wheel, offline=offline)
    run(place / "bin/floe", "version", environ=clean())
    # Only what is imported from now on is compiled, into a directory that nobody but root writes to.
    write_file(place / "complete", b"", 0o644)


def _make(place: Path, offline: Path | None) -> list[str | Path]:
    """An environment with nothing in it, and how its pip is called."""
    python = place / "bin/python"
    if lacks_pip():
        wheel = pip_wheel(offline)
        if wheel is None:
            raise NodeError("this Python has no venv", "apt-get install python3-venv")
        run(sys.executable, "-I", "-m", "venv", "--without-pip", place, seconds=_SECONDS)
        return [python, "-I", f"{wheel}/pip"]
    run(sys.executable, "-I", "-m", "venv", place, seconds=_SECONDS, hint="apt-get install python3-venv")
    return [python, "-I", "-m", "pip"]


def _build_wheel(pip: list[str | Path], source: Path, scratch: Path, offline: Path | None) -> Path:
    """Of a copy: a build leaves things behind."""
    copy = scratch / "source"
    copy_checkout(source, copy)
    _pip(pip, "wheel", "--no-deps", "--wheel-dir", scratch / "wheel", copy, offline=offline)
    (wheel,) = (scratch / "wheel").glob("floe-*.whl")
    return wheel


def copy_checkout(source: Path, copy: Path) -> None:
    """What a wheel is built from, links resolved."""
    copy.mkdir()
    for name in _OF_CHECKOUT:
        if (source / name).is_dir():
            shutil.copytree(source / name, copy / name, ignore=_SKIPPED)
        elif (source / name).is_file():
            shutil.copy2(source / name, copy / name)


def _pip(pip: list[str | Path], *arguments: str | Path, offline: Path | None) -> None:
    """Wheels only: nothing is compiled, and no code of a package runs while it is installed."""
    command, *rest = arguments
    options: list[str | Path] = ["--no-input", "--disable-pip-version-check", "--only-binary", ":all:"]
    environ = clean()
    hint = "see that PyPI or a mirror of it can be reached (PIP_INDEX_URL), or give --offline DIR"
    if offline is not None:
        options += ["--no-index", "--find-links", offline, "--no-cache-dir"]
        environ = {key: value for key, value in environ.items() if not key.startswith("PIP_")} | {
            "PIP_CONFIG_FILE": os.devnull
        }
        hint = f"see that {offline} has the wheels of all packages, for this Python"
    run(*pip, command, *options, *rest, seconds=_SECONDS, environ=environ, hint=hint)


def clean() -> dict[str, str]:
    """The environment without what would change which code is run, or what settings Floe goes by."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FLOE_", "VIRTUAL_ENV"))}


def switch(name: str, record: Record) -> bool:
    """Have `floe` be that environment's; whether it was another's."""
    changed = record.link(CURRENT, VERSIONS / name)
    return record.link(COMMAND, CURRENT / "bin/floe") or changed


def install_self(units: Path, record: Record) -> None:
    """Put this program where boots and --uninstall find it, when what was installed from is gone."""
    record.folder(OPT)
    if _HERE.is_relative_to(NODE):
        return
    new = NODE.with_name("node.new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(_HERE, new / "bootstrap", ignore=_SKIPPED)
    shutil.copy2(_HERE.parent / "bootstrap-node.sh", new / "bootstrap-node.sh")
    if units.is_dir():
        shutil.copytree(units, new / "systemd", ignore=_SKIPPED)
    if NODE.is_dir():
        if _same(NODE, new):
            shutil.rmtree(new)
            return
        old = NODE.with_name("node.old")
        shutil.rmtree(old, ignore_errors=True)
        NODE.rename(old)
        new.rename(NODE)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(NODE)
    sync_folder(OPT)


def _same(one: Path, other: Path) -> bool:
    def content(folder: Path) -> list[tuple[str, bytes]]:
        return [(str(path.relative_to(folder)), path.read_bytes()) for path in _files(folder)]

    return content(one) == content(other)


def remove_unused() -> list[str]:
    """Take away environments that are neither in use nor current; which of them stay, for a process has them open."""
    current = Path(os.path.realpath(CURRENT)).name
    used, stay = _in_use(), []
    for place in sorted(VERSIONS.iterdir()) if VERSIONS.is_dir() else []:
        if place.name == current:
            continue
        if any(f"{place}/" in text for text in used):
            stay.append(place.name)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return stay


def _in_use() -> list[str]:
    texts = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            texts.append((process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " "))
        with contextlib.suppress(OSError):
            texts.append((process / "maps").read_text(errors="replace"))
    return texts


def remove_all() -> None:
    """Take away all of it but what somebody else has put into /opt/floe."""
    for place in (VERSIONS, NODE, NODE.with_name("node.new"), NODE.with_name("node.old")):
        shutil.rmtree(place, ignore_errors=True)


def check_wheel(source: Path) -> None:
    """UsageError for a file that is no wheel inside."""
    if source.is_file():
        try:
            with zipfile.ZipFile(source) as archive:
                archive.getinfo("floe/cli/settings.py")
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise UsageError(
                f"--source: {source} is no wheel of Floe: {error}", "pip wheel --no-deps . makes one"
            ) from error
