"""Bentos as `floe bento` finds them, pushes their models and makes images that carry none of their bytes."""

import contextlib
import io
import json
import os
import stat
import subprocess
import tarfile
import zipfile

import pytest
from support import images
from support.bento import COMMIT, BentoStore, hub_entry, hub_model, with_models
from support.registry import Front, running_registry

from floe.ingest.bento.archive import unpack
from floe.ingest.bento.files import OWNER
from floe.ingest.bento.find import find_models, latest_files, open_bento
from floe.ingest.bento.image import prepare_image
from floe.ingest.bento.push import push_models
from floe.ingest.model import push_model
from floe.ingest.oci import source as sources
from floe.ingest.oci.carried import carried_models
from floe.ingest.oci.opening import open_source
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.erofs_reader import read_image
from floe.store.errors import (
    AccessDeniedError,
    BadInputError,
    DamagedError,
    NotFoundError,
    SourceChangedError,
    UnsupportedError,
)
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.nodes import find, walk
from floe.store.objects import open_store
from floe.store.stub import ANNOTATION
from floe.store.treeobject import decode_tree

ROOT = "/home/bentoml/bento"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def catalog():
    with contextlib.closing(Catalog(open_store("memory://"), open_index(None))) as made:
        yield made


@pytest.fixture
def store(tmp_path):
    return BentoStore(tmp_path / "home")


@pytest.fixture
def work(tmp_path):
    """What `floe bento push` and `image` do, on this machine's folders."""

    class Work:
        hub = tmp_path / "hub"
        spool = tmp_path / "spool"
        spool.mkdir()

        def push(self, catalog, text, home, **options):
            with open_bento(str(text), home, self.spool) as bento:
                return push_models(catalog, bento, find_models(bento, self.hub), spool_dir=self.spool, **options)

        def image(self, catalog, text, home, base, target, *, has_files=False, **options):
            folder = tmp_path / f"layer-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            with open_bento(str(text), home, self.spool) as bento:
                models = find_models(bento, self.hub)
                with prepare_image(catalog, bento, models, base, target, has_files=has_files, **options) as prepared:
                    return prepared.write(push_models(catalog, bento, models, spool_dir=self.spool), folder)

    return Work()


def base_image(folder, *layers, **options):
    fill = [images.files({"bin/sh": "shell"}), *layers]
    return images.build_oci(folder, fill, **options).source


def image_of(name):
    with contextlib.closing(open_source(name)) as source:
        image = sources.resolve(source)
        return image, {found.marker.path: found.marker for found in carried_models(image)}


def tree_at(catalog, digest, path):
    return find(read_image(decode_tree(catalog.store.get(layout.tree_key(digest)), digest)), path.encode())


def listing(tree):
    """Path -> what a container sees of it."""
    return {path: (node.mode, node.link, node.size if node.is_file else 0) for path, node in walk(tree)}


def unpacked(layout_folder, tag, folder):
    command = ["umoci", "unpack", "--image", f"{layout_folder}:{tag}", folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "rootfs"


# Found


@pytest.mark.parametrize("text", ["front", "front:latest", "front:v1", "FRONT:V1", "front:v"])
def test_a_bento_of_the_store(store, work, text):
    path = store.bento(2)
    with open_bento(text, store.home, work.spool) as bento:
        assert (bento.path, str(bento)) == (path, "front:v1")
        models = find_models(bento, work.hub)
        assert [model.place for model in models] == ["models/own/b2", "models/shared/1"]
        assert [model.path for model in models] == [store.home / "models/own/b2", store.home / "models/shared/1"]


def test_latest_without_its_file_is_the_one_that_was_built_last(store, work):
    store.bento(2, tag="front:old", yaml="name: front\nversion: old\ncreation_time: '2020-01-01T00:00:00+00:00'\n")
    newest = store.bento(2)
    for content in (None, "gone", "../../../etc", ""):
        latest = store.home / "bentos/front/latest"
        latest.unlink(missing_ok=True)
        if content is not None:
            latest.write_text(content)
        with open_bento("front", store.home, work.spool) as bento:
            assert bento.path == newest


@pytest.mark.parametrize("spec", [1, 2])
def test_an_export_brings_its_models(store, work, catalog, tmp_path, spec):
    bento = store.bento(spec)
    models = [":".join(path.parts[-2:]) for path in (store.home / "models").glob("*/*") if path.is_dir()]
    archive = store.export(bento, tmp_path / "exported.bento", models)
    pushed = work.push(catalog, archive, tmp_path / "nowhere")
    assert sorted(str(model.ref) for model in pushed) == sorted(models)
    assert list(work.spool.iterdir()) == []
    # From the store or from an export, on whatever machine: the same tree.
    again = work.push(catalog, bento, store.home, read_again=True)
    assert [(model.digest, model.new_bytes, model.moved) for model in again] == [
        (model.digest, 0, False) for model in pushed
    ]


@pytest.mark.parametrize("kind", ["tar", "gz", "bz2", "zip", "folder"])
def test_other_formats_of_an_export(store, work, tmp_path, kind):
    bento = store.bento(1)
    whole = tmp_path / "whole"
    archive = store.export(bento, tmp_path / "x.bento", ["oldie:7"])
    whole.mkdir()
    subprocess.run(["tar", "-xJf", archive, "-C", whole], check=True)
    path = tmp_path / f"exported.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", strict_timestamps=False) as made:
            for file in sorted(whole.rglob("*")):
                made.write(file, file.relative_to(whole))
    elif kind == "folder":
        whole.rename(path)
    else:
        with tarfile.open(path, "w:" if kind == "tar" else f"w:{kind}") as made:
            made.add(whole, ".")
    with open_bento(str(path), tmp_path / "nowhere", work.spool) as opened:
        (model,) = find_models(opened, work.hub)
        assert (model.path / "weights.bin").read_bytes() == (store.home / "models/oldie/7/weights.bin").read_bytes()
        if kind in ("tar", "gz", "bz2"):
            found = (model.path / "weights.bin").stat()
            assert int(found.st_mtime) == int((store.home / "models/oldie/7/weights.bin").stat().st_mtime)


