"""`floe doctor` before real faults: each is found, graded, and answered with what mends it."""

import email.utils
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import seaweed
from support.containerd import each_version, versions
from support.floe_daemons import Daemons
from support.floe_node import wait_until
from support.redis_server import RedisServer
from support.s3gate import S3Gate
from support.slow_disk import SlowDisk, ext4_disk

from floe.cli.main import main
from floe.doctor import disk, kernel, units
from floe.mount.probe import probe
from floe.mount.runner import MountRunner
from floe.store.cache.durable import current_boot_id
from floe.store.errors import PreconditionError
from floe.store.objects import open_store


@pytest.fixture(autouse=True)
def _machine(monkeypatch, tmp_path):
    """A node of one's own: a store in a folder, no daemon, no containerd."""
    for name in list(os.environ):
        if name.startswith(("FLOE_", "AWS_")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    for name, value in {
        "CONFIG": "", "STORE": f"file://{home}/store", "INDEX": "none", "CACHE_DIR": home / "cache", "RUN_DIR": home / "run", "ROOT": home / "root",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"FLOE_{name}", str(value))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(home))
    (home / "cache").mkdir(parents=True)
    assert main(["store", "init"]) == 0


@pytest.fixture
def doctor(capsys, tmp_path):
    """Run it: exit status, and the findings by check."""

    def run(*argv, config=tmp_path / "config.toml"):
        capsys.readouterr()
        code = main(["doctor", "--containerd-config", str(config), *map(str, argv), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["exit_status"] == code
        checks = {}
        for finding in found["findings"]:
            assert finding["level"] in ("ok", "skipped") or finding["mend"], finding
            checks.setdefault(finding["check"], []).append(SimpleNamespace(**finding))
        return code, checks

    return run


def only(found, level):
    """The finding, which is the only one of its check, and of that level."""
    (one,) = found
    assert one.level == level, one
    return one


def listing(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_node_without_daemons_has_warnings_and_nothing_is_written(doctor, tmp_path, capsys):
    before = listing(tmp_path)
    code, found = doctor("--containerd", versions()[-1].bin / "containerd")
    assert code == 3
    assert "systemctl start" in only(found["run directory"], "warning").mend
    assert only(found["packfs"], "warning").mend == "systemctl start floe-packfs"
    assert only(found["snapshotter"], "warning").mend == "systemctl start floe-snapshotter"
    assert "floe containerd configure" in only(found["containerd configuration"], "warning").mend
    only(found["store"], "ok")
    only(found["credentials"], "ok")
    only(found["cache disk speed"], "skipped")
    only(found["own files"], "ok")
    assert listing(tmp_path) == before
    assert main(["doctor", "--containerd-config", str(tmp_path / "config.toml")]) in (1, 3)
    shown = capsys.readouterr().out
    assert "systemctl start floe-packfs" in shown
    assert shown.splitlines()[-1].endswith("skipped")


@pytest.mark.slow
def test_with_both_daemons_and_containerd_configured_they_are_well(doctor, tmp_path, monkeypatch):
    version = versions()[-1]
    daemons = Daemons(tmp_path / "h")
    try:
        for name, value in daemons.environ.items():
            if name.startswith("FLOE_"):
                monkeypatch.setenv(name, value)
        config = tmp_path / "config.toml"
        binary = ("--containerd", str(version.bin / "containerd"))
        daemons.floe("containerd", "configure", "--containerd-config", config, *binary)
        daemons.floe("store", "init")
        _, found = doctor(*binary)
        for check in ("packfs", "snapshotter", "run directory", "containerd configuration", "containerd", "store"):
            only(found[check], "ok")
        # The socket that containerd dials is another.
        monkeypatch.setenv("FLOE_ADDRESS", str(tmp_path / "else.sock"))
        assert str(tmp_path / "else.sock") in only(doctor(*binary)[1]["containerd configuration"], "error").text
    finally:
        daemons.close()


@each_version()
def test_what_is_wrong_in_containerd_s_configuration(version, doctor, tmp_path, monkeypatch):
    config = tmp_path / "config.toml"
    binary = ("--containerd", str(version.bin / "containerd"))
    assert main(["containerd", "configure", "--containerd-config", str(config), *binary]) == 0
    text = config.read_text()

    def said(changed):
        config.write_text(changed)
        return doctor(*binary)[1]["containerd configuration"]

    only(said(text), "ok")
    levels = {one.level: one.text for one in said(text.replace("layers = false", "layers = true"))}
    assert "discard_unpacked_layers" in levels["error"]
    assert "was changed since" in levels["warning"]
    off = 'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
    assert any("CRI is switched off" in one.text for one in said(off + text) if one.level == "error")
    if version.is_2:
        gone = said(
            text.replace('platform = "linux/', 'platform = "linux/').replace('snapshotter = "floe"\n', "", 2)[
                : text.rindex("[[")
            ]
        )
        assert any(one.level in ("warning", "error") for one in gone)
        cut = said(text[: text.rindex("[[")])
        assert any("unpacks for no floe" in one.text for one in cut if one.level == "error")
    assert "--runtime" not in "".join(one.mend for one in said(off + text))
    if version.is_2:  # what mends it leaves it to that handler
        config.unlink()
        configure = ["containerd", "configure", "--containerd-config", str(config), "--runtime", "runc-floe", *binary]
        assert main(configure) == 0
        changed = only(said(config.read_text() + "# theirs\n"), "warning")
        assert "configure" in changed.mend
        assert "--runtime runc-floe" in changed.mend
    broken = only(said("nonsense ["), "error")
    assert "dump" in broken.text or "TOML" in broken.text


def test_a_run_directory_that_others_may_write_and_a_socket_that_is_none(doctor, tmp_path):
    run_dir = Path(os.environ["FLOE_RUN_DIR"])
    run_dir.mkdir()
    run_dir.chmod(0o777)
    (run_dir / "snapshotter.sock").write_text("")
    code, found = doctor()
    assert code == 1
    assert only(found["run directory"], "error").mend == f"chmod go-w {run_dir}"
    assert any(one.mend == f"rm {run_dir}/snapshotter.sock" for one in found["snapshotter"] if one.level == "error")


def test_redis_that_drops_keys_and_redis_that_is_not_there(doctor, tmp_path, monkeypatch):
    server = RedisServer(tmp_path / "redis", "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
    try:
        monkeypatch.setenv("FLOE_INDEX", f"redis://127.0.0.1:{server.port}")
        code, found = doctor()
        assert code == 3
        assert "noeviction" in only(found["index eviction"], "warning").mend
        with server.client() as client:  # by what is said, it is mended
            client.config_set("maxmemory-policy", "noeviction")
        found = doctor()[1]
        assert "index eviction" not in found
        only(found["index"], "ok")
    finally:
        server.stop()
    code, found = doctor()
    assert code == 3
    assert str(server.port) in only(found["index"], "warning").text


def test_each_command_that_redis_does_not_let_a_user_give(doctor, tmp_path, monkeypatch):
    server = RedisServer(tmp_path / "redis", acl=True)
    try:
        monkeypatch.setenv("FLOE_INDEX", server.url(user="node"))
        only(doctor("--probe-writes")[1]["index permissions"], "ok")  # a reader's
        code, found = doctor("--role", "writer", "--probe-writes")
        assert code == 3
        for word in ("DEL", "HDEL", "EVAL", "HGET"):
            assert f"+{word.lower()}" in only(found["index permissions"], "warning").mend
        server.ask("ACL", "SETUSER", "node", "-hgetall")
        found = doctor()[1]
        assert "+hgetall (" in only(found["index permissions"], "warning").mend
        server.ask("ACL", "SETUSER", "node", "+hgetall")  # as it says
        only(doctor()[1]["index permissions"], "ok")
        monkeypatch.setenv("FLOE_INDEX", server.url(user="floe"))
        only(doctor("--role", "writer")[1]["index permissions"], "skipped")
        only(doctor("--role", "writer", "--probe-writes")[1]["index permissions"], "ok")
        for word in ("set", "hset", "hsetnx", "eval", "del"):
            server.ask("ACL", "SETUSER", "floe", f"-{word}")
            found = doctor("--role", "writer", "--probe-writes")[1]
            assert word.upper() in only(found["index permissions"], "warning").text
            server.ask("ACL", "SETUSER", "floe", f"+{word}")
        wait_until(lambda: server.ask("DBSIZE") == 0)  # what a note was tried with expires
    finally:
        server.stop()


@pytest.fixture
def gate(monkeypatch):
    for name, value in seaweed.running().environment().items():
        monkeypatch.setenv(name, value)
    with S3Gate(seaweed.running(), {seaweed.ACCESS_KEY: None}) as made:
        monkeypatch.setenv("FLOE_STORE", made.address(seaweed.shared_bucket(), f"doctor/{uuid.uuid4().hex}"))
        yield made


def objects():
    store = open_store(os.environ["FLOE_STORE"], retry=False)
    found = {info.key for info in store.list("")}
    store.close()
    return found


def test_a_bucket_without_a_store_and_each_permission_that_is_missing(doctor, gate):
    assert only(doctor()[1]["store"], "warning").mend == "floe store init"
    assert main(["store", "init"]) == 0
    kept = objects()
    found = doctor()[1]
    only(found["store"], "ok")
    assert "environment" in only(found["credentials"], "ok").text
    only(found["clock"], "ok")
    gate.denied = {"s3:ListBucket"}
    code, found = doctor()
    assert code == 1
    assert any("s3:ListBucket" in one.mend and "list" in one.text for one in found["store"])
    gate.denied = {"s3:GetObject"}
    assert {"s3:GetObject" in one.mend for one in doctor()[1]["store"]} == {True}
    gate.denied = {"s3:PutObject", "s3:DeleteObject"}
    only(doctor()[1]["store"], "ok")  # a reader's needs are met
    _, found = doctor("--role", "writer")
    assert [one.level for one in found["store"]] == ["ok", "skipped"]
    _, found = doctor("--role", "writer", "--probe-writes")
    assert {one.level for one in found["store"]} == {"error"}
    assert all("s3:PutObject" in one.mend for one in found["store"])
    gate.denied = set()
    assert only(doctor("--role", "remover", "--probe-writes")[1]["store"], "ok")
    assert objects() == kept


def test_a_user_of_the_server_who_may_only_read(doctor, monkeypatch):
    """SeaweedFS's own refusals, nobody in between."""
    weed = seaweed.running()
    for name, value in weed.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLOE_STORE", weed.url(seaweed.shared_bucket(), f"doctor/{uuid.uuid4().hex}"))
    assert main(["store", "init"]) == 0
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.READER_SECRET)
    only(doctor()[1]["store"], "ok")
    _, found = doctor("--role", "writer", "--probe-writes")
    assert any("put is denied" in one.text for one in found["store"] if one.level == "error")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    only(doctor()[1]["store"], "error")


@pytest.mark.parametrize(("seconds", "level"), [(-3600, "error"), (3600, "error"), (120, "warning"), (0, "ok")])
def test_a_clock_that_is_not_the_server_s(doctor, gate, monkeypatch, seconds, level):
    monkeypatch.setattr(
        BaseHTTPRequestHandler,
        "date_time_string",
        lambda *_: email.utils.formatdate(time.time() + seconds, usegmt=True),
    )
    found = only(doctor()[1]["clock"], level)
    if seconds:
        assert ("behind" if seconds > 0 else "ahead") in found.text
        assert "set-ntp" in found.mend


def test_credentials_that_are_not_there_and_those_that_expire(doctor, gate, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    code, found = doctor()
    assert code == 1
    assert "AWS_ACCESS_KEY_ID" in only(found["credentials"], "error").mend
    assert "AWS_ACCESS_KEY_ID" in only(found["store"], "error").mend
    # A program gives them out for half an hour.
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1800))
    answer = {
        "Version": 1,
        "AccessKeyId": seaweed.ACCESS_KEY,
        "SecretAccessKey": seaweed.SECRET_KEY,
        "SessionToken": "",
        "Expiration": until,
    }
    program = tmp_path / "give.py"
    program.write_text(f"print('''{json.dumps(answer)}''')")
    config = tmp_path / "aws"
    config.write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    text = only(doctor()[1]["credentials"], "ok").text
    assert "custom-process" in text
    assert until[:10] in text
    assert "renewed" in text
    monkeypatch.delenv("AWS_CONFIG_FILE")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "x")
    assert "session" in only(doctor()[1]["credentials"], "warning").text


def test_a_store_that_does_not_answer_is_left_in_time(doctor, monkeypatch):
    for name, value in seaweed.running().environment().items():
        monkeypatch.setenv(name, value)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        port = silent.getsockname()[1]
        monkeypatch.setenv("FLOE_STORE", f"s3://bucket/p?endpoint=http://127.0.0.1:{port}&region=us-east-1")
        begun = time.monotonic()
        code, found = doctor("--seconds", "1")
        assert time.monotonic() - begun < 60  # of a connection's own deadlines, minutes
        assert code == 3
        assert "not done within 1 s" in only(found["store"], "warning").text


def test_a_cache_in_memory(doctor, monkeypatch, tmp_path):
    place = tmp_path / "memory"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "floe-test", place], check=True)
    try:
        monkeypatch.setenv("FLOE_CACHE_DIR", str(place))
        found = doctor()[1]
        assert "local SSD" in only(found["cache disk"], "warning").mend
        only(found["cache space"], "ok")
        with (place / "filler").open("wb") as file:
            file.write(bytes((4 << 20) - (64 << 10)))
        assert "cache_min_free" in only(doctor()[1]["cache space"], "warning").text
    finally:
        subprocess.run(["umount", place], check=True)


