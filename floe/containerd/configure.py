"""Floe in containerd's configuration: planned, shown, written, verified, and taken out again."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from floe.containerd import document, wanted
from floe.containerd.dump import dump, not_in_force, side_effects
from floe.containerd.imports import Effective, effective
from floe.containerd.record import Kept, Record, digest
from floe.containerd.wanted import Change, Request, Set
from floe.store.errors import BadInputError, PreconditionError, UnsupportedError

DEFAULT_FILE = Path("/etc/containerd/config.toml")
RESTART = "systemctl restart containerd"


@dataclass(frozen=True)
class Plan:
    """What will be written. `before`: the file as it is, None for none; `base`: as it is without Floe."""

    before: bytes | None
    base: bytes | None
    after: bytes | None
    record: Record | None
    changes: tuple[Change, ...] = ()
    config_version: int = 0
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything will be written."""
        return self.before != self.after

    def diff(self, path: Path) -> str:
        """As `diff -u` shows it."""
        old, new = (_lines(data) for data in (self.before, self.after))
        return "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
            for line in difflib.unified_diff(old, new, str(path), f"{path} (new)")
        )


@dataclass
class Configuration:
    """containerd's configuration file. `main`: what containerd is started with, when `file` is imported by it.

    `binary`: asked what is in force; None: nobody is.
    """

    file: Path
    main: Path
    binary: Path | None
    kept: Kept = field(init=False)

    def __post_init__(self) -> None:
        """Resolve symlinks: what they lead to is edited."""
        self.kept = Kept(self.file)

    # configure

    def plan(self, request: Request) -> Plan:
        """What configuring would write, and why it cannot be: nothing is changed here.

        BadInputError, PreconditionError, UnsupportedError; UnavailableError: containerd does not accept it as it is.
        """
        before = self.kept.read()
        notes: list[str] = []
        base = self._base(before, notes)
        text = self._text(base)
        config = document.parse(text, self.file)
        version = _config_version(config, request, self.file)
        if not config:
            text = f"version = {version}\n" + ("\n" + text.lstrip("\n") if text.strip() else "")
        if request.runtime is not None:
            _check_runtime(request, version)
        whole = self._effective(request, text)
        _check_enabled(whole)
        changes = wanted.changes(request, version, whole.config)
        own = wanted.missing(changes, whole.config)
        _check_free(whole, request)
        after, blocks = document.apply(text, own, self.file)
        self._check_imports(request, after, changes)
        notes += _notes(request, whole.config, version)
        parsed = document.parse(text, self.file)
        record = Record(
            digest(base),
            str(digest(after.encode())),
            request.runtime,
            [(change, wanted.lookup(parsed, change.path) if isinstance(change, Set) else None) for change in own],
            document.tables_made(parsed, own),
            blocks,
        )
        return Plan(before, base, after.encode(), record, tuple(changes), version, tuple(notes))

    def apply(self, plan: Plan) -> str:
        """Write it, and see that containerd goes by it; what it does not go by is put back. How that was verified.

        PreconditionError when the file is as it was again.
        """
        earlier = self._dump_if_any(plan.before)
        record, backup = self.kept.read_record(), self.kept.read_backup()
        if plan.record is not None and plan.changed:
            self.kept.keep(plan.base, plan.record)
        try:
            if plan.changed:
                self.kept.write(plan.after)
            return self._verify(plan, earlier)
        except BaseException:
            if plan.changed:
                self.kept.write(plan.before)
                if record is None:
                    self.kept.forget()
                else:
                    self.kept.keep(backup, record)
            raise

    def _verify(self, plan: Plan, earlier: Mapping[str, Any] | None) -> str:
        if self.binary is None:
            return "not verified: there is no containerd to ask"
        now = dump(self.binary, self.main)
        state = "was put back as it was" if plan.changed else "was not changed"
        wrong = not_in_force(plan.changes, now)
        if wrong:
            raise PreconditionError(
                f"containerd does not go by {', '.join(wrong)}; {self.file} {state}",
                hint="another file of imports may have the last word: see containerd config dump",
            )
        if earlier is not None and plan.before == plan.base:
            moved = side_effects(plan.changes, earlier, now)
            if moved:
                raise PreconditionError(
                    f"other keys of containerd would change as well: {', '.join(moved)}; {self.file} {state}",
                    hint="compare containerd config dump of the file with and without the shown diff",
                )
        return f"verified: {self.binary} config dump says what was wanted"

    def _dump_if_any(self, before: bytes | None) -> Mapping[str, Any] | None:
        """What is in force now; without a file there is nothing to load."""
        asked = self.binary is not None and (before is not None or self.main != self.file)
        return dump(self.binary, self.main) if self.binary is not None and asked else None

    def _base(self, before: bytes | None, notes: list[str]) -> bytes | None:
        """The file as it would be without Floe."""
        record = self.kept.read_record()
        if record is None or digest(before) == record.before:
            return before
        if digest(before) == record.after:
            backup = self.kept.read_backup()
            if digest(backup) == record.before:
                return backup
        if not _has_traces(before):
            return before  # written anew, as some platforms do at boot
        notes.append(
            "the file was changed since Floe was put into it: the backup is made anew, of the file without Floe's keys"
        )
        return self._without(before or b"", record)[0]

    def _without(self, data: bytes, record: Record) -> tuple[bytes, list[str]]:
        text, left = document.take_out(self._text(data), record.changes, record.made, record.blocks, self.file)
        return text.encode(), left

    def _text(self, data: bytes | None) -> str:
        try:
            return (data or b"").decode()
        except UnicodeDecodeError as error:
            raise BadInputError(f"{self.file} is not UTF-8: {error}", hint="mend the file, then try again") from error

    def _effective(self, request: Request, text: str) -> Effective:
        return effective(self.main, request.version, {self.file: text, self.kept.path: text})

    def _check_imports(self, request: Request, after: str, changes: list[Change]) -> None:
        """PreconditionError when another file has the last word about one of Floe's keys."""
        whole = self._effective(request, after)
        if all(source.path not in (self.file, self.kept.path) for source in whole.sources):
            raise PreconditionError(
                f"{self.main} does not import {self.file}",
                hint="name it in imports of that file, or give another --main",
            )
        for change in wanted.missing(changes, whole.config):
            last = whole.last(change.path) if request.version.is_2 else whole.replacing(change.path)
            raise PreconditionError(
                f"{document.dotted(change.path)} of {self.file} would have no effect: {last} has the last word",
                hint=f"give --containerd-config {last} --main {self.main}, or take that table out of {last}",
            )

    # unconfigure

    def plan_undo(self) -> Plan:
        """What taking Floe out would write. PreconditionError when Floe was not put in by `configure`."""
        before, record = self.kept.read(), self.kept.read_record()
        if record is None:
            self._check_untouched(before)
            return Plan(before, before, before, None)
        if digest(before) == record.before:  # an earlier run came so far
            return Plan(before, before, before, record)
        backup = self.kept.read_backup()
        if digest(before) == record.after and digest(backup) == record.before:
            return Plan(before, backup, backup, record)
        if not _has_traces(before):
            return Plan(before, before, before, record, notes=(f"{self.file} was written anew, without Floe",))
        after, left = self._without(before or b"", record)
        notes = ["the file was changed since Floe was put into it: only Floe's own keys are taken out"]
        notes += [f"{key} was given another value since, and stays" for key in left]
        return Plan(before, after, after, record, notes=tuple(notes))

    def undo(self, plan: Plan) -> None:
        """Put the file back, then forget what was done."""
        if plan.changed:
            self.kept.write(plan.after)
        self.kept.forget()

    def _check_untouched(self, before: bytes | None) -> None:
        config = document.parse(self._text(before), self.file)
        if wanted.lookup(config, wanted.PROXY) is not None:
            raise PreconditionError(
                f"{self.file} has {document.dotted(wanted.PROXY)}, and floe containerd configure did not put it there",
                hint='take it out by hand, with every snapshotter = "floe"',
            )
        for place in (wanted.IMAGES, (*wanted.CRI, "containerd")):
            if wanted.lookup(config, (*place, "snapshotter")) == wanted.NAME:
                raise PreconditionError(
                    f'{self.file} has {document.dotted(place)}.snapshotter = "floe", and floe containerd configure did not put it there',
                    hint=f"give it the one of before by hand, for example overlayfs; then {RESTART}",
                )


