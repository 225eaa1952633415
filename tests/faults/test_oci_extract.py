"""A directory of an image's layers made a model: what is stored, what is left, and what is refused."""

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import tarfile

import pytest
from support import images
from support.registry import Front, running_registry

from floe.ingest.model import push_model
from floe.ingest.oci import source as sources
from floe.ingest.oci.attach import attach
from floe.ingest.oci.carried import carried_models
from floe.ingest.oci.detach import detach
from floe.ingest.oci.extract import extract
from floe.ingest.oci.opening import open_source
from floe.store import layout
from floe.store.catalog import Catalog
from floe.store.erofs_reader import read_image
from floe.store.errors import AccessDeniedError, BadInputError, FloeError, NotFoundError, UnsupportedError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.nodes import walk
from floe.store.objects import open_store
from floe.store.treeobject import decode_tree

REF = ModelRef.parse("weights:1")
PLACE = "/app/models/m"
DIRECTORY, SYMLINK, HARD_LINK = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
WEIGHTS = os.urandom(300_000)


def lower(tar):
    for name in ("app", "app/models", PLACE[1:], f"{PLACE[1:]}/old", f"{PLACE[1:]}/sub"):
        images.add(tar, name, kind=DIRECTORY, mode=0o750, uid=7, gid=8, mtime=12.5, xattrs={"user.of": name})
    images.add(
        tar, f"{PLACE[1:]}/big.safetensors", WEIGHTS, mode=0o640, uid=5, gid=6, mtime=1.25, xattrs={"user.a": "b"}
    )
    images.add(
        tar,
        f"{PLACE[1:]}/again",
        kind=HARD_LINK,
        link=f"{PLACE[1:]}/big.safetensors",
        mode=0o640,
        uid=5,
        gid=6,
        mtime=1.25,
    )
    images.add(tar, f"{PLACE[1:]}/link", kind=SYMLINK, link="sub/config.json", mode=0o777)
    images.add(tar, f"{PLACE[1:]}/gone", b"goes")
    images.add(tar, f"{PLACE[1:]}/old/inside", b"hidden later")
    images.add(tar, f"{PLACE[1:]}/sub/config.json", b"first")
    images.add(tar, "app/main.py", b"print()", mode=0o755)
    images.add(tar, f"{PLACE[1:]}-not", b"only begins like it")
    images.add(tar, "app/" + "long" * 40, b"with an extended header")


def upper(tar):
    # No entry for the directories above: theirs come from below.
    images.add(tar, f"{PLACE[1:]}/.wh.gone")
    images.add(tar, f"{PLACE[1:]}/old", kind=DIRECTORY, mode=0o700)
    images.add(tar, f"{PLACE[1:]}/old/.wh..wh..opq")
    images.add(tar, f"{PLACE[1:]}/old/new", b"n")
    images.add(tar, f"{PLACE[1:]}/sub/config.json", b"second, of the upper layer", mode=0o600)
    images.add(tar, "etc/upper", b"u")


def other(tar):
    images.add(tar, "etc/other", b"o")


@pytest.fixture
def catalog():
    with contextlib.closing(Catalog(open_store("memory://"), open_index(None))) as made:
        yield made


@pytest.fixture
def built(tmp_path):
    history = [{"created_by": name} for name in ("lower", "upper", "other")]
    config = {"config": {"Cmd": ["/bin/sh"]}, "history": history}
    return images.build_oci(tmp_path / "image", [lower, upper, other], config=config)


def image_of(name):
    with contextlib.closing(open_source(name)) as source:
        image = sources.resolve(source)
        return image, [found.marker for found in carried_models(image)]


def unpacked(image, folder):
    subprocess.run(["umoci", "unpack", "--image", image, folder], check=True, capture_output=True)
    return folder / "rootfs"


def facts(root, path):
    found = path.lstat()
    xattrs = {key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)}
    content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
    time = 0 if path.is_dir() and not path.is_symlink() else found.st_mtime_ns
    return (
        found.st_mode,
        found.st_uid,
        found.st_gid,
        time,
        {k: v for k, v in xattrs.items() if k.startswith("user.")},
        hashlib.sha256(content).hexdigest(),
    )


def seen(root, *, without=None):
    return {
        str(path.relative_to(root)): facts(root, path)
        for path in root.rglob("*")
        if not path.is_relative_to(root / ".floe")
        and (without is None or not path.is_relative_to(without) or path == without)
    }


