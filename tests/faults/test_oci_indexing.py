"""Indexing images: what is stored, what is reused, and that nothing is published by half."""

import contextlib
import gzip
import hashlib
import json
import os
import tarfile
from pathlib import Path

import pytest
from support import images
from support.registry import running_registry
from support.stores import RecordingStore

from floe.ingest.model import push_model
from floe.ingest.oci import image as indexing
from floe.ingest.oci.image import index_image
from floe.ingest.oci.media import OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from floe.ingest.oci.treeload import load_tree
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError, FloeError, NotFoundError, UnsupportedError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.nodes import find
from floe.store.objects import open_store
from floe.store.packindex import PackIndex
from floe.store.stub import ANNOTATION


@pytest.fixture
def catalog():
    with contextlib.closing(Catalog(open_store("memory://"), open_index(None))) as made:
        yield made


@pytest.fixture
def index(catalog, tmp_path):
    def run(ref, **options):
        return index_image(catalog, str(ref), spool_dir=tmp_path, **options)

    return run


def refs(catalog):
    return sorted(info.key for info in catalog.store.list("refs"))


def three(tmp_path, compression="gzip"):
    layers = [
        images.busybox(),
        images.files({"etc/x": b"x" * 5000, "a": os.urandom(300_000)}),
        images.files({"b": b"b"}),
    ]
    return images.build_oci(tmp_path / "image", layers, compression=compression)


@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_every_compression(index, catalog, tmp_path, compression):
    built = three(tmp_path, compression)
    result = index(built.source)
    assert [layer.diff_id for layer in result.layers] == list(built.diff_ids)
    assert result.new_layers == 3
    assert result.record.manifest_digest == built.manifest_digest
    assert result.record.size == sum(layer["size"] for layer in built.layers)
    for layer in result.layers:
        assert catalog.resolve_chain(layer.chain_id)[:2] == (layer.diff_id, layer.manifest)
    assert catalog.image(built.manifest_digest) == result.record


