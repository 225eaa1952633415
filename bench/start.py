"""python -m bench.start: a Python image of over 1 GiB whose command imports it, from pull to its first output.

Under a real containerd by CRI, from a registry on loopback, each start on a node that holds nothing, page cache empty:

- `overlayfs`: as everybody does it, pulled and unpacked.
- `floe`: lazy, with no profile of the image anywhere; `floe, profiled`: after one start elsewhere was recorded.
- `soci`: Debian's soci-snapshotter, its index pushed beside the image.

Then, in the same node, all of the image's files are read once by a second container. Bytes fetched are compared with bytes
touched: what one start leaves in the page cache when nothing reads ahead. The first build of the image takes some minutes
and a download of 300 MB; --image keeps it for the next run.
"""

import argparse
import contextlib
import datetime as dt
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import command, native, pyimage, resident, servers, soci, wheels, workloads
from bench.report import Results

# isort: split
from support.certificates import Authority
from support.containerd import Containerd, versions
from support.floe_daemons import Daemons
from support.registry import Registry

from floe.store import mounttable

MIB = 1 << 20
OVERLAY, FLOE, PROFILED, SOCI = "overlayfs", "floe", "floe, profiled", "soci"
SUBJECTS = (OVERLAY, FLOE, PROFILED, SOCI)
READ_ALL = ("sh", "-c", "find / -xdev -type f -exec cat {} + | wc -c")
_RECORDED = 60.0  # seconds for a profile to come into the store


@dataclass
class Start:
    """Seconds from asking for the image: until it was pulled, first output, end; of reading everything; bytes fetched."""

    pulled: float
    first_output: float
    ended: float
    whole_tree: float = 0.0
    fetched: int = 0


def main() -> int:
    """Build, push, index, start in rounds, print."""
    options = _options()
    return command.run(options, lambda stack, work: _Starts(stack, work, options).measure())


def _options() -> argparse.Namespace:
    parser = command.parser("start", __doc__, rounds=5, free="15 GiB")
    parser.add_argument("--only", choices=SUBJECTS, action="append", help="these subjects alone; overlayfs always")
    parser.add_argument("--image", type=Path, help="an OCI layout to keep the image in, made when it is not there")
    parser.add_argument("--stack", type=Path, default=wheels.FOLDER / "stack", help="where its packages are installed")
    options = parser.parse_args()
    if os.geteuid():
        parser.error("mounting needs root: run it with sudo")
    options.only = [name for name in SUBJECTS if name == OVERLAY or not options.only or name in options.only]
    if SOCI in options.only and not soci.available():
        parser.error("there is no soci-snapshotter to compare with: install/setup.sh bench unpacks it on Debian")
    return options


