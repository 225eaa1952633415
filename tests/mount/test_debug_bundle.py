"""`floe debug bundle`: all that a bug report needs, and nothing that is secret, wherever it was planted."""

import json
import os
import stat
import tarfile

import pytest
from support.floe_node import Node, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

SECRETS = {
    "index": "s3cr3t%2Findex",
    "environment": "wJalrXUtnFEMI/K7MDENG",
    "token": "t0ken-of-nobody",
    "userinfo": "pull-passw0rd",
    "log": "header-s3cret",
    "event": "AKIAPLANTED000EXAMPLE",
    "file": "in-a-password-file",
}


@pytest.fixture
def node(tmp_path):
    (tmp_path / "h").mkdir()
    made = Node(tmp_path / "h")
    yield made
    made.clean_up()


def unpacked(path):
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_a_bundle_of_a_node_that_reads_has_all_of_it_and_no_secret(node, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(1 << 20))
    node.floe("model", "push", folder, "iris:1")
    mountpoint = node.home / "mnt"
    node.floe("model", "mount", "iris:1", mountpoint)
    assert (mountpoint / "weights").read_bytes() == (folder / "weights").read_bytes()

    (tmp_path / "password").write_text(SECRETS["file"] + "\n")
    config = (
        f'index = "redis://floe:{SECRETS["index"]}@127.0.0.1:1"\n'
        f'# by hand: password = "{SECRETS["file"]}"\n'
        'log_format = "json"\n'
    )
    (node.home / "config.toml").write_text(config)
    del node.environ["FLOE_INDEX"]
    node.environ |= {
        "AWS_SECRET_ACCESS_KEY": SECRETS["environment"],
        "FLOE_SOMEBODYS_TOKEN_HERE": SECRETS["token"],
        "HTTPS_PROXY": f"http://proxy:{SECRETS['userinfo']}@127.0.0.1:2",
        "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
    }
    with (node.run_dir / "packfs.log").open("a") as log:
        log.write(f"asked with Authorization: Bearer {SECRETS['log']}\n")
        log.write(f"GET https://user:{SECRETS['userinfo']}@registry.example/v2/ failed\n")
        log.write(f"refused: {SECRETS['environment']}\nindex redis://floe:s3cr3t/index@127.0.0.1:1\n")
    wait_until((node.run_dir / "events/packfs.jsonl").exists)  # a batch of events is written at a time
    with (node.run_dir / "events/packfs.jsonl").open("a") as events:
        events.write(json.dumps({"at": 1.0, "by": "packfs", "kind": "stall", "detail": SECRETS["event"]}) + "\n")

    path = tmp_path / "bundle.tar.gz"
    said = json.loads(node.floe("debug", "bundle", path, "--json").stdout)
    found = unpacked(path)
    for name, secret in {**SECRETS, "index, decoded": "s3cr3t/index"}.items():
        for file, data in found.items():
            assert secret.encode() not in data, (name, file)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {f"floe-debug/{name}" for name in said["files"]} | {"floe-debug/summary.json"} == set(found)

    def part(name):
        return json.loads(found[f"floe-debug/{name}"])

    assert part("settings.json")["run_dir"] == str(node.run_dir)
    assert part("settings.json")["index"].endswith("<secret>@127.0.0.1:1")
    environment = part("environment.json")
    assert environment["FLOE_RUN_DIR"] == str(node.run_dir)
    assert environment["AWS_SECRET_ACCESS_KEY"] is None
    assert part("versions.json")["packages"]["zstandard"] != "not installed"
    assert part("kernel.json")["file_systems"]["overlay"] in (True, False)
    assert part("status.json")["packfs"]["running"]
    assert [one["key"] for one in part("traces.json")] == [str(mountpoint)]
    assert "mounted" in {event["kind"] for event in part("events.json")}
    assert b"floe_packfs_kernel_reads_total" in found["floe-debug/metrics/packfs.txt"]
    assert b"registry.example" in found["floe-debug/logs/packfs.log"]
    assert "metrics/snapshotter.txt" in said["errors"]  # none runs, and the rest is there all the same

    assert "is there already" in node.floe("debug", "bundle", path, code=1).stderr
    assert unpacked(path) == found
    (node.home / "config.toml").write_text("")
    node.floe("umount", mountpoint)


def test_a_machine_without_anything_has_a_bundle_too(node, tmp_path):
    out = node.floe("debug", "bundle", tmp_path / "b.tar.gz").stdout
    assert "look through it before you send it" in out
    assert json.loads(unpacked(tmp_path / "b.tar.gz")["floe-debug/settings.json"])["store"].startswith("file://")
    assert "cannot write" in node.floe("debug", "bundle", tmp_path / "no/such/b.tar.gz", code=2).stderr