def test_an_archive_is_read_in_place(index, tmp_path):
    built = three(tmp_path)
    archive = images.oci_archive(built.directory, tmp_path / "image.tar")
    result = index(f"oci-archive:{archive}:latest")
    assert result.record.manifest_digest == built.manifest_digest
    with archive.open("r+b") as file:
        file.truncate(archive.stat().st_size // 2)
    with pytest.raises((DamagedError, NotFoundError)):
        index(f"oci-archive:{archive}:latest")


def test_what_is_known_is_not_asked_for_again(index, catalog, tmp_path):
    built = three(tmp_path)
    with running_registry(tmp_path / "registry") as registry:
        name = registry.push(built.source, "app:1")
        first = index(name, plain_http=True)
        asked = registry.blob_requests()
        assert set(asked) >= {layer["digest"] for layer in built.layers}
        again = index(name, plain_http=True)
        assert registry.blob_requests()[len(asked) :] == [built.config_digest]
    assert (again.new_layers, again.new_packs, again.new_bytes) == (0, 0, 0)
    assert again.record.chain_ids == first.record.chain_ids
    assert catalog.find_image(name).manifest_digest == built.manifest_digest


def test_a_tag_that_is_rolled_back_stands_for_the_first_image_again(index, catalog, tmp_path):
    for content in ("a", "b", "a"):
        built = images.build_oci(tmp_path / "image", [images.files({"f": content})], tag="t")
        name = index(built.source).record.names[0]
        assert catalog.find_image(name).manifest_digest == built.manifest_digest
    assert sorted(len(record.names) for record in catalog.images()) == [0, 1]


def test_a_damaged_store_is_repaired(index, catalog, tmp_path):
    built = three(tmp_path)
    index(built.source)
    pack = next(iter(catalog.store.list("packs")))
    catalog.store.delete(pack.key)
    assert index(built.source).new_packs == 1
    assert catalog.store.head(pack.key).size == pack.size


@pytest.mark.parametrize("folder", ["trees", "indexes", "manifests"])
def test_a_damaged_object_of_a_layer_is_replaced(index, catalog, tmp_path, folder):
    built = three(tmp_path)
    first = index(built.source)
    key = next(info.key for info in catalog.store.list(folder) if info.size > 64)
    whole = bytes(catalog.store.get(key))
    catalog.store.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
    with contextlib.closing(Catalog(catalog.store, open_index(None))) as fresh:  # that remembers nothing
        again = index_image(fresh, built.source, spool_dir=tmp_path)
        for layer in again.layers:
            _, _, manifest = fresh.resolve_chain(layer.chain_id)
            load_tree(fresh, manifest)
            for pack in manifest.packs:
                PackIndex.decode(catalog.store.get(layout.pack_index_key(pack.id)), pack.id)
    assert again.new_layers == 1
    assert [layer.diff_id for layer in again.layers] == [layer.diff_id for layer in first.layers]


def test_files_are_shared_between_layers_and_models(index, catalog, tmp_path):
    weights = os.urandom(9_000_000)
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(weights)
    push_model(catalog, model, ModelRef.parse("m"), spool_dir=tmp_path)
    built = images.build_oci(
        tmp_path / "image", [images.files({"w": weights, "x": b"x"}), images.files({"again": weights})]
    )
    assert index(built.source).new_bytes < 10_000


def test_refs_come_last(tmp_path):
    store = RecordingStore(open_store("memory://"))
    with contextlib.closing(Catalog(store, open_index(None))) as catalog:
        index_image(catalog, three(tmp_path).source, spool_dir=tmp_path)
    written = [request.key for request in store.requests if request.op.startswith("put")]
    kinds = [
        key.split("/")[1] if key.startswith(("refs/", "profiles/")) else "content"
        for key in written
        if key != "floe.json"
    ]
    first = kinds.index("layers")
    assert set(kinds[:first]) == {"content"}
    assert kinds[first:] == ["layers"] * 3 + ["chains"] * 3 + ["images"] + ["trees"] * 3


def blob(directory, data):
    digest = hashlib.sha256(data).hexdigest()
    (directory / "blobs/sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def craft(directory, layers, kinds=None, diff_ids=None):
    """An OCI layout of exactly these layer blobs, as wrong as they may be."""
    (directory / "blobs/sha256").mkdir(parents=True)
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    diff_ids = diff_ids or ["sha256:" + hashlib.sha256(_unzipped(data)).hexdigest() for data in layers]
    config = {"os": "linux", "architecture": images.ARCHITECTURE, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    kinds = kinds or ["application/vnd.oci.image.layer.v1.tar+gzip"] * len(layers)
    manifest = {"schemaVersion": 2, "config": {"mediaType": OCI_CONFIG, **blob(directory, json.dumps(config).encode())},
                "layers": [{"mediaType": kind, **blob(directory, data)} for kind, data in zip(kinds, layers, strict=True)]}  # fmt: skip
    entry = {"mediaType": OCI_MANIFEST, **blob(directory, json.dumps(manifest).encode())}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return f"oci:{directory}"


def _unzipped(data):
    try:
        return gzip.decompress(data)
    except (OSError, EOFError):
        return data


def named(name):
    def fill(tar):
        images.add(tar, name, b"x")

    return gzip.compress(images.make_tar(fill))


GOOD = gzip.compress(images.make_tar(images.files({"good": os.urandom(100_000)})))
KIND = "application/vnd.oci.image.layer.v1.tar"


@pytest.mark.parametrize(
    ("layers", "options", "error", "message"),
    [
        ([GOOD, GOOD[:-20_000]], {}, DamagedError, "layer 2 of .* is truncated gzip"),
        ([GOOD, named("../x")], {}, DamagedError, r"entry '\.\./x' of layer 2 of .* has '\.\.'"),
        ([GOOD, named("/x")], {}, DamagedError, "entry '/x' of layer 2 of .* absolute name"),
        ([GOOD, GOOD], {"diff_ids": ["sha256:" + "a" * 64] * 2}, DamagedError, "does not match its diff id"),
        ([GOOD, GOOD], {"diff_ids": ["sha256:" + "a" * 64]}, DamagedError, "2 layers, but its config names 1"),
        ([GOOD, GOOD], {"kinds": [KIND, KIND + "+gzip+encrypted"]}, UnsupportedError, "layer 2 of .* is encrypted"),
        ([GOOD, GOOD], {"kinds": [KIND, "text/x"]}, UnsupportedError, "unknown media type 'text/x'"),
        ([GOOD, b"no tar at all" * 100], {}, DamagedError, "layer 2 of"),
    ],
)
def test_bad_images_leave_nothing_behind(index, catalog, tmp_path, layers, options, error, message):
    with pytest.raises(error, match=message):
        index(craft(tmp_path / "image", layers, **options))
    assert refs(catalog) == []


def test_a_blob_that_does_not_match_its_digest(index, catalog, tmp_path):
    built = three(tmp_path)
    path = built.directory / "blobs/sha256" / built.layers[1]["digest"].removeprefix("sha256:")
    data = bytearray(path.read_bytes())
    data[5] ^= 1  # gzip's time: the content stays the same
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="does not match its digest"):
        index(built.source)
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedError):
        index(built.source)
    path.unlink()
    with pytest.raises(NotFoundError, match="does not hold blob"):
        index(built.source)
    assert refs(catalog) == []


@pytest.mark.parametrize("name", ["oci:/nowhere", "oci:{built}:none", "oci-archive:/nowhere.tar", "oci:/etc"])
def test_images_that_are_not_there(index, tmp_path, name):
    built = three(tmp_path)
    with pytest.raises(NotFoundError):
        index(name.format(built=built.directory))
    with pytest.raises(BadInputError, match="is no file"):
        index(f"oci-archive:{built.directory}")


def test_a_failing_store_leaves_nothing_behind(tmp_path, monkeypatch):
    with contextlib.closing(Catalog(open_store("memory://"), open_index(None))) as catalog:
        real = catalog.put_manifest
        calls = []

        def failing(manifest):
            calls.append(manifest)
            if len(calls) == 2:
                raise FloeError("no more")
            return real(manifest)

        monkeypatch.setattr(catalog, "put_manifest", failing)
        with pytest.raises(FloeError, match="no more"):
            index_image(catalog, three(tmp_path).source, spool_dir=tmp_path)
        assert refs(catalog) == []
        assert index_image(catalog, three(tmp_path).source, spool_dir=tmp_path).record


def test_platforms(index, tmp_path):
    directory = tmp_path / "multi"
    wanted = {}
    entries = []
    for arch in ("arm64", "s390x"):
        built = images.build_oci(directory, [images.files({"arch": arch})], tag=arch, architecture=arch)
        wanted[arch] = built.manifest_digest
        size = (directory / "blobs/sha256" / built.manifest_digest[7:]).stat().st_size
        entries.append({"mediaType": OCI_MANIFEST, "digest": built.manifest_digest, "size": size, "platform": {"os": "linux", "architecture": arch}})  # fmt: skip
    inner = {"mediaType": OCI_INDEX, **blob(directory, json.dumps({"schemaVersion": 2, "manifests": entries}).encode())}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [inner]}))
    for arch, digest in wanted.items():
        result = index(f"oci:{directory}", platform=f"linux/{arch}")
        assert (result.record.manifest_digest, result.record.platform) == (digest, f"linux/{arch}")
    with pytest.raises(NotFoundError, match=r"no image for linux/riscv64; it has: linux/arm64, linux/s390x"):
        index(f"oci:{directory}", platform="linux/riscv64")


