"""The command line: read, and refused where it cannot be meant, without a look at the node."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from bootstrap.errors import UsageError

AUTO, NONE = "auto", "none"
_HANDLER = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # as Kubernetes names a handler of a RuntimeClass
_KEY = re.compile(r"[a-z][a-z0-9_]*")
_DEVICE = re.compile(r"/dev(/[^/\s]+)+")
# A registry's host, a path, and a tag or digest: ctr completes no names.
_IMAGE = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+(:[A-Za-z0-9._-]+|@sha256:[0-9a-f]{64})")
_FIXED = ("root", "run_dir", "address")  # the units say where
_UNINSTALL = ("dry_run", "uninstall", "yes", "host_root", "json")

_TEXT = """Make this machine a Floe node: cache disks, program, settings, units, containerd. Run again it changes what is
not yet as asked for, and finishes what was interrupted; what is not given stays as it was given before."""
_MORE = """Settings come from the flags, else from FLOE_* variables, else from the instance's metadata on Google Cloud
(floe-store, floe-cache-size and so on), else from /etc/floe/config.toml as it is. Exit status: 0 done, 1 failed,
2 used wrongly. A disk with data is never formatted."""


@dataclass(frozen=True)
class Options:
    """What was asked for. None: not said, so that what was said before counts.

    `disks`: AUTO, NONE or paths of devices. `settings`: of Floe, by key, as texts. `runtime_handler`: NONE for all pods.
    """

    disks: str | tuple[str, ...] | None = None
    raid0: bool | None = None
    format: bool | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    runtime_handler: str | None = None
    csi: bool | None = None
    containerd_config: Path | None = None
    containerd_main: Path | None = None
    source: Path | None = None
    offline: Path | None = None
    host_root: Path | None = None
    image: bool = False
    verify_image: str | None = None
    declarative: bool = False
    dry_run: bool = False
    uninstall: bool = False
    boot: bool = False
    yes: bool = False
    json: bool = False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, "bootstrap-node.sh --help lists what there is")


def parser() -> argparse.ArgumentParser:
    """The flags, without abbreviations: a script that was written today means the same tomorrow."""
    made = _Parser(
        prog="bootstrap-node.sh",
        description=_TEXT,
        epilog=_MORE,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    disks = made.add_argument_group("cache disks")
    disks.add_argument(
        "--disks",
        metavar="auto|none|DEV[,DEV...]",
        help="local NVMe disks that are empty, none, or these (auto); several are several cache directories",
    )
    disks.add_argument("--raid0", action="store_true", help="several disks become one, by mdadm")
    disks.add_argument(
        "--format", action="store_true", help="yes, those disks may be formatted, now and at later boots"
    )
    disks.add_argument("--no-format", dest="format", action="store_false", help="no longer, at no boot either")
    settings = made.add_argument_group("settings")
    settings.add_argument("--store", metavar="URL", help="object store: s3://..., gs://... or file:///PATH")
    settings.add_argument("--index", metavar="URL", help="index: redis://..., rediss://..., sqlite:/PATH or none")
    settings.add_argument("--set", metavar="KEY=VALUE", action="append", help="another of Floe's settings; repeatable")
    containerd = made.add_argument_group("containerd")
    containerd.add_argument(
        "--runtime-handler", metavar="NAME", help="for pods of this handler only, for example runc-floe; none: all pods"
    )
    containerd.add_argument(
        "--containerd-config", metavar="FILE", help="the file to change (/etc/containerd/config.toml)"
    )
    containerd.add_argument(
        "--containerd-main", metavar="FILE", help="what containerd is started with, when it imports that file"
    )
    containerd.add_argument("--verify-image", metavar="REF", help="at the end pull this image and run it")
    kubernetes = made.add_argument_group("Kubernetes")
    kubernetes.add_argument("--csi", action="store_true", help="run the CSI driver too: models as volumes of any pod")
    kubernetes.add_argument("--no-csi", dest="csi", action="store_false", help="no longer")
    source = made.add_argument_group("program")
    source.add_argument("--source", metavar="PATH", help="a checkout or a wheel of Floe (the checkout this lies in)")
    source.add_argument("--offline", metavar="DIR", help="install from the wheels in DIR; nothing is downloaded")
    how = made.add_argument_group("how")
    how.add_argument(
        "--image", action="store_true", help="for a disk image: nothing is started, disks wait for its boot"
    )
    how.add_argument("--host-root", metavar="DIR", help="a host whose root is DIR, from a container or for a chroot")
    how.add_argument(
        "--declarative", action="store_true", help="what is not given now counts no more, whatever was given before"
    )
    how.add_argument("--uninstall", action="store_true", help="take everything back that this has done")
    how.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    how.add_argument("--yes", action="store_true", help="do not ask")
    how.add_argument("--json", action="store_true", help="print the report as JSON; needs --yes or --dry-run")
    how.add_argument("--boot", action="store_true", help=argparse.SUPPRESS)  # floe-node.service
    return made


def parse(arguments: Sequence[str]) -> Options:
    """The command line. UsageError."""
    given = vars(parser().parse_args(list(arguments)))
    _check_together(given)
    values = dict(given)
    settings = _settings(values.pop("store", None), values.pop("index", None), values.pop("set", []))
    if "disks" in values:
        values["disks"] = disks_of(values["disks"])
    for key in ("containerd_config", "containerd_main", "source", "offline", "host_root"):
        if key in values:
            values[key] = _path(key, values[key])
    if "runtime_handler" in values:
        _check_handler(values["runtime_handler"])
    if not _IMAGE.fullmatch(values.get("verify_image", "host/image:tag")):
        raise UsageError(
            f"--verify-image: {values['verify_image']!r} is no whole name of an image",
            "write host, path and tag, for example docker.io/library/busybox:1.36",
        )
    if "cache_dir" in settings or "cache_dirs" in settings:
        if values.get("disks", NONE) != NONE:
            raise UsageError("--disks and --set cache_dir both say where the cache lies", "give one of them")
        values["disks"] = NONE
    if values.get("raid0") and isinstance(values.get("disks"), tuple) and len(values["disks"]) < 2:
        raise UsageError("--raid0 needs at least two disks", "name more of them, or leave --raid0 out")
    if values.get("raid0") and values.get("disks") == NONE:
        raise UsageError(
            "--raid0 needs disks, and there are none to be used", "give --disks auto, or leave --raid0 out"
        )
    return Options(settings=settings, **values)


def _check_together(given: Mapping[str, object]) -> None:
    if given.get("boot") and len(given) > 1:
        raise UsageError("--boot is how floe-node.service starts this, and goes alone", "leave it out")
    if given.get("uninstall"):
        others = [_flag(key) for key in given if key not in _UNINSTALL]
        if others:
            raise UsageError(f"--uninstall goes without {', '.join(others)}", "it takes back all that was done")
    if given.get("image") and "verify_image" in given:
        raise UsageError("--image starts nothing, so there is nothing to verify with", "leave --verify-image out")
    if given.get("json") and not (given.get("yes") or given.get("dry_run") or given.get("boot")):
        raise UsageError("--json asks no questions", "give --yes or --dry-run with it")


def disks_of(text: str) -> str | tuple[str, ...]:
    """What --disks says. UsageError."""
    if text in (AUTO, NONE):
        return text
    devices = tuple(text.split(","))
    for device in devices:
        if not _DEVICE.fullmatch(device) or ".." in device.split("/"):
            raise UsageError(f"--disks: {device!r} is no device", "write auto, none, or /dev/nvme0n1,/dev/nvme1n1")
    twice = next((device for device in devices if devices.count(device) > 1), None)
    if twice is not None:
        raise UsageError(f"--disks names {twice} twice", "name each disk once")
    return devices


def _settings(store: str | None, index: str | None, more: Sequence[str]) -> dict[str, str]:
    found = {key: value for key, value in (("store", store), ("index", index)) if value is not None}
    for text in more:
        key, equals, value = text.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UsageError(f"--set: {text!r} is not KEY=VALUE", "for example --set cache_size=80%")
        if key in found:
            raise UsageError(f"--set: {key} is given twice", "give it once")
        found[key] = value
    check_fixed(found, "--set")
    return found


def check_fixed(settings: Mapping[str, str], place: str) -> None:
    """UsageError for what the units decide."""
    fixed = next((key for key in _FIXED if key in settings), None)
    if fixed is not None:
        raise UsageError(
            f"{place}: {fixed} stands in the units as well",
            "leave it out, or install by hand: docs/OPERATIONS.md, Install",
        )


def _check_handler(name: str) -> None:
    if not _HANDLER.fullmatch(name):
        raise UsageError(
            f"--runtime-handler: {name!r} is no name of a runtime handler",
            "small letters, digits and dashes, for example runc-floe; none for all pods",
        )


def _path(key: str, text: str) -> Path:
    path = Path(text)
    of_host = key in ("containerd_config", "containerd_main")
    if not text or (of_host and not path.is_absolute()):
        raise UsageError(f"{_flag(key)}: {text!r} is no absolute path", "write it from / on")
    if key in ("offline", "host_root") and not path.is_dir():
        raise UsageError(f"{_flag(key)}: there is no directory {text}", "check the path")
    if key == "offline" and not any(path.glob("*.whl")):
        raise UsageError(f"--offline: there are no wheels in {text}", "pip wheel -w DIR . in a checkout makes them")
    if key == "source":
        check_source(path)
    if key == "host_root" and not (path / "etc").is_dir():
        raise UsageError(f"--host-root: {text} is no root of a system: it has no etc", "mount the host's / there")
    return path if of_host else path.absolute()


def check_source(path: Path) -> None:
    """UsageError unless it is a checkout or a wheel of Floe."""
    if path.is_dir():
        if (path / "pyproject.toml").is_file() and (path / "floe/__init__.py").is_file():
            return
        raise UsageError(f"--source: {path} is no checkout of Floe", "it has pyproject.toml and floe/ in it")
    if not path.is_file():
        raise UsageError(f"--source: there is no {path}", "name a checkout of Floe, or a wheel")
    if not re.fullmatch(r"floe-[^-]+-py3-none-any\.whl", path.name):
        raise UsageError(f"--source: {path.name} is no wheel of Floe", "pip wheel --no-deps . in a checkout makes one")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")
