"""The demo behind install/demo.sh: one Python application and one model, started as today and started with Floe.

As today: overlayfs, the model baked into the image. With Floe: the same application image, the model attached. Both by
CRI on a private containerd with a private registry on this machine; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.containerd import Containerd, versions
from support.cri import Cri
from support.floe_daemons import Daemons
from support.images import add, build_oci
from support.pythonimage import ENV, PYTHON, app_layers
from support.registry import Registry

MIB = 1 << 20
MODEL_PATH = "/models/demo"
TENSORS = 12
PROGRAM = f"""
import hashlib, json
from safetensors import safe_open
from safetensors.numpy import load_file
path = "{MODEL_PATH}/model.safetensors"
with safe_open(path, "numpy") as model:
    names = sorted(model.keys())
    print("first output: a tensor of", model.get_tensor(names[0]).shape, "of", len(names), flush=True)
weights = load_file(path)
print("all weights:", hashlib.sha256(b"".join(weights[n].tobytes() for n in sorted(weights))).hexdigest(), flush=True)
"""


@dataclass
class Start:
    """One start of the application: seconds from asking for it, bytes fetched for it, and what it printed."""

    first_output: float
    all_weights: float
    pulled: float
    moved: int
    output: str


def main() -> int:
    """Build, start twice each way, compare, clean up. Exit 1 when the outputs differ."""
    parser = argparse.ArgumentParser(prog="install/demo.sh", description=__doc__)
    parser.add_argument("--model-mib", type=int, default=384, help="size of the model in MiB (default 384)")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="where to work; a real disk, 5 GiB free")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="floe-demo-", dir=options.dir))
    try:
        return _demo(work, options)
    finally:
        shutil.rmtree(work)


def _demo(work: Path, options: argparse.Namespace) -> int:
    with ExitStack() as stack:
        with _step("making a model"):
            _make_model(work / "model", options.model_mib)
        with _step("building the application image, and one with the model baked in"):
            layers = app_layers(PROGRAM)
            build = {"env": ENV, "command": (PYTHON, "/app/main.py")}
            plain = build_oci(work / "plain", layers, tag="1", **build)
            baked = build_oci(work / "baked", [*layers, _model_layer(work / "model")], tag="1", **build)
        registry = Registry(work / "registry")
        stack.callback(registry.stop)
        with _step("pushing both to a private registry"):
            baked_name, plain_name = f"{registry.host}/app:baked", f"{registry.host}/app:plain"
            for image, name in ((baked, baked_name), (plain, plain_name)):
                _run("skopeo", "copy", "--dest-tls-verify=false", image.source, f"docker://{name}")
        daemons = Daemons(work / "floe")
        stack.callback(daemons.close)
        attached = f"{registry.host}/app:attached"
        with _step("floe model push, floe image index, floe image attach"):
            daemons.floe("model", "push", work / "model", "demo:1")
            daemons.floe("image", "index", "--plain-http", plain_name)
            daemons.floe("image", "attach", "--plain-http", plain_name, attached, "--model", f"demo:1={MODEL_PATH}")
        with _step("starting it as today: overlayfs, the model in the image"):
            (work / "today").mkdir()
            today = _starts(Containerd(versions()[-1], work / "today", registries=(registry.host,)), baked_name)
        with _step("starting it with Floe: lazy layers, the model attached"):
            (work / "lazy").mkdir()
            containerd = Containerd(
                versions()[-1],
                work / "lazy",
                snapshotter_address=daemons.address,
                snapshotter_root=daemons.root,
                registries=(registry.host,),
            )
            lazy = _starts(containerd, attached, lambda: _store_bytes(daemons))
    same = len({start.output for start in (*today, *lazy)}) == 1
    _print(today, lazy, same=same, as_json=options.json)
    return 0 if same else 1


def _make_model(folder: Path, mib: int) -> None:
    folder.mkdir()
    source = np.random.default_rng(7)
    count = mib * MIB // 4 // TENSORS // 1024
    tensors = {f"layer.{n:02d}.weight": source.random((count, 1024), dtype=np.float32) for n in range(TENSORS)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Demo"], "layers": TENSORS}))


def _model_layer(folder: Path) -> Callable[..., None]:
    def fill(tar) -> None:
        for path in sorted(folder.iterdir()):
            add(tar, f"{MODEL_PATH.lstrip('/')}/{path.name}", path.read_bytes())

    return fill


def _starts(containerd: Containerd, image: str, store_bytes: Callable[[], int] = lambda: 0) -> tuple[Start, Start]:
    try:
        cri = containerd.cri()
        pod = cri.run_pod("demo")
        before = _content_bytes(containerd)

        def moved() -> int:
            return _content_bytes(containerd) - before + store_bytes()

        first = _start(cri, pod, image, moved)
        second = _start(cri, pod, image, moved)
        second.moved -= first.moved
        return first, second
    finally:
        containerd.stop()


def _start(cri: Cri, pod: str, image: str, moved: Callable[[], int]) -> Start:
    began = time.time()
    cri.pull(image)
    pulled = time.time() - began
    container = cri.run_container(pod, image)
    code = cri.wait(container, timeout=300)
    output = cri.logs(container)
    if code:
        raise SystemExit(f"demo: the application ended with {code}:\n{output}")
    stamps = [line.split(" ", 1)[0] for line in Path(cri.status(container).log_path).read_text().splitlines()]
    first, last = (_seconds(stamps[n]) - began for n in (0, -1))
    return Start(first, last, pulled, moved(), output)


def _seconds(stamp: str) -> float:
    # RFC 3339 with nanoseconds, which Python before 3.11 does not parse.
    whole, _, rest = stamp.partition(".")
    digits = rest[:9].rstrip("Z+-:")
    zone = stamp[-6:] if stamp[-6] in "+-" else "+00:00"
    return dt.datetime.fromisoformat(whole + zone).timestamp() + float(f"0.{digits}")


def _content_bytes(containerd: Containerd) -> int:
    """Bytes of blobs that containerd downloaded."""
    blobs = containerd.root / "io.containerd.content.v1.content" / "blobs"
    return sum(path.stat().st_size for path in blobs.rglob("*") if path.is_file()) if blobs.exists() else 0


def _store_bytes(daemons: Daemons) -> int:
    """Bytes that the node fetched from the store: pack data by the worker, trees and indexes by the snapshotter."""
    counters = daemons.json("status")["packfs"]["counters"]
    cache = daemons.cache
    metadata = [*cache.glob("trees/*.erofs"), *cache.glob("packs/*/index")]
    return sum(counters[f"{s}_bytes"] for s in ("store", "readahead")) + sum(p.stat().st_size for p in metadata)


def _print(today: tuple[Start, Start], lazy: tuple[Start, Start], *, same: bool, as_json: bool) -> None:
    rows = {
        "today, first start": today[0],
        "Floe, first start": lazy[0],
        "today, second start": today[1],
        "Floe, second start": lazy[1],
    }
    if as_json:
        print(
            json.dumps({"same_output": same, "starts": {name: vars(start) for name, start in rows.items()}}, indent=1)
        )
        return
    print(f"\n{'':<22}{'image ready':>13}{'first output':>14}{'all weights':>13}{'bytes moved':>14}")
    for name, s in rows.items():
        times = f"{s.pulled:>11.2f} s{s.first_output:>12.2f} s{s.all_weights:>11.2f} s"
        print(f"{name:<22}{times}{s.moved / MIB:>10.1f} MiB")
    ratio = today[0].first_output / lazy[0].first_output
    print(
        f"\nFirst output {ratio:.1f} times sooner; registry and store are on this machine, so no network is in these figures."
    )
    print("Output: " + ("the same in all four starts" if same else "NOT the same"))
    print("".join(f"  {line}\n" for line in lazy[0].output.splitlines()), end="")


@contextmanager
def _step(text: str) -> Iterator[None]:
    """Say what is done and how long it took."""
    start = time.monotonic()
    print(f"demo: {text} ...", file=sys.stderr, flush=True)
    yield
    print(f"demo:   {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"demo: {' '.join(command)} failed: {result.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main())
