"""What a run will do, worked out whole before anything is changed, and in words."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bootstrap import containerd, environment, services, settings
from bootstrap.disks import BOOT, FORMAT, OWN, Choice, choose
from bootstrap.errors import NodeError, UsageError
from bootstrap.flags import AUTO, NONE, Options
from bootstrap.node import Node
from bootstrap.record import Record
from bootstrap.survey import check_system, has_raid0, survey
from bootstrap.system import booted, find, read

CACHE_PLACES = ("cache_dir", "cache_dirs")
_DERIVED = (*CACHE_PLACES, "cache_size", "cache_min_free")


@dataclass
class Plan:
    """`asked`: what counts now, with what was asked for earlier. `choice`: None where others say where the cache lies.

    `values`: settings that were given, `sources` where; `name`: of the environment; `source`: None where it is installed;
    `dropped`: settings that were given before, and are not any more.
    """

    asked: dict[str, Any]
    values: dict[str, str]
    sources: Mapping[str, str]
    name: str
    source: Path | None
    choice: Choice | None
    packages: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def merge_asked(before: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """What counts: what is said now, else what was said earlier."""
    asked = {} if options.declarative else dict(before)
    if options.disks is not None:
        asked["disks"] = options.disks if isinstance(options.disks, str) else list(options.disks)
        if options.disks == NONE:
            asked["raid0"] = False
        if asked["disks"] == before.get("disks") and options.declarative and "identities" in before:
            asked["identities"] = before["identities"]  # said again, and not anew
        else:
            asked.pop("identities", None)
    if options.raid0 is not None:
        asked["raid0"] = options.raid0
    if options.format is not None:
        asked["format"] = options.format
    if options.csi is not None:
        asked["csi"] = options.csi
    for key, value in (
        ("runtime_handler", options.runtime_handler),
        ("containerd_config", options.containerd_config),
        ("containerd_main", options.containerd_main),
    ):
        if value is not None:
            asked[key] = str(value)
    if asked.get("raid0") and asked.get("disks") == NONE:
        raise UsageError(
            "--raid0 needs disks, and --disks none was given before", "give --disks auto, or leave --raid0 out"
        )
    return {"disks": AUTO, "raid0": False, "format": False, **asked}


def make(options: Options, record: Record) -> Plan:
    """All that can be known beforehand. UsageError, NodeError: nothing was changed."""
    source = _source(options, record)
    checker = settings.Checker(path=source) if source else installed_checker()
    metadata, notes, warnings = _metadata(options)
    values, sources, more = settings.gather(options.settings, os.environ, metadata, checker)
    asked = merge_asked(record.asked, options)
    # Whatever the metadata of a later boot say, these were said by whoever ran this.
    said = {key: value for key, value in values.items() if sources[key] != "metadata"}
    before = record.asked.get("settings", {})
    earlier = {} if options.declarative else dict(before)
    if options.disks not in (None, NONE):
        earlier = {key: value for key, value in earlier.items() if key not in CACHE_PLACES}  # the disks have its place
    asked["settings"] = {**earlier, **said}
    counting = {key: value for key, value in earlier.items() if key not in said}
    for key in not_taken_over(counting, record):
        values[key] = counting[key]  # also where the run that was told of it came to no end
        sources = {**sources, key: "said earlier"}
    if options.image and not booted() and not record.exists:
        notes.append("what the metadata say is asked for at the boot")
    if not options.image and not booted():
        raise NodeError(
            "systemd does not run here",
            "give --image to prepare this system for its boot; in a pod: hostPID: true, and the host's / as --host-root",
        )
    notes += [*more, *check_system(image=options.image)]
    packages, offline_hint = _packages(options, asked)
    if packages and options.offline is not None:
        raise NodeError(f"--offline, and this system lacks {', '.join(packages)}", offline_hint)
    containerd.check_program(asked.get("runtime_handler"))
    containerd.check_files(asked)
    if record.data.get("containerd"):
        containerd.check_same_file(record.asked, asked)
    services.unit_files(asked)
    services.check_volumes(record.asked, asked)
    if not options.image:
        containerd.check_restart()
    choice = None
    if not options.image:
        choice = choose_cache(asked, values, record)
        asked["identities"] = identities(asked)
        if choice is not None:
            check_consent(choice, consent=asked["format"])
            notes += choice.notes
            warnings += choice.warnings
    elif asked["disks"] != NONE:
        notes.append(
            "disks are chosen at each boot" + ("" if asked["format"] else "; none is formatted without --format")
        )
    name = environment.identity(source) if source else Path(os.path.realpath(environment.CURRENT)).name
    settings.merge(read(settings.FILE), values)  # what cannot be edited is refused now
    dropped = sorted({*record.data.get("dropped", ()), *before} - {*asked["settings"]})
    return Plan(asked, values, sources, name, source, choice, packages, notes, warnings, dropped)


def installed_checker() -> settings.Checker:
    """The judgement of the Floe that is installed."""
    return settings.Checker(python=str(environment.CURRENT / "bin/python"))


def _source(options: Options, record: Record) -> Path | None:
    """What to install from; None where this program was installed itself, and nothing else is named."""
    try:
        source = environment.find_source(options.source, options.offline)
    except UsageError:
        if record.exists and (environment.CURRENT / "bin/floe").exists():
            return None
        raise
    environment.check_wheel(source)
    return source


def _metadata(options: Options) -> tuple[dict[str, str], list[str], list[str]]:
    """Of the instance; a disk image is made on another one."""
    if options.image:
        return {}, [], []
    try:
        return settings.metadata(), [], []
    except NodeError as error:
        return {}, [], [str(error)]


def cache_keys(values: Mapping[str, str], record: Record) -> list[str]:
    """Settings by which others say where the cache lies."""
    file = settings.keys_of(read(settings.FILE))
    ours = record.data.get("settings", {})
    return [key for key in CACHE_PLACES if key in values or (key in file and not written_by_us(key, file, ours))]


def choose_cache(asked: Mapping[str, Any], values: Mapping[str, str], record: Record) -> Choice | None:
    """Where the cache goes; None where settings say so already."""
    theirs = cache_keys(values, record)
    if theirs:
        if asked["disks"] not in (AUTO, NONE):
            raise UsageError(
                f"--disks names disks, and {', '.join(theirs)} is set already",
                f"take it out of {settings.FILE}, or leave --disks out",
            )
        return None
    devices = asked["disks"] if isinstance(asked["disks"], list) else []
    known = asked.get("identities", {})
    devices = [_name_now(device, known[device]) if device in known else device for device in devices]
    node: Node = survey(devices, record.data["formatting"])
    choice = choose(node, devices or asked["disks"], raid0=asked["raid0"])
    if any(use.raid and use.action == FORMAT for use in choice.uses) and not has_raid0():
        raise NodeError(
            f"Linux {platform.release()} has no RAID 0", "leave --raid0 out: several cache directories need no array"
        )
    return choice


def identities(asked: Mapping[str, Any]) -> dict[str, str]:
    """What tells the disks that were named by the kernel's names from others: such a name may be another disk's tomorrow."""
    devices = asked["disks"] if isinstance(asked["disks"], list) else []
    if not devices:
        return {}
    known = dict(asked.get("identities", {}))
    node = survey(devices, [])
    for device in devices:
        disk = node.disk(device)
        if disk is not None and not device.startswith("/dev/disk/"):
            known.setdefault(device, disk.identity)
    return known


def _name_now(device: str, identity: str) -> str:
    """The name that a disk has now. NodeError when it is gone, and its name another disk's."""
    node = survey([device], [])
    disk = node.disk(device)
    if disk is not None and (disk.identity == identity or any(one.ours for one in disk.tree())):
        return device
    same = [one.path for whole in node.disks for one in whole.tree() if one.identity == identity]
    if len(same) == 1:
        return same[0]
    if disk is None:
        return device  # that there is none is said where it is looked at
    raise NodeError(
        f"{device} is not the disk that was named by it: that one is gone, or cannot be told from others",
        "give --disks again; names in /dev/disk/by-id stay with their disk, and auto takes what is empty",
    )