def _has_traces(data: bytes | None) -> bool:
    """Whether anything in a file names Floe: its proxy plugin does, and every snapshotter of that name."""
    return wanted.NAME.encode() in (data or b"")


def source_version(config: Mapping[str, Any]) -> int:
    """The `version` of a file; without one it is 1."""
    found = config.get("version", 1)
    return found if isinstance(found, int) else 0


def _config_version(config: Mapping[str, Any], request: Request, path: Path) -> int:
    """Of the file; of a new or empty one what suits containerd best."""
    newest = 3 if request.version.is_2 else 2
    if not config:
        return newest
    version = source_version(config)
    if version == 1:
        raise UnsupportedError(
            f"{path} is of version 1, or names none",
            hint="containerd config migrate prints it as a newer one; a new one begins as containerd config default",
        )
    if version not in (2, 3):
        raise UnsupportedError(f"{path} is of version {config.get('version')!r}", hint="Floe knows versions 2 and 3")
    if version > newest:
        raise UnsupportedError(
            f"{path} is of version {version}, which containerd {request.version} does not read",
            hint="check --containerd-version",
        )
    return version


def _check_runtime(request: Request, config_version: int) -> None:
    if not request.version.has_runtime_snapshotters:
        raise UnsupportedError(
            f"containerd {request.version} has one snapshotter for all runtimes",
            hint="leave --runtime out, or upgrade to containerd 1.7 or 2.x",
        )
    if request.version.is_2 and config_version == 2:
        raise UnsupportedError(
            f"containerd {request.version} does not pull for a runtime's snapshotter with a file of version 2",
            hint="containerd config migrate prints it as one of version 3; or leave --runtime out",
        )


