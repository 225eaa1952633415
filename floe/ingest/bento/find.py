"""Bentos and their models, found on disk.

BentoML 1.x keeps them in `$BENTOML_HOME` (`~/bentoml`): `bentos/<name>/<version>/bento.yaml`, `models/<name>/<version>/model.yaml`,
and beside the versions a file `latest` that holds one. An exported Bento has its models inside, laid out in the same way.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from floe.ingest.bento import hub
from floe.ingest.bento.archive import unpack
from floe.ingest.bento.info import YAML_MAX, BentoInfo, ModelInfo, NamedModel, Tag, parse_bento, parse_model, parse_tag
from floe.ingest.chunker import os_failure
from floe.store.errors import BadInputError, DamagedError, NotFoundError

BENTO_YAML, MODEL_YAML, MODELS, HUB_MODELS = "bento.yaml", "model.yaml", "models", "hf-models"
_LATEST = "latest"


@dataclass(frozen=True)
class Bento:
    """A Bento in the folder `path`; `stores` are the folders that may hold its models, best first."""

    path: Path
    info: BentoInfo
    stores: tuple[Path, ...]

    def __str__(self) -> str:
        return str(self.info.tag)


@dataclass(frozen=True)
class FoundModel:
    """A model of a Bento: its files in `path`, and the `place` below the Bento at which BentoML looks for it.

    `info` and `yaml`, the bytes of its `model.yaml`, are None and empty for a model of Hugging Face's hub.
    """

    named: NamedModel
    path: Path
    place: str
    info: ModelInfo | None = None
    yaml: bytes = b""


def bentoml_home(environ: Mapping[str, str]) -> Path:
    """Where BentoML keeps its store for this user."""
    return Path(environ.get("BENTOML_HOME") or Path("~/bentoml").expanduser())


@contextlib.contextmanager
def open_bento(text: str, home: Path, spool: Path) -> Iterator[Bento]:
    """The Bento `text`: NAME[:VERSION] in BentoML's store at `home`, a folder, or the file of an export, unpacked below `spool`.

    A version may be cut short where that leaves no doubt. What was unpacked is removed afterwards. NotFoundError, BadInputError,
    DamagedError; the errors of `unpack`.
    """
    path = Path(text)
    is_path = "/" in text or text in (".", "..")
    if not is_path and not path.is_file():
        yield _read(_stored(text, home), home)
        return
    if path.is_dir():
        yield _read(path, home)
        return
    if not path.exists():
        raise NotFoundError(f"there is no Bento {path}", hint="check the path")
    folder = Path(tempfile.mkdtemp(prefix="bento-", dir=spool))
    try:
        unpack(path, folder)
        yield _read(folder, home, shown=path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_models(bento: Bento, hub_cache: Path) -> list[FoundModel]:
    """All models of a Bento, in its order. NotFoundError names the first that is nowhere; DamagedError: its model.yaml."""
    found = []
    for named in bento.info.models:
        if named.from_hub:
            path = hub.find(named, hub_cache, str(bento))
            found.append(FoundModel(named, path, f"{HUB_MODELS}/{hub.folder_name(named)}"))
        else:
            found.append(_stored_model(bento, named))
    return found


def latest_files(models: list[FoundModel]) -> dict[str, str]:
    """Place -> content of the files that say which version of a model is the latest one: of those in the Bento.

    As BentoML finds it when it copies them in this order: the one that was created last.
    """
    best: dict[str, FoundModel] = {}
    for model in models:
        if model.info is None:
            continue
        known = best.get(model.info.tag.name)
        if known is None or known.info is None or model.info.created >= known.info.created:
            best[model.info.tag.name] = model
    return {f"{MODELS}/{name}/{_LATEST}": model.named.tag.version for name, model in best.items()}


def read_yaml(path: Path) -> bytes:
    """A small file whole. NotFoundError, AccessDeniedError."""
    try:
        with path.open("rb") as file:
            return file.read(YAML_MAX + 1)
    except OSError as error:
        raise os_failure(error, os.fsencode(path)) from error


def _read(path: Path, home: Path, *, shown: Path | None = None) -> Bento:
    where = path / BENTO_YAML
    if not where.is_file():
        raise NotFoundError(
            f"{shown or path} is no Bento: it has no {BENTO_YAML}",
            hint="give NAME:VERSION, a Bento's folder or its export",
        )
    info = parse_bento(read_yaml(where), str(where if shown is None else f"{BENTO_YAML} of {shown}"))
    stores = tuple(folder for folder in (path / MODELS, home / MODELS) if folder.is_dir())
    return Bento(path, info, stores)


def _stored(text: str, home: Path) -> Path:
    try:
        tag = parse_tag(text if ":" in text else f"{text}:{_LATEST}", "the Bento's name")
    except DamagedError as error:
        raise BadInputError(f"{text!r} is no name of a Bento", hint="give NAME, NAME:VERSION or a path") from error
    versions = home / "bentos" / tag.name
    if not versions.is_dir():
        raise NotFoundError(
            f"there is no Bento {tag.name} in {home}",
            hint="`bentoml list` shows what there is; --bentoml-home or BENTOML_HOME name another store",
        )
    if tag.version != _LATEST:
        return _version(versions, tag)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        named = versions / (versions / _LATEST).read_text(encoding="utf-8").strip()
        if named.parent == versions and named.is_dir():
            return named
    found = [path for path in sorted(versions.iterdir()) if (path / BENTO_YAML).is_file()]
    if not found:
        raise NotFoundError(f"there is no Bento {tag.name} in {home}", hint="`bentoml list` shows what there is")
    return max(found, key=lambda path: parse_bento(read_yaml(path / BENTO_YAML), str(path / BENTO_YAML)).created)


def _version(versions: Path, tag: Tag) -> Path:
    if (versions / tag.version).is_dir():
        return versions / tag.version
    found = [path for path in sorted(versions.iterdir()) if path.is_dir() and path.name.startswith(tag.version)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(path.name for path in found or sorted(versions.iterdir()) if path.is_dir()) or "none"
    if found:
        raise BadInputError(f"{tag} may be one of several Bentos", hint=f"give the whole version: {there}")
    raise NotFoundError(f"there is no Bento {tag} in {versions.parent.parent}", hint=f"its versions are: {there}")


def _stored_model(bento: Bento, named: NamedModel) -> FoundModel:
    place = f"{named.tag.name}/{named.tag.version}"
    path = next((store / place for store in bento.stores if (store / place).is_dir()), None)
    if path is None:
        where = " or ".join(map(str, bento.stores)) or "BentoML's store"
        raise NotFoundError(
            f"Bento {bento} needs model {named}, which is not in {where}",
            hint=f"`bentoml models pull {named}` or import it; --bentoml-home names another store",
        )
    where_yaml = path / MODEL_YAML
    if not where_yaml.is_file():
        raise DamagedError(
            f"{path} is no model of BentoML: it has no {MODEL_YAML}", hint=f"save or import model {named} again"
        )
    data = read_yaml(where_yaml)
    info = parse_model(data, str(where_yaml))
    if info.tag != named.tag:
        raise DamagedError(f"{where_yaml} is that of {info.tag}, not of {named}", hint=f"save model {named} again")
    return FoundModel(named, path, f"{MODELS}/{place}", info, data)
