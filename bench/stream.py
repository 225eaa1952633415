"""python -m bench.stream: runai-model-streamer loads safetensors from a Floe mount and from the local disk.

The model is resident: mounted natively from the node cache. Each round both are read with the page cache empty (cold disk)
and again with the files in it. What reads is the streamer's own library in a process of its own, its defaults, all tensors
of all files into memory.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import types
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from bench import command, wheels, workloads
from bench.floe_node import FloeNode
from bench.report import Results

MIB = 1 << 20
WHEELS = wheels.FOLDER / "runai-model-streamer"
DISK, FLOE = "local disk", "floe resident"


def main() -> int:
    """Make the data, measure, print; with --load only load, in the child."""
    options = _options()
    if options.load:
        print(_load(options.load))
        return 0
    return command.run(options, lambda stack, work: _measure(stack, work, options))


def _options() -> argparse.Namespace:
    parser = command.parser("stream", __doc__, rounds=5, free="5 GiB")
    parser.add_argument("--size", type=int, default=1024, help="size of the model in MiB (default 1024)")
    parser.add_argument("--shards", type=int, default=4, help="files of the model (default 4)")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.geteuid():
        parser.error("mounting needs root: run it with sudo")
    return options


def _measure(stack: ExitStack, work: Path, options: argparse.Namespace) -> Results:
    wheels.install(WHEELS, "runai-model-streamer>=0.17", "humanize", dependencies=False)
    source = work / "model"
    _make(source, options.size * MIB, options.shards)
    node = FloeNode(work, "resident", {"FLOE_STORE": f"file://{work}/store"})
    node.push(source)
    with node.mounted() as folder:
        for path in folder.iterdir():
            path.read_bytes()
    folder = stack.enter_context(node.mounted())
    if node.mode() != "native":
        raise SystemExit(f"bench: the model is mounted as {node.mode()}, not natively")
    folders = {DISK: source, FLOE: folder}
    cold, warm = [], []
    for _ in range(options.rounds):
        cold_row, warm_row = {}, {}
        for name, place in folders.items():
            workloads.empty_page_cache()
            cold_row[name] = _in_child(place)
        for name, place in folders.items():
            for path in place.iterdir():
                path.read_bytes()
            warm_row[name] = _in_child(place)
        cold.append(cold_row)
        warm.append(warm_row)
    results = Results(facts={"cores": os.cpu_count(), "model MiB": options.size, "files": options.shards})
    results.add("runai-model-streamer, from the disk", cold, DISK)
    results.add("runai-model-streamer, files in the page cache", warm, DISK)
    return results


def _make(folder: Path, size: int, shards: int) -> None:
    folder.mkdir()
    source = np.random.default_rng(11)
    for shard in range(shards):
        tensors = {f"{shard}.{n}": np.frombuffer(source.bytes(size // shards // 8), dtype=np.float16) for n in range(8)}
        save_file(tensors, folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors")


def _in_child(folder: Path) -> float:
    command = [sys.executable, "-m", "bench.stream", "--load", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: the streamer failed: {done.stderr.strip()[-1000:]}")
    return float(done.stdout.split()[-1])


def _load(folder: Path) -> float:
    """Seconds to stream all tensors of the files in `folder` into memory."""
    streamer_class, chunks = _streamer()
    files = {path: _ranges(path) for path in sorted(folder.glob("*.safetensors"))}
    received = 0
    begun = time.perf_counter()
    with streamer_class() as streamer:
        streamer.stream_files(
            [chunks.contiguous(n, str(path), start, sizes) for n, (path, (start, sizes)) in enumerate(files.items())]
        )
        for *_, tensor in streamer.get_chunks():
            received += tensor.numel()  # of bytes
    taken = time.perf_counter() - begun
    if received != sum(sum(sizes) for _, sizes in files.values()):
        raise SystemExit(f"bench: the streamer gave {received} bytes of {folder}")
    return taken


def _ranges(path: Path) -> tuple[int, list[int]]:
    """Where the tensors of a safetensors file begin, and their sizes in the order of the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    return 8 + length, [end - start for start, end in spans]


def _streamer() -> tuple[Any, Any]:
    """FileStreamer and FileChunks. Torch, in whose tensors it wraps its buffers, is stood in for: its wheels bring gigabytes for GPUs."""
    torch = types.ModuleType("torch")
    torch.device = lambda name: types.SimpleNamespace(type=str(name))  # type: ignore[attr-defined]
    torch.from_numpy = _Tensor  # type: ignore[attr-defined]
    package = types.ModuleType("runai_model_streamer")  # its own __init__ imports what needs all of torch
    package.__path__ = [str(WHEELS / "runai_model_streamer")]
    sys.modules |= {"torch": torch, "runai_model_streamer": package}
    sys.path.append(str(WHEELS))
    files = importlib.import_module("runai_model_streamer.file_streamer.file_streamer")
    requests = importlib.import_module("runai_model_streamer.file_streamer.requests_iterator")
    return files.FileStreamer, requests.FileChunks


class _Tensor:
    def __init__(self, array: Any) -> None:
        self._array = array

    def view(self, *_shape: int) -> "_Tensor":
        return self

    def numel(self) -> int:
        return int(self._array.size)


if __name__ == "__main__":
    sys.exit(main())
