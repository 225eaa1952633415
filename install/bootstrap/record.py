"""What was asked for, and what was done for it, so that a second run goes on and `--uninstall` takes back exactly that.

It lies in /var/lib/floe/node: `record.json`, and in `before/` what stood where files were replaced. An entry is durable
before what it speaks of is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from bootstrap.errors import NodeError
from bootstrap.system import read, sync_folder, write_file

PLACE = Path("/var/lib/floe/node")
_VERSION = 1


class Record:
    """`asked`: flags and settings by name; `data` the rest, as JSON has it."""

    def __init__(self, place: Path = PLACE) -> None:
        self.place = place
        self.file = place / "record.json"
        self.data: dict[str, Any] = {"version": _VERSION, "asked": {}, "files": {}, "folders": [], "formatting": []}
        self.exists = False
        self._read()

    def _read(self) -> None:
        try:
            data = json.loads(self.file.read_text())
            version = data["version"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NodeError(
                f"{self.file} cannot be read: {error}", "move it away to begin anew; what it knew is not undone then"
            ) from error
        if version != _VERSION:
            raise NodeError(
                f"{self.file} is of version {version}, not {_VERSION}", "use the bootstrap-node.sh that wrote it"
            )
        self.data.update(data)
        self.exists = True

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for, now or earlier."""
        found: dict[str, Any] = self.data["asked"]
        return found

    def save(self) -> None:
        """Make it durable. What says so already is not written again."""
        if not self.exists or not self.place.is_dir():
            self._begin()
        text = json.dumps(self.data, indent=2, sort_keys=True) + "\n"
        if self.exists and read(self.file) == text:
            sync_folder(self.place)  # who wrote it may have been killed before that
        else:
            write_file(self.file, text.encode(), 0o600)
        self.exists = True

    def _begin(self) -> None:
        """Make the place, and note which of its parents were not there."""
        begun = self.place.is_dir()  # by a run that was killed before it could note anything
        made = [path for path in (self.place.parent, self.place) if begun or not path.is_dir()]
        self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(self.place.parent)
        self.data["folders"] = [str(path) for path in made] + self.data["folders"]

    # files

    def put(self, path: Path, data: bytes, mode: int = 0o644, *, shared: bool = False) -> bool:
        """Have a file say just that; whether it did not before. What stood there is kept.

        `shared`: other people's lines are in `data`, too; once there are, the file is not taken back as this program's.
        """
        try:
            here = path.read_bytes() if not path.is_symlink() else None
        except FileNotFoundError:
            here = None
        same = here == data and not path.is_symlink()
        entry = self.data["files"].get(str(path))
        if entry is None:
            if same:
                return False  # somebody else put it there, and it stays
            entry = {"before": self._keep(path)}
            self.data["files"][str(path)] = entry
        elif same and entry.get("sha256") == _digest(data):
            return False
        elif shared and here is not None and _digest(here) not in (entry.get("sha256"), entry.get("was")):
            entry["edited"] = True
        entry["was"] = None if here is None else _digest(here)  # and is still, where this is killed before it writes
        entry["sha256"] = _digest(data)
        self.folder(path.parent)
        self.save()
        if not same:
            write_file(path, data, mode)
        return not same

    def link(self, path: Path, target: Path) -> bool:
        """Have `path` be a symlink to `target`; whether it was not."""
        if path.is_symlink() and Path(path.readlink()) == target:
            return False
        entry = self.data["files"].setdefault(str(path), {})
        entry.setdefault("before", self._keep(path))
        entry["link"] = str(target)
        self.folder(path.parent)
        self.save()
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(path)
        sync_folder(path.parent)
        return True

    def folder(self, path: Path) -> None:
        """Have a directory there; those that were not are taken away again when they are empty."""
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        if not missing:
            return
        self.data["folders"] += [str(one) for one in reversed(missing) if str(one) not in self.data["folders"]]
        self.save()
        missing[0].mkdir(parents=True, exist_ok=True)

    def _keep(self, path: Path) -> dict[str, Any] | None:
        """A copy of what stands at `path`: None for nothing."""
        if path.is_symlink():
            return {"link": str(path.readlink())}
        if not path.exists():
            return None
        if path.is_dir():
            raise NodeError(f"{path} is a directory", "move it away")
        copy = self.place / "before" / hashlib.sha256(str(path).encode()).hexdigest()[:16]
        if not self.place.is_dir():
            self.save()
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        write_file(copy, path.read_bytes(), 0o600)
        state = path.stat()
        return {"copy": copy.name, "mode": state.st_mode & 0o7777, "owner": [state.st_uid, state.st_gid]}

    def take_back(self, path: str) -> str:
        """Put back what stood at `path`. A note where that was not done: others have changed the file since."""
        entry = self.data["files"].get(path)
        if entry is None:
            return ""
        place, note = Path(path), ""
        if self._is_ours(place, entry):
            before = entry["before"]
            if before is None:
                place.unlink(missing_ok=True)
            elif "link" in before:
                place.unlink(missing_ok=True)
                place.symlink_to(before["link"])
            else:
                write_file(place, (self.place / "before" / before["copy"]).read_bytes(), before["mode"])
                os.chown(place, *before["owner"])
        elif place.exists() or place.is_symlink():
            note = f"{path} was changed since it was written, and stays"
        del self.data["files"][path]
        self.save()
        return note

    def is_edited(self, path: Path) -> bool:
        """Whether a file that was put there has other people's changes."""
        entry = self.data["files"].get(str(path))
        return entry is not None and path.exists() and not self._is_ours(path, entry)

    def _is_ours(self, path: Path, entry: dict[str, Any]) -> bool:
        if entry.get("edited"):
            return False
        if path.is_symlink():
            return str(path.readlink()) == entry.get("link")
        with contextlib.suppress(OSError):
            return _digest(path.read_bytes()) == entry.get("sha256")
        return False

    def forget(self) -> None:
        """The last step: all is taken back."""
        folders = [Path(path) for path in self.data["folders"]]
        shutil.rmtree(self.place, ignore_errors=True)
        for path in sorted(folders, key=lambda one: len(one.parts), reverse=True):
            with contextlib.suppress(OSError):
                path.rmdir()  # others may have put something there
        self.exists = False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
