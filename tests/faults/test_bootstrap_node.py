"""install/bootstrap where a step fails, is interrupted, or finds what others have done meanwhile."""

import contextlib
import json
import platform
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bootstrap import flags, hostroot, install, plan, services, settings
from bootstrap.disks import Choice
from bootstrap.errors import NodeError
from bootstrap.node import MOUNTS
from bootstrap.record import Record
from bootstrap.survey import mark, nvme_transport, survey
from support.bootstrapping import LOCAL, boot_disk, entry
from support.bootstrapping import node as described
from support.own_root import ROOT, OwnRoot

from floe.store.cache import open_cache
from floe.store.errors import UnavailableError

RECORD = "/var/lib/floe/node/record.json"
EMPTY = '{"findings": []}'
CONTAINERD = "/etc/containerd/config.toml"
# Answers as systemd does for a node that runs; $did: what it was asked to do, a line each.
SYSTEMCTL = """#!/bin/sh
did=/opt/fake/did
case "$*" in
"show --property KillMode"*) echo process; exit ;;
"show --property ActiveState --value containerd.service") echo active; exit ;;
"show --property LoadState"*) echo loaded; exit ;;
"show --property ActiveState"*) grep -qx "start .*${5%.service}.*" "$did" && echo active || echo inactive; exit ;;
is-enabled*) exit ;;
show*) exit ;;
esac
echo "$*" >>"$did"
"""


@pytest.fixture
def node(tmp_path):
    """A machine for which Floe was prepared as for a disk image, and which systemd seems to run."""
    with OwnRoot(tmp_path) as node:
        node.program = f"/opt/floe/versions/{node.put_program()}/bin/floe"
        node.environ["PATH"] = f"/opt/fake:{node.environ['PATH']}"
        systemd(node)
        done = node.bootstrap("--yes", "--image", "--disks", "none", "--store", "file:///srv/store")
        assert done.returncode == 0, done.stderr
        node.boots()
        yield node


def systemd(node, *more):
    """A systemctl that is made up; `more`: lines for what it was asked to do."""
    node.write("/opt/fake/systemctl", SYSTEMCTL + "\n".join(more) + "\n", 0o755)
    node.write("/opt/fake/did", "")


def did(node):
    return node.path("/opt/fake/did").read_text().splitlines()


def record(node):
    return json.loads(node.path(RECORD).read_text())


def text(node, name):
    path: Path = node.path(name)
    return path.read_text() if path.exists() else ""


def test_that_formatting_was_begun_counts_until_the_next_boot():
    assert survey([], [mark("one"), "two@another-boot", "three"]).being_formatted == {"one"}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"transport": "pcie"}, "nvme"),
        ({"transport": "tcp"}, "tcp"),
        ({"nvme0/transport": "pcie"}, "nvme"),  # with multipath
        ({"nvme0/transport": "rdma", "nvme1/transport": "tcp"}, ""),
        ({"nvme0/transport": "pcie", "nvme1/transport": "tcp"}, ""),
        ({"model": "x"}, ""),
    ],
)
def test_how_an_nvme_disk_is_reached(tmp_path, files, told):
    """In folders as sysfs has them."""
    for name, content in files.items():
        path = tmp_path / "device" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert nvme_transport(tmp_path) == told


# a node that runs


def test_containerd_is_not_touched_when_the_daemons_do_not_start(node):
    node.write(CONTAINERD, "version = 2\n")
    systemd(node, 'case "$*" in start*) echo "Job failed." >&2; exit 1 ;; esac')
    done = node.bootstrap("--yes", "--disks", "none")
    assert (done.returncode, "Job failed." in done.stderr) == (1, True), done.stderr
    assert text(node, CONTAINERD) == "version = 2\n"
    assert not [line for line in did(node) if "containerd" in line]


def test_a_run_that_finds_all_as_it_was_asked_for_writes_nothing(node):
    before = node.changed()
    done = node.bootstrap("--yes", "--image", "--disks", "none")
    assert (done.returncode, "nothing was changed" in done.stdout) == (0, True), done
    assert node.changed() == before


CSI = "/etc/systemd/system/floe-csi.service"


