"""python -m bench.crowd: one node with 500 mounted layers and 50 readers, and what its pack filesystem makes of them.

Ten images of 50 layers lie in S3 on loopback; a snapshotter prepares them all, so that 500 trees are mounted over the pack
filesystem. 50 threads then read files that nobody read before, one GET each, with a pause between two. This is done
undisturbed, and again while a model is read from its start to its end at full rate beside them, which stands for a
background fill. Printed are p50 and p99 of the reads, and the worker's memory at its peak.
"""

import argparse
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc

from bench import command, data, servers, workloads
from bench.floe_node import peak_memory
from bench.native import run
from bench.report import Results, percentile

# isort: split
from support.floe_daemons import Daemons
from support.images import BuiltImage, add, build_oci
from support.snapshots import REF

from floe.store import mounttable

MIB = 1 << 20
QUIET, LOADED = "undisturbed", "beside a full-rate reader"
FILE = 120 << 10  # bytes of each file: below a frame of an image, so one GET
FILES = 16  # of each layer


def main() -> int:
    """Make the layers, mount them, read, print."""
    options = _options()
    return command.run(options, lambda stack, work: _Crowd(stack, work, options).measure())


def _options() -> argparse.Namespace:
    parser = command.parser("crowd", __doc__, rounds=5, free="12 GiB")
    parser.add_argument("--images", type=int, default=10, help="images of --layers layers each (default 10)")
    parser.add_argument("--layers", type=int, default=50, help="layers of an image (default 50)")
    parser.add_argument("--readers", type=int, default=50, help="threads that read (default 50)")
    parser.add_argument("--pause", type=float, default=0.1, help="mean seconds between a reader's reads (default 0.1)")
    parser.add_argument("--reads", type=int, default=16, help="reads of each reader in a round (default 16)")
    parser.add_argument(
        "--fill", type=int, default=1024, help="size of the model read beside them in MiB (default 1024)"
    )
    options = parser.parse_args()
    if os.geteuid():
        parser.error("mounting needs root: run it with sudo")
    needed = 2 * options.rounds * options.readers * options.reads
    if needed > options.images * options.layers * FILES:
        parser.error(f"{needed} reads want more files than {options.images * options.layers} layers of {FILES} have")
    return options


