"""Signatures over real stores and indexes: what was published with a key is had by who trusts it, and by nobody else."""

import contextlib

import pytest
from support import fleet, seaweed
from support.images import build_oci, files
from support.signing import signer, signing, trusting

from floe.ingest.model import push_model
from floe.ingest.oci.attach import attach
from floe.ingest.oci.image import index_image
from floe.store.catalog import Catalog
from floe.store.errors import UntrustedError
from floe.store.ids import ModelRef, chain_ids
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.stub import ANNOTATION

MODEL = ModelRef.parse("org/model:1")
KEY, NEXT, OTHER = signer(1), signer(2), signer(3)


@pytest.fixture(params=["memory, no index", "file, sqlite", "s3, redis", "s3, cluster"])
def place(request, tmp_path, monkeypatch):
    """A store, and the address of an index."""
    if request.param.startswith("s3"):
        index = request.param.partition(", ")[2]
        for name, value in fleet.environment(index).items():
            monkeypatch.setenv(name, value)
        url, address = seaweed.running().url(seaweed.running().bucket(), "signed"), fleet.index_url(index)
    elif request.param.startswith("file"):
        url, address = f"file://{tmp_path}/store", f"sqlite:{tmp_path}/index.db"
    else:
        url, address = "memory://", "none"
    with contextlib.closing(open_store(url)) as store:
        yield store, address


def test_published_had_refused_and_handed_on(place, tmp_path):
    store, address = place
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w").write_bytes(b"weights")
    image = build_oci(tmp_path / "image", [files({"a": "lower"}), files({"b": "upper"})])
    top = chain_ids(image.diff_ids)[-1]
    ours = signing(store, KEY, address)
    tree = push_model(ours, tmp_path / "m", MODEL, spool_dir=tmp_path).manifest.tree.digest
    index_image(ours, image.source, spool_dir=tmp_path)
    placed = attach(ours, image.source, f"oci:{tmp_path}/out:1", [(MODEL, "/m")]).stubs[0].annotations[ANNOTATION]

    def had(*keys):
        with contextlib.closing(open_index(address)) as index:
            node = trusting(store, *keys, index=index)
            node.check_tree(placed)
            node.check_tree(tree)
            return node.resolve_model(MODEL)[1].tree.digest == tree and node.resolve_chain(top) is not None

    assert had(KEY)
    assert had(OTHER, KEY)
    with contextlib.closing(open_index(address)) as index:
        node = trusting(store, OTHER, index=index)
        for ask in (
            lambda: node.resolve_model(MODEL),
            lambda: node.resolve_chain(top),
            lambda: node.check_tree(tree),
            lambda: node.check_tree(placed),
        ):
            with pytest.raises(UntrustedError, match="not trusted here"):
                ask()
    # To the next key: once it has signed all, who trusts it alone has all, and so has who trusts the first.
    theirs = signing(store, NEXT, address)
    plain = Catalog(store, open_index("none"))
    theirs.move_model(MODEL, *[plain.model_ref(MODEL).manifest] * 2)
    for diff in image.diff_ids:
        theirs.set_layer(diff, plain.layer_ref(diff).manifest)
    for each in (tree, placed):
        theirs.sign_tree(each)
    assert had(NEXT)
    assert had(KEY)
    for catalog in (ours, theirs):
        catalog.index.close()