def test_the_tree_stays_as_it_was(catalog, built, tmp_path):
    made = extract(catalog, built.source, f"oci:{tmp_path}/out:1", [(REF, PLACE + "/")], spool_dir=tmp_path / "spool")
    assert (made.new_layers, made.saved_bytes > len(WEIGHTS) * 0.9) == (2, True)
    assert list((tmp_path / "spool").iterdir()) == []
    image, (marker,) = image_of(made.result.target)
    assert (marker.model, marker.path, marker.manifest) == ("weights:1", PLACE, made.digests[0])
    before = unpacked(f"{tmp_path}/image:latest", tmp_path / "before")
    after = unpacked(f"{tmp_path}/out:1", tmp_path / "after")
    inside = before / PLACE[1:]
    assert seen(after, without=after / PLACE[1:]) == {
        **seen(before, without=inside),
        PLACE[1:]: facts(after, after / PLACE[1:]),
    }
    assert [path.name for path in (after / PLACE[1:]).iterdir()] == ["README"]
    # The model is what all layers together showed there.
    manifest = catalog.get_manifest(made.digests[0])
    tree = read_image(decode_tree(catalog.store.get(layout.tree_key(manifest.tree.digest)), manifest.tree.digest))
    nodes = dict(walk(tree))
    found = {}
    for path, node in nodes.items():
        name = os.fsdecode(path).strip("/")
        if not name:
            continue
        original = (inside / name).lstat()
        found[name] = (node.mode, node.uid, node.gid, os.fsdecode(node.link), node.size if node.is_file else 0)
        assert found[name][:3] == (original.st_mode, original.st_uid, original.st_gid), name
        assert {os.fsdecode(k): v for k, v in node.xattrs.items()} == {
            key: os.getxattr(inside / name, key, follow_symlinks=False)
            for key in os.listxattr(inside / name, follow_symlinks=False)
            if key.startswith("user.") and "umoci" not in key
        }
        if not node.is_dir:
            assert (node.mtime, node.mtime_ns) == divmod(original.st_mtime_ns, 10**9), name
    assert set(found) == {str(path.relative_to(inside)) for path in inside.rglob("*")}
    assert set(found) == {"again", "big.safetensors", "link", "old", "old/new", "sub", "sub/config.json"}
    assert stat.S_IMODE(tree.mode) == 0o750
    # What is not touched keeps its blob, its diff id and its history.
    assert image.manifest.layers[2].digest == built.layers[2]["digest"]
    assert image.config.diff_ids[2] == built.diff_ids[2]
    told = [entry["created_by"] for entry in image.config.value["history"]]
    assert told[:3] == ["lower", "upper", "other"]
    assert len(told) == len(image.config.diff_ids) == 4
    record = catalog.attachment(made.result.digest)
    assert built.manifest_digest in record.source


def test_again_it_is_the_same_and_nothing_is_stored_anew(catalog, built, tmp_path):
    first, second = (
        extract(catalog, built.source, f"oci:{tmp_path}/out:{tag}", [(REF, PLACE)], spool_dir=tmp_path / "spool")
        for tag in (1, 2)
    )
    assert first.result.digest == second.result.digest
    assert second.new_bytes == 0