def written_by_us(key: str, file: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Whether a line of the file is as this program wrote it."""
    return key in ours and settings.keys_of(settings.merge("", {key: ours[key]})).get(key) == file.get(key)


def not_taken_over(keys: Iterable[str], record: Record) -> list[str]:
    """Those of the keys that are this program's still: as it wrote them, or never written. People have the rest of the file."""
    file, ours = settings.keys_of(read(settings.FILE)), record.data.get("settings", {})
    return [key for key in keys if written_by_us(key, file, ours) or (key not in file and key not in ours)]


def check_consent(choice: Choice, *, consent: bool) -> None:
    """NodeError unless what would be formatted may be."""
    disks = choice.to_format
    if disks and not consent:
        names = ", ".join(f"{disk.path} ({disk.size / 1e9:.0f} GB)" for disk in disks)
        raise NodeError(
            f"{names}: empty, and would be formatted", "give --format if that is right, or --disks none to do without"
        )


def _packages(options: Options, asked: Mapping[str, Any]) -> tuple[list[str], str]:
    found, hint = [], ""
    if environment.lacks_pip() and environment.pip_wheel(options.offline) is None:
        found.append("python3-venv")
        hint = "put a wheel of pip beside the others: pip download -d DIR pip"
    if asked["raid0"] and find("mdadm") is None:
        found.append("mdadm")
        hint = "leave --raid0 out: several cache directories need no array"
    return found, hint


def derived(choice: Choice | None) -> dict[str, str]:
    """The settings that follow from where the cache lies."""
    if choice is None:
        return {}
    found = {"cache_dir": choice.directories[0]} if choice.kind != BOOT else {}
    if len(choice.directories) > 1:
        found["cache_dirs"] = ":".join(choice.directories[1:])
    if choice.size:
        found["cache_size"] = choice.size
    if choice.min_free:
        found["cache_min_free"] = choice.min_free
    return found


def settings_text(
    text: str, values: Mapping[str, str], choice: Choice | None, record: Record
) -> tuple[str, dict[str, str]]:
    """The settings file as it shall be, and which of its lines are this program's."""
    ours = record.data.get("settings", {})
    file = settings.keys_of(text)
    theirs = {key for key in file if not written_by_us(key, file, ours)}
    follow = {key: value for key, value in derived(choice).items() if key not in theirs and key not in values}
    given = record.asked.get("settings", {})
    wanted = {**follow, **values}
    gone = tuple(
        key
        for key in (*_DERIVED, *record.data.get("dropped", ()))
        if key in ours and key not in wanted and key not in given and key in file and key not in theirs
    )
    merged = settings.merge(text, wanted, gone)
    kept = {key: value for key, value in ours.items() if key not in gone and key not in theirs}
    return merged, {**kept, **wanted}


def describe(plan: Plan, options: Options, *, changes: bool) -> list[str]:
    """The plan, for people: what is done, in the order of doing."""
    lines = []
    if plan.packages:
        lines.append(f"install the packages {', '.join(plan.packages)}")
    if plan.source is not None and not environment.is_built(plan.name):
        where = f"wheels of {options.offline}" if options.offline else "wheels from the package index"
        lines.append(
            f"install Floe {plan.name} from {plan.source}, with {where}, into {environment.VERSIONS / plan.name}"
        )
    choice = plan.choice
    for use in choice.uses if choice is not None else ():
        names = ", ".join(disk.path for disk in use.members)
        verb = "format" if use.action == "format" else "use"
        lines.append(f"{verb} {names}{' as one array (RAID 0)' if use.raid else ''}, and mount it at {use.mountpoint}")
    if choice is not None and choice.kind != OWN:
        lines.append(f"cache in {', '.join(choice.directories)}")
    for key, value in {**derived(choice), **plan.values}.items():
        lines.append(f"set {key} = {settings.shown(value)} ({plan.sources.get(key, 'follows from the disks')})")
    lines += [f"take back the setting {key}" for key in plan.dropped if key not in plan.values]
    lines.append(f"install and enable the units {', '.join(services.unit_files(plan.asked))}")
    if options.csi is False:
        lines.append(f"take {services.CSI} away")
    handler = plan.asked.get("runtime_handler")
    for_whom = "all pods" if handler in (None, NONE) else f"the runtime handler {handler}"
    file = plan.asked.get("containerd_config", containerd.CONFIG)
    lines.append("start nothing" if options.image else "start the daemons, or replace running ones")
    lines.append(f"put Floe into {file}, for {for_whom}")
    if not options.image:
        lines.append("restart containerd where its configuration changed")
    if options.verify_image:
        lines.append(f"pull {options.verify_image} and run it")
    return lines if changes else []
