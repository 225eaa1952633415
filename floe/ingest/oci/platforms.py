"""Platforms: `os/arch[/variant]` as users write it, as machines call themselves, as indexes list it. Pure."""

from __future__ import annotations

import platform as _machine
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from floe.store.errors import BadInputError

# Source: containerd's platforms/database.go.
_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armhf": "arm",
    "armel": "arm",
    "armv7l": "arm",
    "armv6l": "arm",
    "i386": "386",
    "i486": "386",
    "i586": "386",
    "i686": "386",
}
_DEFAULT_VARIANTS = {("arm64", "v8"), ("amd64", "v1")}
_IMPLIED = {"armel": "v6", "armv6l": "v6", "armhf": "v7", "armv7l": "v7"}


@dataclass(frozen=True)
class Platform:
    """Normalised: `amd64` for x86_64, no variant where it is the architecture's only one (arm64/v8)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @classmethod
    def make(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """Normalise the three parts as a config or an index gives them."""
        arch = _ARCHITECTURES.get(architecture.lower(), architecture.lower())
        variant = variant.lower() or _IMPLIED.get(architecture.lower(), "")
        return cls(os.lower(), arch, "" if (arch, variant) in _DEFAULT_VARIANTS else variant)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse `os/arch[/variant]`; BadInputError otherwise."""
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise BadInputError(
                f"platform {text!r} is not valid", hint="use OS/ARCH[/VARIANT], for example linux/arm64"
            )
        return cls.make(*parts)

    @classmethod
    def default(cls) -> Platform:
        """Linux on this machine's processor."""
        return cls.make("linux", _machine.machine())

    @classmethod
    def of(cls, value: Mapping[str, Any] | None) -> Platform | None:
        """The platform of an index's entry; None when it has none, or is not one to run (`unknown/unknown`)."""
        if not value:
            return None
        made = cls.make(*(str(value.get(key) or "") for key in ("os", "architecture", "variant")))
        return None if made.os in ("", "unknown") else made

    def accepts(self, other: Platform) -> bool:
        """Whether an image for `other` is what was asked for; without a variant any will do."""
        if (self.os, self.architecture) != (other.os, other.architecture):
            return False
        return not self.variant or self.variant == other.variant


def choose(wanted: Platform, offered: Iterable[Platform | None]) -> int | None:
    """Index of the best entry of `offered` for `wanted`: the same variant first, else the first that is accepted."""
    accepted = [(number, item) for number, item in enumerate(offered) if item is not None and wanted.accepts(item)]
    exact = [number for number, item in accepted if item.variant == wanted.variant]
    if exact:
        return exact[0]
    return accepted[0][0] if accepted else None