def _check_enabled(whole: Effective) -> None:
    """PreconditionError when CRI is switched off."""
    for source in whole.sources:
        off = [name for name in source.config.get("disabled_plugins") or [] if name in wanted.CRI_PLUGINS]
        if off:
            raise PreconditionError(
                f"{source.path} switches CRI off: disabled_plugins has {', '.join(map(str, off))}",
                hint="take that out of the list: without CRI no pod runs, and nothing would use Floe",
            )


def _check_free(whole: Effective, request: Request) -> None:
    """PreconditionError when a proxy plugin called floe is somebody else's."""
    here = wanted.lookup(whole.config, wanted.PROXY)
    if here is None:
        return
    for key, value in (("type", "snapshot"), ("address", str(request.address))):
        found = here.get(key) if isinstance(here, Mapping) else None
        if found not in (None, value):
            raise PreconditionError(
                f"{whole.last(wanted.PROXY)} has a proxy plugin floe with {key} = {found!r}, not {value!r}",
                hint="take it out, or give Floe that address: the setting address, --address",
            )


def _notes(request: Request, config: Mapping[str, Any], config_version: int) -> list[str]:
    notes = []
    place = wanted.IMAGES if config_version == 3 else (*wanted.CRI, "containerd")
    images = wanted.lookup(config, place) or {}
    if images.get("discard_unpacked_layers") is True:
        notes.append(
            "discard_unpacked_layers was true: layers are kept from now on, else no image could be unpacked for another snapshotter"
        )
    other = images.get("snapshotter")
    if request.runtime is None and other not in (None, "overlayfs", wanted.NAME):
        notes.append(f"the snapshotter was {other}: images that were pulled for it must be pulled again")
    if request.version.is_2 and "disable_snapshot_annotations" in images:
        notes.append(
            "disable_snapshot_annotations is set: containerd may pull without the transfer service; Floe works either way"
        )
    if request.runtime is not None and request.version.is_2:
        notes.append(
            f"kubelet says for which runtime it pulls only with the pod's annotation io.containerd.cri.runtime-handler: {request.runtime}"
        )
    return notes


def _lines(data: bytes | None) -> list[str]:
    return (data or b"").decode(errors="surrogateescape").splitlines(keepends=True)
