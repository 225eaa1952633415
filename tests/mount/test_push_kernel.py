"""From a directory through the store to the kernel: what is mounted equals what was pushed."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.erofs_mount import mounted

from floe.ingest.entries import Node
from floe.ingest.model import push_model
from floe.ingest.publish import Ingest
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.frames import decode_frame
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.nodes import CHUNK
from floe.store.objects import open_store
from floe.store.packindex import LAYER_FRAME, PackIndex
from floe.store.records import KIND_LAYER, Manifest
from floe.store.treeobject import decode_tree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def catalog(tmp_path):
    made = Catalog(open_store(f"file://{tmp_path}/store"), open_index(f"sqlite:{tmp_path}/index.db"))
    yield made
    made.close()


def fetch(catalog: Catalog, manifest: Manifest, home: Path) -> tuple[Path, list[Path]]:
    """The tree and its packs as files."""
    image = home / "tree.erofs"
    image.write_bytes(decode_tree(catalog.store.get(layout.tree_key(manifest.tree.digest)), manifest.tree.digest))
    devices = []
    for entry in manifest.packs:
        index = PackIndex.decode(catalog.store.get(layout.pack_index_key(entry.id)), entry.id)
        stored = memoryview(catalog.store.get(layout.pack_key(entry.id)))
        path = home / entry.id
        with path.open("wb") as file:
            for number, frame in enumerate(index.frames):
                data = stored[index.stored_offsets[number] :][: frame.stored]
                file.write(decode_frame(data, frame, index.content_length(number)).content)
        assert path.stat().st_size == entry.content_size
        devices.append(path)
    return image, devices


def test_a_model_directory(catalog, tmp_path):
    random.seed(3)
    home = tmp_path / "model"
    (home / "onnx" / "deep").mkdir(parents=True)
    for number, size in enumerate((1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 4097)):
        (home / f"w{number}.bin").write_bytes(random.randbytes(size))
    (home / "onnx" / "deep" / "text").write_text("compressible " * 100_000)
    (home / "onnx" / "same").write_bytes((home / "w7.bin").read_bytes())
    (home / "latest").symlink_to("onnx/deep/text")
    result = push_model(catalog, home, ModelRef("m"), spool_dir=tmp_path / "spool")
    assert result.new_bytes < result.total_bytes
    image, devices = fetch(catalog, result.manifest, tmp_path)
    with mounted(image, devices, tmp_path / "mnt") as mnt:
        done = subprocess.run(
            ["diff", "-r", "--no-dereference", home, mnt], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
        for path in (p for p in home.rglob("*") if not p.is_symlink()):
            there = mnt / path.relative_to(home)
            assert there.stat().st_mtime_ns == path.stat().st_mtime_ns
            assert there.stat().st_size == path.stat().st_size or path.is_dir()


@pytest.mark.slow
def test_a_hundred_thousand_files_of_a_layer(catalog, tmp_path):
    start = time.monotonic()
    root = Node(stat.S_IFDIR | 0o755)
    with Ingest(catalog, spool_dir=tmp_path / "spool", frame_size=LAYER_FRAME) as ingest:
        for outer in range(100):
            below = root.children[b"d%d" % outer] = Node(stat.S_IFDIR | 0o755)
            for inner in range(1000):
                data = b"%d %d" % (outer, inner)
                content = ingest.add_stream(io.BytesIO(data), len(data))
                below.children[b"f%d" % inner] = Node(stat.S_IFREG | 0o644, mtime=inner, content=content)
        _, manifest = ingest.finish(root, KIND_LAYER, "test")
    # Some 3 s of one core; a machine shared with others gets ten times that.
    assert time.monotonic() - start < 30
    assert (manifest.sizes.files, len(manifest.packs)) == (100_000, 1)
    image, devices = fetch(catalog, manifest, tmp_path)
    with mounted(image, devices, tmp_path / "mnt") as mnt:
        for outer in range(0, 100, 9):
            for inner in range(0, 1000, 99):
                assert (mnt / f"d{outer}" / f"f{inner}").read_text() == f"{outer} {inner}"
        assert sum(len(files) for _, _, files in os.walk(mnt)) == 100_000


PUSH = """
import sys
from pathlib import Path
from floe.ingest.model import push_model
from floe.store.catalog import Catalog
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store
home = Path(sys.argv[1])
catalog = Catalog(open_store(f"file://{home}/store"), open_index(f"sqlite:{home}/index.db"))
push_model(catalog, home / "model", ModelRef("m"), spool_dir=home / "spool")
catalog.close()
# Not ru_maxrss: that survives exec, and would tell of the process that started this one.
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    home = tmp_path / "model"
    home.mkdir()
    with (home / "weights").open("wb") as file:
        for _ in range(160):
            file.write(random.randbytes(CHUNK // 2) + b"compressible".ljust(CHUNK // 2, b"."))
    done = subprocess.run([sys.executable, "-c", PUSH, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 << 10, "KiB; the file has 640 MiB"
