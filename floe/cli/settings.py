"""Floe's settings: built-in defaults, then the file, then FLOE_* variables, then flags; later wins.

A file key is the flag's name with underscores, a variable the same in capitals after `FLOE_`. Every value is
checked where it was given, and an error names that place.
"""
# ruff: noqa: RUF009 - _setting makes a dataclass field

from __future__ import annotations

import difflib
import importlib
import math
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from floe.agent.selector import Labels, parse_node_name
from floe.cli.csirules import CsiRules
from floe.cli.imagepolicies import ImagePolicies
from floe.cli.policies import Policies
from floe.cli.sizes import Size, parse_seconds
from floe.cli.trusted import TrustedKeys
from floe.store.errors import AccessDeniedError, BadInputError, FloeError
from floe.store.metricsaddress import parse_address
from floe.store.policy import AUTO, BYPASS

DEFAULT_CONFIG = "/etc/floe/config.toml"
PREFIX = "FLOE_"
# Closer than this to a known variable is a typing mistake; Kubernetes sets FLOE_SERVICE_HOST and the like.
_TYPO = 0.85
T = TypeVar("T")


def _setting(default: T, parse: Callable[[Any], T], text: str) -> T:
    return field(default=default, metadata={"parse": parse, "help": text})


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise BadInputError(f"{value!r} is not a text")
    return value


def _path(value: object) -> Path:
    return Path(_text(value)).expanduser().absolute()


def _optional_path(value: object) -> Path | None:
    return _path(value)


def _key_file(value: object) -> Path | None:
    return None if value == "none" else _path(value)


def _paths(value: object) -> tuple[Path, ...]:
    """Directories, as a list or with a colon between them, as containerd's config_path; `none` for none."""
    if isinstance(value, list) and all(isinstance(folder, str) and ":" not in folder for folder in value):
        value = ":".join(value) or "none"
    text = _text(value)
    folders = () if text == "none" else tuple(text.split(":"))
    if not all(folder.startswith(("/", "~")) for folder in folders):
        raise BadInputError(f"{text!r} is not a list of absolute paths", hint="write /path, /path:/path or none")
    return tuple(_path(folder) for folder in folders)


def _keys(value: object) -> TrustedKeys:
    return TrustedKeys.parse(value)


def _url(value: object) -> str:
    text = _text(value)
    for scheme in ("file://", "sqlite:"):
        rest = text[len(scheme) :]
        if text.startswith(scheme) and not rest.startswith("/"):
            raise BadInputError(f"{text!r} does not name an absolute path", hint=f"write {scheme}/path")
    return text


def _metrics(value: object) -> str:
    if value != "none":
        parse_address(_text(value))
    return str(value)


def _endpoint(value: object) -> str | None:
    text = _text(value)
    if text == "none":
        return None
    if not text.startswith(("http://", "https://")):
        raise BadInputError(f"{text!r} is no address of a collector", hint="write http://HOST:4318 or https://HOST")
    return text


def _size(value: object) -> Size:
    return Size.parse(value)


def _bytes(value: object) -> int:
    return Size.parse(value, percent=False).of(0)


def _rate(value: object) -> int:
    return 0 if value == "none" else _bytes(value)


def _policies(value: object) -> Policies:
    return Policies.parse(value, lambda text: dict(_toml().loads(text)))


def _rules(value: object) -> CsiRules:
    return CsiRules.parse(value, lambda text: dict(_toml().loads(text)))


def _node_name(value: object) -> str | None:
    return parse_node_name(value)


def _labels(value: object) -> Labels:
    return Labels.parse(value)


def _image_policies(value: object) -> ImagePolicies:
    return ImagePolicies.parse(value, lambda text: dict(_toml().loads(text)))


def _grace(value: object) -> float:
    """A span, `7d` or a number of seconds; `none` is 0."""
    if isinstance(value, str):
        value = 0 if value == "none" else parse_seconds(value)
    return 0.0 if value == 0 and not isinstance(value, bool) else _seconds(value)


def _seconds(value: object) -> float:
    try:
        seconds = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BadInputError(f"{value!r} is not a number of seconds above 0")
    return seconds


def _count(value: object) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadInputError(f"{value!r} is not a whole number above 0")
    return value