DISKS = {
    "nvme_card-pd": "Google Persistent Disk",
    "Amazon Elastic Block Store": "Amazon EBS",
    "nvme_card0": "",
    "Amazon EC2 NVMe Instance Storage": "",
}


@pytest.mark.parametrize("model", DISKS)
def test_a_network_disk_is_named_as_such(model, tmp_path, monkeypatch):
    """The kernel's folders of a disk with a partition, as clouds show theirs."""
    (tmp_path / "cache").mkdir()
    mount = disk.mount_of(tmp_path / "cache")._replace(device=(259, 3))
    monkeypatch.setattr(disk, "mount_of", lambda _: mount)
    whole = tmp_path / "sys/devices/pci/nvme0n1"
    for path, text in (("nvme0n1p3/partition", "3"), ("device/model", f"{model}   "), ("queue/rotational", "0")):
        (whole / path).parent.mkdir(parents=True, exist_ok=True)
        (whole / path).write_text(f"{text}\n")
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/259:3").symlink_to(whole / "nvme0n1p3")
    found = disk.look(tmp_path / "cache", tmp_path / "sys")
    assert (found.name, found.model, found.boot) == ("nvme0n1", model, True)
    assert DISKS[model] in found.network
    assert bool(found.network) == bool(DISKS[model])
    node = SimpleNamespace(cache_dirs=(tmp_path / "cache",), min_free=lambda _: 0)
    finding = next(iter(disk.kind(node, tmp_path / "sys")))
    assert finding.level == ("warning" if DISKS[model] else "ok")
    assert ("network boot disk" in finding.text) == bool(DISKS[model])
    (whole / "device/transport").write_text("tcp\n")
    assert disk.look(tmp_path / "cache", tmp_path / "sys").network.startswith(DISKS[model] or "NVMe over tcp")