class _Crowd:
    """One run: the images and the model in the bucket, one node that mounts them."""

    def __init__(self, stack: ExitStack, work: Path, options: argparse.Namespace) -> None:
        self._stack, self._work, self._options = stack, work, options
        self._random = random.Random(9)
        s3 = stack.enter_context(servers.s3(work))
        environ = {**s3.environment(), "FLOE_STORE": s3.url(s3.bucket(), "bench"), "FLOE_PROFILES": "off"}
        self._daemons = Daemons(work / "node", environ)
        stack.callback(self._daemons.close)

    def measure(self) -> Results:
        """Mount everything, then read in rounds."""
        options = self._options
        for number in range(options.images):
            command.say(f"image {number + 1} of {options.images}")
            self._mount(self._image(number))
        folder = self._daemons.run_dir / "trees"
        trees = [m.target for m in mounttable.mounts() if m.fstype == "erofs" and Path(m.target).is_relative_to(folder)]
        if len(trees) != options.images * options.layers:
            raise SystemExit(f"bench: {len(trees)} trees are mounted")
        files = [path for tree in trees for path in Path(tree).glob("l*/*")]
        self._random.shuffle(files)
        fresh = iter(files)
        fill = self._work / "fill"
        self._push_fill(fill)
        middles, slowest = [], []
        for _ in range(options.rounds):
            found = {QUIET: self._read(fresh)}
            with self._filling(fill) as filling:
                found[LOADED] = self._read(fresh, filling)
            middles.append({name: statistics.median(seconds) for name, seconds in found.items()})
            slowest.append({name: percentile(seconds, 0.99) for name, seconds in found.items()})
        results = Results(facts={"cores": os.cpu_count(), "trees mounted": len(trees), "readers": options.readers})
        results.facts["worker peak MiB"] = round(
            peak_memory(int((self._daemons.run_dir / "worker.pid").read_text())) / MIB, 1
        )
        results.add("reads of small files by 50 readers, median", middles, QUIET)
        results.add("reads of small files by 50 readers, p99", slowest, QUIET)
        return results

    def _read(self, fresh: Iterator[Path], during: Callable[[], bool] = lambda: True) -> list[float]:
        """Seconds of each read; those that did not begin while `during` was true do not count."""
        options = self._options
        shares = [[next(fresh) for _ in range(options.reads)] for _ in range(options.readers)]
        workloads.empty_page_cache()

        def reader(paths: list[Path]) -> list[float]:
            pauses, seconds = random.Random(str(paths[0])), []
            for path in paths:
                time.sleep(pauses.uniform(0, 2 * options.pause))
                counts, begun = during(), time.perf_counter()
                path.read_bytes()
                if counts:
                    seconds.append(time.perf_counter() - begun)
            return seconds

        with ThreadPoolExecutor(options.readers) as pool:
            found = [second for seconds in pool.map(reader, shares) for second in seconds]
        if len(found) < options.readers * options.reads // 4:
            raise SystemExit("bench: the full-rate reader ended too soon: give it more to read with --fill")
        return found

    @contextmanager
    def _filling(self, mountpoint: Path) -> Iterator[Callable[[], bool]]:
        """The model mounted with nothing of it in the node cache, and `cat` reading it; whether it still does."""
        # A model of its own for each round: nothing of it is in the node cache.
        model = next(self._fills)
        self._floe("model", "mount", model, mountpoint)
        reader = subprocess.Popen(["cat", mountpoint / "large.bin"], stdout=subprocess.DEVNULL)
        try:
            yield lambda: reader.poll() is None
        finally:
            reader.kill()
            reader.wait()
            self._floe("umount", mountpoint)

    def _push_fill(self, mountpoint: Path) -> None:
        source = self._work / "model"
        mountpoint.mkdir()
        names = []
        for number in range(self._options.rounds):
            command.say(f"model {number + 1} of {self._options.rounds}")
            data.make(source, large=self._options.fill * MIB, files=0)
            with (source / "large.bin").open("r+b") as file:
                for start in range(0, self._options.fill * MIB, MIB):  # no frame like one of another round's
                    file.seek(start)
                    file.write(f"{number} {start}".encode())
            self._floe("model", "push", source, f"fill{number}")
            shutil.rmtree(source)
            names.append(f"fill{number}")
        self._fills = iter(names)

    def _image(self, number: int) -> BuiltImage:
        def layer(which: int) -> Callable[[tarfile.TarFile], None]:
            def fill(tar: tarfile.TarFile) -> None:
                for name in range(FILES):
                    add(tar, f"l{number}.{which}/{name}", self._random.randbytes(FILE))

            return fill

        folder = self._work / f"image{number}"
        built = build_oci(folder, [layer(which) for which in range(self._options.layers)], compression="")
        self._floe("image", "index", built.source)
        shutil.rmtree(folder)
        return built

    def _mount(self, built: BuiltImage) -> None:
        """What containerd asks of a snapshotter when it pulls an image."""
        client, chain, parent = self._daemons.client, "", ""
        for diff_id in built.diff_ids:
            chain = f"sha256:{hashlib.sha256(f'{chain} {diff_id}'.encode()).hexdigest()}" if chain else diff_id
            try:
                client.prepare(f"extract {chain}", parent, {REF: chain})
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise
            else:
                raise SystemExit("bench: a layer that is in the store was not prepared from it")
            (parent,) = client.names(f'labels."{REF}"=={chain}')

    def _floe(self, *arguments: str | Path) -> None:
        run(sys.executable, "-m", "floe", *arguments, env=self._daemons.environ)


if __name__ == "__main__":
    sys.exit(main())
