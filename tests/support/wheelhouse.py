"""Wheels of Floe and of all that it needs, made again of what is installed here: an installation without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def wheelhouse(folder: Path) -> Path:
    """A directory with every wheel that `pip install --no-index` of a checkout asks for."""
    folder.mkdir()
    for name in _needed("floe", "setuptools"):
        if name != "floe":
            _repack(metadata.distribution(name), folder)
    return folder


def floe_wheel(folder: Path) -> Path:
    """This checkout as a wheel, packed without a build: its files and the metadata of its installation."""
    folder.mkdir(parents=True, exist_ok=True)
    distribution = metadata.distribution("floe")
    # That of an editable installation, or what its build has left in the checkout.
    described = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    info = f"floe-{distribution.version}.dist-info"
    path = folder / f"floe-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        record = []
        for file in _package_files():
            archive.write(ROOT / file, file)
            record.append(f"{file},,")
        for name, text in (
            ("METADATA", described),
            ("WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("entry_points.txt", "[console_scripts]\nfloe = floe.cli.main:main\n"),
        ):
            archive.writestr(f"{info}/{name}", text)
            record.append(f"{info}/{name},,")
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,\n"]))
    return path


def _package_files():
    """Through the links to fuse/ and the like, which a wheel has as directories."""
    found = []
    for path in sorted((ROOT / "floe").iterdir()):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [one.relative_to(ROOT) for one in inside if one.is_file() and "__pycache__" not in one.parts]
    return [str(one) for one in found]


def _needed(*names):
    """Those distributions and what they require, for this Python and without extras."""
    waiting, found = list(names), set()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            required = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue  # of another platform or Python
        found.add(name)
        waiting += [_NAME.match(text)[0] for text in required if "extra ==" not in text]
    return found


def _repack(distribution, folder):
    """The files that the installation's RECORD names, but for what pip made itself: scripts and compiled code."""
    wheel = distribution.read_text("WHEEL") or ""
    tags = re.findall(r"(?m)^Tag: (.+)$", wheel)
    tag = "-".join(".".join(dict.fromkeys(parts)) for parts in zip(*(one.split("-") for one in tags), strict=True))
    name = distribution.metadata["Name"].replace("-", "_").replace(".", "_")
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-{tag}.whl", "w") as archive:
        for file in distribution.files or []:
            if (
                ".." in file.parts
                or file.suffix == ".pyc"
                or file.name in ("INSTALLER", "REQUESTED", "direct_url.json")
            ):
                continue
            if file.name == "RECORD":
                continue
            archive.write(file.locate(), str(file))
        info = next(file.parts[0] for file in distribution.files if file.parts[0].endswith(".dist-info"))
        archive.writestr(f"{info}/RECORD", "")


def pip_wheel(folder: Path) -> Path:
    """The wheel of pip that Python brings along, or pip as it is installed."""
    import ensurepip  # noqa: PLC0415 - Debian has it in another package

    bundled = next(Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"), None)
    if bundled is not None:
        return Path(shutil.copy2(bundled, folder))
    subprocess.run([sys.executable, "-m", "pip", "--version"], check=True, stdout=subprocess.DEVNULL)
    _repack(metadata.distribution("pip"), folder)
    return next(folder.glob("pip-*.whl"))
