"""A node with everything running, looked at by a user who is not root; and all that it says, searched for secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from support import redis_server, seaweed
from support.floe_daemons import Daemons
from support.floe_node import open_to_others

SECRETS = (redis_server.PASSWORD, quote(redis_server.PASSWORD, safe=""), seaweed.SECRET_KEY)
NOBODY = 65534
# What a stranger may open: how a run directory is found busy, and by whom.
_HARMLESS = (".pid", ".lock", "packs.known")
LOOK = """
import os, socket, sys, json
found = []
for top in sys.argv[1:]:
    for folder, folders, files in os.walk(top):
        for name in files + folders:
            path = os.path.join(folder, name)
            kind = os.lstat(path).st_mode & 0o170000
            try:
                if kind == 0o140000:
                    with socket.socket(socket.AF_UNIX) as sock:
                        sock.connect(path)
                elif kind == 0o100000:
                    os.close(os.open(path, os.O_RDONLY))
                elif kind == 0o040000:
                    os.close(os.open(os.path.join(path, ".probe"), os.O_CREAT | os.O_WRONLY))
                else:
                    continue
            except OSError:
                continue
            found.append(path)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Daemons with a loose umask, on S3 and a Redis that wants a password; a model is pushed, mounted and read."""
    home = tmp_path_factory.mktemp("node")
    open_to_others(home)
    weed = seaweed.running()
    redis = redis_server.RedisServer(home / "redis", acl=True)
    before = os.umask(0)
    environ = {
        **weed.environment(),
        "FLOE_STORE": weed.url(seaweed.shared_bucket(), "nobody"),
        "FLOE_INDEX": f"redis://floe:{SECRETS[1]}@127.0.0.1:{redis.port}",
        "FLOE_LOG_LEVEL": "debug",
    }
    daemons = None
    try:
        daemons = Daemons(home / "h", environ)
        yield daemons
    finally:
        os.umask(before)
        if daemons is not None:
            daemons.close()
        redis.stop()


def said(node, *words, code=0, index=None):
    done = subprocess.run(
        [sys.executable, "-m", "floe", *words], env={**node.environ, "FLOE_INDEX": index or node.environ["FLOE_INDEX"]}, capture_output=True, text=True, check=False, timeout=100
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_stranger_opens_nothing_and_secrets_are_said_nowhere(node, tmp_path, request):
    model, target = tmp_path / "m", tmp_path / "mnt"
    model.mkdir()
    (model / "weights").write_bytes(os.urandom(3 << 20))
    text = said(node, "model", "push", model, "iris")
    text += said(node, "model", "mount", "iris", target)
    request.addfinalizer(lambda: said(node, "umount", target))
    assert (target / "weights").read_bytes() == (model / "weights").read_bytes()
    node.client.prepare("snapshot")
    text += said(node, "status") + said(node, "status", "--json") + said(node, "store", "check")
    text += said(node, "model", "ls") + said(node, "model", "mount", "missing", tmp_path / "no", code=1)
    wrong = node.environ["FLOE_INDEX"].replace(SECRETS[1], "wrong" + SECRETS[1])
    text += said(node, "status", index=wrong)

    places = [node.run_dir, node.root, node.cache, node.home]
    done = subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/python3", "-c", LOOK, *places],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    opened = [Path(path) for path in json.loads(done.stdout)]
    # Made by this test, as are the sockets for READY.
    own = [node.log("packfs"), node.log("snapshotter"), node.home / "config.toml"]
    assert [
        path
        for path in opened
        if path not in own and not path.name.endswith(_HARMLESS) and not path.name.startswith("notify-")
        and target not in path.parents
    ] == []  # fmt: skip
    sockets = [path for path in node.run_dir.rglob("*") if path.is_socket()]
    assert len(sockets) >= 4
    assert {(path, oct(path.stat().st_mode & 0o777)) for path in sockets if path.stat().st_mode & 0o077} == set()
    assert {path.stat().st_uid for path in sockets} == {0}

    logs = {path: path.read_text(errors="replace") for path in own}
    lines = {
        path: path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if _ours(path, node)
    }
    assert any("packfs" in line for line in lines.values())
    for secret in SECRETS:
        assert secret not in text
        for place, written in {**logs, **lines}.items():
            assert secret not in written, place


def _ours(path: Path, node) -> bool:
    try:
        return f"FLOE_RUN_DIR={node.run_dir}".encode() in (path.parent / "environ").read_bytes()
    except OSError:
        return False
