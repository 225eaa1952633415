"""Keys on disk: how they are made, who may read them, and what is refused."""

import logging
import os
import stat
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from support.signing import signer

from floe.store import keyfiles
from floe.store.errors import AccessDeniedError, AlreadyExistsError, BadInputError, FloeError
from floe.store.keyfiles import create_key, load_trust, public_key_at, read_signer
from floe.store.signing import Statement

NOW = "2026-01-02T03:04:05Z"


def test_a_key_is_made_for_its_owner_alone_and_signs(tmp_path):
    before = os.umask(0)
    try:
        public = create_key(tmp_path / "k")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "k.pub").stat().st_mode) == 0o644
    assert isinstance(load_pem_private_key((tmp_path / "k").read_bytes(), None), Ed25519PrivateKey)
    made = read_signer(tmp_path / "k")
    assert made.public == public == public_key_at(tmp_path / "k") == public_key_at(tmp_path / "k.pub")
    statement = Statement.tree("0" * 64)
    load_trust([str(tmp_path / "k.pub")]).check(statement, [made.sign(statement, NOW)])
    assert create_key(tmp_path / "other") != public


@pytest.mark.parametrize("there", ["k", "k.pub"])
def test_no_key_is_ever_replaced(tmp_path, there):
    (tmp_path / there).symlink_to("nowhere")
    with pytest.raises(AlreadyExistsError, match=there):
        create_key(tmp_path / "k")
    assert [path.name for path in tmp_path.iterdir()] == [there]


def test_a_key_in_a_missing_directory_and_below_a_file(tmp_path):
    with pytest.raises(BadInputError, match="No such file") as caught:
        create_key(tmp_path / "keys" / "k")
    assert caught.value.hint == f"make the directory first: mkdir -p {tmp_path}/keys"
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="Not a directory") as caught:
        create_key(tmp_path / "file" / "k")
    assert "a directory that you may write to" in caught.value.hint


def test_a_key_whose_public_half_cannot_be_written_is_not_left(tmp_path, monkeypatch):
    write = keyfiles._write

    def fail(path, data, mode):
        if path.name.endswith(".pub"):
            raise BadInputError("no")
        write(path, data, mode)

    monkeypatch.setattr(keyfiles, "_write", fail)
    with pytest.raises(BadInputError):
        create_key(tmp_path / "k")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777, 0o620, 0o601])
def test_a_private_key_that_others_may_read_is_refused(tmp_path, mode):
    create_key(tmp_path / "k")
    (tmp_path / "k").chmod(mode)
    with pytest.raises(AccessDeniedError, match=f"mode {mode:04o}") as caught:
        read_signer(tmp_path / "k")
    assert caught.value.hint == f"chmod 600 {tmp_path}/k"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to somebody else")
def test_keys_of_somebody_else_are_refused(tmp_path):
    create_key(tmp_path / "k")
    for name, read in (("k", read_signer), ("k.pub", lambda path: load_trust([str(path)]))):
        os.chown(tmp_path / name, 65534, 0)
        with pytest.raises(AccessDeniedError, match="owner 65534"):
            read(tmp_path / name)


def pem(key, encryption=None):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def test_what_is_no_private_key_is_refused_and_never_quoted(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    key = Ed25519PrivateKey.generate()
    good = pem(key)
    secret = good.splitlines()[1].decode()
    path = tmp_path / "k"
    for data, problem in (
        (b"", "no private key"),
        (good[:-40], "no private key"),
        (good.replace(b"PRIVATE", b"PUBLIC"), "no private key"),
        (secret.encode(), "no private key"),
        (pem(key, BestAvailableEncryption(b"p")), "passphrase"),
        (pem(rsa.generate_private_key(65537, 2048)), "no Ed25519 key"),
    ):
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(BadInputError, match=problem) as caught:
            read_signer(path)
        assert secret not in repr(caught.value) + caught.value.hint
        assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    # The private key where public ones are wanted.
    path.write_bytes(good)
    with pytest.raises(BadInputError, match="no public key") as caught:
        load_trust([str(path)])
    assert secret not in repr(caught.value) + caught.value.hint
    assert secret not in caplog.text


def test_trusted_keys_are_lines_files_and_directories(tmp_path):
    one, two, three = (signer(number).public for number in (1, 2, 3))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.pub").write_text(f"# of the build farm\n\n{two} remark\n")
    (tmp_path / "d" / "b.pub").write_text(f"{three}\n{two}\n")
    (tmp_path / "d" / "ignored").write_text("not a key")
    assert load_trust([]) is None
    assert load_trust([str(one)]).ids == (one.id,)
    assert load_trust([str(tmp_path / "d" / "a.pub")]).ids == (two.id,)
    assert load_trust([str(one), str(tmp_path / "d")]).ids == (one.id, two.id, three.id)


def test_keys_that_are_named_and_not_there_never_mean_that_all_is_trusted(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.pub").write_text("# nothing\n")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "k.pub")
    for name in ("empty", "blank.pub", "absent", "fifo"):
        with pytest.raises(FloeError, match=name):
            load_trust([str(signer(1).public), str(tmp_path / name)])


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_trusted_keys_that_others_may_change_are_refused(tmp_path, mode):
    create_key(tmp_path / "k")
    (tmp_path / "k.pub").chmod(mode)
    for source in (tmp_path / "k.pub", tmp_path):
        with pytest.raises(AccessDeniedError, match=f"mode {mode:04o}"):
            load_trust([str(source)])


def test_a_process_without_keys_does_not_load_the_library():
    code = (
        "import sys; import floe.snapshotter.storelayers, floe.store.keyfiles, floe.cli.main, floe.ingest.model;"
        "assert floe.store.keyfiles.load_trust(()) is None;"
        "raise SystemExit('cryptography' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