class _Starts:
    """One run: registry, store and image, and a new node for every start."""

    def __init__(self, stack: contextlib.ExitStack, work: Path, options: argparse.Namespace) -> None:
        self._stack, self._work, self._options = stack, work, options
        self._numbers = iter(range(10_000))

    def measure(self) -> Results:
        """All starts of all subjects."""
        only = self._options.only
        _say("building the image")
        built = pyimage.build(self._options.image or self._work / "image", self._options.stack)
        self._registry = Registry(self._work / "registry")
        self._stack.callback(self._registry.stop)
        self._image = self._registry.push(built.source, "app:1")
        size = sum(layer["size"] for layer in built.layers)
        results = Results(facts={"containerd": str(versions()[-1]), "layers, compressed MB": round(size / 1e6)})
        if SOCI in only:
            self._index_for_soci()
        if {FLOE, PROFILED} & set(only):
            self._index_for_floe(results)
        starts: dict[str, list[Start]] = {name: [] for name in only}
        runs: dict[str, Callable[[], Start]] = {
            OVERLAY: self._overlayfs,
            FLOE: lambda: self._floe("off"),
            PROFILED: lambda: self._floe("read"),
            SOCI: self._soci,
        }
        for _ in range(self._options.rounds):
            for name in only:
                _say(name)
                starts[name].append(runs[name]())
        for title, of in (
            ("pull", lambda s: s.pulled),
            ("pull to first output", lambda s: s.first_output),
            ("first output after the pull", lambda s: s.first_output - s.pulled),
            ("read of the whole tree", lambda s: s.whole_tree),
        ):
            rows = [{name: of(starts[name][n]) for name in only} for n in range(self._options.rounds)]
            results.add(title, rows, OVERLAY)
            if SOCI in only and {FLOE, PROFILED} & set(only):
                medians = {name: statistics.median(row[name] for row in rows) for name in only}
                results.facts[f"{title}, times as fast as soci"] = {
                    name: round(medians[SOCI] / medians[name], 2) for name in only if name in (FLOE, PROFILED)
                }
        fetched = {name: starts[name][0].fetched for name in only}
        results.facts["MB fetched until the program ended"] = {name: round(n / 1e6, 1) for name, n in fetched.items()}
        if touched := results.facts.get("MB touched"):
            results.facts["fetched of touched"] = {name: round(n / 1e6 / touched, 2) for name, n in fetched.items()}
        return results

    # subjects

    def _overlayfs(self) -> Start:
        with self._containerd() as containerd:
            return self._start(containerd, lambda: content_bytes(containerd))

    def _soci(self) -> Start:
        home = self._home("soci")
        with (
            soci.running(home / "soci", self._secure.host, self._registry.host, self._trust) as address,
            self._containerd(
                snapshotter_address=address, snapshotter_root=home / "soci/root", annotations=True, env=self._trust
            ) as containerd,
        ):
            start = self._start(
                containerd, lambda: self._secure.blob_bytes() + self._registry.blob_bytes(), self._secure_image
            )
            lazy = "fuse.rawBridge" in Path("/proc/self/mountinfo").read_text()
        if not lazy:
            said = [line for line in (home / "soci/log").read_text().splitlines() if '"error"' in line]
            raise SystemExit("bench: soci mounted nothing lazily:\n" + "\n".join(said[:3]))
        shutil.rmtree(home)
        return start

    def _floe(self, profiles: str) -> Start:
        with self._floe_node(profiles) as (daemons, containerd):
            return self._start(containerd, lambda: store_bytes(daemons) + content_bytes(containerd))

    # what they are measured with

    def _start(self, containerd: Containerd, fetched: Callable[[], int], image: str | None = None) -> Start:
        image = image or self._image
        cri = containerd.cri()
        pod = cri.run_pod("bench")
        before = fetched()
        workloads.empty_page_cache()
        began = time.time()
        cri.pull(image)
        pulled = time.time() - began
        container = cri.run_container(pod, image)
        code = cri.wait(container, timeout=300)
        lines = Path(cri.status(container).log_path).read_text().splitlines()
        if code or not any("first output" in line for line in lines):
            raise SystemExit("bench: the program failed:\n" + "\n".join(lines)[-2000:])
        first = next(seconds_of(line.split(" ", 1)[0]) for line in lines if "first output" in line)
        start = Start(pulled, first - began, time.time() - began, fetched=fetched() - before)
        begun = time.perf_counter()
        container = cri.run_container(pod, image, READ_ALL)
        if cri.wait(container, timeout=600):
            raise SystemExit(f"bench: reading the whole tree failed:\n{cri.logs(container)[-2000:]}")
        start.whole_tree = time.perf_counter() - begun
        return start

    @contextlib.contextmanager
    def _containerd(self, home: Path | None = None, **settings: object) -> Iterator[Containerd]:
        base = (home or self._home("containerd")) / "ctr"
        base.mkdir(parents=True)
        if hasattr(self, "_secure"):
            hosts = base / "certs.d" / self._secure.host
            hosts.mkdir(parents=True)
            (hosts / "hosts.toml").write_text(f'server = "https://{self._secure.host}"\n')
        containerd = Containerd(versions()[-1], base, registries=(self._registry.host,), **settings)
        try:
            yield containerd
        finally:
            containerd.stop()
            shutil.rmtree(base, ignore_errors=True)

    @contextlib.contextmanager
    def _floe_node(self, profiles: str, **environ: str) -> Iterator[tuple[Daemons, Containerd]]:
        home = self._home("floe")
        daemons = Daemons(home, {**self._store, "FLOE_INDEX": "none", "FLOE_PROFILES": profiles, **environ})
        try:
            with self._containerd(snapshotter_address=daemons.address, snapshotter_root=daemons.root) as containerd:
                yield daemons, containerd
        finally:
            daemons.close()
            shutil.rmtree(home, ignore_errors=True)

    def _index_for_floe(self, results: Results) -> None:
        s3 = self._stack.enter_context(servers.s3(self._work))
        self._store = {**s3.environment(), "FLOE_STORE": s3.url(s3.bucket(), "bench")}
        with self._floe_node("off") as (daemons, _):
            _say("floe image index")
            begun = time.perf_counter()
            daemons.floe("image", "index", "--plain-http", self._image)
            results.facts["floe image index, seconds"] = round(time.perf_counter() - begun, 1)
        _say("counting what a start touches")
        results.facts["MB touched"] = round(self._touched() / 1e6, 1)
        if PROFILED in self._options.only:
            _say("recording a profile")
            self._record()

    def _touched(self) -> int:
        """Bytes of the image's files that one start leaves in the page cache when the kernel reads nothing ahead."""
        with self._floe_node("off", FLOE_READAHEAD="0") as (daemons, containerd):
            cri = containerd.cri()
            cri.pull(self._image)
            pod = cri.run_pod("bench")
            folder = daemons.run_dir / "trees"
            found = [Path(mount.target) for mount in mounttable.mounts() if mount.fstype == "erofs"]
            trees = [tree for tree in found if tree.is_relative_to(folder)]
            for tree in trees:
                native.set_read_ahead(tree, 0)
            workloads.empty_page_cache()
            if cri.wait(cri.run_container(pod, self._image), timeout=600):
                raise SystemExit("bench: the program failed")
            return sum(resident.pages(tree) for tree in trees)

    def _record(self) -> None:
        with self._floe_node("on") as (daemons, containerd):
            cri = containerd.cri()
            cri.pull(self._image)
            if cri.wait(cri.run_container(cri.run_pod("bench"), self._image), timeout=300):
                raise SystemExit("bench: the program failed")
            os.kill(int((daemons.run_dir / "worker.pid").read_text()), signal.SIGTERM)  # it says first what it recorded
            until = time.monotonic() + _RECORDED
            while not any(layer["starts"] for layer in daemons.json("image", "profile", self._image)["layers"]):
                if time.monotonic() > until:
                    raise SystemExit("bench: no profile of the start was recorded")
                time.sleep(0.5)

    def _index_for_soci(self) -> None:
        authority = Authority(self._work / "authority")
        certificate = authority.issue("registry", "localhost", "127.0.0.1")
        self._secure = Registry(self._work / "registry-tls", tls=certificate, storage=self._registry.storage)
        self._stack.callback(self._secure.stop)
        self._secure_image = f"{self._secure.host}/app:1"
        self._trust = {"SSL_CERT_FILE": str(authority.ca)}
        with self._containerd(env=self._trust) as containerd:
            containerd.cri().pull(self._secure_image)
            _say("soci create, soci push")
            soci.index(containerd, self._secure_image, self._home("soci-index") / "store")

    def _home(self, name: str) -> Path:
        # Sockets lie in it, and their paths must stay short.
        folder = self._work / f"{name}{next(self._numbers)}"
        folder.mkdir()
        return folder