def test_weights_that_a_pushed_model_has_already_are_stored_once(catalog, built, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/w").write_bytes(WEIGHTS)
    push_model(catalog, tmp_path / "m", ModelRef.parse("other"), spool_dir=tmp_path / "spool")
    made = extract(catalog, built.source, f"oci:{tmp_path}/out:1", [(REF, PLACE)], spool_dir=tmp_path / "spool")
    assert made.new_bytes < 1000


def test_two_directories_and_what_is_carried_already(catalog, built, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/w").write_bytes(b"w")
    push_model(catalog, tmp_path / "m", ModelRef.parse("other"), spool_dir=tmp_path / "spool")
    first = attach(catalog, built.source, f"oci:{tmp_path}/out:1", [(ModelRef.parse("other"), "/app/other")])
    directories = [(REF, PLACE), (ModelRef.parse("etc"), "/etc")]
    made = extract(catalog, first.target, f"oci:{tmp_path}/out:2", directories, spool_dir=tmp_path / "spool")
    assert made.new_layers == 3
    image, markers = image_of(made.result.target)
    assert [marker.model for marker in markers] == ["other:latest", "weights:1", "etc:latest"]
    assert len(image.manifest.layers) == 6
    bare = detach(catalog, made.result.target, f"oci:{tmp_path}/out:3", None)
    root = unpacked(f"{tmp_path}/out:3", tmp_path / "bundle")
    assert list((root / PLACE[1:]).iterdir()) == []
    assert bare.left == ()


def test_in_a_registry_only_what_changed_is_sent(catalog, built, tmp_path):
    with running_registry(tmp_path / "registry") as registry:
        source = registry.push(built.source, "app:1")
        made = extract(
            catalog, source, f"{registry.host}/lean:1", [(REF, PLACE)], spool_dir=tmp_path / "spool", plain_http=True
        )
        assert made.result.copied_bytes < 20_000
        with contextlib.closing(open_source(made.result.target, plain_http=True)) as found:
            image = sources.resolve(found)
            assert sum(len(b"".join(found.open_blob(layer))) for layer in image.manifest.layers) < 20_000


def test_a_registry_that_refuses_is_named_and_the_next_one_needs_nothing_stored_anew(catalog, built, tmp_path):
    options = {"spool_dir": tmp_path / "spool", "plain_http": True}
    with running_registry(tmp_path / "registry") as registry, Front(registry, status=403) as front:
        with pytest.raises(AccessDeniedError, match=f"{front.host}/lean") as caught:
            extract(catalog, built.source, f"{front.host}/lean:1", [(REF, PLACE)], **options)
        assert caught.value.hint
        assert list((tmp_path / "spool").iterdir()) == []
        packs = {info.key for info in catalog.store.list("packs")}
        extract(catalog, built.source, f"{registry.host}/lean:1", [(REF, PLACE)], **options)
        assert packs == {info.key for info in catalog.store.list("packs")}


def test_a_docker_image_with_zstd_layers(catalog, tmp_path):
    made = images.build_oci(tmp_path / "image", [lower, upper], compression="zstd")
    done = extract(catalog, made.source, f"oci:{tmp_path}/out:1", [(REF, PLACE)], spool_dir=tmp_path / "spool")
    image, _ = image_of(done.result.target)
    assert [layer.media_type.rpartition("+")[2] for layer in image.manifest.layers] == ["gzip"] * 3


def nothing_there(tar):
    images.add(tar, "app", kind=DIRECTORY, mode=0o755)


def a_file(tar):
    images.add(tar, PLACE[1:], b"file")


def behind_a_symlink(tar):
    images.add(tar, "app/models", kind=SYMLINK, link="../srv")
    images.add(tar, "srv/m/w", b"w")


def written_through_a_symlink(tar):
    images.add(tar, f"{PLACE[1:]}/own", b"own")
    images.add(tar, "alias", kind=SYMLINK, link="app/models/m")
    images.add(tar, "alias/w", b"through the symlink")


def a_link_out(tar):
    images.add(tar, f"{PLACE[1:]}/w", b"w")
    images.add(tar, "app/w", kind=HARD_LINK, link=f"{PLACE[1:]}/w")


def a_link_in(tar):
    images.add(tar, "app/w", b"w")
    images.add(tar, f"{PLACE[1:]}/w", kind=HARD_LINK, link="app/w")


def no_files(tar):
    images.add(tar, f"{PLACE[1:]}/sub", kind=DIRECTORY, mode=0o755)


def deleted(tar):
    images.add(tar, "app/models/.wh.m")


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([nothing_there], NotFoundError, f"has no directory {PLACE}"),
        ([a_file], (NotFoundError, BadInputError), "is no directory|has no directory"),
        ([behind_a_symlink], BadInputError, "/app/models is a symlink"),
        ([written_through_a_symlink], UnsupportedError, "through a symlink"),
        ([a_link_out], UnsupportedError, "'app/w' is a hard link across the border"),
        ([a_link_in], UnsupportedError, "is a hard link across the border"),
        ([no_files], BadInputError, "holds no file"),
        ([lower, deleted], NotFoundError, f"has no directory {PLACE}"),
    ],
)
def test_what_is_refused_names_no_model_and_writes_no_image(catalog, tmp_path, layers, error, message):
    made = images.build_oci(tmp_path / "image", layers)
    with pytest.raises(error, match=message) as caught:
        extract(catalog, made.source, f"oci:{tmp_path}/out:1", [(REF, PLACE)], spool_dir=tmp_path / "spool")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()
    assert list(catalog.store.list("refs")) == []
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize("path", ["/", "relative", "/proc", "/a/../b"])
def test_paths_that_cannot_be(catalog, built, tmp_path, path):
    with pytest.raises(BadInputError):
        extract(catalog, built.source, f"oci:{tmp_path}/out:1", [(REF, path)], spool_dir=tmp_path)
    overlapping = [(REF, PLACE), (ModelRef.parse("b"), PLACE + "/sub")]
    with pytest.raises(BadInputError, match="would hide one another"):
        extract(catalog, built.source, f"oci:{tmp_path}/out:1", overlapping, spool_dir=tmp_path)


def test_a_carried_model_is_no_directory_of_the_image(catalog, built, tmp_path):
    made = extract(catalog, built.source, f"oci:{tmp_path}/out:1", [(REF, PLACE)], spool_dir=tmp_path / "spool")
    with pytest.raises(BadInputError, match="would hide one another"):
        extract(catalog, made.result.target, f"oci:{tmp_path}/out:2", [(REF, PLACE)], spool_dir=tmp_path / "spool")


def test_a_damaged_layer(catalog, built, tmp_path):
    path = built.directory / "blobs/sha256" / built.layers[0]["digest"].removeprefix("sha256:")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FloeError):
        extract(catalog, built.source, f"oci:{tmp_path}/out:1", [(REF, PLACE)], spool_dir=tmp_path / "spool")
    assert list(catalog.store.list("refs")) == []
    assert not (tmp_path / "out").exists()


def test_the_manifest_is_sound(catalog, built, tmp_path):
    extract(catalog, built.source, f"oci:{tmp_path}/out:1", [(REF, PLACE)], spool_dir=tmp_path / "spool")
    command = ["skopeo", "inspect", f"oci:{tmp_path}/out:1"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert told["Labels"]["io.floe.models"] == f"weights:1={PLACE}"
