"""hosts.toml: what stands in the files is what servers are asked, in which order; malformed files are refused by name."""

from pathlib import Path

import pytest

from floe.ingest.oci.hosts import PULL, PUSH, RESOLVE, TLS, find_endpoints
from floe.store.errors import AccessDeniedError, BadInputError, UnsupportedError

ALL = {PULL, RESOLVE, PUSH}


def write(folder, registry, text):
    path = folder / registry / "hosts.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def endpoints(tmp_path, text, registry="r.example", **options):
    write(tmp_path, registry, text)
    return find_endpoints(registry, (tmp_path,), plain_http=options.get("plain_http", False))


def shown(found):
    return [(endpoint.address + endpoint.path, set(endpoint.capabilities)) for endpoint in found]


@pytest.mark.parametrize(
    ("registry", "plain_http", "address"),
    [
        ("docker.io", False, "https://registry-1.docker.io"),
        ("ghcr.io", False, "https://ghcr.io"),
        ("127.0.0.1:5000", False, "https://127.0.0.1:5000"),
        ("127.0.0.1:5000", True, "http://127.0.0.1:5000"),
    ],
)
def test_without_files(tmp_path, registry, plain_http, address):
    (only,) = find_endpoints(registry, (tmp_path / "none",), plain_http=plain_http)
    assert (only.address, only.path, set(only.capabilities), only.mirror) == (address, "/v2", ALL, False)
    assert str(only) == f"registry {registry}"
    assert (only.tls, dict(only.headers), only.dial_timeout, only.proxy) == (TLS(), {}, None, None)


def test_hosts_come_in_their_order_and_the_server_last(tmp_path):
    found = endpoints(
        tmp_path,
        """
        server = "https://up.example/team"
        capabilities = ["pull", "resolve"]
        [host."https://z.example"]
        capabilities = ["Pull"]
        [host."a.example:5000/v2/"]
        [host."http://m.example/x".header]
        a = "b"
        [host."https://o.example/deep/root"]
        override_path = true
        [host."https://p.example"]
        override_path = true
        """,
    )
    assert shown(found) == [
        ("https://z.example/v2", {PULL}),
        ("https://a.example:5000/v2", ALL),
        ("http://m.example/x/v2", ALL),
        ("https://o.example/deep/root", ALL),
        ("https://p.example", ALL),
        ("https://up.example/team/v2", {PULL, RESOLVE}),
    ]
    assert [str(endpoint) for endpoint in found[:2]] == [
        "mirror z.example of r.example",
        "mirror a.example:5000 of r.example",
    ]
    assert dict(found[2].headers) == {"a": "b"}


def test_without_a_server_the_registry_itself_comes_last_and_can_do_everything(tmp_path):
    text = 'capabilities = ["pull"]\nca = "own.pem"\n[host."https://m.example"]\n'
    mirror, own = endpoints(tmp_path, text, "docker.io")
    assert (own.address, set(own.capabilities), own.mirror) == ("https://registry-1.docker.io", ALL, False)
    assert own.tls.ca == (tmp_path / "docker.io" / "own.pem",)
    assert mirror.tls == TLS()
    assert mirror.mirror


