"""What the figures say: what binds a first reading on this machine, and what to do about it. Pure.

A first reading goes through three things at once: the store sends, the cores decompress and verify, the cache disk takes
what is kept. The slowest is the limit. The cache is written behind readers, who are not held up by a slow disk, but what it
cannot take in time is not kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from floe.selfbench.figures import ENOUGH_BYTES, GREW_NO_MORE, Cpu, Disk, Mount, Network, Store

PER_CONNECTION, STORE, LINK, CPU, CACHE_DISK, MOUNT, UNKNOWN = (
    "store_per_connection",
    "store",
    "link",
    "cpu",
    "cache_disk",
    "mount",
    "unknown",
)
_OF_LINK = 0.75  # of what an interface claims: the rest are headers
_OF_EXPECTED = 0.75  # a mount that gives less than this of what its parts give is a limit itself
_CLOSE = 1.25  # a runner-up within this is named
_BUSY = 0.85  # of all cores
# A reading of fewer bytes than ENOUGH_BYTES tells a rate when it lasted so long; but of fewer than these it was one wait or two.
_ENOUGH_SECONDS, _FEWEST_BYTES = 0.2, 1 << 20


@dataclass(frozen=True)
class Measured:
    """All that was measured; None: that part was left out, or failed."""

    store: Store | None = None
    network: Network | None = None
    cpu: Cpu | None = None
    disk: Disk | None = None
    mount: Mount | None = None


@dataclass(frozen=True)
class Verdict:
    """`limit`: one of the names above. `sentence` names it with its figures; `remarks` are what else should be known."""

    limit: str
    sentence: str
    bytes_per_second: float | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    limit: str
    rate: float  # bytes of content per second
    name: str
    does: str


def judge(found: Measured) -> Verdict:
    """The verdict, by those figures that tell something; UNKNOWN when none of the store does."""
    unmeasured = found.store is None
    remarks = tuple(_remarks(found))
    found = _telling(found)
    candidates = _candidates(found)
    if found.store is None:
        why = "the store was not measured" if unmeasured else "too little was read of the store"
        sentence = f"What binds a first reading here is not known: {why}."
        if candidates:
            sentence += f" Whatever it gives, {_list(candidates)}."
        return Verdict(UNKNOWN, sentence, None, remarks)
    ordered = sorted(candidates, key=lambda candidate: candidate.rate)
    limit, others = ordered[0], ordered[1:]
    mount = found.mount
    if mount is not None and mount.from_store and mount.first_bytes_per_second < _OF_EXPECTED * limit.rate:
        return _of_mount(mount, candidates, remarks)
    close = next((other for other in others if other.rate < _CLOSE * limit.rate), None)
    sentence = f"Reading 1 GiB for the first time here is bound by {limit.name}: {limit.does}{_while(others)}."
    if close is not None:
        sentence += f" {close.name[0].upper()}{close.name[1:]} is close behind."
    if limit.limit == CACHE_DISK and others:
        kept = limit.rate / others[0].rate
        sentence += (
            f" Readers are not held up by that, but some {100 - round(100 * kept)}% of what they read at full rate is not "
            "kept, and is fetched again next time."
        )
    else:
        through = mount.first_bytes_per_second if mount is not None and mount.from_store else limit.rate
        sentence += f" {_takes(min(limit.rate, through))}"
    return Verdict(limit.limit, sentence, limit.rate, remarks)


def _of_mount(mount: Mount, parts: list[_Candidate], remarks: tuple[str, ...]) -> Verdict:
    """When none of its parts alone accounts for how slow a mount is."""
    share = mount.cpu_share_of_first
    busy = share is not None and share >= _BUSY
    name = "the processor" if busy else "the mount itself"
    gives = f"a mount gives {rate(mount.first_bytes_per_second)}"
    if share is not None:
        gives += f" with all cores {share:.0%} busy"
    sentence = (
        f"Reading 1 GiB for the first time here is bound by {name}: {gives}, while {_list(parts)}. "
        f"{_takes(mount.first_bytes_per_second)}"
    )
    return Verdict(CPU if busy else MOUNT, sentence, mount.first_bytes_per_second, remarks)


def rate(bytes_per_second: float) -> str:
    """Megabytes or gigabytes (decimal, as links and disks are sold) per second, for people."""
    value, unit = bytes_per_second / 1e6, "MB/s"
    if value >= 1000:
        value, unit = value / 1000, "GB/s"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def span(seconds: float) -> str:
    """Microseconds to seconds, for people."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _telling(found: Measured) -> Measured:
    """Without a store or mount of which too little was read."""
    store, mount = found.store, found.mount
    # Small ranges measure round trips, however many they are: a reader's are large.
    if store is not None and not (store.range_bytes >= _FEWEST_BYTES and _tells(*_read_of_store(store))):
        store = None
    if mount is not None and not _tells(*_read_of_mount(mount)):
        mount = None
    return replace(found, store=store, mount=mount)


def _tells(read: int, seconds: float) -> bool:
    return read >= ENOUGH_BYTES or (read >= _FEWEST_BYTES and seconds >= _ENOUGH_SECONDS)


def _read_of_store(store: Store) -> tuple[int, float]:
    """Different bytes and seconds of what gave its best rate."""
    best = max(store.steps, key=lambda step: step.bytes_per_second)
    return min(best.bytes, store.objects_bytes), best.seconds


def _read_of_mount(mount: Mount) -> tuple[int, float]:
    """Bytes and seconds of the first reading."""
    return mount.bytes, mount.bytes / mount.first_bytes_per_second if mount.bytes else 0.0