def _one_of(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in allowed:
            raise BadInputError(f"{value!r} is not one of {', '.join(allowed)}")
        return str(value)

    return parse


@dataclass(frozen=True)
class Settings:
    """What every command goes by; paths are absolute, times seconds, `int` sizes bytes."""

    store: str = _setting(
        "file:///var/lib/floe/store", _url, "object store: file:///PATH, s3://BUCKET/PREFIX?... or gs://BUCKET/PREFIX"
    )
    index: str = _setting(
        "sqlite:/var/lib/floe/index.db", _url, "index: redis://..., rediss://..., sqlite:/PATH or none"
    )
    root: Path = _setting(Path("/var/lib/floe/snapshotter"), _path, "the snapshotter's directory")
    cache_dir: Path = _setting(Path("/var/cache/floe"), _path, "the node cache's directory")
    cache_dirs: tuple[Path, ...] = _setting(
        (), _paths, "further directories of the node cache, on disks of their own: DIR[:DIR...] or none (none)"
    )
    run_dir: Path = _setting(Path("/run/floe"), _path, "sockets, pid files and mountpoints of the daemons")
    cache_size: Size = _setting(Size(percent=80.0), _size, "node cache: bytes, KiB to TiB, or %% of the disk (80%%)")
    cache_min_free: Size = _setting(Size(percent=10.0), _size, "disk space the node cache leaves free (10%%)")
    store_timeout: float = _setting(30.0, _seconds, "seconds a command keeps trying when the store fails (30)")
    spool_dir: Path | None = _setting(None, _optional_path, "where packs wait for upload (CACHE_DIR/spool)")
    workers: int = _setting(min(8, os.cpu_count() or 1), _count, "files or layers handled in parallel")
    readahead: int = _setting(128 << 20, _bytes, "bytes fetched ahead of a sequential reader, 0 for none (128MiB)")
    read_deadline: float = _setting(300.0, _seconds, "seconds a read waits for the store before it fails (300)")
    fetch_memory: int = _setting(256 << 20, _bytes, "bytes of memory for data on its way (256MiB)")
    busy_poll: str = _setting(
        "on", _one_of("on", "off"), "processor time spent on small reads' latency: on or off (on)"
    )
    profiles: str = _setting(
        "on", _one_of("on", "read", "off"), "start-up profiles: on, read (replayed, not recorded) or off (on)"
    )
    completion: str = _setting(
        "off",
        _one_of("off", "idle", "always"),
        "fetch all of what is mounted in the background: off, idle, always (off)",
    )
    completion_rate: int = _setting(0, _rate, "bytes a second that completion may fetch, or none (none)")
    model_policy: Policies = _setting(
        Policies(), _policies, "policies of models, as a list of TOML tables: completion, pin, share; or none (none)"
    )
    image_policy: ImagePolicies = _setting(
        ImagePolicies(),
        _image_policies,
        "which images are indexed, as a list of TOML tables: name, tags, platforms, min_size, max_size, never; or none (none)",
    )
    image_grace: float = _setting(
        0.0,
        _grace,
        "how long an image keeps its record after its registry deleted it: 7d, 36h, seconds; or none: for ever (none)",
    )
    seed: str = _setting(
        "off", _one_of("off", "label", "all"), "images that were unpacked are given to the store: off, label, all (off)"
    )
    seed_rate: int = _setting(32 << 20, _rate, "bytes a second that seeding reads, or none for no bound (32MiB)")
    containerd_socket: Path = _setting(
        Path("/run/containerd/containerd.sock"), _path, "containerd's socket, which seeding asks for blobs"
    )
    signing_key: Path | None = _setting(None, _key_file, "private key that signs what is published: a file, or none")
    trusted_keys: TrustedKeys = _setting(
        TrustedKeys(), _keys, "whose signatures count: public keys, files or directories of them, with commas; or none"
    )
    cache_bypass: str = _setting(
        AUTO, _one_of(*BYPASS), "reads go around a cache disk slower than the store: auto, never, always (auto)"
    )
    address: Path | None = _setting(None, _optional_path, "the snapshotter's socket (RUN_DIR/snapshotter.sock)")
    registry_config: tuple[Path, ...] = _setting(
        (Path("/etc/containerd/certs.d"), Path("/etc/docker/certs.d")),
        _paths,
        "directories of registries' hosts.toml files, as containerd's config_path: DIR[:DIR...] or none",
    )
    prepare_timeout: float = _setting(2.0, _seconds, "seconds the look-ups of one pull may take together (2)")
    on_store_error: str = _setting("unpack", _one_of("unpack", "error"), "a failed look-up: unpack or error (unpack)")
    prefetch_at_prepare: int = _setting(
        4 << 30, _bytes, "bytes of a model fetched while its image is pulled, 0 for none (4GiB)"
    )
    mounter: str = _setting(
        "auto", _one_of("auto", "erofs", "portable"), "what mounts: erofs, portable, or auto: EROFS if there is (auto)"
    )
    loop: str = _setting("auto", _one_of("auto", "always", "never"), "loop devices below EROFS: auto, always, never")
    kubelet_dir: Path = _setting(
        Path("/var/lib/kubelet"), _path, "the kubelet's directory; the CSI driver's socket lies in it"
    )
    csi_rules: CsiRules = _setting(
        CsiRules(),
        _rules,
        "which namespaces' pods may have which models, as a list of TOML tables; or none: all (none)",
    )
    node_name: str | None = _setting(None, _node_name, "what this node is called among others (the host's name)")
    node_labels: Labels = _setting(
        Labels(), _labels, "what orders may select this node by: KEY=VALUE,KEY or none (none)"
    )
    heartbeat: float = _setting(10.0, _seconds, "seconds between two heartbeats of the agent (10)")
    warm_budget: Size = _setting(
        Size(percent=50.0), _size, "most that warm orders may keep of the node cache: bytes or %% of it (50%%)"
    )
    packfs_metrics: str | None = _setting(None, _metrics, "unix:/PATH, LOOPBACK:PORT or none")
    snapshotter_metrics: str | None = _setting(None, _metrics, "unix:/PATH, LOOPBACK:PORT or none")
    csi_metrics: str | None = _setting(None, _metrics, "unix:/PATH, LOOPBACK:PORT or none")
    agent_metrics: str | None = _setting(None, _metrics, "unix:/PATH, LOOPBACK:PORT or none")
    indexer_metrics: str = _setting("none", _metrics, "unix:/PATH, LOOPBACK:PORT or none (none)")
    otlp_endpoint: str | None = _setting(
        None, _endpoint, "OpenTelemetry collector that spans go to: http://HOST:PORT, or none (none)"
    )
    log_level: str = _setting("info", _one_of("debug", "info", "warning", "error"), "debug, info, warning or error")
    log_format: str = _setting("text", _one_of("text", "json"), "text or json")

    @property
    def cache_roots(self) -> tuple[Path, ...]:
        """All directories of the node cache. BadInputError when one is named twice."""
        roots = (self.cache_dir, *self.cache_dirs)
        twice = next((root for position, root in enumerate(roots) if root in roots[:position]), None)
        if twice is not None:
            raise BadInputError(
                f"{twice} is named twice among cache_dir and cache_dirs",
                hint="cache_dirs lists what comes beside cache_dir",
            )
        return roots

    @property
    def spool(self) -> Path:
        """Where packs wait for upload."""
        return self.spool_dir or self.cache_dir / "spool"

    @property
    def socket(self) -> Path:
        """Where the snapshotter listens."""
        return self.address or self.run_dir / "snapshotter.sock"

    @property
    def csi_socket(self) -> Path:
        """Where the CSI driver listens: kubelets look for plugins there."""
        return self.kubelet_dir / "plugins/csi.floe/csi.sock"

    @property
    def node(self) -> str:
        """What this node is called among others. BadInputError when the host's name is none."""
        return self.node_name or parse_node_name(socket.gethostname())

    def metrics(self, daemon: str) -> str | None:
        """Where `daemon` ("packfs", "snapshotter", "csi", "agent" or "indexer") serves its metrics; None: nowhere."""
        chosen: str | None = getattr(self, f"{daemon}_metrics")
        if chosen == "none":
            return None
        return chosen or f"unix:{self.run_dir}/{daemon}-metrics.sock"

    def as_flags(self, *keys: str) -> list[str]:
        """The command line that gives a child process these settings whatever its file and environment say."""
        flags = ["--config="]
        for key in keys or KEYS:
            value = getattr(self, key)
            if isinstance(value, tuple):
                value = ":".join(map(str, value)) or "none"
            if value is not None:
                flags.append(f"--{flag_name(key)}={value}")
        return flags


KEYS = tuple(f.name for f in fields(Settings))
HELP: Mapping[str, str] = {f.name: f.metadata["help"] for f in fields(Settings)}
_PARSE: Mapping[str, Callable[[object], object]] = {f.name: f.metadata["parse"] for f in fields(Settings)}


def flag_name(key: str) -> str:
    """`cache_dir` as a flag is `cache-dir`."""
    return key.replace("_", "-")


def defaults_for(uid: int, environ: Mapping[str, str]) -> Settings:
    """The built-in settings; a user other than root has directories and index of their own, after the XDG variables."""
    if uid == 0:
        return Settings()
    cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "~").expanduser() / ".cache") / "floe"
    runtime = environ.get("XDG_RUNTIME_DIR")
    run_dir = Path(runtime) / "floe" if runtime else cache / "run"
    return Settings(index=f"sqlite:{cache}/index.db", cache_dir=cache / "node", run_dir=run_dir)


