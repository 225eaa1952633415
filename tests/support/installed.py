"""A place into which one version of Floe after the other is installed, as pip does it under running daemons."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import floe

_ROOT = Path(floe.__file__).resolve().parents[1]


class Installed:
    """`environ` makes a process that starts anywhere but in a checkout run the version that is installed then."""

    def __init__(self, base: Path) -> None:
        self.site = base / "site"
        self.environ = {"PYTHONPATH": str(self.site), "PYTHONDONTWRITEBYTECODE": "1"}
        self._base = base

    def install(self, version: str, changes: Mapping[str, str] | None = None) -> None:
        """This checkout's code as that version, with text appended to some of its modules (by path below floe/)."""
        package = self._base / f"of-{version}"
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_ROOT / "floe", package / "floe", ignore=skip)  # follows the links to fuse/ and the like
        init = package / "floe" / "__init__.py"
        init.write_text(re.sub(r'(__version__ = )".*"', rf'\1"{version}"', init.read_text()))
        for name, text in (changes or {}).items():
            with (package / "floe" / name).open("a") as file:
                file.write(text)
        if self.site.exists():
            self.site.rename(self._base / f"before-{version}")
        package.rename(self.site)