def _candidates(found: Measured) -> list[_Candidate]:
    candidates = []
    if found.store is not None:
        candidates.append(_of_store(found.store, found.network, found.cpu))
    if found.cpu is not None:
        total = found.cpu.content_bytes_per_core_second * found.cpu.cores
        one = found.cpu.cores == 1
        does = (
            f"{found.cpu.cores} core{' decompresses and verifies' if one else 's decompress and verify'} {rate(total)}"
        )
        candidates.append(_Candidate(CPU, total, "the processor", does))
    if found.disk is not None:
        wrote = found.disk.write_bytes_per_second
        candidates.append(_Candidate(CACHE_DISK, wrote, "the cache disk", f"it writes {rate(wrote)}"))
    return candidates


def _of_store(store: Store, network: Network | None, cpu: Cpu | None) -> _Candidate:
    """The store's best rate, in content, and what bounds it."""
    best = store.best_bytes_per_second / (cpu.stored_share if cpu is not None else 1.0)
    one, most = store.single_connection_bytes_per_second, store.steps[-1].connections
    packed = f", which is {rate(best)} of content" if cpu is not None and cpu.stored_share < 0.95 else ""
    over = f"the store gives {rate(store.best_bytes_per_second)} over {_connections(store.saturates_at)}{packed}"
    link = network.link_bytes_per_second if network is not None else None
    if link is not None and store.best_bytes_per_second >= _OF_LINK * link:
        assert network is not None
        return _Candidate(LINK, best, f"the link, {network.interface} of {rate(link)}", over)
    if store.client_cpu_share >= _BUSY:
        return _Candidate(CPU, best, "the processor", f"{over}, and receiving that takes all cores")
    if most > 1 and store.ended != GREW_NO_MORE and store.saturates_at == most:
        does = f"{over}, still more with each one ({rate(one)} over one)"
        return _Candidate(PER_CONNECTION, best, "what one connection to the store carries", does)
    alone = "as one does alone" if store.saturates_at == 1 else f"and no more over {most} ({rate(one)} over one)"
    where = "the store" if network is None else "the store, or the link to it"
    return _Candidate(STORE, best, where, f"{over}, {alone}")


def _connections(count: int) -> str:
    return f"{count} connection{'' if count == 1 else 's'}"


def _while(others: list[_Candidate]) -> str:
    return f", while {_list(others)}" if others else ""


def _list(others: list[_Candidate]) -> str:
    told = [
        other.does.replace("it writes", "the cache disk writes", 1) if other.limit == CACHE_DISK else other.does
        for other in others
    ]
    return " and ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told)


def _takes(bytes_per_second: float) -> str:
    seconds = (1 << 30) / bytes_per_second
    return f"1 GiB takes about {seconds:.{0 if seconds >= 10 else 1}f} s."


def _too_small(found: Measured) -> list[str]:
    """What was measured, and is not believed."""
    remarks = []
    telling = _telling(found)
    if found.store is not None and telling.store is None:
        read, seconds = _read_of_store(found.store)
        remarks.append(
            f"What was read of the store is too small to tell what it gives ({_size(read)} in {span(seconds)}, ranges of "
            f"{_size(found.store.range_bytes)}): name a larger model, or give --write, a larger --size or more --seconds."
        )
    if found.mount is not None and found.mount.from_store and telling.mount is None:
        read, seconds = _read_of_mount(found.mount)
        remarks.append(
            f"What was read of {found.mount.model} is too small to tell what a mount gives ({_size(read)} in {span(seconds)}): "
            "name a larger model, or give a larger --size or more --seconds."
        )
    return remarks


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB"


def _remarks(found: Measured) -> list[str]:
    remarks = _too_small(found)
    store, disk, network = found.store, found.disk, found.network
    if store is not None:
        start = f"What reads here and there waits for round trips: the store answers a small read in {span(store.get_median_seconds)}"
        start += f" (99th percentile {span(store.get_p99_seconds)})"
        if disk is not None:
            start += f", the cache disk in {span(disk.read_4kib_median_seconds)}"
        remarks.append(f"{start}.")
        if network is not None and store.get_median_seconds > 5 * network.tcp_connect_median_seconds + 0.002:
            remarks.append(
                f"A round trip to {network.endpoint} takes {span(network.tcp_connect_median_seconds)}: of a small read's "
                "time, most is spent in the store, not on the way."
            )
    if store is not None and disk is not None and _telling(found).store is not None:
        if disk.read_4kib_median_seconds > store.get_median_seconds:  # reads of the same size, that is
            remarks.append(
                f"WARNING: a hit costs more than a miss. The cache disk takes {span(disk.read_4kib_median_seconds)} for a small "
                f"read, the store {span(store.get_median_seconds)}. Put cache_dir on a local SSD."
            )
        elif disk.read_bytes_per_second < store.best_bytes_per_second:
            remarks.append(
                f"WARNING: the cache disk reads {rate(disk.read_bytes_per_second)}, less than the store gives "
                f"({rate(store.best_bytes_per_second)}): reading again is slower than reading first. "
                "Put cache_dir on a faster disk."
            )
    if disk is not None and not disk.direct:
        remarks.append(
            f"{disk.path} does not allow reads and writes past the page cache: the disk's figures may be memory's."
        )
    if store is not None and store.repeated:
        remarks.append("The store's objects are few: some were read more than once, and a server may remember them.")
    return remarks
