"""A mounted model is read while the container's credentials are withdrawn and replaced: no read fails."""

from __future__ import annotations

import os
import random
import threading

import pytest
from support import seaweed
from support.credentialsources import ContainerEndpoint, Issuer
from support.floe_node import Node
from support.s3gate import S3Gate

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
SIZE = 48 << 20


@pytest.fixture
def gate():
    with S3Gate(seaweed.running(), {}) as made:
        yield made


@pytest.fixture
def node(tmp_path, gate):
    issuer = Issuer(gate)
    made = Node(tmp_path)
    made.environ = {name: value for name, value in made.environ.items() if not name.startswith("AWS_")}
    made.environ["FLOE_STORE"] = gate.address(seaweed.running().bucket(), "models")
    made.environ["FLOE_READAHEAD"] = "1MiB"  # so that there are many requests
    with ContainerEndpoint(issuer) as endpoint:
        made.environ |= endpoint.environment()
        made.issuer = issuer
        yield made
        made.clean_up()


def test_no_read_of_a_mounted_model_fails_while_credentials_rotate(node, gate, tmp_path):
    content = random.Random(7).randbytes(SIZE)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights").write_bytes(content)
    node.floe("model", "push", tmp_path / "m", "m")
    place = tmp_path / "mnt"
    place.mkdir()
    node.floe("model", "mount", "m", place)
    rotations, lock = [], threading.Lock()

    def rotate(action, _):
        if action == "s3:GetObject":
            with lock:
                rotations.append(gate.refusals["ExpiredToken"])
                if len(rotations) % 5 == 0:
                    node.issuer.rotate()

    gate.before = rotate
    with (place / "weights").open("rb") as file:
        assert file.read() == content
    gate.before = lambda *_: None
    assert len(rotations) >= 10
    assert gate.refusals["ExpiredToken"] >= 2
    node.floe("umount", place)
