"""A planted cache: filled by plant-cache.sh, copied by copy-cache.sh, read without the store, and distrusted where it should be."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.floe_node import Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
GKE = Path(__file__).resolve().parents[2] / "install/gke"
CONTENT = random.Random(1).randbytes(9 << 20)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store with the model acme/m:1, and a directory into which it was planted."""
    node = Node(tmp_path_factory.mktemp("original"))
    folder = node.home / "m"
    folder.mkdir()
    (folder / "weights").write_bytes(CONTENT)
    (folder / "config.json").write_text("{}")
    node.floe("model", "push", folder, "acme/m:1")
    place = node.home / "planted"
    place.mkdir()
    script(node, "plant-cache.sh", place, "acme/m:1")
    assert not list(Path("/run").glob("floe-plant.*"))
    yield node.home
    node.clean_up()


@pytest.fixture
def node(tmp_path, original):
    """A node of its own, with a copy of that store."""
    node = Node(tmp_path)
    shutil.copytree(original / "store", node.store)
    yield node
    node.clean_up()


@pytest.fixture
def planted(tmp_path, original):
    """The disk, as this node has it."""
    return shutil.copytree(original / "planted", tmp_path / "planted")


def script(node, name, *words, code=0, **more):
    program = node.home / "floe"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m floe "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [GKE / name, *words], capture_output=True, text=True, check=False, timeout=60,
        env={**node.environ, "FLOE": str(program), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stderr


def mounted(node):
    place = node.home / "mnt"
    found = json.loads(node.floe("model", "mount", "acme/m:1", place, "--json").stdout)
    return place, found["resident"]


def test_a_node_with_a_planted_cache_reads_without_the_store_s_packs(node, planted):
    assert sorted(path.name for path in planted.iterdir()) == ["packs", "planted.json", "trees"]
    assert json.loads((planted / "planted.json").read_text())["models"] == "acme/m:1"
    shutil.rmtree(node.store / "packs")
    assert "copied 1 packs; 0 are left out" in script(node, "copy-cache.sh", planted, node.cache)
    (pack,) = (node.cache / "packs").iterdir()
    assert sorted(path.name for path in pack.iterdir()) == ["bitmap", "complete", "data", "index", "pins"]
    assert not (node.cache / "planted.new").exists()
    before = {path: path.stat().st_mtime_ns for path in node.cache.rglob("*")}
    assert "was copied before" in script(node, "copy-cache.sh", planted, node.cache)
    assert {path: path.stat().st_mtime_ns for path in node.cache.rglob("*")} == before
    place, resident = mounted(node)
    assert resident
    assert (place / "weights").read_bytes() == CONTENT


def test_what_is_damaged_on_the_disk_comes_from_the_store(node, planted):
    (data,) = planted.glob("packs/*/data")
    with data.open("r+b") as file:
        file.seek(3 << 20)
        file.write(b"not what was there")
    (tree,) = planted.glob("trees/*.erofs")
    tree.write_bytes(bytes(len(tree.read_bytes())))
    said = script(node, "copy-cache.sh", planted, node.cache)
    assert "copied 1 packs" in said
    (pack,) = (node.cache / "packs").iterdir()
    assert not (pack / "complete").exists()
    place, resident = mounted(node)
    assert not resident
    assert (place / "weights").read_bytes() == CONTENT


@pytest.mark.slow
def test_nothing_is_copied_beside_a_pack_filesystem_or_over_what_is_there(node, planted):
    place, _ = mounted(node)  # starts one
    assert "a pack filesystem writes to" in script(node, "copy-cache.sh", planted, node.cache, code=1)
    assert not (node.cache / "planted.json").exists()
    assert (place / "config.json").read_text() == "{}"
    node.floe("umount", place)


@pytest.mark.slow
def test_an_interrupted_copy_begins_anew_and_several_directories_share(node, planted):
    other = node.home / "other"
    left = node.cache / "planted.new/packs" / ("0" * 64)
    left.mkdir(parents=True)
    assert "copied 1 packs" in script(node, "copy-cache.sh", planted, node.cache, other)
    assert not (node.cache / "planted.new").exists()
    assert len([*node.cache.glob("packs/*"), *other.glob("packs/*")]) == 1
    assert "copied before" in script(node, "copy-cache.sh", planted, node.cache, other)


@pytest.mark.slow
def test_planting_refuses_what_is_no_cache_and_models_that_are_not_there(node, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "letters").write_text("")
    assert "letters" in script(node, "plant-cache.sh", full, "acme/m:1", code=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    script(node, "plant-cache.sh", empty, "acme/nothing:1", code=1)
    assert not (empty / "planted.json").exists()
    script(node, "copy-cache.sh", empty, node.cache, code=1)
    assert not list(Path("/run").glob("floe-plant.*"))
