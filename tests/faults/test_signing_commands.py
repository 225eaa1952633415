"""The commands that make keys, sign, and say who signed: in this process, on a store in a folder."""

import json
from types import SimpleNamespace

import pytest
from support.images import build_oci, files

from floe.cli.main import main


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """A machine of one's own with a key, a model's directory, and settings in the environment."""

    def set_variable(name, value):
        monkeypatch.setenv(name, str(value))

    def floe(*argv, code=0):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == code, argv
        return SimpleNamespace(**dict(zip(("stdout", "stderr"), capsys.readouterr(), strict=True)))

    for name, value in {
        "STORE": f"file://{tmp_path}/store",
        "INDEX": f"sqlite:{tmp_path}/index.db",
        "CACHE_DIR": tmp_path / "cache",
        "RUN_DIR": tmp_path / "run",
        "ROOT": tmp_path / "root",
        "CONFIG": tmp_path / "config.toml",
    }.items():
        set_variable(f"FLOE_{name}", value)
    (tmp_path / "config.toml").touch()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w").write_bytes(b"weights" * 100_000)
    floe("key", "create", tmp_path / "key")
    return SimpleNamespace(
        home=tmp_path, floe=floe, set=set_variable, json=lambda *argv: json.loads(floe(*argv, "--json").stdout)
    )


def trusting(here, *names):
    here.set("FLOE_TRUSTED_KEYS", ",".join(str(here.home / name) for name in names))


def refused(here, *argv, code=1):
    return here.floe(*argv, code=code).stderr


def test_rotation(here, tmp_path):
    here.floe("model", "push", tmp_path / "m", "iris", "--signing-key", tmp_path / "key")
    new = here.json("key", "create", tmp_path / "new")
    verify = ("model", "verify-signature", "iris")
    trusting(here, "key.pub")
    assert [s["trusted"] for s in here.json(*verify)["signatures"]] == [True]
    trusting(here, "key.pub", "new.pub")
    here.floe(*verify)
    signed = here.json("model", "sign", "iris", "--signing-key", tmp_path / "new")
    assert signed["key"] == new["id"]
    assert [s["trusted"] for s in here.json(*verify)["signatures"]] == [True, True]
    trusting(here, "new.pub")
    assert [s["trusted"] for s in here.json(*verify)["signatures"]] == [False, True]
    (listed,) = here.json("model", "ls")
    assert [s["key"] for s in listed["signatures"] if s["trusted"]] == [new["id"]]
    assert new["id"][:16] in here.floe("model", "ls").stdout
    # What only the old key signed is refused from now on.
    here.floe("model", "push", tmp_path / "m", "late", "--signing-key", tmp_path / "key")
    assert "not trusted here" in refused(here, "model", "verify-signature", "late")


def test_an_image_is_signed_as_it_is_stored(here, tmp_path):
    image = build_oci(tmp_path / "oci", [files({"a": "lower"}), files({"b": "upper"})], tag="1")
    target = f"oci:{tmp_path}/out:1"
    here.floe("model", "push", tmp_path / "m", "iris")
    here.floe("image", "index", image.source)
    here.floe("image", "attach", image.source, target, "--model", "iris=/m")
    here.floe("image", "index", target)
    trusting(here, "key.pub")

    def trusted(name):
        return [[s["trusted"] for s in layer["signatures"]] for layer in here.json("image", "show", name)["layers"]]

    assert trusted(image.source) == [[], []]
    sign = ("--signing-key", tmp_path / "key")
    assert "is not signed" in refused(here, "image", "attach", image.source, target, "--model", "iris=/m")
    signed = here.json("image", "sign", target, *sign)
    assert (signed["layers"], len(signed["models"])) == (list(image.diff_ids), 1)
    assert signed["key"] == here.json("key", "show", tmp_path / "key")["id"]
    # The layers are the same ones in both images; the model's stub is a layer of which nothing is stored.
    assert trusted(image.source) == [[True], [True]]
    assert trusted(target) == [[True], [True], []]
    assert here.json("image", "sign", target, *sign) == signed
    assert signed["key"][:16] in here.floe("image", "show", image.source).stdout
    here.floe("image", "rm", image.source)
    here.floe("image", "sign", image.source, *sign, code=1)


def test_keys_are_shown_without_their_secret(here, tmp_path):
    secret = (tmp_path / "key").read_text().splitlines()[1]
    shown = here.json("key", "show", tmp_path / "key")
    assert shown == here.json("key", "show", tmp_path / "key.pub") | {"file": str(tmp_path / "key")}
    assert shown["public_key"] in (tmp_path / "key.pub").read_text()
    here.floe("key", "create", tmp_path / "key", code=1)
    trusting(here, "key.pub")
    here.set("FLOE_LOG_LEVEL", "debug")
    said = [here.floe("model", "push", tmp_path / "m", "iris", "--signing-key", tmp_path / "key")]
    said += [here.floe(*argv) for argv in (("status",), ("model", "show", "iris"), ("key", "show", tmp_path / "key"))]
    (tmp_path / "key").chmod(0o644)
    said += [here.floe("model", "sign", "iris", "--signing-key", tmp_path / "key", code=1)]
    assert not any(secret in found.stdout + found.stderr for found in said)
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert stored == [tmp_path / "key"]


def test_status_and_commands_say_what_is_trusted(here, tmp_path):
    assert "what the store holds is believed" in here.floe("status").stdout
    here.floe("model", "verify-signature", "iris", code=2)
    here.floe("model", "sign", "iris", code=2)
    trusting(here, "key.pub")
    shown = here.json("key", "show", tmp_path / "key")
    assert here.json("status")["trust"] == {"keys": [shown["id"]], "error": None}
    told = here.floe("model", "push", tmp_path / "m", "iris")
    assert "published unsigned" in told.stderr
    (tmp_path / "key.pub").write_text("rubbish")
    assert "key.pub" in here.json("status")["trust"]["error"]
    assert "key.pub" in refused(here, "model", "mount", "iris", tmp_path / "mnt", code=2)


def test_a_public_key_in_the_settings_file(here, tmp_path):
    here.floe("model", "push", tmp_path / "m", "iris", "--signing-key", tmp_path / "key")
    public = here.json("key", "show", tmp_path / "key")["public_key"]
    (tmp_path / "config.toml").write_text(f"trusted_keys = {json.dumps([public])}\n")
    assert here.json("model", "verify-signature", "iris")["tree"] == here.json("model", "show", "iris")["tree"]