def test_the_disk_s_speed_beside_the_store_s(doctor, monkeypatch):
    monkeypatch.setattr(disk, "_SECONDS", 0.1)
    assert "nothing to read" in only(doctor("--probe-writes")[1]["cache disk speed"], "ok").text
    home = Path(os.environ["FLOE_CACHE_DIR"]).parent
    with ext4_disk(home / "other") as place:
        monkeypatch.setenv("FLOE_STORE", f"file://{place}/store")
        put_pack()
        assert "one connection to the store reads" in doctor("--probe-writes")[1]["cache disk speed"][0].text
        monkeypatch.setattr(
            disk.measuring, "measure_nameless", lambda *_: SimpleNamespace(write_bytes_per_second=1000.0)
        )
        assert "local SSD" in only(doctor("--probe-writes")[1]["cache disk speed"], "warning").mend
    assert listing(Path(os.environ["FLOE_CACHE_DIR"])) == []


def put_pack():
    """Into a store that is not retried; what was just put is in this machine's memory, if the store is a folder."""
    store = open_store(os.environ["FLOE_STORE"], retry=False)
    store.put("packs/aa/" + "a" * 64, os.urandom(2 << 20))


def test_a_store_in_a_folder_is_as_fast_as_its_disk_and_not_as_memory(doctor, monkeypatch):
    monkeypatch.setattr(disk, "_SECONDS", 0.1)
    put_pack()
    # Memory reads more than any disk writes; and of one disk, what it writes and reads says nothing of where to put a cache.
    found = only(doctor("--probe-writes")[1]["cache disk speed"], "ok")
    assert "the store lies on the same disk" in found.text
    slow = SlowDisk(Path(os.environ["FLOE_CACHE_DIR"]).parent / "slow")
    try:
        monkeypatch.setenv("FLOE_STORE", f"file://{slow.path}/store")
        put_pack()
        slow.set(0.0, 8e6)
        found = only(doctor("--probe-writes")[1]["cache disk speed"], "ok")
        assert 1 < int(re.search(r"store reads (\d+) MB/s", found.text)[1]) < 16
    finally:
        slow.close()