def test_where_files_are_looked_for(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"

    def server(registry):
        return find_endpoints(registry, (first, second), plain_http=False)[-1].host

    write(second, "r.example:5000", 'server = "two.example"')
    assert server("r.example:5000") == "two.example"
    write(first, "_default", 'server = "default.example"')
    assert server("r.example:5000") == "default.example"
    write(first, "r.example:5000", 'server = "colon.example"')
    assert server("r.example:5000") == "colon.example"
    write(first, "r.example_5000_", 'server = "under.example"')
    assert server("r.example:5000") == "under.example"
    assert server("r.example") == "default.example"
    assert server("docker.io") == "default.example"
    write(first, "docker.io", "")  # an empty file says nothing
    assert server("docker.io") == "registry-1.docker.io"


def test_tls_of_all_forms(tmp_path):
    folder = tmp_path / "r.example"

    def tls(text):
        return endpoints(tmp_path, f'[host."https://m"]\n{text}\n')[0].tls

    assert tls('ca = "a.pem"') == TLS((folder / "a.pem",))
    assert tls('ca = ["/abs/a.pem", "b.pem"]') == TLS((Path("/abs/a.pem"), folder / "b.pem"))
    assert tls('client = "c.pem"') == TLS((), ((folder / "c.pem", None),))
    assert tls('client = ["c.pem", "d.pem"]').client == ((folder / "c.pem", None), (folder / "d.pem", None))
    pairs = tls('client = [["c.pem", "c.key"], ["d.pem", ""]]').client
    assert pairs == ((folder / "c.pem", folder / "c.key"), (folder / "d.pem", None))
    assert tls("skip_verify = true").skip_verify


def test_docker_s_certificate_files(tmp_path):
    folder = tmp_path / "r.example"
    folder.mkdir()
    for name in ("a.crt", "b.crt", "c.cert", "c.key", "d.cert", "readme"):
        (folder / name).write_text("x")
    (only,) = find_endpoints("r.example", (tmp_path,), plain_http=False)
    assert only.tls.ca == (folder / "a.crt", folder / "b.crt")
    assert only.tls.client == ((folder / "c.cert", folder / "c.key"), (folder / "d.cert", None))


def test_http_with_tls_settings_is_a_guess(tmp_path):
    def guess(text):
        return endpoints(tmp_path, text)[0]

    assert guess('[host."http://m:5000"]\nskip_verify = true').guess
    assert guess('[host."http://m:5000"]\nskip_verify = true').address == "https://m:5000"
    assert guess('[host."http://m"]\nca = "a"').guess
    for text in ('[host."http://m:5000"]', '[host."http://m:80"]\nca = "a"', '[host."https://m"]\nca = "a"'):
        assert not guess(text).guess


@pytest.mark.parametrize(
    ("text", "seconds"), [("1s", 1), ("500ms", 0.5), ("1m30s", 90), ("1.5h", 5400), ("100us", 1e-4)]
)
def test_times(tmp_path, text, seconds):
    assert endpoints(tmp_path, f'dial_timeout = "{text}"')[0].dial_timeout == pytest.approx(seconds)


def test_a_proxy_may_want_a_login(tmp_path):
    assert endpoints(tmp_path, 'proxy = "http://user:pw@p:3128/"')[0].proxy == "http://user:pw@p:3128/"


def test_unknown_keys_are_left_alone_as_containerd_does(tmp_path):
    assert endpoints(tmp_path, 'of_a_later_containerd = 1\n[host."https://m"]\nthis_too = []\n')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server = ", "not valid TOML"),
        ("server = 3", "server: it is no text"),
        ('server = "https://a b"', "is no address"),
        ('server = "https://user:hunter2@h"', "server: it holds a user name"),
        ('[host."https://user:hunter2@h"]', "host 1: it holds a user name"),
        ('proxy = "http://user:hunter2@p/path"', "proxy: it is no address"),
        ('server = "https://h:99999"', "is no address"),
        ('server = "https://h/?q"', "is no address"),
        ('server = "https://"', "is no address"),
        ("host = 3", "host: it is no table"),
        ('[host]\n"https://m" = 3', "host: it is no table"),
        ('capabilities = ["fly"]', "'fly' is none of pull, resolve, push"),
        ("capabilities = 3", "capabilities: it is neither a text nor a list"),
        ("ca = [3]", "ca: it is neither"),
        ('client = [["a"]]', "client: it is no file"),
        ("client = 3", "client: it is no file"),
        ('skip_verify = "yes"', "skip_verify: it is neither true nor false"),
        ("override_path = 1", "override_path: it is neither"),
        ("header = 3", "header: it is no table"),
        ("[header]\na = 3", "a: it is neither"),
        ('[header]\n"a b" = "c"', "header 'a b': it cannot be sent"),
        ('[header]\na = "b\\nc: d"', "header 'a': it cannot be sent"),
        ('dial_timeout = "soon"', "dial_timeout: 'soon' is no time"),
        ('dial_timeout = "0s"', "is no time"),
        ('proxy = "ftp://p"', "proxy: it is no address"),
        ('proxy = "http://p/path"', "proxy: it is no address"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, text, said):
    with pytest.raises(BadInputError, match=said) as caught:
        endpoints(tmp_path, text)
    assert "hosts.toml" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_what_floe_cannot_do(tmp_path):
    with pytest.raises(UnsupportedError, match="socks5"):
        endpoints(tmp_path, 'proxy = "socks5://p:1080"')


def test_a_directory_in_the_file_s_place(tmp_path):
    (tmp_path / "r.example" / "hosts.toml").mkdir(parents=True)
    with pytest.raises((BadInputError, AccessDeniedError), match=r"cannot read .*hosts\.toml"):
        find_endpoints("r.example", (tmp_path,), plain_http=False)