def load(
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    config: str | None = None,
    defaults: Settings | None = None,
) -> Settings:
    """The settings in force. `config` is --config (None: FLOE_CONFIG or the default file; "": no file).

    They start from `defaults`, or from the built-in ones.
    Raises BadInputError for an unknown key or a bad value, naming where it stands, and for a file that was
    asked for and is not there; the default file may be missing.
    """
    given = config if config is not None else environ.get(f"{PREFIX}CONFIG") or None
    settings = defaults or Settings()
    if given != "":
        path = Path(given or DEFAULT_CONFIG)
        settings = _apply(settings, _read_file(path, required=given is not None), lambda key: f"{key} in {path}")
    settings = _apply(settings, _from_environment(environ), lambda key: PREFIX + key.upper())
    chosen = {key: flags[key] for key in KEYS if flags.get(key) is not None}
    return _apply(settings, chosen, lambda key: f"--{flag_name(key)}")


def _apply(settings: Settings, values: Mapping[str, object], place: Callable[[str], str]) -> Settings:
    changes: dict[str, Any] = {}
    for key, value in values.items():
        try:
            changes[key] = _PARSE[key](value)
        except BadInputError as error:
            hint = error.hint or f"{flag_name(key)}: {HELP[key].replace('%%', '%')}"
            raise BadInputError(f"{place(key)}: {error}", hint=hint) from error
    return replace(settings, **changes)


