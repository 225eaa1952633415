"""The same hosts.toml leads Floe and a real containerd to the same servers, for the same things.

Not tried here: containerd 2.1 asks for blobs also servers whose `capabilities` lack "pull"; Floe does not.
"""

import contextlib
import re
from types import SimpleNamespace

import pytest
from support.certificates import Authority
from support.containerd import Containerd, versions
from support.images import build_oci, files
from support.registry import Front, running_registry

from floe.ingest.oci.opening import open_source
from floe.ingest.oci.source import resolve

NAME = "r.example:5000"
NEWEST = versions()[-1:]
CASES = {
    "mirrors-in-order": """
        server = "{c}"
        [host."{b}"]
        [host."{a}"]
        """,
    "a-mirror-that-fails": """
        server = "{c}"
        [host."{broken}"]
        [host."{a}"]
        """,
    "no-resolve": """
        server = "{c}"
        [host."{a}"]
        capabilities = ["pull"]
        """,
    "subtable-first": """
        server = "{c}"
        [host."{b}".header]
        x-meta = ["1", "2"]
        [host."{a}"]
        """,
    "override-path": """
        [host."{elsewhere}/proxy/hub"]
        override_path = true
        """,
    "path": 'server = "{deep}/us"',
    "ca": """
        server = "{tls}"
        ca = "ca.pem"
        """,
    "client": """
        server = "{mutual}"
        ca = ["ca.pem"]
        client = [["node.pem", "node.key"]]
        """,
    "skip-verify": """
        [host."{tls}"]
        skip_verify = true
        """,
    "guess-tls": """
        [host."{tls_as_http}"]
        skip_verify = true
        """,
    "guess-none": """
        [host."{a}"]
        skip_verify = true
        """,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A registry with an image for each case, servers before it, and a containerd."""
    if not NEWEST:
        pytest.skip("no containerd here: run install/setup.sh test")
    folder = tmp_path_factory.mktemp("world")
    authority = Authority(folder / "ca")
    authority.issue("node")
    with contextlib.ExitStack() as stack:
        registry = stack.enter_context(running_registry(folder / "registry"))
        for case in CASES:
            registry.push(build_oci(folder / case, [files({case: case * 100})]).source, f"team/app:{case}")

        def front(**options):
            return stack.enter_context(Front(registry, **options))

        fronts = {
            "a": front(),
            "b": front(),
            "c": front(),
            "broken": front(status=500),
            "elsewhere": front(api="/proxy/hub"),
            "deep": front(api="/us/v2"),
            "tls": front(tls=authority.server("127.0.0.1")),
            "mutual": front(tls=authority.server("127.0.0.1", clients=authority)),
        }
        daemon = Containerd(NEWEST[0], folder)
        stack.callback(daemon.stop)
        yield SimpleNamespace(fronts=fronts, daemon=daemon, authority=authority, folder=folder)


def asked(world):
    """What the servers were asked for, tags and blobs with their queries: whom, and with which header."""
    found = {}
    for name, front in world.fronts.items():
        for _, path, headers in front.seen:
            what = re.search(r"/(manifests|blobs)/(.*)", path)
            if what and (what.group(1) == "blobs" or not what.group(2).startswith("sha256:")):
                found.setdefault(what.group(2).replace("%3A", ":"), set()).add((name, headers.get("x-meta")))
        front.seen.clear()
    return found


@pytest.mark.parametrize("case", CASES)
def test_floe_asks_whom_containerd_asks(world, case):
    config = world.folder / f"certs-{case}"
    directory = config / "r.example_5000_"
    directory.mkdir(parents=True)
    for path in (world.authority.ca, *world.folder.glob("ca/node.*")):
        (directory / path.name).write_bytes(path.read_bytes())
    addresses = {name: front.address for name, front in world.fronts.items()}
    addresses["tls_as_http"] = addresses["tls"].replace("https", "http")
    (directory / "hosts.toml").write_text(CASES[case].format(**addresses))
    for front in world.fronts.values():
        front.seen.clear()

    world.daemon.ctr("content", "fetch", "--hosts-dir", str(config), f"{NAME}/team/app:{case}")
    by_containerd = asked(world)
    with contextlib.closing(open_source(f"{NAME}/team/app:{case}", registry_config=(config,))) as source:
        image = resolve(source)
        assert [b"".join(source.open_blob(layer)) for layer in image.manifest.layers]
    by_floe = asked(world)
    assert len(by_floe) == 3  # the tag, the config, the layer
    if case == "a-mirror-that-fails":  # which Floe asks once, containerd each time
        for servers in by_containerd.values():
            servers.discard(("broken", None))
        for servers in by_floe.values():
            servers.discard(("broken", None))
    assert by_floe == by_containerd
