"""What was done to containerd's configuration, and what is in force, for people and for `floe doctor`."""

from __future__ import annotations

from typing import Any

from floe.containerd import wanted
from floe.containerd.configure import Configuration
from floe.containerd.dump import dump
from floe.containerd.imports import effective
from floe.containerd.record import digest
from floe.containerd.version import Version

NOT_CONFIGURED, CONFIGURED, CHANGED = "not configured", "configured", "changed since"


def status_of(configuration: Configuration, version: Version) -> dict[str, Any]:
    """What was done to the file, and what is in force.

    `state`: of the file; `runtime`: the handler that it was configured for, None for all; the rest as containerd goes by it,
    or as its files say when there is no program to ask.
    BadInputError, NotFoundError for files that cannot be read; UnavailableError when containerd does not accept them.
    """
    kept = configuration.kept
    record, data = kept.read_record(), kept.read()
    state = NOT_CONFIGURED
    if record is not None and digest(data) != record.before:
        state = CONFIGURED if digest(data) == record.after else CHANGED
    asked = configuration.binary is not None
    if configuration.binary is not None and (data is not None or configuration.main.exists()):
        config = dump(configuration.binary, configuration.main)
    elif data is None and not configuration.main.exists():
        config = {}
    else:
        config = effective(configuration.main, version).config
    return {
        "file": str(kept.path),
        "state": state,
        "runtime": None if record is None else record.runtime,
        "containerd": str(version),
        "asked": asked,
        **in_force(config),
    }


def in_force(config: dict[str, Any]) -> dict[str, Any]:
    """What a whole configuration says of Floe."""
    images = wanted.lookup(config, wanted.IMAGES) or wanted.lookup(config, (*wanted.CRI, "containerd")) or {}
    runtimes = {
        **(wanted.lookup(config, (*wanted.CRI, "containerd", "runtimes")) or {}),
        **(wanted.lookup(config, (*wanted.RUNTIME, "containerd", "runtimes")) or {}),
    }
    unpack = wanted.lookup(config, wanted.UNPACK) or []
    off = [str(name) for name in config.get("disabled_plugins") or [] if name in wanted.CRI_PLUGINS]
    return {
        "address": wanted.lookup(config, (*wanted.PROXY, "address")),
        "snapshotter": images.get("snapshotter"),
        "runtimes": sorted(name for name, table in runtimes.items() if table.get("snapshotter") == wanted.NAME),
        "platforms": sorted(wanted.lookup(config, (*wanted.IMAGES, "runtime_platforms")) or {}),
        "unpacked_for": sorted({str(entry.get("snapshotter")) for entry in unpack if isinstance(entry, dict)}),
        "discards_layers": bool(images.get("discard_unpacked_layers")),
        "cri_disabled": off,
    }
