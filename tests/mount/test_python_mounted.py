"""`import floe` on a node: mounting, reading beside a pack filesystem, and as a user who is not root."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.floe_node import Node
from support.ordinary_user import OrdinaryUser

SIZE = 9 << 20


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.clean_up()


@pytest.fixture
def user():
    user = OrdinaryUser()
    yield user
    user.close()


def push(node, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(random.Random(4).randbytes(SIZE))
    (tmp_path / "m" / "config.json").write_text("{}")
    save_file({"a": np.arange(300_000)}, str(tmp_path / "m" / "w.safetensors"))
    node.floe("model", "push", tmp_path / "m", "iris")


def python(node, script):
    argv = [sys.executable, "-c", script]
    done = subprocess.run(argv, env=node.environ, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_program_mounts_reads_beside_the_mount_and_unmounts(node, tmp_path):
    push(node, tmp_path)
    script = f"""
import json, floe
from floe.fuse.portable.files import FileReader
with floe.open_store() as store:
    with store.mount("iris", {str(tmp_path / "mnt")!r}) as path:
        mounted = (path / "weights").read_bytes()
        with floe.SafeTensors(path / "w.safetensors") as tensors:
            there = tensors.tensor("a")
        model = store.model("iris")
        # The pack filesystem owns the cache: it reads for this program, too.
        with model.open("weights", buffering=0) as file:
            read = file.read()
            served = isinstance(file._reader(), FileReader)
    again = store.model("iris").read("weights")  # now that nobody owns the cache
    ((name, streamed),) = store.model("iris").tensors()
print(json.dumps([mounted == read == again, len(read), served, (there == streamed).all().item(), len(there)]))
"""
    assert python(node, script) == [True, SIZE, True, True, 300_000]
    assert node.mounts() == []
    assert node.processes() == []


@pytest.mark.slow
def test_a_user_who_is_not_root_reads_with_a_cache_of_their_own(node, user, tmp_path):
    push(node, tmp_path)
    user.take_store(node.store)
    script = """
import hashlib, json, os, floe
with floe.open_store() as store:
    model = store.model("iris")
    print(json.dumps([os.getuid(), hashlib.sha256(model.read("weights")).hexdigest(), str(store.settings.cache_dir)]))
"""
    digest = hashlib.sha256((tmp_path / "m" / "weights").read_bytes()).hexdigest()
    uid, found, cache = json.loads(user.python(script))
    assert (found, cache) == (digest, str(user.cache))
    assert uid != 0
    out = user.json("model", "export", "iris", user.home / "out")
    size = SIZE + 2 + (tmp_path / "m" / "w.safetensors").stat().st_size
    assert (out["files"], out["content_bytes"]) == (3, size)
