"""What an s3:// address asks for beside a place: a CA, encryption; and servers without conditional puts."""

import logging
import uuid

import pytest
from support import seaweed
from support.certificates import Authority
from support.fakegcs import FakeGCS
from support.s3gate import S3Gate

from floe.ingest.model import push_model
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, ConflictError, UnavailableError
from floe.store.ids import ModelRef
from floe.store.index import open_index
from floe.store.objects import open_store
from floe.store.objects.multipart import PART

KEY = "arn:aws:kms:us-east-1:123456789012:key/floe"


@pytest.fixture(autouse=True)
def _credentials(monkeypatch):
    for name, value in seaweed.running().environment().items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gate():
    with S3Gate(seaweed.running(), {seaweed.ACCESS_KEY: None}) as made:
        yield made


def address(gate, **options):
    return gate.address(seaweed.shared_bucket(), f"options/{uuid.uuid4().hex}", **options)


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * ((PART + (1 << 20)) // 256))
    return path


def test_a_private_authority_is_trusted_when_the_address_names_it(tmp_path, large, monkeypatch):
    authority = Authority(tmp_path / "ca")
    ca, tls = authority.ca, authority.server("127.0.0.1")
    with S3Gate(seaweed.running(), {seaweed.ACCESS_KEY: None}, tls) as gate:
        url = address(gate)
        with pytest.raises(UnavailableError, match="certificate is of an authority that is not trusted"):
            open_store(url, retry=False).get("x")
        store = open_store(f"{url}&ca={ca}", retry=False)
        store.put("x", b"1")
        store.put_file("large", large)  # through boto3
        assert bytes(store.get("large")) == large.read_bytes()
        store.close()
        monkeypatch.setenv("AWS_CA_BUNDLE", str(ca))
        assert bytes(open_store(url, retry=False).get("x")) == b"1"
    with FakeGCS(tls) as google:
        # With TLS an endpoint is no emulator: it gets a token, here of its own token server.
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ca))
        key = google.key_file(tmp_path / "key.json")
        store = open_store(google.address(google.bucket(), ca=ca, service_account=key), retry=False)
        store.put_file("large", large)
        assert [info.key for info in store.list("")] == ["large"]
        store.close()


@pytest.mark.parametrize("content", [b"", b"no certificate"])
def test_a_ca_without_a_certificate_is_refused(gate, tmp_path, content):
    (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(BadInputError, match="holds no PEM certificate"):
        open_store(address(gate, ca=tmp_path / "ca.pem"))


def test_every_object_is_encrypted_with_the_key_of_the_address(gate, large):
    """The gate notes the headers and drops them: SeaweedFS by itself has no keys. It tells no SHA-256 of parts either."""
    store = open_store(address(gate, kms_key=KEY), retry=False)
    store.put("x", b"1")
    version = store.put_if("new", b"1", None)
    store.put_if("new", b"2", version)
    assert gate.encrypted == {("s3:PutObject", "aws:kms", KEY)}
    written = gate.actions["s3:PutObject"]
    assert written == 3
    gate.encrypted.clear()
    store.put_file("large", large)
    assert gate.encrypted == {("s3:PutObject", "aws:kms", KEY)}
    assert bytes(store.get("large")) == large.read_bytes()
    gate.encrypted.clear()
    plain = open_store(address(gate), retry=False)
    plain.put("x", b"1")
    plain.put_file("large", large)
    assert gate.encrypted == set()
    for opened in (store, plain):
        opened.close()


def test_a_server_that_refuses_conditions_is_compared_with_instead(gate, caplog):
    gate.conditions = "refused"
    store = open_store(address(gate), retry=False)
    with caplog.at_level(logging.WARNING):
        first = store.put_if("ref", b"one", None)
    assert "may be lost unseen" in caplog.text
    with pytest.raises(ConflictError):
        store.put_if("ref", b"two", None)
    second = store.put_if("ref", b"two", first)
    with pytest.raises(ConflictError):
        store.put_if("ref", b"three", first)
    assert store.get_versioned("ref") == (b"two", second)
    store.delete("ref")
    with pytest.raises(ConflictError):
        store.put_if("ref", b"three", second)


def test_a_writer_in_between_is_noticed_where_conditions_are_refused(gate):
    gate.conditions = "refused"
    url = address(gate)
    store, rival = open_store(url, retry=False), open_store(url, retry=False)
    store.put_if("ref", b"one", None)
    version = store.head("ref").version
    put = store.put
    store.put = lambda key, data: (put(key, data), rival.put(key, b"theirs"))
    with pytest.raises(ConflictError, match="at the same moment"):
        store.put_if("ref", b"mine", version)
    assert bytes(store.get("ref")) == b"theirs"


class Rival:
    """Pushes another directory to the same tag as soon as the first push reads its source."""

    def __init__(self, push):
        self.push = push

    def total(self, _):
        push, self.push = self.push, None
        if push is not None:
            self.result = push()

    def advance(self, _):
        pass


@pytest.mark.parametrize("kind", ["s3", "s3, conditions refused", "gs", "file", "memory"])
@pytest.mark.parametrize("was_there", [True, False], ids=["moved", "new"])
def test_of_two_pushes_to_one_tag_one_wins_and_the_other_says_so(gate, tmp_path, kind, was_there):
    for name in ("first", "mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(name.encode() * 1000)
    with FakeGCS() as google:
        gate.conditions = "refused" if "refused" in kind else "honoured"
        urls = {"gs": google.address(google.bucket()), "file": f"file://{tmp_path}/store", "memory": "memory://"}
        store = open_store(urls.get(kind) or address(gate))
        catalog = Catalog(store, open_index(None))
        ref = ModelRef("m")

        def push(name, progress=None):
            return push_model(catalog, tmp_path / name, ref, spool_dir=tmp_path / name / "../spool", progress=progress)

        before = push("first").digest if was_there else None
        rival = Rival(lambda: push("theirs"))
        with pytest.raises(ConflictError, match=r"m:latest was moved to .* by somebody else") as caught:
            push("mine", rival)
        theirs = rival.result
        assert theirs.previous == before
        assert catalog.resolve_model(ref)[0] == theirs.digest
        # What lost is stored, and named by the hint; pushed again it wins.
        assert "push again" in caught.value.hint
        (digest,) = [word.partition("@")[2].rstrip(";") for word in caught.value.hint.split() if "@" in word]
        again = push("mine")
        assert (again.previous, again.new_packs) == (theirs.digest, 0)
        assert again.manifest.tree == catalog.get_manifest(digest).tree
        catalog.close()


def test_two_pushes_of_the_same_do_not_conflict(gate, tmp_path):
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "weights").write_bytes(b"same" * 1000)
    catalog = Catalog(open_store(address(gate)), open_index(None))
    ref = ModelRef("m")

    def push(progress=None):
        return push_model(catalog, tmp_path / "same", ref, spool_dir=tmp_path / "spool", progress=progress)

    rival = Rival(push)
    mine = push(rival)
    assert mine.manifest.tree == rival.result.manifest.tree
    catalog.close()