def tar_of(path, *members):
    with tarfile.open(path, "w:xz") as tar:
        for member in members:
            info = tarfile.TarInfo(member[0])
            info.type, info.linkname = member[1], member[2]
            info.size = 1 if member[1] == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"x"))


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ([("../evil", tarfile.REGTYPE, "")], DamagedError, "leads outside"),
        ([("a/../../evil", tarfile.REGTYPE, "")], DamagedError, "leads outside"),
        ([("/evil", tarfile.REGTYPE, "")], DamagedError, "absolute name"),
        ([("link", tarfile.SYMTYPE, "../..")], DamagedError, "leads outside"),
        ([("link", tarfile.SYMTYPE, "/etc")], DamagedError, "no Bento|outside|absolute"),
        ([("link", tarfile.SYMTYPE, "dir"), ("link/evil", tarfile.REGTYPE, "")], DamagedError, "holds one name twice"),
        ([("a", tarfile.REGTYPE, ""), ("a", tarfile.REGTYPE, "")], DamagedError, "holds one name twice"),
        ([("a", tarfile.REGTYPE, ""), ("b", tarfile.LNKTYPE, "a")], UnsupportedError, "no file, directory or symlink"),
        ([("null", tarfile.CHRTYPE, "")], UnsupportedError, "no file, directory or symlink"),
        ([("a", tarfile.REGTYPE, "")], NotFoundError, "is no Bento: it has no bento.yaml"),
    ],
)
def test_archives_that_are_refused(store, work, tmp_path, members, error, message):
    path = tmp_path / "x.bento"
    tar_of(path, *members)
    with pytest.raises(error, match=message), open_bento(str(path), store.home, work.spool):
        pass
    assert list(work.spool.iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_links_through_links_lead_nowhere(store, work, tmp_path):
    """Each stays inside by its words; together they would not."""
    secret = tmp_path / "secret"
    secret.write_text("seen")
    up = [("a/b/c/d", tarfile.DIRTYPE, ""), ("a/b/c/d/up", tarfile.SYMTYPE, "../../..")]
    path = tmp_path / "x.bento"
    for name, link in (("out/evil", "a/b/c/d/up/../../.."), ("leak", "a/b/c/d/up/../../../../secret")):
        tar_of(path, *up, ("out", tarfile.SYMTYPE, "a/b/c/d/up/../../.."), (name, tarfile.SYMTYPE, link))
        with (
            pytest.raises(DamagedError, match=r"below a symlink|leads outside"),
            open_bento(str(path), store.home, work.spool),
        ):
            pass
        assert list(work.spool.iterdir()) == []
        assert not any(path.name == "evil" for path in tmp_path.rglob("evil"))


def test_a_tar_is_no_zip_for_ending_in_one(store, work, tmp_path):
    inner = tmp_path / "weights.npz"
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("arr.npy", b"0" * 100)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(inner, "weights.npz")
    with pytest.raises(NotFoundError) as caught, open_bento(str(path), store.home, work.spool):
        pass
    assert "no bento.yaml" in str(caught.value)


@pytest.mark.parametrize("mode", ["", "gz", "bz2", "xz"])
def test_a_damaged_bit_or_a_missing_end_is_seen(tmp_path, mode):
    path = tmp_path / "x.tar"
    with tarfile.open(path, f"w:{mode}") as tar:
        for name in ("bento.yaml", "src/a.py"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(os.urandom(700)))
    data = path.read_bytes()
    if mode:
        damaged = [data[: len(data) // 2], data[:-4], data[:-4] + bytes(4)]  # what the checksum is, or the index
    else:
        second = 512 + 1024
        damaged = [data[:second], data[: second + 100], data[:second] + b"\x01" + data[second + 1 :]]
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(DamagedError, match="cannot be unpacked"):
            unpack(path, folder)


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    path.write_bytes(info.tobuf() + bytes(4096))
    (tmp_path / "out").mkdir()
    with pytest.raises(DamagedError, match="too many"):
        unpack(path, tmp_path / "out")


def test_an_archive_that_is_cut_short(store, work, tmp_path):
    archive = store.export(store.bento(1), tmp_path / "x.bento", ["oldie:7"])
    data = archive.read_bytes()
    for content in (data[:-100], data[: len(data) // 2], b"no archive", b""):
        archive.write_bytes(content)
        with pytest.raises((DamagedError, NotFoundError)) as caught, open_bento(str(archive), store.home, work.spool):
            pass
        assert str(archive) in str(caught.value)
        assert caught.value.hint
    assert list(work.spool.iterdir()) == []


def no_store(store):
    store.home = store.home / "elsewhere"


def no_version(store):
    (store.home / "bentos/front/v1").rename(store.home / "bentos/front/v2")


def two_versions(store):
    store.bento(2, tag="front:v1a")
    (store.home / "bentos/front/v1").rename(store.home / "bentos/front/v1b")


def broken_yaml(store):
    (store.home / "bentos/front/v1/bento.yaml").write_text("name: [")


def a_model_that_is_gone(store):
    (store.home / "models/shared/1").rename(store.home / "models/shared/2")


def a_model_without_its_yaml(store):
    (store.home / "models/shared/1/model.yaml").unlink()


def a_model_with_another_s_yaml(store):
    path = store.home / "models/shared/1/model.yaml"
    path.write_text(path.read_text().replace("shared", "other"))


def a_model_with_broken_yaml(store):
    (store.home / "models/shared/1/model.yaml").write_text("- ")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (no_store, NotFoundError, "there is no Bento front in"),
        (no_version, NotFoundError, "there is no Bento front:v1 in"),
        (two_versions, BadInputError, "front:v1 may be one of several Bentos"),
        (broken_yaml, DamagedError, "bento.yaml is not YAML"),
        (a_model_that_is_gone, NotFoundError, "Bento front:v1 needs model shared:1, which is not in"),
        (a_model_without_its_yaml, DamagedError, "shared/1 is no model of BentoML: it has no model.yaml"),
        (a_model_with_another_s_yaml, DamagedError, "is that of other:1, not of shared:1"),
        (a_model_with_broken_yaml, DamagedError, "model.yaml is no mapping"),
    ],
)
def test_what_cannot_be_pushed_stores_nothing(store, work, catalog, spoil, error, message):
    store.bento(2)
    spoil(store)
    with pytest.raises(error, match=message) as caught:
        work.push(catalog, "front:v1", store.home)
    assert caught.value.hint
    assert list(catalog.store.list("")) == []


@pytest.mark.parametrize("text", ["Front Page", "front:", ":v1", "front:v 1"])
def test_what_is_no_name_of_a_bento(store, work, text):
    with pytest.raises(BadInputError, match="no name of a Bento"), open_bento(text, store.home, work.spool):
        pass


# Pushed


def test_what_two_bentos_share_is_stored_and_read_once(store, work, catalog):
    store.bento(2)
    first = work.push(catalog, "front", store.home)
    assert [(str(model.ref), model.reused) for model in first] == [("own:b2", False), ("shared:1", False)]
    store.bento(2, tag="other:v9")
    (store.home / "models/shared/1/weights.bin").chmod(0)
    before = {found.key for found in catalog.store.list("")}
    second = work.push(catalog, "other", store.home)
    assert [(model.reused, model.new_bytes) for model in second] == [(True, 0), (True, 0)]
    assert [model.digest for model in second] == [model.digest for model in first]
    assert {found.key for found in catalog.store.list("")} == before
    manifest = catalog.resolve_model(ModelRef.parse("shared:1"))[1]
    assert manifest.labels["floe.bento-model"] == "shared:1"
    assert manifest.source == "bentoml:shared:1"


def test_a_version_that_is_another_model_by_now_is_pushed(store, work, catalog):
    store.bento(2)
    first = work.push(catalog, "front", store.home)
    store.model("shared:1", {"weights.bin": b"new"}, created="2026-02-02T00:00:00+00:00")
    second = work.push(catalog, "front", store.home)
    assert [(model.reused, model.moved) for model in second] == [(True, False), (False, True)]
    assert second[1].previous == first[1].digest


def test_a_model_of_that_name_that_came_another_way_is_not_replaced(store, work, catalog, tmp_path):
    store.bento(2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/w").write_text("mine")
    mine = push_model(catalog, tmp_path / "mine", ModelRef.parse("shared:1"), spool_dir=work.spool)
    with pytest.raises(BadInputError, match="the store's model shared:1 is not that of Bento front:v1") as caught:
        work.push(catalog, "front", store.home)
    assert "floe model rm shared:1" in caught.value.hint
    assert catalog.resolve_model(ModelRef.parse("shared:1"))[0] == mine.digest


def test_models_of_the_hub(store, work, catalog):
    store.bento(2, yaml=with_models(2, hub_entry("Acme/Tiny")))
    content = {"model.safetensors": b"w" * 9000, "config.json": b"{}", "onnx/config.json": b"{}"}
    top = hub_model(work.hub, "Acme/Tiny", content)
    hub_model(work.hub, "Acme/Tiny", {"model.safetensors": b"old" * 9000}, commit="f" * 40, ref="old")
    (top / "blobs" / "abc.incomplete").write_bytes(b"half")
    (top / ".no_exist" / COMMIT).mkdir(parents=True)
    (top / ".no_exist" / COMMIT / "adapter.json").touch()
    (top / "trees").mkdir()
    for commit in (COMMIT, "f" * 40):
        (top / "trees" / f"{commit}.json").write_text("[]")
    pushed = work.push(catalog, "front", store.home)
    model = pushed[0]
    assert (str(model.ref), model.found.place) == (f"acme/tiny:{COMMIT}", "hf-models/models--acme--tiny")
    tree = read_image(decode_tree(catalog.store.get(layout.tree_key(tree_of(catalog, model))), tree_of(catalog, model)))
    expected = {
        os.fsencode(path.relative_to(top)): os.fsencode(path.readlink()) if path.is_symlink() else b""
        for path in top.rglob("*")
        if "f" * 40 not in str(path)
        and path.name not in ("abc.incomplete", "old")
        and (path.is_symlink() or path.is_file())
        and not (path.parent.name == "blobs" and path.stat().st_size == 27000)
    }
    found = {path.strip(b"/"): node.link for path, node in walk(tree) if not node.is_dir}
    assert found == expected
    assert found[f"snapshots/{COMMIT}/config.json".encode()].startswith(b"../../blobs/")
    assert all(model.reused for model in work.push(catalog, "front", store.home))


def tree_of(catalog, model):
    return catalog.get_manifest(model.digest).tree.digest


def test_a_model_of_the_hub_that_is_not_here(store, work, catalog):
    store.bento(2, yaml=with_models(2, hub_entry("Acme/Tiny")))
    hub_model(work.hub, "Acme/Tiny", {"w": b"w"}, commit="f" * 40)
    with pytest.raises(NotFoundError, match=f"needs acme/tiny at {COMMIT}, which is not in") as caught:
        work.push(catalog, "front", store.home)
    assert f"hf download acme/tiny --revision {COMMIT}" in caught.value.hint
    top = hub_model(work.hub, "Acme/Tiny", {"w": b"ww"})
    (top / "snapshots" / COMMIT / "w").resolve().unlink()
    with pytest.raises(DamagedError, match="leads nowhere"):
        work.push(catalog, "front", store.home)
    assert list(catalog.store.list("refs/models")) == []


def two_commits(*more):
    return with_models(2, "".join(hub_entry("Acme/Tiny", revision=commit) for commit in (COMMIT, OTHER, *more)))


def test_two_commits_of_one_repository_are_one_model(store, work, catalog):
    """As they lie in one folder of the hub's cache."""
    store.bento(2, yaml=two_commits())
    top = hub_model(work.hub, "Acme/Tiny", {"model.safetensors": b"w" * 9000, "config.json": b"{}"})
    hub_model(work.hub, "Acme/Tiny", {"model.safetensors": b"v" * 9000, "config.json": b"{}"}, commit=OTHER, ref="v1")
    hub_model(work.hub, "Acme/Tiny", {"model.safetensors": b"u" * 9000}, commit="e" * 40, ref="v0")
    model, *_ = work.push(catalog, "front", store.home)
    assert str(model.ref) == f"acme/tiny:{COMMIT[:12]}-{OTHER[:12]}"
    tree = read_image(decode_tree(catalog.store.get(layout.tree_key(tree_of(catalog, model))), tree_of(catalog, model)))
    names = {os.fsdecode(path).strip("/") for path, node in walk(tree) if not node.is_dir}
    assert {name for name in names if not name.startswith("blobs/")} == {
        *(f"snapshots/{commit}/{name}" for commit in (COMMIT, OTHER) for name in ("model.safetensors", "config.json")),
        "refs/main",
        "refs/v1",
    }
    assert sum(name.startswith("blobs/") for name in names) == 3  # one of them belongs to both
    assert top.name == "models--Acme--Tiny"
    assert work.push(catalog, "front", store.home)[0].reused
    # A Bento with one of them has a model of its own, of the same content.
    store.bento(2, tag="other:v9", yaml=with_models(2, hub_entry("Acme/Tiny")))
    alone = work.push(catalog, "other", store.home)[0]
    assert (str(alone.ref), alone.reused, alone.new_bytes) == (f"acme/tiny:{COMMIT}", False, 0)


def test_two_commits_in_an_image(store, work, catalog, tmp_path):
    store.bento(2, yaml=two_commits())
    for commit, ref in ((COMMIT, "main"), (OTHER, "v1")):
        hub_model(work.hub, "Acme/Tiny", {"w": commit.encode()}, commit=commit, ref=ref)
    made = work.image(catalog, "front", store.home, base_image(tmp_path / "base"), f"oci:{tmp_path}/out:1")
    _, models = image_of(made.result.target)
    place = f"{ROOT}/hf-models/models--acme--tiny"
    tree = tree_at(catalog, models[place].tree, f"{place}/snapshots")
    assert set(tree.children) == {COMMIT.encode(), OTHER.encode()}


def test_one_of_two_commits_that_is_not_here(store, work, catalog):
    store.bento(2, yaml=two_commits())
    hub_model(work.hub, "Acme/Tiny", {"w": b"w"})
    with pytest.raises(NotFoundError, match=f"needs acme/tiny at {OTHER}, which is not in") as caught:
        work.push(catalog, "front", store.home)
    # Into the folder that has the other one.
    assert caught.value.hint.startswith(f"`hf download Acme/Tiny --revision {OTHER}`; ")
    assert list(catalog.store.list("")) == []


def test_more_commits_than_a_tag_has_room_for(store, work, catalog):
    commits = [f"{number:x}" * 40 for number in range(9)]
    for commit in commits:
        hub_model(work.hub, "Acme/Tiny", {"w": commit.encode()}, commit=commit)
    for count in (8, 9):
        entries = "".join(hub_entry("Acme/Tiny", revision=commit) for commit in commits[:count])
        store.bento(2, tag=f"many:v{count}", yaml=with_models(2, entries))
    model = work.push(catalog, "many:v8", store.home)[0]
    assert model.ref.tag == "-".join(commit[:7] for commit in commits[:8])
    with pytest.raises(BadInputError, match="names 9 commits of acme/tiny"):
        work.push(catalog, "many:v9", store.home)


def test_a_commit_with_and_without_some_of_its_files_is_one_model(store, work):
    """BentoML lists a model once for each choice of files; its cache has them in one folder."""
    again = (
        hub_entry("Acme/Tiny").replace("include: null", "include: ['*.json']").replace("acme--tiny:", "acme--tiny:0")
    )
    store.bento(2, yaml=with_models(2, hub_entry("Acme/Tiny") + again))
    hub_model(work.hub, "Acme/Tiny", {"w": b"w"})
    with open_bento("front", store.home, work.spool) as bento:
        found = [model.place for model in find_models(bento, work.hub)]
    assert found == ["hf-models/models--acme--tiny", "models/own/b2", "models/shared/1"]


def test_what_a_later_model_cannot_be_stops_all(store, work, catalog, tmp_path):
    store.bento(2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/w").write_text("mine")
    push_model(catalog, tmp_path / "mine", ModelRef.parse("shared:1"), spool_dir=work.spool)
    stored = {found.key for found in catalog.store.list("")}
    with pytest.raises(BadInputError, match="was pushed by other means"):
        work.push(catalog, "front", store.home)
    catalog.remove_model(ModelRef.parse("shared:1"))
    os.mkfifo(store.home / "models/shared/1/fifo")
    with pytest.raises(BadInputError, match="fifo is a fifo"):
        work.push(catalog, "front", store.home)
    assert {found.key for found in catalog.store.list("")} <= stored


def test_the_latest_version_is_the_one_that_was_created_last(store, work):
    for version, created in (("a", "2026-01-02"), ("c", "2026-01-03"), ("b", "2026-01-01")):
        store.model(f"m:{version}", {"w": b"w"}, created=f"{created}T00:00:00+00:00")
    store.bento(2, yaml="name: front\nversion: v1\nmodels: ['m:a', 'm:c', 'm:b']\n", models=False)
    with open_bento("front", store.home, work.spool) as bento:
        assert latest_files(find_models(bento, work.hub)) == {"models/m/latest": "c"}


# Images


@pytest.mark.parametrize("spec", [1, 2])
def test_the_image_of_a_bento(store, work, catalog, tmp_path, spec):
    path = store.bento(spec)
    made = work.image(catalog, path, store.home, base_image(tmp_path / "base"), f"oci:{tmp_path}/out:1")
    image, models = image_of(made.result.target)
    assert {place: marker.model for place, marker in models.items()} == {
        f"{ROOT}/models/{str(model.ref).replace(':', '/')}": str(model.ref) for model, _ in made.models
    }
    inner = image.config.value["config"]
    assert inner["Entrypoint"] == [f"{ROOT}/env/docker/entrypoint.sh"]
    assert (inner["User"], inner["WorkingDir"], inner.get("Cmd")) == ("1034:1034", ROOT, None)
    assert inner["Labels"]["io.floe.bento"] == {1: "old_svc:v1", 2: "front:v1"}[spec]
    env = dict(text.split("=", 1) for text in inner["Env"])
    assert env["PATH"] == "/bin"
    assert env["BENTO_PATH"] == ROOT
    assert env["BENTOML_HF_CACHE_DIR"] == f"{ROOT}/hf-models"
    assert {1: ("A", "b c"), 2: ("GREETING", "hello")}[spec] in env.items()
    assert "HF_HUB_OFFLINE" not in env
    # None of the models' bytes.
    sizes = [layer.size for layer in image.manifest.layers]
    assert sum(sizes) < 20_000
    root = unpacked(tmp_path / "out", 1, tmp_path / "bundle")
    for model, place in made.models:
        assert [found.name for found in (root / place[1:]).iterdir()] == ["README"]
        assert (root / place[1:]).parent.joinpath("latest").read_text() == model.ref.tag
        tree = tree_at(catalog, models[place].tree, place)
        stored = model.found.path
        seen = {found: node for found, node in walk(tree) if not node.is_dir}
        assert {os.fsdecode(found).strip("/"): node.size for found, node in seen.items()} == {
            str(file.relative_to(stored)): file.stat().st_size for file in stored.rglob("*") if file.is_file()
        }
        assert all(node.mode & 0o444 == 0o444 for node in seen.values())
    bento = root / ROOT[1:]
    files = {str(found.relative_to(path)): found.read_bytes() for found in path.rglob("*") if found.is_file()}
    assert {name: (bento / name).read_bytes() for name in files} == files
    assert sorted(found.name for found in bento.iterdir()) == [
        *sorted([*(found.name for found in path.iterdir()), "hf-models", "models"])
    ]
    # No stray directories: BentoML takes each for a model.
    assert {found.name for found in (bento / "models").iterdir()} == {model.ref.name for model, _ in made.models}
    assert list((bento / "hf-models").iterdir()) == []
    for found in (bento, *bento.rglob("*")):
        if not any(found.is_relative_to(root / place[1:]) for _, place in made.models):
            assert (found.lstat().st_uid, found.lstat().st_gid) == (OWNER, OWNER)
    assert stat.S_IMODE((bento / "env/docker/entrypoint.sh").stat().st_mode) & 0o755 == 0o755


def test_digests_are_the_same_on_every_machine_with_that_store(store, work, catalog, tmp_path):
    bento = store.bento(2)
    base = base_image(tmp_path / "base")
    first = work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/out:1")
    archive = store.export(bento, tmp_path / "x.bento", ["own:b2", "shared:1"])
    os.utime(bento / "src/service.py", (1, 1))
    second = work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/out:2")
    third = work.image(catalog, archive, tmp_path / "nowhere", base, f"oci:{tmp_path}/out:3")
    assert first.result.digest == second.result.digest == third.result.digest


def test_two_bentos_mount_one_tree(store, work, catalog, tmp_path):
    """On a node a tree has one superblock: what two Bentos have in common is in memory once."""
    store.bento(2)
    store.bento(2, tag="other:v9")
    trees = []
    for number, name in enumerate(("front", "other")):
        # Each base has directories of its own age.
        layer = aged(1000 + number)
        base = base_image(tmp_path / f"base{number}", layer)
        made = work.image(catalog, name, store.home, base, f"oci:{tmp_path}/out:{name}")
        trees.append({place: marker.tree for place, marker in image_of(made.result.target)[1].items()})
    assert trees[0] == trees[1]


def aged(mtime):
    def fill(tar):
        images.add(tar, "home", kind=tarfile.DIRTYPE, mode=0o755, mtime=mtime)
        images.add(tar, "home/bentoml", kind=tarfile.DIRTYPE, mode=0o700, uid=1034, gid=1034, mtime=mtime)

    return fill


def test_models_of_the_hub_in_an_image(store, work, catalog, tmp_path):
    store.bento(2, yaml=with_models(2, hub_entry("Acme/Tiny")))
    hub_model(work.hub, "Acme/Tiny", {"model.safetensors": b"w" * 9000})
    made = work.image(catalog, "front", store.home, base_image(tmp_path / "base"), f"oci:{tmp_path}/out:1")
    image, models = image_of(made.result.target)
    place = f"{ROOT}/hf-models/models--acme--tiny"
    assert models[place].model == f"acme/tiny:{COMMIT}"
    assert "HF_HUB_OFFLINE=1" in image.config.value["config"]["Env"]
    tree = tree_at(catalog, models[place].tree, f"{place}/snapshots/{COMMIT}")
    assert tree.children[b"model.safetensors"].link.startswith(b"../../blobs/")


def test_an_image_that_bentoml_s_dockerfile_built_keeps_its_config(store, work, catalog, tmp_path):
    config = {
        "Env": ["PATH=/app/.venv/bin:/bin", "BENTO_PATH=/srv/bento", "GREETING=changed"],
        "User": "bentoml",
        "Entrypoint": ["/srv/bento/env/docker/entrypoint.sh"],
        "WorkingDir": "/srv/bento",
    }

    def built(tar):
        images.add(tar, "srv", kind=tarfile.DIRTYPE, mode=0o755)
        images.add(tar, "srv/bento", kind=tarfile.DIRTYPE, mode=0o750, uid=1034, gid=1034)
        images.add(tar, "srv/bento/bento.yaml", b"there")
        images.add(tar, "etc/passwd", b"bentoml:x:1034:1034::/home/bentoml:/bin/sh\n")
        images.add(tar, "etc/group", b"bentoml:x:1034:\n")

    store.bento(2)
    base = base_image(tmp_path / "base", built, config={"config": config})
    made = work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/out:1", has_files=True)
    image, models = image_of(made.result.target)
    inner = image.config.value["config"]
    assert {key: inner[key] for key in ("User", "Entrypoint", "WorkingDir")} == {
        key: config[key] for key in ("User", "Entrypoint", "WorkingDir")
    }
    assert inner["Env"] == [*config["Env"], "BENTOML_HF_CACHE_DIR=/srv/bento/hf-models"]
    assert set(models) == {"/srv/bento/models/own/b2", "/srv/bento/models/shared/1"}
    root = unpacked(tmp_path / "out", 1, tmp_path / "bundle")
    assert (root / "srv/bento/bento.yaml").read_text() == "there"
    assert not (root / "srv/bento/src").exists()
    assert (root / "srv/bento/models/shared/latest").read_text() == "1"
    assert (stat.S_IMODE((root / "srv/bento").stat().st_mode), (root / "srv/bento").stat().st_uid) == (0o750, 1034)


def test_weights_of_the_base_are_hidden_and_told_of(store, work, catalog, tmp_path):
    store.bento(2)
    stray = images.files({f"{ROOT[1:]}/models/stale/1/model.yaml": "x", f"{ROOT[1:]}/models/own/latest": "z9"})
    base = base_image(tmp_path / "base", stray)
    made = work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/out:1")
    assert len(made.warnings) == 1
    assert f"has files of its own in {ROOT}/models: they are hidden" in made.warnings[0]
    root = unpacked(tmp_path / "out", 1, tmp_path / "bundle")
    assert sorted(found.name for found in (root / ROOT[1:] / "models").iterdir()) == ["own", "shared"]
    assert (root / ROOT[1:] / "models/own/latest").read_text() == "b2"


def link_on_the_way(store, work, catalog, tmp_path):
    return base_image(tmp_path / "base", lambda tar: images.add(tar, "home", kind=tarfile.SYMTYPE, link="srv"))


def a_finished_image(store, work, catalog, tmp_path):
    base = base_image(tmp_path / "base")
    return work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/finished:1").result.target


def a_strange_path(store, work, catalog, tmp_path):
    return base_image(tmp_path / "base", config={"config": {"Env": ["BENTO_PATH=../x"]}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (link_on_the_way, "/home is a symlink"),
        (a_finished_image, "carries a model at .* already: it is a Bento's finished image"),
        (a_strange_path, "'../x' is no place for a model"),
    ],
)
def test_bases_that_are_refused(store, work, catalog, tmp_path, make, message):
    store.bento(2)
    base = make(store, work, catalog, tmp_path)
    stored = {found.key for found in catalog.store.list("")}
    with pytest.raises(BadInputError, match=message):
        work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/out:1")
    assert not (tmp_path / "out").exists()
    assert {found.key for found in catalog.store.list("")} == stored


def test_a_base_that_is_not_there_stores_nothing(store, work, catalog, tmp_path):
    store.bento(2)
    with pytest.raises(NotFoundError, match="there is no folder") as caught:
        work.image(catalog, "front", store.home, f"oci:{tmp_path}/nowhere:1", f"oci:{tmp_path}/out:1")
    assert caught.value.hint
    assert list(catalog.store.list("")) == []


def a_fifo(bento):
    os.mkfifo(bento / "src/fifo")


def a_removed_file(bento):
    (bento / "src/.wh.data").write_text("x")


def a_removed_folder(bento):
    (bento / "apis/.wh.old").mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (a_fifo, "fifo is no file, directory or symlink"),
        (a_removed_file, "data would stand for a removed file"),
        (a_removed_folder, "old would stand for a removed file"),
    ],
)
@pytest.mark.parametrize("has_files", [False, True])
def test_files_that_no_layer_can_hold_are_refused_before_anything_is_stored(
    store, work, catalog, tmp_path, spoil, message, has_files
):
    spoil(store.bento(2))
    base = base_image(tmp_path / "base")
    with pytest.raises(BadInputError, match=message) as caught:
        work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/out:1", has_files=has_files)
    assert caught.value.hint
    assert list(catalog.store.list("")) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_that_a_bento_was_built_under_shows_nowhere(store, work, catalog, tmp_path, umask):
    bento = store.bento(2)
    (bento / "src/run.sh").write_text("#!/bin/sh\n")
    (bento / "src/run.sh").chmod(0o755)
    base = base_image(tmp_path / "base")
    usual = work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/out:usual")
    for path in (bento, store.home / "models/own/b2", store.home / "models/shared/1"):
        for found in (path, *path.rglob("*")):
            runs = found.is_dir() or found.stat().st_mode & stat.S_IXUSR
            found.chmod((0o777 if runs else 0o666) & ~umask)
    pushed = work.push(catalog, "front", store.home, read_again=True)
    assert [(model.reused, model.moved) for model in pushed] == [(False, False)] * 2
    made = work.image(catalog, "front", store.home, base, f"oci:{tmp_path}/out:again")
    assert made.result.digest == usual.result.digest
    root = unpacked(tmp_path / "out", "again", tmp_path / "bundle") / ROOT[1:]
    assert {name: stat.S_IMODE((root / name).stat().st_mode) for name in ("src", "src/run.sh", "bento.yaml")} == {
        "src": 0o755,
        "src/run.sh": 0o755,
        "bento.yaml": 0o644,
    }


def test_files_of_an_older_bento_in_the_base_are_gone(store, work, catalog, tmp_path):
    store.bento(2)
    older = images.files({f"{ROOT[1:]}/src/service.py": "old", f"{ROOT[1:]}/src/removed.py": "old", "srv/kept": "x"})
    work.image(catalog, "front", store.home, base_image(tmp_path / "base", older), f"oci:{tmp_path}/out:1")
    root = unpacked(tmp_path / "out", 1, tmp_path / "bundle")
    assert not (root / ROOT[1:] / "src/removed.py").exists()
    assert (root / ROOT[1:] / "src/service.py").read_text() == "import bentoml\n"
    assert (root / "srv/kept").read_text() == "x"


def test_a_file_that_becomes_shorter_is_named(store, work, catalog, tmp_path, monkeypatch):
    path = store.bento(2) / "src/service.py"
    real = os.fstat

    def longer(fd):
        found = real(fd)
        if not os.path.samestat(found, path.stat()):
            return found
        values = list(found)
        values[stat.ST_SIZE] += 1000
        return os.stat_result(values)

    monkeypatch.setattr("floe.ingest.bento.files.os.fstat", longer)
    with pytest.raises(SourceChangedError, match=r"service\.py changed or vanished while it was read"):
        work.image(catalog, "front", store.home, base_image(tmp_path / "base"), f"oci:{tmp_path}/out:1")


def test_registries_that_refuse(store, work, catalog, tmp_path):
    store.bento(2)
    with running_registry(tmp_path / "registry") as registry, Front(registry, status=403) as front:
        base = registry.push(base_image(tmp_path / "base"), "python:3")
        options = {"plain_http": True, "target_plain_http": True}
        with pytest.raises(AccessDeniedError, match=f"{front.host}/python") as caught:
            work.image(catalog, "front", store.home, f"{front.host}/python:3", f"{registry.host}/front:1", **options)
        assert caught.value.hint
        assert list(catalog.store.list("")) == []
        with pytest.raises(AccessDeniedError, match=f"{front.host}/front") as caught:
            work.image(catalog, "front", store.home, base, f"{front.host}/front:1", **options)
        assert caught.value.hint
        # The models are stored by then; the next one, somewhere else, needs nothing more.
        made = work.image(catalog, "front", store.home, base, f"{registry.host}/front:1", **options)
        assert all(model.reused for model, _ in made.models)


def test_a_tag_that_moves_meanwhile_changes_no_image(store, work, catalog, tmp_path):
    store.bento(2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/w").write_text("mine")
    (tmp_path / "layer").mkdir()
    other = push_model(catalog, tmp_path / "mine", ModelRef.parse("mine:1"), spool_dir=work.spool).digest
    with open_bento("front", store.home, work.spool) as bento:
        models = find_models(bento, work.hub)
        target = f"oci:{tmp_path}/out:1"
        with prepare_image(catalog, bento, models, base_image(tmp_path / "base"), target, has_files=False) as prepared:
            pushed = push_models(catalog, bento, models, spool_dir=work.spool)
            for model in pushed:
                catalog.set_model(model.ref, other)
            prepared.write(pushed, tmp_path / "layer")
    markers = image_of(target)[1].values()
    assert {marker.model: marker.manifest for marker in markers} == {str(m.ref): m.digest for m in pushed}
    assert other not in {marker.manifest for marker in markers}


def test_a_second_bento_sends_no_weight(store, work, catalog, tmp_path):
    store.bento(2)
    store.bento(2, tag="other:v9")
    with running_registry(tmp_path / "registry") as registry:
        base = registry.push(base_image(tmp_path / "base"), "python:3")
        options = {"plain_http": True, "target_plain_http": True}
        work.image(catalog, "front", store.home, base, f"{registry.host}/front:1", **options)
        before = sum(found.size for found in catalog.store.list("packs"))
        made = work.image(catalog, "other", store.home, base, f"{registry.host}/other:1", **options)
        assert made.result.copied_bytes < 10_000
        assert sum(found.size for found in catalog.store.list("packs")) == before
        command = ["skopeo", "inspect", "--config", "--tls-verify=false", f"docker://{registry.host}/other:1"]
        told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert told["config"]["Labels"]["io.floe.bento"] == "other:v9"
    assert ANNOTATION not in json.dumps(told)
