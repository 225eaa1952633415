"""What was measured. Names carry their units; `dataclasses.asdict` of these is what --json shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

GREW_NO_MORE, BOUNDED, MOST = "grew no more", "bounded", "most connections"
ENOUGH_BYTES = 32 << 20  # read at whatever speed, they tell a rate


@dataclass(frozen=True)
class Step:
    """Ranged GETs over so many connections at once."""

    connections: int
    bytes: int
    seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Store:
    """The object store, read. `repeated`: the objects were smaller than what was read, so some of it was read twice.

    `ended` says why no more connections were tried: GREW_NO_MORE, BOUNDED (by time or bytes) or MOST. `saturates_at`:
    the fewest connections that give nine tenths of the best rate. `client_cpu_share`: of all cores, at the best rate.
    `range_bytes`: of a GET, on an average.
    """

    url: str
    objects: int
    objects_bytes: int
    repeated: bool
    get_bytes: int
    gets: int
    get_median_seconds: float
    get_p99_seconds: float
    range_bytes: int
    steps: tuple[Step, ...]
    ended: str
    saturates_at: int
    single_connection_bytes_per_second: float
    best_bytes_per_second: float
    client_cpu_share: float


@dataclass(frozen=True)
class Upload:
    """Objects put into the store, and removed again."""

    objects: int
    bytes: int
    seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Network:
    """Between this machine and the store. `link_bytes_per_second`: what the interface claims to be, if it says."""

    endpoint: str
    tcp_connect_median_seconds: float
    interface: str | None
    link_bytes_per_second: float | None


@dataclass(frozen=True)
class Cpu:
    """Frames decompressed and verified, by Floe's own code. `of_the_store`: frames of a pack, else made here.

    Rates are of content. `stored_share`: stored bytes for each byte of content.
    """

    cores: int
    frames: int
    content_bytes: int
    of_the_store: bool
    stored_share: float
    content_bytes_per_core_second: float


@dataclass(frozen=True)
class Disk:
    """The cache directory's disk, in a file of its own. `direct`: past the page cache (O_DIRECT)."""

    path: str
    direct: bool
    bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float
    read_4kib_median_seconds: float
    read_4kib_p99_seconds: float
    read_128kib_median_seconds: float
    read_128kib_p99_seconds: float


@dataclass(frozen=True)
class Mount:
    """A model read through a mount, with a cache of its own that was empty. `from_store`: of the store, else made here.

    `first`: nothing on the node yet; `again`: in the cache, but not in the kernel's page cache. `cpu_share_of_first`: how
    busy all cores were meanwhile, with whatever else this machine did; None: it was over before the kernel could tell.
    """

    model: str
    from_store: bool
    mount_seconds: float
    bytes: int
    first_bytes_per_second: float
    cpu_share_of_first: float | None
    again_bytes_per_second: float
    small_files: int
    small_first_files_per_second: float | None
    small_first_median_seconds: float | None
    small_again_files_per_second: float | None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below or at which `share` of `values` (at least one) lie: nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
