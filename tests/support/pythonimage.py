"""A Python application image, built from what this machine has installed: three layers, no download.

`app_layers()`: busybox and shared libraries; the Python interpreter and its standard library; the virtual environment's
packages and the application. The demo, the end-to-end tests and the soak all run this image.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from support.images import add, busybox

Fill = Callable[[tarfile.TarFile], None]

SITE = "app/site-packages"
ENV = ("PATH=/usr/bin:/bin", f"PYTHONPATH=/{SITE}", "PYTHONDONTWRITEBYTECODE=1")
PYTHON = "/usr/bin/python3"
# Where an installation keeps many files that nobody reads at a start, as real images do.
_BULK = ("/usr/share", "/usr/lib", "/usr/include")


def _interpreter() -> Path:
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _libraries(programs: list[Path]) -> set[str]:
    """Shared libraries that `programs` load, and the dynamic loader, by the paths they are found at."""
    listed = subprocess.run(["ldd", *map(str, programs)], capture_output=True, text=True, check=False).stdout
    found = re.findall(r"=> (/\S+) \(", listed) + re.findall(r"^\s*(/\S*ld-linux\S*) \(", listed, re.MULTILINE)
    # Packages that bring libraries of their own find them beside themselves.
    return {path for path in found if "site-packages" not in path}


def _add_file(tar: tarfile.TarFile, path: Path, name: str) -> None:
    info = tar.gettarinfo(str(path), name)
    if info.islnk():  # each file by its own content: the other name may not be in the image
        info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = int(info.mtime)  # as containerd and BuildKit write layers: without an extended header for each file
    if info.isreg():
        with path.open("rb") as content:
            tar.addfile(info, content)
    else:
        tar.addfile(info)


def _walk(root: Path, *, bytecode: bool = False) -> Iterator[Path]:
    for base, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if bytecode or f != "__pycache__")
        yield Path(base)
        yield from (Path(base) / name for name in sorted(names))
        yield from (Path(base) / f for f in folders if (Path(base) / f).is_symlink())


def _add_tree(tar: tarfile.TarFile, root: Path, name: str, *, bytecode: bool = False) -> None:
    for path in _walk(root, bytecode=bytecode):
        _add_file(tar, path, f"{name}/{path.relative_to(root)}".removesuffix("/."))


def _base(tar: tarfile.TarFile, site: Path) -> None:
    busybox()(tar)
    extensions = list((_standard_library() / "lib-dynload").glob("*.so"))
    packages = list(site.rglob("*.so*"))
    for library in sorted(_libraries([_interpreter(), *extensions, *packages])):
        if Path(library).is_relative_to(site):
            continue
        add(tar, library.lstrip("/"), Path(library).read_bytes(), mode=0o755)


def _python(tar: tarfile.TarFile, *, bytecode: bool) -> None:
    name = str(_interpreter()).lstrip("/")
    add(tar, name, _interpreter().read_bytes(), mode=0o755)
    if f"/{name}" != PYTHON:
        add(tar, PYTHON.lstrip("/"), kind=tarfile.SYMTYPE, link=f"/{name}", mode=0o777)
    _add_tree(tar, _standard_library(), str(_standard_library()).lstrip("/"), bytecode=bytecode)


def app_layers(
    program: str,
    *,
    packages: tuple[str, ...] | None = None,
    site: Path | None = None,
    bytecode: bool = False,
    bulk_files: int = 0,
    bulk_bytes: int = 0,
) -> list[Fill]:
    """The layers of an image that runs `program` as /app/main.py.

    Packages come from the folder `site` (None: this virtual environment), those that `packages` names (None: all);
    `bytecode` takes compiled modules too, as images have them. Files from the machine's own /usr are added until the last
    layer holds `bulk_files` files and `bulk_bytes` bytes.
    """
    source = site or _site_packages()

    def application(tar: tarfile.TarFile) -> None:
        add(tar, "app/main.py", program.encode(), mode=0o644)
        for entry in sorted(source.iterdir()):
            if packages is None or entry.name in packages:
                if entry.is_dir():
                    _add_tree(tar, entry, f"{SITE}/{entry.name}", bytecode=bytecode)
                else:
                    _add_file(tar, entry, f"{SITE}/{entry.name}")
        _add_bulk(tar, bulk_files, bulk_bytes)

    return [partial(_base, site=source), partial(_python, bytecode=bytecode), application]


def _add_bulk(tar: tarfile.TarFile, files: int, size: int) -> None:
    """Real files of this machine, below /bulk, until `tar` holds that many files and bytes."""
    have_files = sum(member.isreg() for member in tar.getmembers())
    have_bytes = sum(member.size for member in tar.getmembers())
    for root in _BULK:
        for path in _walk(Path(root)):
            if have_files >= files and have_bytes >= size:
                return
            if path.is_symlink() or not path.is_file():
                continue
            _add_file(tar, path, f"bulk{path}")
            have_files, have_bytes = have_files + 1, have_bytes + path.stat().st_size
    if have_files < files or have_bytes < size:
        raise AssertionError(f"this machine has too little in /usr: {have_files} files, {have_bytes} bytes")
