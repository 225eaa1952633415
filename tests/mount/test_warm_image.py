"""`floe warm` of an indexed image with an attached model: its layers and the model come onto the node, frame by frame, or what starts read."""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import closing

import pytest
from support.floe_daemons import Starting
from support.images import build_oci, files

from floe.cli.names import parse_model
from floe.store.cache.bitmap import Bitmap
from floe.store.catalog import Catalog
from floe.store.index import open_index
from floe.store.objects import open_store

MIB = 1 << 20

pytestmark = pytest.mark.timeout(300)


class Warmed(Starting):
    """A machine of its own whose image `name` has two layers and a model."""

    def __init__(self, home):
        super().__init__(home, {"FLOE_NODE_NAME": "alone"})
        content = random.Random(3)
        layers = [files({f"etc/{name}": content.randbytes(MIB)}) for name in ("one", "two")]
        image = build_oci(home / "oci", layers, tag="v1")
        weights = home / "weights"
        weights.mkdir()
        (weights / "w.bin").write_bytes(content.randbytes(2 * MIB))
        self.floe("model", "push", weights, "m:1")
        self.mountpoint = home / "mnt"
        self.name = f"oci:{home}/out:v1"
        self.floe("image", "attach", f"oci:{home}/oci:v1", self.name, "--model", "m:1=/opt/model")
        self.floe("image", "index", self.name)
        self.diff_ids = image.diff_ids
        self.worker = None

    def begin(self):
        self.worker = self.start("packfs")

    def record_a_start(self):
        """Somebody mounts the model and reads its first MiB; afterwards nothing of it is here, as on another node."""
        self.floe("model", "mount", "m:1", self.mountpoint)
        fd = os.open(self.mountpoint / "w.bin", os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(fd, MIB, 0)
        finally:
            os.close(fd)
        self.floe("umount", self.mountpoint)
        shutil.rmtree(self.cache)

    def warm(self, *flags, name=None):
        """Exit status of `floe warm`, and what it says of this node."""
        command = [sys.executable, "-m", "floe", "warm", name or self.name, *flags, "--json"]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False, timeout=120)
        assert done.stdout, done.stderr
        said = json.loads(done.stdout)
        (progress,) = said["nodes"]
        assert said["complete"] == (progress["state"] == "done")
        return done.returncode, progress["state"], progress["verified_bytes"], progress["total_bytes"]

    def bitmaps(self):
        """By pack, what the node cache's disk says of its frames."""
        found = {path.parent.name: Bitmap.decode(path.read_bytes()) for path in self.cache.glob("packs/*/bitmap")}
        assert None not in found.values()
        return found

    def packs(self):
        """Of each layer, and then of the model, the packs as the store has them."""
        with closing(open_store(f"file://{self.store}")) as store:
            catalog = Catalog(store, open_index(None))
            manifests = [catalog.layer(diff_id)[1] for diff_id in self.diff_ids]
            manifests.append(catalog.resolve_model(parse_model("m:1")[0])[1])
        return [[pack.id for pack in manifest.packs] for manifest in manifests]

    def close(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait(20)
        self.clean_up()


@pytest.fixture
def node(tmp_path):
    made = Warmed(tmp_path / "h")
    yield made
    made.close()


def test_an_image_is_warmed_with_all_its_layers_and_its_model(node):
    node.begin()
    said = node.floe("warm", node.name, "--profile-only", code=1).stderr
    assert "nobody recorded a start" in said
    assert node.warm("--check")[:3] == (1, "incomplete", 0)
    assert node.bitmaps() == {}
    assert node.warm()[:2] == (0, "done")
    packs, bitmaps = node.packs(), node.bitmaps()
    assert len(packs) == 3
    assert all(packs)
    assert {pack: bitmaps[pack].is_full() for of in packs for pack in of} == {pack: True for of in packs for pack in of}
    assert node.warm("--check", "--deep")[:2] == (0, "done")
    # What is damaged on the disk is found by those who look.
    data = node.cache / "packs" / packs[-1][0] / "data"
    with data.open("r+b") as file:
        file.write(bytes(4096))
    assert node.warm("--check", "--deep")[0] == 1


def test_with_profile_only_what_starts_read_comes_and_no_more(node):
    node.record_a_start()
    node.begin()
    assert node.warm("--profile-only", "--check", name="m:1") == (1, "incomplete", 0, 0)  # nor how much it would be
    assert node.warm("--profile-only", name="m:1") == (0, "done", MIB, MIB)
    (model,) = node.packs()[-1]
    assert {pack: len(bits.present()) for pack, bits in node.bitmaps().items()} == {model: 1}
    assert node.warm("--check", name="m:1") == (1, "incomplete", MIB, 2 * MIB)
    # The image places the same model: what starts of it read anywhere counts. Of its layers nobody started any.
    assert node.warm("--profile-only") == (0, "done", MIB, MIB)
    assert node.bitmaps().keys() == {model}