def implicit(tar):
    images.add(tar, "tmp/x", b"x")


def with_tmp(mode):
    def fill(tar):
        images.add(tar, "tmp", mode=mode, kind=tarfile.DIRTYPE)

    return fill


def test_directories_without_an_entry_over_other_layers(index, catalog, tmp_path):
    """One layer over two bases that give its /tmp different modes cannot be one tree."""
    one = images.build_oci(tmp_path / "one", [with_tmp(0o1777), implicit])
    other = images.build_oci(tmp_path / "other", [with_tmp(0o700), implicit])
    same = images.build_oci(tmp_path / "same", [images.files({"f": "f"}), with_tmp(0o1777), implicit])
    first = index(one.source)
    tree = load_tree(catalog, catalog.get_manifest(first.layers[1].manifest))
    assert find(tree, b"tmp").mode & 0o7777 == 0o1777
    second = index(other.source)
    assert second.layers[1].manifest is None
    assert "unpacked the ordinary way" in second.warnings[0]
    assert catalog.resolve_chain(second.layers[1].chain_id) is None
    assert catalog.resolve_chain(second.layers[0].chain_id) is not None
    third = index(same.source)
    assert (third.layers[2].manifest, third.warnings) == (first.layers[1].manifest, ())
    assert catalog.resolve_chain(first.layers[1].chain_id)[1] == first.layers[1].manifest


def test_stubs_are_passed_over(index, catalog, tmp_path):
    stub = images.files({".floe/model.json": "{}", "m/README": "r"})
    for annotations in ({1: {ANNOTATION: "ab" * 32}}, None):
        built = images.build_oci(
            tmp_path / f"image-{annotations is None}",
            [images.busybox(), stub, images.files({"z": "z"})],
            annotations=annotations,
        )
        result = index(built.source)
        assert [layer.stub for layer in result.layers] == [False, True, False]
        assert catalog.layer(built.diff_ids[1]) is None
        assert catalog.chain(result.record.chain_ids[1]) is None
        assert catalog.chain(result.record.chain_ids[2]).parent == result.record.chain_ids[1]


def test_progress_counts_blobs(index, tmp_path):
    class Progress:
        whole = seen = 0

        def total(self, nbytes):
            self.whole = nbytes

        def advance(self, nbytes):
            self.seen += nbytes

    progress = Progress()
    built = three(tmp_path)
    index(built.source, progress=progress)
    assert progress.whole == progress.seen == sum(layer["size"] for layer in built.layers)


@pytest.mark.slow
def test_a_hundred_thousand_files(index, catalog, tmp_path):
    def many(tar):
        for folder in range(200):
            images.add(tar, f"d{folder}", mode=0o755, kind=tarfile.DIRTYPE)
            for number in range(500):
                images.add(tar, f"d{folder}/f{number}", b"%d.%d" % (folder, number))

    built = images.build_oci(tmp_path / "image", [many], compression="zstd")
    before = _resident()
    result = index(built.source)
    assert catalog.get_manifest(result.layers[0].manifest).sizes.files == 100_000
    assert _resident() - before < 400 << 20
    assert indexing.PARENT_LABEL not in catalog.get_manifest(result.layers[0].manifest).labels


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
