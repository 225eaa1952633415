"""What is read: one large file and a tree of small ones, incompressible, the same in every run."""

import random
from pathlib import Path

MIB = 1 << 20
SMALL_MAX = 16 << 10  # bytes; the sizes of source files and Python modules
PER_FOLDER = 100


def make(folder: Path, *, large: int, files: int) -> None:
    """Write `folder/large.bin` of `large` bytes and `files` small files below `folder/small/`."""
    source = random.Random(20261124)
    folder.mkdir(parents=True)
    with (folder / "large.bin").open("wb") as out:
        for start in range(0, large, MIB):
            out.write(source.randbytes(min(MIB, large - start)))
    for number in range(files):
        path = folder / "small" / f"{number // PER_FOLDER:04d}" / f"{number:06d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.randbytes(source.randrange(64, SMALL_MAX)))


def size(folder: Path) -> int:
    """Bytes of all regular files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