def test_the_csi_driver_is_there_where_it_is_asked_for_and_goes_when_it_is_not(node):
    prepare = ("--yes", "--image", "--disks", "none")
    assert not node.path(CSI).exists()
    assert node.bootstrap(*prepare, "--csi").returncode == 0
    assert node.path(CSI).read_bytes() == (ROOT / "install/systemd/floe-csi.service").read_bytes()
    assert "nothing was changed" in node.bootstrap(*prepare).stdout  # it was asked for before
    target = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/m/mount"
    node.write("/run/floe/models/1.json", json.dumps({"mountpoint": target, "volume": "csi-1"}))
    node.write("/run/floe/models/2.json", json.dumps({"mountpoint": "/mnt/of-a-user", "volume": ""}))
    before = node.changed()
    for words in [(*prepare, "--no-csi"), (*prepare, "--declarative"), ("--yes", "--uninstall")]:
        done = node.bootstrap(*words)
        said = f"error: 1 volumes of pods are mounted by the CSI driver: {target}\n"
        assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    assert node.changed() == before
    node.path("/run/floe/models/1.json").unlink()
    assert node.bootstrap(*prepare, "--no-csi").returncode == 0
    assert not node.path(CSI).exists()
    assert "stop floe-csi.service" in did(node)


def test_the_csi_driver_starts_after_the_daemons_and_stops_before_them(node):
    node.bootstrap("--yes", "--disks", "none", "--csi")
    begun = [line for line in did(node) if line.startswith(("start", "restart"))]
    assert begun.index("start floe-csi.service") > next(n for n, line in enumerate(begun) if "floe-packfs" in line)
    services_stop = "from bootstrap import services; services.stop()"
    done = node.run(
        "/opt/floe/current/bin/python", "-c", f"import sys; sys.path.insert(0, '/opt/floe/node'); {services_stop}"
    )
    assert "floe-csi.service does not end" in done.stderr  # as this systemd has it: what was started is active
    # The agent mounts nothing, and ends; the two that the driver's volumes are mounted by are not stopped under them.
    assert [line for line in did(node) if line.startswith("stop")] == [
        "stop floe-agent.service",
        "stop floe-csi.service",
    ]


def test_a_host_that_runs_and_whose_processes_are_not_to_be_seen_is_refused(tmp_path):
    for name in ("etc", "bin", "run/systemd/system"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin/sh").touch()
    words = ["--yes", "--host-root", str(tmp_path)]
    with pytest.raises(NodeError, match="its processes are not to be seen") as caught:
        hostroot.enter(flags.parse(words), words)
    assert "hostPID" in caught.value.hint
    assert not (tmp_path / "var").exists()


@pytest.mark.parametrize(
    ("said", "tries"),
    [("E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7", 3), ("E: no network", 1)],
)
def test_apts_own_timer_is_waited_for_at_its_lists(monkeypatch, said, tries):
    answers = [SimpleNamespace(returncode=100, stderr=said, stdout="")] * 2 + [SimpleNamespace(returncode=0)]
    asked = []
    monkeypatch.setattr(install, "_LOCK_PAUSE", 0)
    monkeypatch.setattr(install, "run", lambda *words, **_: asked.append(words) or answers[len(asked) - 1])
    with pytest.raises(NodeError, match="no network") if tries == 1 else contextlib.nullcontext():
        install._update({})
    assert len(asked) == tries


def test_what_is_not_given_any_more_counts_no_more(node):
    given = {"FLOE_COMPLETION": "always", "FLOE_WORKERS": "2"}

    def install(*words, environ):
        done = node.bootstrap("--yes", "--image", "--disks", "auto", *words, environ=environ)
        assert done.returncode == 0, done.stderr
        return settings.keys_of(text(node, "/etc/floe/config.toml")), record(node)["asked"]["format"]

    install("--format", environ=given)
    found, may_format = install(environ={"FLOE_WORKERS": "2"})  # as ever: what was given before is kept
    assert (found["completion"], may_format) == ('"always"', True)
    assert install("--no-format", environ={})[1] is False
    install("--format", environ={})
    found, may_format = install("--declarative", environ={"FLOE_WORKERS": "2"})
    assert ("completion" in found, "store" in found, "workers" in found, may_format) == (False, False, True, False)


def test_settings_of_a_run_that_came_to_no_end_are_written_by_the_next(node):
    known = record(node)
    known["asked"]["settings"] |= {"store": "s3://b/p?region=r", "workers": "2"}  # saved first; then it was killed
    node.write(RECORD, json.dumps(known))
    done = node.bootstrap("--yes", "--image")
    assert done.returncode == 0, done.stderr
    found = settings.keys_of(text(node, "/etc/floe/config.toml"))
    assert (found["store"], found["workers"]) == ('"s3://b/p?region=r"', '"2"')


def test_what_people_wrote_into_the_settings_stays_at_a_second_run_and_at_uninstall(node):
    file = "/etc/floe/config.toml"
    edited = text(node, file).replace("file:///srv/store", "file:///srv/other") + "read_deadline = 20\n"
    node.write(file, edited)
    for _ in range(2):
        done = node.bootstrap("--yes", "--image", "--set", "workers=2")
        assert done.returncode == 0, done.stderr
    found = settings.keys_of(text(node, file))
    assert (found["store"], found["read_deadline"], found["workers"]) == ('"file:///srv/other"', "20", '"2"')
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert f"{file} was changed since it was written" in done.stdout + done.stderr
    assert settings.keys_of(text(node, file)) == {"store": '"file:///srv/other"', "read_deadline": "20"}


def test_settings_that_nobody_changed_go_at_uninstall(node):
    for value in ("2", "4"):
        assert node.bootstrap("--yes", "--image", "--set", f"workers={value}").returncode == 0
    assert node.bootstrap("--yes", "--uninstall").returncode == 0
    assert not node.path("/etc/floe/config.toml").exists()


def test_disks_take_the_place_of_a_cache_directory_said_earlier(node):
    for words, there in ((("--set", "cache_dir=/data/floe"), True), (("--disks", "auto"), False)):
        done = node.bootstrap("--yes", "--image", *words)
        assert done.returncode == 0, done.stderr
        assert ("cache_dir" in record(node)["asked"]["settings"]) == there
        assert ("cache_dir" in settings.keys_of(text(node, "/etc/floe/config.toml"))) == there


def test_another_file_of_containerd_is_refused_while_floe_is_in_the_first(node):
    before = node.changed()
    done = node.bootstrap("--yes", "--image", "--containerd-config", "/etc/containerd/conf.d/floe.toml")
    assert (done.returncode, f"Floe was put into {CONTAINERD}, not" in done.stderr) == (2, True), done.stderr
    assert node.changed() == before
    assert node.bootstrap("--yes", "--image", "--containerd-config", CONTAINERD).returncode == 0


def test_a_secret_that_is_added_or_taken_away_is_a_reason_to_replace_the_daemons(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "PLACE", tmp_path)
    before = services.state()
    drop_in = tmp_path / "floe-packfs.service.d/secrets.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nEnvironment=AWS_SHARED_CREDENTIALS_FILE=/etc/floe/secrets/aws-credentials\n")
    assert services.state() != before
    drop_in.unlink()
    assert services.state() == before


