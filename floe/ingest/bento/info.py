"""What `bento.yaml` and `model.yaml` say. Pure.

Sources: BentoML 1.4's bentoml/_internal/bento/bento.py (BentoInfo is spec 1, BentoInfoV2 spec 2; `from_yaml_file` for what came
before 1.0), models/model.py, tag.py, and _bentoml_sdk/models/huggingface.py. Members that are not named here are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import yaml

from floe.store import jsontext
from floe.store.errors import DamagedError, UnsupportedError

YAML_MAX = 16 << 20  # bytes; the schema of a large service has some hundred KiB
_MODELS_MAX = 16384  # entries, of all services; by aliases a short text can name very many
HUGGINGFACE = "huggingface"
_SPECS = (1, 2)
_PART = re.compile(r"[a-z0-9]([-._a-z0-9]*[a-z0-9])?")
_PART_MAX = 63
_HUB_ID = re.compile(r"[a-z0-9]([-._a-z0-9]*[a-z0-9_])?(/[a-z0-9]([-._a-z0-9]*[a-z0-9_])?)?")
_REVISION = re.compile(r"[0-9a-f]{40}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NULL = "tag:yaml.org,2002:null"


class _Loader(yaml.CSafeLoader):
    """Texts stay texts: a version `1`, `1e5` or `2024-01-01` is a name. Only null is told from them."""


_Loader.yaml_implicit_resolvers = {
    first: [item for item in found if item[0] == _NULL] for first, found in _Loader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True, order=True)
class Tag:
    """`name:version` of a Bento or a model; lower case, each at most 63 characters."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class NamedModel:
    """A model as a Bento names it. `hub_id` and `commits` (40 hex digits each, sorted) are set for those of Hugging Face's hub.

    All commits of one repository are one model, as they lie in one folder of the hub's cache.
    """

    tag: Tag
    hub_id: str = ""
    commits: tuple[str, ...] = ()

    @property
    def from_hub(self) -> bool:
        """Whether its files lie in Hugging Face's cache instead of BentoML's store."""
        return bool(self.hub_id)

    def __str__(self) -> str:
        return f"{self.hub_id}@{','.join(self.commits)}" if self.from_hub else str(self.tag)


@dataclass(frozen=True)
class BentoInfo:
    """A `bento.yaml`: all models, of the Bento and of its services, each once; `envs` are (name, value, stage)."""

    tag: Tag
    spec: int
    models: tuple[NamedModel, ...]
    envs: tuple[tuple[str, str, str], ...]
    created: datetime
    bentoml_version: str


@dataclass(frozen=True)
class ModelInfo:
    """A `model.yaml`."""

    tag: Tag
    created: datetime


def parse_bento(data: bytes, where: str) -> BentoInfo:
    """A `bento.yaml` found at `where`. DamagedError: not one. UnsupportedError: of a spec that this Floe does not know."""
    value = _mapping(data, where)
    spec = _text(value.get("spec", "1"), "spec", where)
    if spec not in map(str, _SPECS):
        raise UnsupportedError(
            f"{where} is of spec {jsontext.shown(spec)}; this Floe reads {' and '.join(map(str, _SPECS))}",
            hint="upgrade Floe on this machine",
        )
    models: dict[Tag | str, NamedModel] = {}
    entries = 0
    services = [found for found in _list(value.get("services"), "services", where) if isinstance(found, dict)]
    for holder in (value, *services):
        named = _list(holder.get("models"), "models", where)
        entries += len(named)
        if entries > _MODELS_MAX:
            raise DamagedError(f"{where} names models more than {_MODELS_MAX} times", hint="build the Bento again")
        for entry in named:
            model = _model(entry, where)
            known = models.get(model.hub_id or model.tag)
            models[model.hub_id or model.tag] = _with_commits(model, known) if known else model
    docker = value.get("docker")
    old = docker.get("env") if isinstance(docker, dict) else None
    envs = [*_old_envs(old, where), *(_env(entry, where) for entry in _list(value.get("envs"), "envs", where))]
    return BentoInfo(
        _tag(value.get("name"), value.get("version"), where),
        int(spec),
        tuple(models.values()),
        tuple({name: (name, text, stage) for name, text, stage in envs}.values()),
        _time(value.get("creation_time"), where),
        _text(value.get("bentoml_version") or "", "bentoml_version", where),
    )


def parse_model(data: bytes, where: str) -> ModelInfo:
    """A `model.yaml` found at `where`. DamagedError: not one."""
    value = _mapping(data, where)
    return ModelInfo(_tag(value.get("name"), value.get("version"), where), _time(value.get("creation_time"), where))


