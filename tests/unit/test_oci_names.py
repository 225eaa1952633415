"""Image references, platforms, manifests and credentials: pure parsing."""

import base64
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floe.ingest.oci import auth, dockerconfig, ecr, media
from floe.ingest.oci.platforms import Platform, choose
from floe.ingest.oci.references import DockerArchiveRef, LayoutRef, RegistryRef, parse_image_ref
from floe.store.errors import AccessDeniedError, BadInputError, DamagedError, FloeError, UnsupportedError

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("python", "docker.io/library/python:latest"),
        ("python:3.12", "docker.io/library/python:3.12"),
        ("bentoml/bento:1", "docker.io/bentoml/bento:1"),
        ("index.docker.io/library/python", "docker.io/library/python:latest"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
        ("localhost/app:v1", "localhost/app:v1"),
        ("[::1]:5000/a/b/c:t", "[::1]:5000/a/b/c:t"),
        ("ghcr.io/Org".lower() + "/app@" + DIGEST, "ghcr.io/org/app@" + DIGEST),
        ("ghcr.io/org/app:1@" + DIGEST, "ghcr.io/org/app:1@" + DIGEST),
        ("UPPER/app", "UPPER/app:latest"),
    ],
)
def test_registry_references(text, full):
    ref = parse_image_ref(text)
    assert isinstance(ref, RegistryRef)
    assert str(ref) == full
    assert parse_image_ref(full) == ref


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("oci:/d", LayoutRef("/d")),
        ("oci:/d:tag", LayoutRef("/d", "tag")),
        ("oci:/d:host:5000/app:1", LayoutRef("/d", "host:5000/app:1")),
        ("oci:/d@" + DIGEST, LayoutRef("/d", None, DIGEST)),
        ("oci-archive:/f.tar:1.0", LayoutRef("/f.tar", "1.0", archive=True)),
        ("docker-archive:/f.tar", DockerArchiveRef("/f.tar")),
        ("docker-archive:/f.tar:app:1", DockerArchiveRef("/f.tar", RegistryRef("docker.io", "library/app", "1"))),
        ("docker-archive:/f.tar:h:5/app", DockerArchiveRef("/f.tar", RegistryRef("h:5", "app", "latest"))),
        ("docker-archive:/f.tar:@1", DockerArchiveRef("/f.tar", number=1)),
    ],
)
def test_layout_references(text, ref):
    assert parse_image_ref(text) == ref
    assert parse_image_ref(str(ref)) == ref


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "a:",
        "a:b:c",
        "Python",
        "a/",
        "a//b",
        "https://a/b",
        "a@sha256:12",
        "oci:",
        "oci::t",
        "oci:/d:",
        "docker-archive:",
        "docker-archive::app",
        "docker-archive:/f:",
        "docker-archive:/f:@x",
        "docker-archive:/f:app@" + DIGEST,
        "a b",
        "host:99999999/a",
        "a" * 300,
    ],
)
def test_references_that_are_none(text):
    with pytest.raises(BadInputError):
        parse_image_ref(text)


@given(st.text(max_size=60))
def test_no_text_breaks_the_parser(text):
    try:
        ref = parse_image_ref(text)
    except BadInputError:
        return
    assert str(ref)


def test_platforms():
    assert str(Platform.parse("linux/aarch64/v8")) == "linux/arm64"
    assert str(Platform.parse("Linux/x86_64")) == "linux/amd64"
    assert str(Platform.parse("linux/arm/v7")) == "linux/arm/v7"
    for text in ("linux", "linux/", "a/b/c/d"):
        with pytest.raises(BadInputError):
            Platform.parse(text)
    entries = [{"os": "unknown", "architecture": "unknown"}, None, {"os": "linux", "architecture": "arm", "variant": "v6"},
               {"os": "linux", "architecture": "arm", "variant": "v7"}, {"os": "linux", "architecture": "arm64", "variant": "v8"}]  # fmt: skip
    offered = [Platform.of(entry) for entry in entries]
    assert choose(Platform.parse("linux/arm/v7"), offered) == 3
    assert choose(Platform.parse("linux/arm"), offered) == 2
    assert choose(Platform.parse("linux/arm64"), offered) == 4
    assert choose(Platform.parse("linux/amd64"), offered) is None


