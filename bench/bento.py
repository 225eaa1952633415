"""python -m bench.bento: a Bento whose model is in the store, against the image that `bentoml containerize` makes.

The real bentoml builds two Bentos that share one model of 2 GiB. In interleaved rounds of one run:

- `image`: seconds of `floe bento image` into a bucket that holds nothing, and of the second Bento's after it; bytes that each
  wrote to the bucket and sent to the registry.
- `pull to first prediction`: on a real containerd, from asking for the image to the answer of a service that has loaded all
  of its model; on a node that holds nothing, page cache empty. `overlayfs` pulls and unpacks the stock image, with models in a
  gzip layer, as builders push it; `floe` mounts. Then the second Bento on the same node.

Registry and S3 server are on loopback. Bytes fetched are those of the first prediction, of both: the registry's blobs and the store's content.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import command, servers, workloads
from bench.report import Results
from bench.start import content_bytes, seconds_of, store_bytes

# isort: split
from support.bento import stock_layer
from support.containerd import TOOLS, Containerd, versions
from support.floe_daemons import Daemons
from support.images import add, build_oci
from support.pythonimage import ENV, PYTHON, app_layers
from support.registry import Registry

MIB = 1 << 20
BENTOML = TOOLS / "bentoml" / "bin" / "python"
ROOT = "home/bentoml/bento"
PATIENCE = 3600.0  # seconds for one step, on whatever machine
OVERLAY, FLOE = "overlayfs", "floe"
BENTOS = ("front", "other")
FIRST, SECOND = "first Bento", "second Bento"
SERVICE = """
import bentoml, numpy

@bentoml.service
class Service:
    weights = bentoml.models.BentoModel("weights:1")

    def __init__(self):
        self.weights_read = numpy.load(self.weights.path_of("weights.npy"))  # all of it, as an engine does

    @bentoml.api
    def predict(self, text: str) -> int:
        return int(self.weights_read[-1]) + len(text)
"""
# The store of models and the Bentos, by the real package, and what it gives a builder for each.
BUILD = """
import shutil, sys
import bentoml, numpy
from bentoml._internal.container import construct_containerfile
source, contexts, mib = sys.argv[1], sys.argv[2], int(sys.argv[3])
with bentoml.models.create("weights:1") as model:
    random = numpy.random.Generator(numpy.random.SFC64(20261126))
    array = numpy.lib.format.open_memmap(model.path_of("weights.npy"), "w+", numpy.uint32, (mib << 18,))
    for start in range(0, len(array), 1 << 22):
        part = array[start : start + (1 << 22)]
        part[:] = random.integers(0, 1 << 32, len(part), numpy.uint32)
    array.flush()
for name in sys.argv[4:]:
    python = {"lock_packages": False, "packages": ["bentoml"]}
    bento = bentoml.bentos.build("service:Service", build_ctx=source, version="v1", name=name, python=python)
    with construct_containerfile(bento, enable_buildkit=False) as (context, _):
        shutil.copytree(context, f"{contexts}/{name}", symlinks=True)
"""
# In the container: serve, and ask until there is an answer.
ASK = f"""
import json, subprocess, sys, time, urllib.request
server = subprocess.Popen([sys.executable, "-m", "bentoml", "serve", "--port", "3999", "/{ROOT}"], stdout=sys.stderr)
body, kind = json.dumps({{"text": "hi"}}).encode(), {{"Content-Type": "application/json"}}
while server.poll() is None:
    try:
        answer = urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:3999/predict", body, kind)).read()
        print("first output:", answer.decode(), flush=True)
        server.terminate()
        sys.exit(0)
    except OSError:
        time.sleep(0.02)