def test_the_doctor_looks_with_the_credentials_that_the_unit_gives_the_daemon(monkeypatch, tmp_path):
    variables = {"AWS_SHARED_CREDENTIALS_FILE": "/etc/floe/secrets/aws-credentials", "NOTIFY_SOCKET": "/run/x"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["/bin/sh", "-c", "echo; read end"], env=variables, **pipes) as keeper:
        keeper.stdout.readline()  # it has its variables
        monkeypatch.setattr(install, "property_of", lambda *_: str(keeper.pid))
        seen = {}
        monkeypatch.setattr(
            install, "run", lambda *_, environ, **__: seen.update(environ) or SimpleNamespace(stdout=EMPTY)
        )
        install._examine({}, Record(tmp_path / "none"))
        keeper.kill()
    assert seen["AWS_SHARED_CREDENTIALS_FILE"] == variables["AWS_SHARED_CREDENTIALS_FILE"]
    assert "NOTIFY_SOCKET" not in seen


# a boot


@pytest.fixture
def known(tmp_path, monkeypatch):
    """The record of a node with a cache disk, and its settings, for steps that are called one by one."""
    for module in (install, plan):
        monkeypatch.setattr(module, "survey", lambda *_: described(boot_disk()))
    monkeypatch.setattr(settings, "FILE", tmp_path / "etc/config.toml")
    monkeypatch.setattr(settings, "metadata", lambda **_: {})
    monkeypatch.setattr(install, "installed_checker", lambda: settings.Checker(path=ROOT))
    known = Record(tmp_path / "record")
    known.data |= {"asked": {"disks": "auto", "raid0": False, "format": True, "settings": {}}, "containerd": False}
    install.write_settings({}, Choice("own", ("/mnt/floe-cache-0/cache",), size="95%"), known)
    assert settings.keys_of(settings.FILE.read_text()) == {
        "cache_dir": '"/mnt/floe-cache-0/cache"',
        "cache_size": '"95%"',
    }
    return known