def _read_file(path: Path, *, required: bool) -> dict[str, object]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if required:
            raise BadInputError(f"there is no settings file {path}", hint="check --config or FLOE_CONFIG") from None
        return {}
    except OSError as error:
        kind: type[FloeError] = AccessDeniedError if isinstance(error, PermissionError) else BadInputError
        raise kind(f"cannot read the settings file {path}: {error.strerror}") from error
    values = _parse_toml(data, path)
    for key in values:
        if key not in KEYS:
            raise BadInputError(f"{path} has an unknown setting {key!r}", hint=_suggest(key, KEYS))
    return values


def _parse_toml(data: bytes, path: Path) -> dict[str, object]:
    toml = _toml()
    try:
        values: dict[str, object] = toml.loads(data.decode())
    except (UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise BadInputError(f"{path} is not valid TOML: {error}", hint="mend the file, then try again") from error
    return values


def _toml() -> Any:
    # Imported late: most commands on most machines find no file.
    return importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    known = {PREFIX + key.upper(): key for key in KEYS}
    values: dict[str, object] = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or not value or name == f"{PREFIX}CONFIG":
            continue
        if name in known:
            values[known[name]] = value
        elif difflib.get_close_matches(name, known, n=1, cutoff=_TYPO):
            raise BadInputError(
                f"the environment variable {name} is none of Floe's", hint=_suggest(name, (*known, f"{PREFIX}CONFIG"))
            )
    return values


def _suggest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