sys.exit("bentoml serve ended")
"""


def main() -> int:
    """Build, make images, start in rounds, print."""
    options = _options()
    return command.run(options, lambda stack, work: _Bentos(stack, work, options).measure())


def _options() -> argparse.Namespace:
    parser = command.parser("bento", __doc__, rounds=5, free="40 GiB")
    parser.add_argument("--size", type=int, default=2048, help="size of the model in MiB (default 2048)")
    options = parser.parse_args()
    if os.geteuid() or not versions():
        parser.error("it needs root and a containerd: run install/setup.sh test")
    if not BENTOML.exists():
        parser.error(f"there is no BentoML in {BENTOML.parent}: run install/setup.sh test")
    return options


class _Bentos:
    """One run: the Bentos, registry and bucket, and a new node for every start."""

    def __init__(self, stack: contextlib.ExitStack, work: Path, options: argparse.Namespace) -> None:
        self._work, self._options = work, options
        self._numbers = iter(range(10_000))
        self._results = Results(facts={"containerd": str(versions()[-1]), "model MiB": options.size})
        self._s3 = stack.enter_context(servers.s3(work))
        self._registry = Registry(work / "registry")
        stack.callback(self._registry.stop)

    def measure(self) -> Results:
        """All rounds: images first, as the last ones are those that are started."""
        command.say("building the Bentos")
        stock = self._build()
        rounds = self._options.rounds
        made = [self._make_images() for _ in range(rounds)]
        self._results.add("image", [{name: found[0] for name, found in row.items()} for row in made], FIRST)
        for title, number in (("bytes written to the bucket", 1), ("bytes sent to the registry", 2)):
            self._results.facts[title] = {
                name: round(statistics.median(row[name][number] for row in made)) for name in (FIRST, SECOND)
            }
        runs: dict[str, Callable[[], tuple[list[float], int]]] = {
            OVERLAY: lambda: self._overlayfs(stock),
            FLOE: self._floe,
        }
        starts = []
        for _ in range(rounds):
            starts.append({})
            for name, run in runs.items():
                command.say(name)
                starts[-1][name] = run()
        for number, title in enumerate(("pull to first prediction", "the same of a second Bento on that node")):
            self._results.add(title, [{name: row[name][0][number] for name in runs} for row in starts], OVERLAY)
        fetched = {name: statistics.median(row[name][1] for row in starts) for name in runs}
        self._results.facts["MB fetched until both had answered"] = {n: round(b / 1e6, 1) for n, b in fetched.items()}
        return self._results

    # what is made once

    def _build(self) -> list[str]:
        """The Bentos, the base image and the stock images; names of the latter."""
        source, contexts = self._work / "src", self._work / "contexts"
        source.mkdir()
        contexts.mkdir()
        (source / "service.py").write_text(SERVICE)
        self._home = {"BENTOML_HOME": str(self._work / "bentoml"), "BENTOML_DO_NOT_TRACK": "1"}
        environ = {**os.environ, **self._home, "PATH": f"{BENTOML.parent}:{os.environ['PATH']}"}
        argv = [BENTOML, "-c", BUILD, source, contexts, str(self._options.size), *BENTOS]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"bench: bentoml cannot build:\n{done.stderr[-4000:]}")
        site = next((BENTOML.parent.parent / "lib").glob("python3*")) / "site-packages"
        layers = [*app_layers("", site=site, bytecode=True), _writable]
        env = (*ENV, "HOME=/home/bentoml")
        base = build_oci(self._work / "base", layers, env=env)
        self._base = self._registry.push(base.source, "python:3")
        stock = []
        for name in BENTOS:
            command.say(f"making the stock image of {name}")
            layer = stock_layer(contexts / name)
            stock_env = (*env, f"BENTO_PATH=/{ROOT}", "BENTOML_HOME=/home/bentoml/", "BENTOML_CONTAINERIZED=true")
            image = build_oci(self._work / f"stock-{name}", [*layers, layer], env=stock_env)
            stock.append(self._registry.push(image.source, f"stock-{name}:1", timeout=PATIENCE))
            shutil.rmtree(image.directory)
        shutil.rmtree(contexts)
        return stock

    def _make_images(self) -> dict[str, tuple[float, int, int]]:
        """Seconds, bytes written to a new bucket and bytes sent to the registry, of each Bento's image."""
        bucket = self._s3.bucket()
        # Another repository each time: what a registry has of others is mounted, and not sent.
        number = next(self._numbers)
        self._images = [f"{self._registry.host}/bento{number}-{name}:1" for name in BENTOS]
        self._store = {**self._s3.environment(), "FLOE_STORE": self._s3.url(bucket, "bench"), "FLOE_INDEX": "none"}
        found = {}
        with _daemons(self._folder(), self._store | self._home) as daemons:
            for title, name, image in zip((FIRST, SECOND), BENTOS, self._images, strict=True):
                command.say(f"floe bento image of the {title}")
                before = self._stored(bucket)
                os.sync()
                begun = time.perf_counter()
                words = ("bento", "image", "--plain-http", f"{name}:v1", image, "--base", self._base)
                said = daemons.json(*words, timeout=PATIENCE)
                taken = time.perf_counter() - begun
                found[title] = (taken, self._stored(bucket) - before, said["copied_bytes"])
            for image in self._images:
                daemons.floe("image", "index", "--plain-http", image)
        return found

    def _stored(self, bucket: str) -> int:
        """Bytes of all objects of a bucket."""
        client = self._s3.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        size = sum(item["Size"] for page in pages for item in page.get("Contents", ()))
        client.close()
        return size

    # what is measured

    def _overlayfs(self, images: list[str]) -> tuple[list[float], int]:
        with self._containerd() as containerd:
            return self._predictions(containerd, images, lambda: content_bytes(containerd))

    def _floe(self) -> tuple[list[float], int]:
        folder = self._folder()
        with (
            _daemons(folder, self._store | {"FLOE_PROFILES": "off"}) as daemons,
            self._containerd(snapshotter_address=daemons.address, snapshotter_root=daemons.root) as containerd,
        ):
            return self._predictions(containerd, self._images, lambda: store_bytes(daemons) + content_bytes(containerd))

    def _predictions(
        self, containerd: Containerd, images: list[str], fetched: Callable[[], int]
    ) -> tuple[list[float], int]:
        """Seconds from asking for each image to its first prediction; bytes fetched for all of them."""
        cri, taken = containerd.cri(), []
        cri.timeout = PATIENCE
        pod = cri.run_pod("bench")
        before = fetched()
        for image in images:
            workloads.empty_page_cache()
            began = time.time()
            cri.pull(image)
            container = cri.run_container(pod, image, (PYTHON, "-c", ASK))
            code = cri.wait(container, timeout=PATIENCE)
            lines = Path(cri.status(container).log_path).read_text().splitlines()
            answers = [line for line in lines if "first output" in line]
            if code or not answers:
                raise SystemExit("bench: the service failed:\n" + "\n".join(lines)[-3000:])
            taken.append(seconds_of(answers[0].split(" ", 1)[0]) - began)
        return taken, fetched() - before

    @contextlib.contextmanager
    def _containerd(self, **settings: object) -> Iterator[Containerd]:
        base = self._folder()
        containerd = Containerd(versions()[-1], base, registries=(self._registry.host,), **settings)
        try:
            yield containerd
        finally:
            containerd.stop()
            shutil.rmtree(base, ignore_errors=True)

    def _folder(self) -> Path:
        # Sockets lie in it, and their paths must stay short.
        folder = self._work / f"n{next(self._numbers)}"
        folder.mkdir()
        return folder


@contextlib.contextmanager
def _daemons(folder: Path, environ: dict[str, str]) -> Iterator[Daemons]:
    daemons = Daemons(folder, environ)
    try:
        yield daemons
    finally:
        daemons.close()
        shutil.rmtree(folder, ignore_errors=True)


def _writable(tar: tarfile.TarFile) -> None:
    add(tar, "tmp", kind=tarfile.DIRTYPE, mode=0o1777)


if __name__ == "__main__":
    sys.exit(main())