def parse_tag(text: str, what: str) -> Tag:
    """`NAME:VERSION`; DamagedError names `what` holds it. Capitals are lowered, as BentoML does."""
    name, _, version = text.partition(":")
    return _tag(name, version, what)


def _mapping(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > YAML_MAX:
        raise DamagedError(f"{where} is longer than the {YAML_MAX >> 20} MiB that are read of it")
    try:
        value = yaml.load(data, Loader=_Loader)  # noqa: S506 - a safe loader's heir
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise DamagedError(f"{where} is not YAML: {jsontext.shown(first)}", hint="build the Bento again") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{where} is no mapping", hint="build the Bento again")
    return {key: item for key, item in value.items() if isinstance(key, str)}


def _model(entry: Any, where: str) -> NamedModel:
    if isinstance(entry, str):  # before 1.0.0a7
        return NamedModel(parse_tag(entry, where))
    if not isinstance(entry, dict):
        raise DamagedError(f"{where} names a model by something that is no mapping", hint="build the Bento again")
    tag = parse_tag(_text(entry.get("tag"), "a model's tag", where), where)
    registry = _text(entry.get("registry") or "bentoml", "a model's registry", where)
    if registry == "bentoml":
        return NamedModel(tag)
    if registry != HUGGINGFACE:
        raise UnsupportedError(
            f"{where} takes model {tag} from the registry {jsontext.shown(registry)}",
            hint="Floe knows models of BentoML's store and of Hugging Face's hub",
        )
    metadata = entry.get("metadata")
    known: Mapping[str, Any] = metadata if isinstance(metadata, dict) else {}
    hub_id = _text(known.get("model_id") or tag.name.replace("--", "/"), "model_id", where).lower()
    revision = _text(known.get("revision") or "", "revision", where)
    if _HUB_ID.fullmatch(hub_id) is None or ".." in hub_id or "--" in hub_id:
        raise DamagedError(f"{where}: {jsontext.shown(hub_id)} is no model of Hugging Face's hub")
    if _REVISION.fullmatch(revision) is None:
        raise UnsupportedError(
            f"{where} names {hub_id} at revision {jsontext.shown(revision)}, which is no commit",
            hint="build the Bento again where the hub can be reached, so that BentoML pins the commit",
        )
    return NamedModel(tag, hub_id, (revision,))


def _with_commits(model: NamedModel, known: NamedModel) -> NamedModel:
    return replace(known, commits=tuple(sorted({*known.commits, *model.commits})))


def _env(entry: Any, where: str) -> tuple[str, str, str]:
    if not isinstance(entry, dict):
        raise DamagedError(f"{where} has an env that is no mapping", hint="build the Bento again")
    stage = _text(entry.get("stage") or "all", "an env's stage", where)
    return _env_name(entry.get("name"), where), _text(entry.get("value") or "", "an env's value", where), stage


def _old_envs(value: Any, where: str) -> list[tuple[str, str, str]]:
    """`docker.env` of spec 1: a mapping, or a list of NAME=VALUE; a path of a file was copied into the Dockerfile."""
    if isinstance(value, list):
        pairs = [tuple(_text(item, "docker.env", where).partition("=")[::2]) for item in value]
    elif isinstance(value, dict):
        pairs = [(name, _text(text or "", "docker.env", where)) for name, text in value.items()]
    else:
        return []
    return [(_env_name(name, where), text, "all") for name, text in pairs]


def _env_name(value: Any, where: str) -> str:
    name = _text(value, "an env's name", where)
    if _ENV_NAME.fullmatch(name) is None:
        raise DamagedError(f"{where}: {jsontext.shown(name)} is no name of an environment variable")
    return name


def _tag(name: Any, version: Any, where: str) -> Tag:
    parts = [_text(part, "a name or version", where).lower() for part in (name, version)]
    for part in parts:
        if _PART.fullmatch(part) is None or len(part) > _PART_MAX:
            raise DamagedError(
                f"{where}: {jsontext.shown(part)} is no name or version that BentoML would have written",
                hint="build the Bento, or save the model, again",
            )
    return Tag(*parts)


def _time(value: Any, where: str) -> datetime:
    if value is None:  # before 1.0
        return datetime.fromtimestamp(0, timezone.utc)
    text = _text(value, "creation_time", where).replace("Z", "+00:00")
    try:
        found = datetime.fromisoformat(text)
        return found if found.tzinfo else found.replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise DamagedError(f"{where}: creation_time {jsontext.shown(text)} is no time") from error


def _list(value: Any, what: str, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DamagedError(f"{where} has {what!r} that is no list", hint="build the Bento again")
    return value


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise DamagedError(f"{where}: {what} is no text", hint="build the Bento, or save the model, again")
    return value
