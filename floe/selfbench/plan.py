"""How long and with how many bytes each part measures: said before it begins. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from floe.store.errors import BadInputError

PARTS = ("store", "cpu", "disk", "mount")
CONNECTIONS = (1, 2, 4, 8, 16, 32)
RANGE = 8 << 20  # bytes of a GET, as a sequential reader's
LEAST_SIZE, LEAST_SECONDS = 4 << 20, 1.0
SMALL_FILES, SMALL_BYTES = 200, 4096  # of the model that is made where the store has none

# Shares of the whole time; what is left is for starting processes and for clearing up.
_LATENCY, _THROUGHPUT, _CPU, _DISK, _MOUNT = 0.08, 0.32, 0.05, 0.25, 0.2


@dataclass(frozen=True)
class Plan:
    """Times in seconds, sizes in bytes. `parts`: of PARTS, in that order."""

    seconds: float
    size: int
    parts: tuple[str, ...]
    write: bool

    def __post_init__(self) -> None:
        """BadInputError for what cannot give figures."""
        if not LEAST_SECONDS <= self.seconds < math.inf:
            raise BadInputError(
                f"{self.seconds:g} s are too few, or no number", hint=f"give --seconds {LEAST_SECONDS:g} or more"
            )
        if self.size < LEAST_SIZE:
            raise BadInputError(
                f"{self.size} bytes are too few", hint=f"give --size {LEAST_SIZE >> 20}MiB or more, for example 2GiB"
            )

    @property
    def latency_seconds(self) -> float:
        """For small GETs, one after another."""
        return self.seconds * _LATENCY

    @property
    def step_seconds(self) -> float:
        """For each number of connections."""
        return self.seconds * _THROUGHPUT / len(CONNECTIONS)

    @property
    def step_bytes(self) -> int:
        """Read at most with each number of connections."""
        return self.size // len(CONNECTIONS)

    @property
    def range_bytes(self) -> int:
        """Of a GET; a plan with few bytes has shorter ones."""
        return min(RANGE, self.step_bytes // 4)

    @property
    def upload_bytes(self) -> int:
        """Put into the store at most, with --write."""
        return self.size // 16

    @property
    def cpu_seconds(self) -> float:
        """For decompressing and verifying."""
        return self.seconds * _CPU

    @property
    def disk_seconds(self) -> float:
        """For each of four things the disk does."""
        return self.seconds * _DISK / 4

    @property
    def disk_bytes(self) -> int:
        """Of the file on the cache disk, whole MiB."""
        return self.size // 4 >> 20 << 20

    @property
    def mount_seconds(self) -> float:
        """For each of a first reading, another one, and small files."""
        return self.seconds * _MOUNT / 3

    @property
    def mount_bytes(self) -> int:
        """Read at most through a mount of a model of the store."""
        return self.size // 8

    @property
    def model_bytes(self) -> int:
        """Of a model made for the mount, where the store has none."""
        return self.size // 16

    @property
    def space(self) -> int:
        """Bytes of the cache disk that are taken at most at any time."""
        small = SMALL_FILES * SMALL_BYTES * 2
        model = 3 * (self.model_bytes + small)  # as files, while it is pushed, and in its store
        needs = {"disk": self.disk_bytes, "mount": max(model, self.mount_bytes * 2)}
        return max((needs.get(part, 0) for part in self.parts), default=0)

    @property
    def downloaded(self) -> int:
        """Bytes read from the store at most."""
        frames = 32 << 20
        return sum({"store": self.size, "cpu": frames, "mount": self.mount_bytes}.get(part, 0) for part in self.parts)


def parse_parts(text: str | None) -> tuple[str, ...]:
    """`store,disk` as parts; None: all. BadInputError for an unknown one."""
    if text is None:
        return PARTS
    wanted = [word.strip() for word in text.split(",")]
    for word in wanted:
        if word not in PARTS:
            raise BadInputError(f"--only names {word!r}, which is no part", hint=f"the parts: {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in wanted)