def manifest(layer="application/vnd.oci.image.layer.v1.tar+gzip", config=media.OCI_CONFIG, **more):
    blob = {"digest": DIGEST, "size": 3}
    value = {
        "schemaVersion": 2,
        "config": {"mediaType": config, **blob},
        "layers": [{"mediaType": layer, **blob}],
        **more,
    }
    return media.parse_manifest(json.dumps(value).encode(), media.OCI_MANIFEST, "M")


@pytest.mark.parametrize("layer", media.LAYERS)
def test_layers_that_are_read(layer):
    media.check_image(manifest(layer), "M")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "is encrypted"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign layer"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", "foreign layer"),
        ("application/vnd.oci.image.layer.v1.tar+br", r"unknown media type .*\+br"),
    ],
)
def test_layers_that_are_refused(layer, message):
    with pytest.raises(UnsupportedError, match=message):
        media.check_image(manifest(layer), "M")


def test_what_is_no_image():
    with pytest.raises(UnsupportedError, match="helm"):
        media.check_image(manifest(config="application/vnd.cncf.helm.config.v1+json"), "M")
    with pytest.raises(UnsupportedError, match="schema 1"):
        media.parse_manifest(b'{"schemaVersion":1}', "application/vnd.docker.distribution.manifest.v1+prettyjws", "M")
    with pytest.raises(UnsupportedError, match="media type 'text/html'"):
        media.parse_manifest(b"{}", "text/html", "M")
    with pytest.raises(UnsupportedError, match="sha512"):
        media.parse_descriptor({"mediaType": "x", "digest": "sha512:" + "a" * 128, "size": 1}, "M")
    for raw in (b"", b"[]", b"{", b'{"layers":1}', b'{"layers":[1]}', b'{"config":{},"layers":[]}', b"[" * 100_000):
        with pytest.raises(DamagedError):
            media.parse_manifest(raw, media.OCI_MANIFEST, "M")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["mediaType", "layers", "config", "digest", "size", "manifests", "rootfs", "diff_ids", "schemaVersion", "os"]), x), max_leaves=20))  # fmt: skip
def test_no_json_breaks_the_parsers(value):
    raw = json.dumps(value).encode()
    for parse in (lambda: media.parse_manifest(raw, media.OCI_MANIFEST, "M"), lambda: media.parse_config(raw, "C")):
        with contextlib.suppress(FloeError):
            parse()


def write_config(tmp_path, value):
    path = tmp_path / "config.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_credentials(tmp_path):
    encoded = base64.b64encode(b"me:pass:word").decode()
    path = write_config(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": encoded}, "http://r:5000/v2": {"username": "u", "password": "p"},
        "t": {"auth": base64.b64encode(b"<token>:xyz").decode()}, "empty": {}}, "credHelpers": {"g": "gcloud", "no": ""}})  # fmt: skip
    config = dockerconfig.read_config(path)
    for name in ("docker.io", "registry-1.docker.io"):
        found = config.find(name)
        assert (found.username, found.password) == ("me", "pass:word")
    assert "pass" not in repr(found) + repr(config)
    assert found.basic() == "Basic " + encoded
    assert config.find("r:5000").username == "u"
    assert config.find("t").identity_token == "xyz"
    assert config.find("empty") is None
    assert config.find("elsewhere") is None
    assert (config.helper("g"), config.helper("t")) == ("gcloud", "")
    assert dockerconfig.read_config(tmp_path / "none.json").find("x") is None
    for bad in ("{", "[]", '{"auths": 3}', '{"credHelpers": 3}'):
        with pytest.raises(BadInputError, match=r"config\.json"):
            dockerconfig.read_config(write_config(tmp_path, bad))
    with pytest.raises(BadInputError, match=r"the entry for x in .*config\.json"):
        dockerconfig.read_config(write_config(tmp_path, '{"auths":{"x":{"auth":"?"}}}')).find("x")
    assert str(dockerconfig.config_path({"DOCKER_CONFIG": "/d"})) == "/d/config.json"
    assert str(dockerconfig.config_path({"HOME": "/h"})) == "/h/.docker/config.json"