def test_a_doctor_that_is_killed_while_it_measures_leaves_nothing_and_what_others_left_goes(doctor, monkeypatch):
    cache = Path(os.environ["FLOE_CACHE_DIR"])
    process = subprocess.Popen(
        [sys.executable, "-m", "floe", "doctor", "--probe-writes"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def writes():
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if str(fd.readlink()).startswith(f"{cache}/") and fd.stat().st_blocks:
                    return True
        return False

    wait_until(writes)
    process.kill()
    process.wait()
    assert listing(cache) == []
    for name, age in (("doctor-abcdefgh", 3600), ("doctor-zyxwvuts", 0)):
        (cache / name).mkdir()
        (cache / name / "file").write_bytes(bytes(4096))
        os.utime(cache / name, times=(time.time() - age,) * 2)
    monkeypatch.setattr(disk, "_SECONDS", 0.1)
    doctor("--probe-writes")
    assert [path.name for path in cache.iterdir()] == ["doctor-zyxwvuts"]  # it may be a live one's, of an older Floe


def test_what_the_kernel_does_with_short_files(doctor, tmp_path):
    cache, run_dir = Path(os.environ["FLOE_CACHE_DIR"]), Path(os.environ["FLOE_RUN_DIR"])
    assert "--probe-writes" in only(doctor()[1]["file-backed EROFS"], "skipped").text
    truth = probe(MountRunner(10, tmp_path / "stuck"), cache)
    only(doctor("--probe-writes")[1]["file-backed EROFS"], "ok" if truth.files else "warning")
    assert listing(cache) == []
    # As the mounter noted it, since this boot.
    (run_dir / "probes").mkdir(parents=True)
    noted = {"boot": current_boot_id(), "files": False, "why": "this kernel reads zeros where a file is too short"}
    place = run_dir / "probes" / f"{cache.stat().st_dev}.json"
    place.write_text(json.dumps(noted))
    assert "6.12.117" in only(doctor()[1]["file-backed EROFS"], "warning").mend
    place.write_text(json.dumps({**noted, "boot": "another"}))
    only(doctor()[1]["file-backed EROFS"], "skipped")


def test_a_kernel_that_lacks_things(tmp_path):
    (tmp_path / "filesystems").write_text("nodev\tsysfs\n\text4\nnodev\tfuse\n")
    found = {one.check: one for one in kernel.features(tmp_path, tmp_path, "5.10.0-32-amd64")}
    assert {name: one.level for name, one in found.items()} == {
        "kernel": "error", "fuse": "error", "overlay": "error", "erofs": "warning",
    }  # fmt: skip
    assert "mknod" in found["fuse"].mend
    assert found["erofs"].mend.startswith("modprobe erofs")
    assert next(iter(kernel.features(tmp_path, tmp_path, "6.12.1"))).level == "ok"
    # On a fresh Debian the modules are there, and nobody has mounted anything yet.
    modules = tmp_path / "modules"
    (modules / "6.1.0-1").mkdir(parents=True)
    (modules / "6.1.0-1/modules.dep").write_text("kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko\n")
    found = {one.check: one for one in kernel.features(tmp_path, tmp_path, "6.1.0-1", modules)}
    assert (found["erofs"].level, found["erofs"].text) == ("ok", "the kernel loads erofs when it is first mounted")
    assert found["overlay"].level == "error"


def test_a_limit_on_fuse_requests(tmp_path):
    node = SimpleNamespace(read_deadline=300.0)
    assert [one.level for one in kernel.fuse_timeout(node, tmp_path)] == ["ok"]
    limits = tmp_path / "sys/fs/fuse"
    limits.mkdir(parents=True)
    for name, value in (("default_request_timeout", "60"), ("max_request_timeout", "3600")):
        (limits / name).write_text(f"{value}\n")
    first, second = kernel.fuse_timeout(node, tmp_path)
    assert (first.level, second.level) == ("error", "warning")
    assert first.mend.startswith("sysctl -w fs.fuse.default_request_timeout=0")


SHOWN = {
    "Id": "floe-packfs.service", "LoadState": "loaded", "ActiveState": "active", "SubState": "running",
    "UnitFileState": "enabled", "NeedDaemonReload": "no", "NRestarts": "0", "KillMode": "process",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "level", "mend"),
    [
        ({}, "ok", ""),
        ({"LoadState": "not-found", "ActiveState": "inactive"}, "skipped", ""),
        ({"LoadState": "masked", "ActiveState": "inactive"}, "error", "systemctl unmask floe-packfs"),
        ({"LoadState": "bad-setting"}, "error", "systemd-analyze verify floe-packfs"),
        ({"ActiveState": "failed", "SubState": "failed"}, "error", "systemctl reset-failed floe-packfs"),
        ({"ActiveState": "activating", "SubState": "auto-restart"}, "error", "journalctl -u floe-packfs"),
        ({"ActiveState": "inactive", "SubState": "dead"}, "warning", "systemctl start floe-packfs"),
        ({"UnitFileState": "disabled"}, "warning", "systemctl enable floe-packfs"),
        ({"KillMode": "control-group"}, "error", "systemctl cat floe-packfs"),
        ({"NeedDaemonReload": "yes"}, "warning", "systemctl daemon-reload"),
        ({"NRestarts": "7"}, "warning", "journalctl -u floe-packfs"),
    ],
)
def test_units_in_each_state(changed, level, mend, tmp_path):
    """A systemctl that prints what systemd's prints: two units, a line a property, an empty line between them."""
    text = "\n".join(f"{name}={value}" for name, value in {**SHOWN, **changed}.items())
    well = "\n".join(f"{name}={value}" for name, value in {**SHOWN, "Id": "floe-snapshotter.service"}.items())
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\n\n{well}\nEND\n")
    program.chmod(0o755)
    first, second = units.units(None, tmp_path, str(program))
    assert (first.check, first.level, second.level) == ("floe-packfs.service", level, "ok")
    assert mend in first.mend
    assert bool(first.mend) == bool(mend)


def test_units_without_systemd_and_with_one_that_does_not_answer(tmp_path):
    (one,) = units.units(None, tmp_path / "none")
    assert one.level == "skipped"
    program = tmp_path / "systemctl"
    program.write_text("#!/bin/sh\necho Failed to connect to bus >&2\nexit 1\n")
    program.chmod(0o755)
    (one,) = units.units(None, tmp_path, str(program))
    assert (one.level, "Failed to connect to bus" in one.text) == ("error", True)


def test_keys_that_cannot_be_read_and_keys_that_do_not_fit(doctor, monkeypatch, tmp_path):
    assert "believed" in only(doctor()[1]["trusted keys"], "ok").text
    for name in ("ours", "other"):
        assert main(["key", "create", str(tmp_path / name)]) == 0
    monkeypatch.setenv("FLOE_TRUSTED_KEYS", str(tmp_path / "nowhere.pub"))
    code, found = doctor()
    assert code == 1
    assert str(tmp_path / "nowhere.pub") in only(found["trusted keys"], "error").text
    assert "trusted_keys" in only(found["trusted keys"], "error").mend
    monkeypatch.setenv("FLOE_TRUSTED_KEYS", str(tmp_path / "other.pub"))
    (tmp_path / "other.pub").chmod(0o666)
    assert only(doctor()[1]["trusted keys"], "error").mend == f"chmod go-w {tmp_path}/other.pub"
    (tmp_path / "other.pub").chmod(0o644)
    found = doctor()[1]
    only(found["trusted keys"], "ok")
    assert "signing key" not in found  # a reader signs nothing
    assert "floe key create" in only(doctor("--role", "writer")[1]["signing key"], "warning").mend
    monkeypatch.setenv("FLOE_SIGNING_KEY", str(tmp_path / "ours"))
    assert f"{tmp_path}/ours.pub" in only(doctor()[1]["signing key"], "warning").mend
    monkeypatch.setenv("FLOE_TRUSTED_KEYS", f"{tmp_path}/other.pub,{tmp_path}/ours.pub")
    only(doctor()[1]["signing key"], "ok")
    (tmp_path / "ours").chmod(0o644)
    assert only(doctor()[1]["signing key"], "error").mend == f"chmod 600 {tmp_path}/ours"
    (tmp_path / "ours").write_text("nonsense")
    (tmp_path / "ours").chmod(0o600)
    assert "floe key create" in only(doctor()[1]["signing key"], "error").mend


@each_version()
def test_a_snapshotter_floe_that_no_proxy_plugin_stands_for(version, doctor, tmp_path, capsys):
    """As half a configuration by hand leaves it."""
    place = '"io.containerd.cri.v1.images"' if version.is_2 else '"io.containerd.grpc.v1.cri".containerd'
    config = tmp_path / "config.toml"
    config.write_text(f'version = {3 if version.is_2 else 2}\n[plugins.{place}]\nsnapshotter = "floe"\n')
    binary = ("--containerd", str(version.bin / "containerd"))
    found = only(doctor(*binary)[1]["containerd configuration"], "error")
    assert "no proxy plugin" in found.text
    assert main(["containerd", "unconfigure", "--containerd-config", str(config), *binary]) == 1
    assert "did not put it there" in capsys.readouterr().err
    assert main(["containerd", "configure", "--containerd-config", str(config), *binary]) == 0  # as it says
    only(doctor(*binary)[1]["containerd configuration"], "ok")


def test_floe_on_its_own_mount(doctor, monkeypatch):
    def refuse(_):
        raise PreconditionError("this process runs from a Floe mount", hint="install Floe on the node's own disk")

    monkeypatch.setattr("floe.doctor.daemons.refuse_own_mount", refuse)
    code, found = doctor()
    assert code == 1
    assert "own disk" in only(found["own files"], "error").mend


def test_a_check_that_breaks_is_an_error_and_the_others_go_on(doctor, monkeypatch):
    monkeypatch.setattr("floe.doctor.daemons.status_of", lambda *_: 1 // 0)
    code, found = doctor("--containerd", versions()[-1].bin / "containerd")
    assert code == 1
    assert any("ZeroDivisionError" in one.text for one in found["containerd"])
    only(found["store"], "ok")


@pytest.mark.parametrize("argv", [["--seconds", "0"], ["--seconds", "nan"], ["--role", "king"]])
def test_wrong_use(argv, capsys):
    try:
        code = main(["doctor", *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert "floe: error: " in capsys.readouterr().err


def test_each_directory_of_the_cache_is_looked_at(doctor, monkeypatch, tmp_path):
    (tmp_path / "second").mkdir()
    monkeypatch.setenv("FLOE_CACHE_DIRS", f"{tmp_path}/second:{tmp_path}/third")
    found = doctor()[1]
    for check in ("cache directory", "cache disk", "cache space", "file-backed EROFS"):
        assert len(found[check]) == 3
    assert any("third" in one.text and "not made yet" in one.text for one in found["cache directory"])
