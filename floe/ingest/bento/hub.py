"""Models of Hugging Face's hub, as its cache on this machine holds them.

`models--org--name/{blobs,refs,snapshots/<commit>}` and more, a snapshot's files being symlinks into `blobs`; see
huggingface_hub's "Understand caching". BentoML names such models in lower case, and so must the folder be called that containers see.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from floe.ingest.bento.info import NamedModel
from floe.ingest.chunker import os_failure
from floe.store.errors import DamagedError, NotFoundError

_FOLDER = "models--"
_BLOBS, _REFS, _SNAPSHOTS = "blobs", "refs", "snapshots"
_REF_MAX = 256  # bytes; a ref holds a commit


def cache_folder(environ: Mapping[str, str]) -> Path:
    """The cache of this user, where BentoML looks for it too."""
    for name in ("BENTOML_HF_CACHE_DIR", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name])
    home = (
        environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "huggingface"
    )
    return Path(home) / "hub"


def folder_name(named: NamedModel) -> str:
    """What the cache calls a model's folder."""
    return _FOLDER + named.hub_id.replace("/", "--")


def find(named: NamedModel, cache: Path, bento: str) -> Path:
    """The model's folder in `cache`, whatever its capitals. NotFoundError: not there, or not at all of its commits."""
    wanted = folder_name(named)
    candidates = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        candidates = sorted(path for path in cache.iterdir() if path.name.lower() == wanted)
    missing, hub_id = named.commits, named.hub_id
    for path in candidates:
        absent = tuple(commit for commit in named.commits if not (path / _SNAPSHOTS / commit).is_dir())
        if not absent:
            return path
        if len(absent) < len(missing):  # there the fewest have to be downloaded; its name has the capitals to do it by
            missing, hub_id = absent, path.name.removeprefix(_FOLDER).replace("--", "/")
    downloads = "; ".join(f"`hf download {hub_id} --revision {commit}`" for commit in missing)
    raise NotFoundError(
        f"Bento {bento} needs {named.hub_id} at {' and '.join(missing)}, which is not in {cache}",
        hint=f"{downloads}; --hub-cache names another cache",
    )


def files_of(folder: Path, commits: Iterable[str]) -> frozenset[bytes]:
    """What of the cache's `folder` belongs to these commits, relative to it: snapshots, blobs of those, refs that mean them.

    The cache also holds other commits, and what is being downloaded. DamagedError: a file of a snapshot that leads nowhere.
    """
    return frozenset(name for commit in commits for name in _files_of(folder, commit))


def _files_of(folder: Path, revision: str) -> frozenset[bytes]:
    try:
        top = folder.resolve()
        kept = set[Path]()
        for found in _walk(top / _SNAPSHOTS / revision):
            if found.is_dir() and not found.is_symlink():
                continue
            real = found.resolve()
            if not real.is_file():
                raise DamagedError(f"{found} leads nowhere: its download is not complete", hint="download it again")
            kept.update((found, *([real] if real.is_relative_to(top) else [])))
        # What else is kept of a commit is called by it: `.no_exist/<commit>/...`, since huggingface_hub 2 `trees/<commit>.json`.
        for other in top.iterdir():
            if other.name not in (_BLOBS, _REFS, _SNAPSHOTS) and other.is_dir():
                named = [path for path in other.iterdir() if path.name.partition(".")[0] == revision]
                found_below = [path for start in named for path in (start, *_walk(start))]
                kept.update(path for path in found_below if path.is_file() and not path.is_symlink())
        kept.update(path for path in _walk(top / _REFS) if path.is_file() and _says(path, revision))
        return frozenset(os.fsencode(path.relative_to(top)) for path in kept)
    except OSError as error:
        raise os_failure(error, os.fsencode(error.filename or folder)) from error


def _says(ref: Path, revision: str) -> bool:
    return ref.stat().st_size <= _REF_MAX and ref.read_bytes().strip() == revision.encode()


def _walk(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        yield from (Path(base) / name for name in (*folders, *names))