def test_a_registry_s_own_helper_comes_before_the_store(tmp_path):
    stored = {"credsStore": "pass", "credHelpers": {"https://index.docker.io/v1/": "hub", "r:5000": "own", "off": ""}}
    config = dockerconfig.read_config(write_config(tmp_path, stored))
    found = [config.helper(host) for host in ("docker.io", "r:5000", "other", "off")]
    assert found == ["hub", "own", "pass", ""]
    assert dockerconfig.server_name("registry-1.docker.io") == "https://index.docker.io/v1/"
    assert dockerconfig.server_name("r:5000") == "r:5000"
    assert not dockerconfig.is_hub("r:5000")


def test_what_the_variable_holds():
    assert dockerconfig.inline_config({}) is None
    config = dockerconfig.inline_config(
        {"DOCKER_AUTH_CONFIG": '{"auths": {"r": {"username": "u", "password": "hunter2"}}}'}
    )
    assert config.find("r").origin == "the entry for r in DOCKER_AUTH_CONFIG"
    with pytest.raises(BadInputError, match="variable DOCKER_AUTH_CONFIG is not valid") as caught:
        dockerconfig.inline_config({"DOCKER_AUTH_CONFIG": '{"auths": "hunter2"}'})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "region"),
    [
        ("123456789012.dkr.ecr.eu-central-1.amazonaws.com", "eu-central-1"),
        ("123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("123456789012.dkr-ecr.us-west-2.on.aws", "us-west-2"),
        ("public.ecr.aws", None),
        ("1.dkr.ecr.us-west-2.amazonaws.com", None),
        ("123456789012.dkr.ecr.us-west-2.amazonaws.com.evil.example", None),
        ("evil-123456789012.dkr.ecr.us-west-2.amazonaws.com", None),
    ],
)
def test_hosts_of_amazon_ecr(host, region):
    assert ecr.region_of(host) == region


def test_challenges():
    header = 'Digest realm="x", Bearer realm="https://a/t?x=Basic",service="s, Basic",scope="repository:a:pull,push", Basic realm="b"'
    bearer, basic = auth.parse_challenges(header)
    assert bearer.parameters == {
        "realm": "https://a/t?x=Basic",
        "service": "s, Basic",
        "scope": "repository:a:pull,push",
    }
    assert basic.scheme == "basic"
    assert auth.parse_challenges("Negotiate") == []
    assert auth.check_realm(bearer, "h", plain_http=False)
    for realm in ("http://a/t", "file:///etc/passwd"):
        with pytest.raises(AccessDeniedError):
            auth.check_realm(auth.Challenge("bearer", {"realm": realm}), "h", plain_http=False)
    assert auth.token_in(b'{"access_token":"t"}', "r") == auth.Token("t")
    full = b'{"token":"t","expires_in":300,"refresh_token":"i"}'
    assert auth.token_in(full, "r") == auth.Token("t", 300.0, "i")
    for lifetime in (b"true", b"0", b"-1", b"null", b'"300"', b"1e999"):
        assert auth.token_in(b'{"token":"t","expires_in":' + lifetime + b"}", "r") == auth.Token("t")
    for body in (b"", b"[]", b"{}", b'{"token":"a\\nb"}', b"[" * 100_000, b'{"token":"t","expires_in":NaN}'):
        with pytest.raises(AccessDeniedError):
            auth.token_in(body, "r")


def test_a_quote_that_is_not_closed_hides_what_follows():
    (bearer,) = auth.parse_challenges('Bearer service="a", realm="b\\", Basic realm=c')
    assert (bearer.scheme, bearer.parameters["service"]) == ("bearer", "a")
    (basic,) = auth.parse_challenges('Basic realm="a\\\nb, Bearer c"')
    assert basic.scheme == "basic"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["a", '\\"', 'a="', 'a="\\', "a ", ", ", ",Bearer a="])
@pytest.mark.parametrize("before", ["Bearer ", 'Bearer "', 'Bearer a="'])
def test_long_challenges_hold_up_nobody(before, piece):
    for _ in range(50):
        auth.parse_challenges((before + piece * 8192)[:8192])
    assert auth.parse_challenges(before + piece * (6_000_000 // len(piece))) == []
