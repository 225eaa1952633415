"""The work itself: each step sees what is there already, so that a second run does what is left."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bootstrap import containerd, environment, services, settings, storage
from bootstrap.disks import BOOT, DEFAULT_CACHE, FORMAT, Choice, choose
from bootstrap.errors import NodeError
from bootstrap.flags import NONE, Options
from bootstrap.plan import (
    Plan,
    cache_keys,
    choose_cache,
    identities,
    installed_checker,
    not_taken_over,
    settings_text,
)
from bootstrap.record import Record
from bootstrap.survey import check_kernel, survey
from bootstrap.system import last_lines, property_of, read, run, say

# What daemons make, beside the cache. What was there before the first run stays at --uninstall.
STATE = ("/var/lib/floe/snapshotter", "/var/lib/floe/index.db", "/var/cache/floe", "/run/floe")
_APT = ("apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300")
_APT_SECONDS = 1800.0
_LOCK_SECONDS, _LOCK_PAUSE = 300.0, 2.0
_OF_SYSTEMD = ("NOTIFY_", "WATCHDOG_", "LISTEN_", "FDSTORE", "PYTHON")  # what is one process's alone


def install(plan: Plan, options: Options, record: Record) -> dict[str, Any]:
    """Make the node. What was done, for a report. NodeError: it stopped there, and the next run goes on."""
    done: list[str] = []
    if not record.exists:
        record.data["state"] = [path for path in STATE if not Path(path).exists()]
    record.data["asked"] = plan.asked
    record.data.pop("dropped", None)
    if plan.dropped:
        record.data["dropped"] = plan.dropped
    record.save()
    if plan.packages:
        _install_packages(plan.packages, record)
        done.append(f"installed the packages {', '.join(plan.packages)}")
    if plan.source is not None:
        if not environment.is_built(plan.name):
            environment.build(plan.name, plan.source, options.offline, record)
            done.append(f"installed Floe {plan.name}")
        # What containerd's configuration does not allow is said now; all that was done is a directory below /opt/floe.
        containerd.configure(plan.asked, dry_run=True, command=environment.VERSIONS / plan.name / "bin/floe")
        environment.install_self(services.UNITS, record)
        environment.switch(plan.name, record)
    if plan.choice is not None:
        done += storage.apply(plan.choice, record)
    if write_settings(plan.values, plan.choice, record):
        done.append(f"wrote {settings.FILE}")
    if services.install(record):
        done.append(f"installed the units {', '.join(services.unit_files(record.asked))}")
    warnings = list(plan.warnings)
    report: dict[str, Any] = {"done": done, "notes": plan.notes, "warnings": warnings, "next": [], "exit_status": 0}
    if options.image:
        configure_containerd(record, done, plan.notes)
        record.data.pop("restart_containerd", None)  # it is started with the system
        record.save()
        report["next"].append("the daemons start with the next boot of this system, and of each machine made from it")
        return _said(report)
    # First: where they do not run, containerd goes on without them.
    done += services.start(record)
    changed = configure_containerd(record, done, plan.notes)
    if changed or record.data.get("restart_containerd"):
        done.append(containerd.restart())
        record.data.pop("restart_containerd", None)
        record.save()
    stay = environment.remove_unused()
    if stay:
        plan.notes.append(f"running processes still use {', '.join(stay)}; a later run takes that away")
    if options.verify_image:
        done.append(containerd.verify(options.verify_image))
    _examine(report, record)
    return _said(report)


def _said(report: dict[str, Any]) -> dict[str, Any]:
    if not report["done"]:
        report["notes"].append("all was as asked for; nothing was changed")
    return report


def _install_packages(packages: list[str], record: Record) -> None:
    say(f"installing {', '.join(packages)}")
    record.data["packages"] = sorted({*record.data.get("packages", ()), *packages})
    record.save()
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    _update(environ)
    run(*_APT, "install", "--no-install-recommends", *packages, seconds=_APT_SECONDS, environ=environ)
    importlib.invalidate_caches()


def _update(environ: Mapping[str, str]) -> None:
    """Lists anew. apt waits for dpkg's lock and not for that of the lists, which its own timer may hold at a first boot."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        done = run(*_APT, "update", check=False, seconds=_APT_SECONDS, environ=environ)
        if done.returncode == 0:
            return
        said = done.stderr or done.stdout
        if "lists/lock" not in said or time.monotonic() > until:
            hint = "see that this system's package sources can be reached"
            raise NodeError(f"apt-get update failed: {last_lines(said)}", hint)
        time.sleep(_LOCK_PAUSE)


def write_settings(values: Mapping[str, str], choice: Choice | None, record: Record) -> bool:
    """Have the settings in Floe's file, judged by Floe before it is put there; whether it changed."""
    text, ours = settings_text(read(settings.FILE), values, choice, record)
    with tempfile.TemporaryDirectory(prefix="floe-bootstrap-") as scratch:
        draft = Path(scratch, "config.toml")
        draft.write_text(text)
        draft.chmod(0o600)
        installed_checker().check_file(draft)
    record.data["settings"] = ours
    record.data.pop("dropped", None)
    if text == settings.HEADER and not settings.FILE.exists():
        record.save()
        return False
    changed = record.put(settings.FILE, text.encode(), settings.mode_for(text), shared=True)
    record.save()
    return changed