@pytest.mark.parametrize("error", [NodeError("mkfs failed", "look"), ValueError("list.remove"), KeyError("path")])
@pytest.mark.parametrize("step", [(install.storage, "apply"), (plan, "survey")], ids=["apply", "survey"])
def test_whatever_a_boot_fails_with_the_cache_is_not_left_below_the_mountpoint(known, monkeypatch, capfd, step, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(*step, fails)
    assert install.boot(known) == 1
    assert settings.keys_of(settings.FILE.read_text()) == {}
    assert str(error) in capfd.readouterr().err


def test_a_boot_writes_what_is_still_to_be_written_and_leaves_people_s_lines(known, monkeypatch):
    monkeypatch.setattr(install.storage, "apply", lambda *_: [])
    monkeypatch.setattr(plan, "choose_cache", lambda *_: None)
    monkeypatch.setattr(install, "choose_cache", lambda *_: None)
    known.asked["settings"] = {"workers": "2", "store": "file:///a", "log_level": "debug"}
    install.write_settings({"workers": "2", "store": "file:///a"}, None, known)  # log_level: a run was killed before
    kept = (
        settings.FILE.read_text().replace('store = "file:///a"', 'store = "file:///b"').replace('workers = "2"\n', "")
    )
    settings.FILE.write_text(kept)
    for _ in range(2):
        install.boot(known)
        found = settings.keys_of(settings.FILE.read_text())
        assert (found["store"], found.get("workers"), found["log_level"]) == ('"file:///b"', None, '"debug"')


RAW, EPHEMERAL = "gke-local-nvme-ssd=true", "gke-ephemeral-storage-local-ssd=true"


@pytest.mark.parametrize(
    ("attributes", "formats"),
    [
        ({}, True),
        ({"kube-labels": f"a=b,cloud.google.com/{RAW}", "kube-env": "x"}, True),
        ({"kube-labels": f"a=b,cloud.google.com/{EPHEMERAL}"}, False),
        ({"kube-env": "x"}, False),
        (None, False),  # the metadata server does not answer
    ],
)
def test_a_boot_leaves_disks_alone_that_gke_may_want(known, monkeypatch, capfd, attributes, formats):
    def metadata(**_):
        if attributes is None:
            raise NodeError("the metadata server does not answer")
        return attributes

    disk = entry("/dev/nvme1n1", **LOCAL)
    monkeypatch.setattr(plan, "survey", lambda *_: described(boot_disk(), disk, empty=["/dev/nvme1n1"]))
    monkeypatch.setattr(settings, "metadata", metadata)
    formatted = []
    monkeypatch.setattr(install.storage, "apply", lambda choice, _: formatted.extend(choice.to_format) or [])
    install.boot(known)
    assert bool(formatted) == formats
    assert ("/dev/nvme1n1 is empty, and the platform may want it" in capfd.readouterr().err) == (not formats)
    assert bool(settings.keys_of(settings.FILE.read_text())) == formats


def test_a_disk_that_was_named_is_found_by_what_tells_it_from_others(known, monkeypatch):
    def machine(*serials):
        """Empty disks, in the order of their names."""
        names = [f"/dev/nvme{number}n1" for number in range(1, len(serials) + 1)]
        disks = [entry(name, **LOCAL, serial=serial) for name, serial in zip(names, serials, strict=True)]
        monkeypatch.setattr(plan, "survey", lambda *_: described(boot_disk(), *disks, empty=names))

    def chosen(asked):
        return [disk.path for disk in plan.choose_cache(asked, {}, known).to_format]

    machine("mine", "theirs")
    asked = plan.merge_asked({}, flags.parse(["--disks", "/dev/nvme1n1", "--format"]))
    assert chosen(asked) == ["/dev/nvme1n1"]
    asked["identities"] = plan.identities(asked)
    machine("theirs", "mine")
    assert chosen(asked) == ["/dev/nvme2n1"]
    assert plan.identities(asked) == asked["identities"]
    machine("theirs")
    with pytest.raises(NodeError, match="/dev/nvme1n1 is not the disk that was named by it") as caught:
        chosen(asked)
    assert "/dev/disk/by-id" in caught.value.hint
    assert chosen(plan.merge_asked(asked, flags.parse(["--disks", "/dev/nvme1n1"]))) == ["/dev/nvme1n1"]


def test_a_kernel_that_cannot_mount_trees_is_said_at_the_boot_of_an_image(known, monkeypatch, capfd):
    monkeypatch.setattr(platform, "release", lambda: "5.15.0-91-generic")
    assert install.boot(known) == 1
    assert "error: Linux 5.15.0-91-generic is older than 5.16" in capfd.readouterr().err


def test_a_cache_disk_that_is_not_mounted_is_left_out(tmp_path):
    missing = Path(f"{MOUNTS}977/cache")
    with pytest.raises(UnavailableError, match=f"no disk is mounted at {missing.parent}"):
        open_cache([missing])
    cache = open_cache([missing, tmp_path / "cache"])
    assert [member.root for member in cache.members] == [tmp_path / "cache"]
    assert not missing.parent.exists()


def test_a_boot_does_not_wait_for_containerd_which_waits_for_it(node):
    node.write(CONTAINERD, "version = 2\n")
    done = node.boot()
    assert done.returncode == 0, done.stderr
    assert did(node) == ["--no-block restart containerd.service"]
    assert "floe" in text(node, CONTAINERD)


def test_a_daemon_that_is_started_again_does_not_start_the_unit_of_the_boot():
    unit = (ROOT / "install/bootstrap/floe-node.service").read_text()
    assert [line for line in unit.splitlines() if line.startswith(("WantedBy", "RequiredBy"))] == [
        "WantedBy=multi-user.target"
    ]


# uninstall


def test_uninstall_is_refused_while_something_puts_floe_back(node):
    drop_in = "/etc/systemd/system/containerd.service.d/50-floe.conf"
    node.write(drop_in, "[Service]\nExecStartPre=-/usr/local/bin/floe containerd configure\n")
    before = node.changed()
    done = node.bootstrap("--yes", "--uninstall")
    assert (done.returncode, drop_in in done.stderr, "extras.sh remove /" in done.stderr) == (1, True, True)
    assert node.changed() == before
    # systemd goes by it until its units are read anew.
    node.path(drop_in).unlink()
    systemd(node, 'case "$*" in "restart containerd.service") /usr/local/bin/floe containerd configure ;; esac')
    done = node.bootstrap("--yes", "--uninstall")
    assert (done.returncode, "has Floe again" in done.stderr) == (1, True), done.stderr
    assert did(node) == ["restart containerd.service"]  # and nothing was stopped
    assert "floe" in text(node, CONTAINERD)
    systemd(node)
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert "restart containerd.service" in did(node)
    assert not node.path(CONTAINERD).exists()
    assert not node.path(RECORD).exists()


def test_uninstall_lists_containers_and_images_before_it_looks_at_mounts(node):
    program = text(node, node.program)
    needed = {
        "containers": [{"namespace": "k8s.io", "id": "c" * 64, "image": "example.org/a:1", "running": True}],
        "images": [{"namespace": "k8s.io", "name": f"example.org/{number}:1"} for number in range(50)],
    }
    nothing = {"containers": [], "images": []}
    listed = ("container ccccccccccccc of example.org/a:1 (k8s.io)", "image example.org/38:1 (k8s.io)", "and 11 more")
    mounted = ("1 uses of Floe's mounts", "/somebody/uses/it")
    mounts = json.dumps({"mounts": [{"tree": "/run/floe/trees/1", "uses": ["/somebody/uses/it"]}]})
    node.write("/opt/fake/mounts", mounts)
    answers = (
        'case "$*" in *unconfigure*--dry-run*) cat /opt/fake/needed; exit ;; '
        "status*) cat /opt/fake/mounts; exit ;; esac"
    )
    node.write(node.program, program.replace("exec", f"{answers}\nexec", 1), 0o755)
    for stranded, said, unsaid in ((needed, listed, "/somebody/uses/it"), (nothing, mounted, "need Floe")):
        answer = {"changed": True, "notes": [], "stranded": {"asked": True, **stranded}}
        node.write("/opt/fake/needed", json.dumps(answer))
        before = node.changed()
        done = node.bootstrap("--yes", "--uninstall")
        assert done.returncode == 1
        assert [one for one in (*said, "hint: drain the node") if one not in done.stderr] == []
        assert unsaid not in done.stderr
        assert (node.changed(), did(node)) == (before, [])


def test_an_uninstall_that_was_killed_after_it_took_floe_out_restarts_containerd_when_it_goes_on(node):
    program = text(node, node.program)
    floe = f"{Path(sys.executable).parent}/floe"
    killed = f'case "$*" in *dry-run*|*status*) ;; *unconfigure*) {floe} "$@"; kill -9 $PPID ;; esac'
    node.write(node.program, program.replace("exec", f"{killed}\nexec"), 0o755)
    assert node.bootstrap("--yes", "--uninstall").returncode == -signal.SIGKILL
    assert (node.path(CONTAINERD).exists(), did(node)) == (False, [])
    node.write(node.program, program, 0o755)
    done = node.bootstrap("--yes", "--uninstall")
    assert done.returncode == 0, done.stderr
    assert did(node)[0] == "restart containerd.service"
