"""Bad images through the command: like test_bad_input.py."""

import contextlib
import gzip
import hashlib
import json
import os

import pytest
from support import images
from support.blobhost import BlobHost

from floe.ingest.oci.media import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST


def craft(directory, layers, kinds=None, diff_ids=None):
    """An OCI layout of exactly these layer blobs, as wrong as they may be."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(data, kind):
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    kinds = kinds or [f"{OCI_LAYER}+gzip"] * len(layers)
    diff_ids = diff_ids or [f"sha256:{hashlib.sha256(unzipped(data)).hexdigest()}" for data in layers]
    config = {"os": "linux", "architecture": images.ARCHITECTURE, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "config": blob(json.dumps(config).encode(), OCI_CONFIG),
        "layers": [blob(data, kind) for data, kind in zip(layers, kinds, strict=True)],
    }
    index = {"schemaVersion": 2, "manifests": [blob(json.dumps(manifest).encode(), OCI_MANIFEST)]}
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (directory / "index.json").write_text(json.dumps(index))
    return f"oci:{directory}"


def unzipped(data):
    try:
        return gzip.decompress(data)
    except (OSError, EOFError):
        return data


def with_entry(name):
    return gzip.compress(images.make_tar(lambda tar: images.add(tar, name, b"x")))


GOOD = gzip.compress(images.make_tar(images.files({"good": os.urandom(100_000)})))


@pytest.mark.parametrize(
    ("layers", "options", "names"),
    [
        ([GOOD, GOOD], {"kinds": [f"{OCI_LAYER}+gzip", "text/x"]}, ["layer 2", "unknown media type 'text/x'"]),
        ([GOOD, GOOD], {"kinds": [f"{OCI_LAYER}+gzip", f"{OCI_LAYER}+gzip+encrypted"]}, ["layer 2", "is encrypted"]),
        ([GOOD, GOOD[:-20_000]], {}, ["layer 2", "truncated gzip"]),
        ([GOOD, GOOD], {"diff_ids": [f"sha256:{'a' * 64}"] * 2}, ["does not match its diff id", "a" * 64]),
        ([GOOD, with_entry("../out")], {}, ["layer 2", "entry '../out'", "'..'"]),
        ([GOOD, with_entry("a/../../out")], {}, ["layer 2", "entry 'a/../../out'", "'..'"]),
        ([GOOD, with_entry("/etc/out")], {}, ["layer 2", "entry '/etc/out'", "absolute"]),
        ([GOOD, b"no tar at all " * 100], {}, ["layer 2", "not a valid tar"]),
    ],
    ids=["media-type", "encrypted", "truncated", "diff-id", "dotdot", "dotdot-inside", "absolute", "no-tar"],
)
def test_a_bad_layer(world, tmp_path, layers, options, names):
    source = craft(tmp_path / "image", layers, **options)
    hint = "not encrypted" if "kinds" in options and "encrypted" in options["kinds"][1] else "build"
    world.fails("image", "index", source, code=1, names=[source, *names], hint=hint)
    assert source not in [name for image in world.json("image", "ls") for name in image["names"]]


def test_a_blob_that_does_not_match_its_digest(world, tmp_path):
    source = craft(tmp_path / "image", [GOOD])
    blob = tmp_path / "image/blobs/sha256" / hashlib.sha256(GOOD).hexdigest()
    blob.write_bytes(GOOD[:5] + bytes([GOOD[5] ^ 1]) + GOOD[6:])  # in gzip's time: the content is the same
    names = [source, blob.name, "does not match its digest"]
    world.fails("image", "index", source, code=1, names=names, hint="again")
    blob.unlink()
    world.fails("image", "index", source, code=1, names=[tmp_path / "image", blob.name], hint="")


@pytest.mark.one_store
def test_no_such_image(world, tmp_path):
    built = images.build_oci(tmp_path / "image", [images.files({"x": "y"})], tag="1")
    with contextlib.closing(BlobHost()) as registry:
        there = registry.add(built, "app")
        missing = there.replace("app:1", "app:2")
        world.fails("image", "index", "--plain-http", missing, code=1, names=[missing], hint="name")
    world.fails("image", "index", f"oci:{tmp_path}/none", code=1, names=[tmp_path / "none"], hint="check the path")
    world.fails("image", "index", f"oci:{tmp_path}/image:2", code=1, names=[tmp_path / "image", "2"], hint="1")
    world.fails("image", "show", there, code=1, names=[there], hint="floe image ls")
    world.fails("image", "rm", there, code=1, names=[there], hint="floe image ls")


@pytest.mark.one_store
def test_a_registry_that_is_not_there(world):
    world.fails(
        *("image", "index", "--plain-http", "127.0.0.1:1/app:1"), code=1, names=["127.0.0.1:1/app:1"], hint="address"
    )
