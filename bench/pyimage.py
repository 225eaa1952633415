"""A Python image as people have them: an interpreter and a machine learning stack of over 1 GiB, whose command imports it."""

import json
from pathlib import Path

from bench import servers, wheels  # noqa: F401 - makes the tests' support importable

# isort: split
from support.images import BuiltImage, build_oci
from support.pythonimage import ENV, PYTHON, app_layers

PACKAGES = ("tensorflow-cpu",)  # torch's wheels for this platform bring several GB of GPU libraries
PROGRAM = """
import tensorflow as tf
print("first output: tensorflow", tf.__version__, float(tf.reduce_sum(tf.ones((64, 64)))), flush=True)
"""


def build(folder: Path, stack: Path) -> BuiltImage:
    """The image as an OCI layout in `folder`, made there if it is not there; packages come from `stack`, installed if missing."""
    if not (folder / "index.json").exists():
        wheels.install(stack, *PACKAGES)
        layers = app_layers(PROGRAM, site=stack, bytecode=True)
        build_oci(folder, layers, tag="1", command=(PYTHON, "/app/main.py"), env=(*ENV, "TF_CPP_MIN_LOG_LEVEL=2"))
    (entry,) = json.loads((folder / "index.json").read_text())["manifests"]
    manifest = _blob(folder, entry["digest"])
    config = _blob(folder, manifest["config"]["digest"])
    diff_ids = tuple(config["rootfs"]["diff_ids"])
    return BuiltImage(folder, "1", entry["digest"], manifest["config"]["digest"], diff_ids, tuple(manifest["layers"]))


def _blob(folder: Path, digest: str) -> dict:
    return dict(json.loads((folder / "blobs" / "sha256" / digest.partition(":")[2]).read_bytes()))