def content_bytes(containerd: Containerd) -> int:
    """Bytes of blobs that containerd downloaded."""
    blobs = containerd.root / "io.containerd.content.v1.content" / "blobs"
    return sum(path.stat().st_size for path in blobs.rglob("*") if path.is_file()) if blobs.exists() else 0


def store_bytes(daemons: Daemons) -> int:
    """Bytes that the node fetched from the store: pack data by the worker, trees and indexes by the snapshotter."""
    counters = daemons.json("status")["packfs"]["counters"]
    metadata = [*daemons.cache.glob("trees/*.erofs"), *daemons.cache.glob("packs/*/index")]
    return sum(counters[f"{s}_bytes"] for s in ("store", "readahead")) + sum(p.stat().st_size for p in metadata)


def seconds_of(stamp: str) -> float:
    """POSIX seconds of a time as containers' logs have it."""
    # RFC 3339 with nanoseconds, which Python before 3.11 does not parse.
    whole, _, rest = stamp.partition(".")
    zone = stamp[-6:] if stamp[-6] in "+-" else "+00:00"
    return dt.datetime.fromisoformat(whole + zone).timestamp() + float(f"0.{rest[:9].rstrip('Z+-:')}")


def _say(text: str) -> None:
    if sys.stderr.isatty() or os.environ.get("FLOE_BENCH_VERBOSE"):
        print(f"bench: {time.strftime('%H:%M:%S')} {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