def configure_containerd(record: Record, done: list[str], notes: list[str]) -> bool:
    """Floe's keys in containerd's configuration; whether they were not. That a restart is due is durable first."""
    due = bool(containerd.configure(record.asked, dry_run=True)["changed"])
    if due:
        record.data["restart_containerd"] = True
    record.data["containerd"] = True
    record.folder(Path(record.asked.get("containerd_config", containerd.CONFIG)).parent)
    record.save()
    answer = containerd.configure(record.asked)
    if answer["changed"]:
        done.append(f"put Floe into {answer['file']}")
    notes += answer["notes"]
    return bool(answer["changed"])


def _examine(report: dict[str, Any], record: Record) -> None:
    """What `floe doctor` finds; errors make the run a failed one."""
    say("looking whether all is well")
    file = record.asked.get("containerd_config")
    command = (environment.COMMAND, "doctor", "--json", *(("--containerd-config", file) if file else ()))
    found = run(*command, check=False, seconds=120, environ=_as_the_daemon())
    try:
        findings = json.loads(found.stdout)["findings"]
    except (ValueError, KeyError) as error:
        raise NodeError(f"floe doctor failed: {found.stderr.strip()[-300:]}", "run floe doctor") from error
    for finding in findings:
        if finding["level"] in ("warning", "error"):
            report["warnings"].append(f"{finding['check']}: {finding['text']}")
            report["next"].append(f"{finding['check']}: {finding['mend']}")
        if finding["level"] == "error":
            report["exit_status"] = 1


def _as_the_daemon() -> dict[str, str]:
    """What the unit gives the pack filesystem, credentials for example: by that it reads the store."""
    keeper = property_of(services.PACKFS, "MainPID")
    text = read(Path("/proc", keeper, "environ")) if keeper.isdecimal() else ""
    theirs = dict(line.partition("=")[::2] for line in text.split("\0") if "=" in line)
    return {**environment.clean(), **{key: value for key, value in theirs.items() if not key.startswith(_OF_SYSTEMD)}}


# a boot


def boot(record: Record) -> int:
    """floe-node.service: disks and settings as they are on this machine now. What fails is said, and the rest is done."""
    if not record.exists:
        return 0
    problems: list[NodeError] = []
    values = dict(record.asked.get("settings", {}))
    consent = False
    with _going_on(problems):
        attributes = settings.metadata(attempts=6)
        consent = record.asked["format"] and not settings.platform_takes_disks(attributes)
        values, _, notes = settings.gather(values, {}, attributes, installed_checker())
        _log(notes)
    values = {key: values[key] for key in not_taken_over(values, record)}
    with _going_on(problems):
        check_kernel()
    theirs, choice = False, None
    with _going_on(problems):
        theirs = bool(cache_keys(values, record))
    with _going_on(problems):
        found = _choose_at_boot(record, values, problems, consent=consent)
        _log(storage.apply(found, record) if found is not None else [])
        choice = found
        record.asked["identities"] = identities(record.asked)  # of a disk image's, at its first boot
        record.save()
    with _going_on(problems):
        # The settings of before name a disk that may not be mounted now: a cache there would fill what lies below it.
        write_settings(values, None if theirs else choice or _boot_disk(problems), record)
    with _going_on(problems):
        if record.data.get("containerd") and containerd.program() is not None:
            done: list[str] = []
            if configure_containerd(record, done, done):
                done.append(containerd.restart(wait=False))
                record.data.pop("restart_containerd", None)
                record.save()
            _log(done)
    for problem in problems:
        _log([f"error: {problem}", f"hint: {problem.hint}"])
    return 1 if problems else 0


@contextlib.contextmanager
def _going_on(problems: list[NodeError]) -> Iterator[None]:
    """Whatever a step of a boot fails with is kept, for the next ones do not depend on it."""
    try:
        yield
    except NodeError as error:
        problems.append(error)
    except Exception as error:
        problems.append(
            NodeError(f"{type(error).__name__}: {error}", "report this; systemctl restart floe-node tries again")
        )


def _boot_disk(problems: list[NodeError]) -> Choice:
    """Where the cache lies when none of the disks can be had."""
    with _going_on(problems):
        return choose(survey([], []), NONE, raid0=False)
    return Choice(BOOT, (DEFAULT_CACHE,))


def _choose_at_boot(
    record: Record, values: Mapping[str, str], problems: list[NodeError], *, consent: bool
) -> Choice | None:
    """As ever, but that disks which cannot be used, or may not be formatted, are done without."""
    asked = dict(record.asked)
    if isinstance(asked["disks"], list):
        usable = []
        for device in asked["disks"]:
            try:
                choose_cache({**asked, "disks": [device], "raid0": False}, values, record)
                usable.append(device)
            except NodeError as error:
                problems.append(error)
        asked["disks"] = usable or NONE
        asked["raid0"] = asked["raid0"] and len(usable) > 1
    choice = choose_cache(asked, values, record)
    if choice is None or consent or not choice.to_format:
        return choice
    why = "the platform may want it later in this boot" if record.asked["format"] else "there was no --format"
    _log([f"{disk.path} is empty, and {why}: it stays so" for disk in choice.to_format])
    known = tuple(use for use in choice.uses if use.action != FORMAT)
    if not known:
        return choose_cache({**asked, "disks": NONE, "raid0": False}, values, record)
    directories = tuple(f"{use.mountpoint}/cache" for use in known)
    return Choice(choice.kind, directories, known, choice.min_free, choice.size, choice.notes, choice.warnings)


def _log(lines: list[str]) -> None:
    """For the journal."""
    for line in lines:
        sys.stderr.write(line + "\n")
    sys.stderr.flush()
