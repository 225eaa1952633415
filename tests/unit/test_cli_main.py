"""The command line: what it imports, what it refuses, what it completes."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest

import floe
from floe.cli import output
from floe.cli.completion import words_of
from floe.cli.main import build_parser, main
from floe.cli.options import SHARED, _metavar
from floe.cli.settings import KEYS, flag_name, load
from floe.ingest.oci import opening
from floe.store.errors import BadInputError

HEAVY = {
    "asyncio",
    "boto3",
    "botocore",
    "cachetools",
    "concurrent.futures",
    "google.auth",
    "google.protobuf",
    "grpc",
    "http.server",
    "obstore",
    "prometheus_client",
    "requests",
    "rich",
    "socketserver",
    "sqlite3",
    "ssl",
    "tomlkit",
    "tomllib",
    "urllib.request",
    "yaml",
    "zstandard",
}
COMMANDS = [
    "model push",
    "model ls",
    "model show",
    "model rm",
    "model mount",
    "model history",
    "umount",
    "image index",
    "image ls",
    "image show",
    "image rm",
    "image attach",
    "image detach",
    "image weights",
    "bento push",
    "bento image",
    "store init",
    "store check",
    "bench",
    "doctor",
    "containerd configure",
    "containerd unconfigure",
    "containerd show",
    "packfs",
    "snapshotter",
    "status",
    "version",
    "completion",
]


def run(*argv):
    return subprocess.run(
        [sys.executable, "-m", "floe", *argv], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("argv", [["--help"], ["version"], ["model", "push", "--help"], ["completion", "bash"]])
def test_help_and_version_import_nothing_heavy(argv):
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "floe", *argv],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    loaded = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines() if line.startswith("import time:")}
    assert "floe.cli.main" in loaded  # the listing is what we think it is
    assert not loaded & HEAVY


def test_version():
    found = run("version")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"floe {floe.__version__}\n", "")
    assert json.loads(run("version", "--json").stdout)["floe"] == floe.__version__
    assert run("--version").stdout == found.stdout


def test_every_command_has_a_help():
    tree = words_of(build_parser())
    for command in COMMANDS:
        assert command in tree
        with pytest.raises(SystemExit) as caught:
            main([*command.split(), "--help"])
        assert caught.value.code == 0


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["model"],
        ["frobnicate"],
        ["model", "frobnicate"],
        ["model", "push", "only-a-directory"],
        ["model", "ls", "--frobnicate"],
        ["model", "ls", "--sto", "file:///x"],
        ["image", "attach", "a", "b"],
        ["image", "detach", "a", "b"],
        ["image", "detach", "a", "b", "--all", "--model", "m"],
        ["image", "detach", "--config=", "a", "b", "--directory", "relative=m"],
        ["image", "detach", "--config=", "a", "b", "--directory", "/path"],
        ["image", "weights", "--config=", "a", "--min-size", "large"],
        ["completion", "tcsh"],
        ["--log-level", "loud", "--config=", "model", "ls"],
        ["model", "ls", "--config", "/nonexistent/floe.toml"],
        ["model", "ls", "--config=", "--store", "nonsense"],
        ["model", "ls", "--config=", "--store", "ftp://host/x"],
        ["model", "ls", "--config=", "--index", "mysql:x"],
        ["model", "show", "--config=", "Bad Name"],
        ["model", "rm", "--config=", "name:Bad Tag"],
        ["image", "attach", "--config=", "a", "b", "--model", "iris"],
        ["image", "detach", "--config=", "a", "b", "--model", "Bad Name"],
        ["packfs", "--config=", "--metrics", "0.0.0.0:9000"],
        ["snapshotter", "--config=", "--metrics", "192.0.2.1:9000"],
    ],
)
def test_wrong_use_exits_2_with_a_message(argv, capfd, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("FLOE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FLOE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("FLOE_CACHE_DIR", str(tmp_path / "cache"))
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capfd.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.startswith(("floe: error: ", "usage: "))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "usage"),
    [
        (["--frobnicate"], "floe"),
        (["ui", "--loop", "never"], "floe ui"),
        (["status", "once"], "floe status"),
        (["model", "ls", "--frobnicate"], "floe model ls"),
        (["indexer", "status", "--workers", "2"], "floe indexer status"),
    ],
)
def test_an_argument_that_a_command_does_not_know_is_answered_with_its_own_usage(argv, usage, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    unknown = " ".join(word for word in argv if f" {word}" not in f" {usage}")
    assert said.startswith(f"floe: error: unrecognized arguments: {unknown}\nfloe: hint: usage: {usage} [-h]")


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("ui", ("containerd_socket", "address", "read_deadline", "signing_key", "trusted_keys")),
        ("status", ("trusted_keys",)),
        ("doctor", ("address", "read_deadline", "signing_key", "trusted_keys")),
        ("agent", ("containerd_socket", "spool_dir", "signing_key", "trusted_keys")),
        ("debug bundle", ("containerd_socket", "signing_key", "trusted_keys", "packfs_metrics", "csi_metrics")),
    ],
)
def test_what_looks_at_a_node_takes_the_settings_that_it_goes_by_after_its_name(command, keys):
    for key in keys:
        found = build_parser().parse_args([*command.split(), f"--{flag_name(key)}", "x"])
        assert getattr(found, key) == "x"


def test_part_of_a_digest_is_answered_with_who_prints_whole_ones(capsys):
    """`floe model ls` shows twelve digits."""
    assert main(["model", "show", "--config=", "llama@6a63abca0e21"]) == 2
    said = capsys.readouterr().err
    assert "is not 64 lowercase hex digits" in said
    assert "`floe model history llama` and `floe model ls --json`" in said


def test_settings_may_stand_before_and_after_the_command():
    parser = build_parser()
    before = parser.parse_args(["--store", "file:///a", "--run-dir=/r", "model", "--index", "none", "ls"])
    after = parser.parse_args(["model", "ls", "--store", "file:///a", "--index", "none", "--run-dir", "/r"])
    for key, value in (("store", "file:///a"), ("index", "none"), ("run_dir", "/r")):
        assert getattr(before, key) == getattr(after, key) == value
    assert parser.parse_args(["--store", "file:///a", "model", "ls", "--store", "file:///b"]).store == "file:///b"
    assert not hasattr(parser.parse_args(["model", "ls"]), "store")


def test_a_flag_of_one_command_may_stand_before_it_too():
    parser = build_parser()
    push = ["push", "d", "m"]
    for argv in (
        ["--workers", "2", "model", *push],
        ["model", "--workers", "2", *push],
        ["model", *push, "--workers=2"],
    ):
        assert parser.parse_args(argv).workers == "2"
    for key in KEYS:
        assert getattr(parser.parse_args([f"--{flag_name(key)}", "x", "model", "ls"]), key) == "x"
    assert parser.parse_args(["--workers", "2", "model", *push, "--workers", "3"]).workers == "3"
    assert "--workers" not in parser.format_help()


@pytest.mark.parametrize(
    ("flags", "plain"),
    [
        ([], (False, False)),
        (["--plain-http"], (True, True)),
        (["--source-plain-http"], (True, False)),
        (["--target-plain-http"], (False, True)),
    ],
)
def test_source_and_target_may_differ_in_tls(monkeypatch, flags, plain):
    asked = []

    def opener(side):
        def open_(_text, *, plain_http=False, registry_config=()):
            asked.append((side, plain_http))
            if side == "target":
                raise BadInputError("far enough")
            return io.BytesIO()  # it can be closed

        return open_

    monkeypatch.setattr(opening, "open_source", opener("source"))
    monkeypatch.setattr(opening, "open_target", opener("target"))
    argv = ["image", "attach", "--config=", "--store", "memory://", "--index", "none", "a", "b", "--model", "m=/m"]
    assert main([*argv, *flags]) == 2
    assert asked == [("source", plain[0]), ("target", plain[1])]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_holds_whatever_a_name_holds(monkeypatch, encoding):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding))
    value = {"raw": os.fsdecode(b"d\xff"), "text": "käse"}
    output.print_json(value)
    sys.stdout.flush()
    assert json.loads(buffer.getvalue().decode(encoding)) == value


def test_every_setting_has_a_flag_somewhere():
    flags = {word.text for words in words_of(build_parser()).values() for word in words}
    assert {f"--{flag_name(key)}" for key in KEYS} <= flags
    for command in COMMANDS:
        mine = {word.text for word in words_of(build_parser())[command]}
        assert {f"--{flag_name(key)}" for key in SHARED} <= mine


def test_what_help_calls_a_size_takes_one():
    sizes = [key for key in KEYS if _metavar(key) == "SIZE"]
    assert "cache_size" in sizes
    for key in sizes:
        load({key: "1MiB"}, {}, config="")


def test_a_reader_that_goes_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as stdout:
        found = subprocess.run(
            [sys.executable, "-m", "floe", "version"], stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=60
        )
    assert found.stderr == b""
    assert found.returncode == 1


COMPLETE = """
source /dev/stdin
COMP_WORDS=({words}) COMP_CWORD={last}
compopt() {{ :; }}
_floe
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("floe mod", ["model"]),
        (
            "floe model ",
            [
                *(
                    "push",
                    "ls",
                    "show",
                    "rm",
                    "profile",
                    "mount",
                    "export",
                    "verify",
                    "diff",
                    "copy",
                    "tag",
                    "history",
                    "publish",
                    "retention",
                ),
                *("sign", "verify-signature"),
            ],
        ),
        ("floe model pu", ["push", "publish"]),
        ("floe --store file:///x model sh", ["show"]),
        ("floe model push --lab", ["--label"]),
        ("floe model ls --js", ["--json"]),
        ("floe completion ", ["bash", "fish", "zsh"]),
        ("floe packfs --wor", []),
    ],
)
def test_bash_completes(line, expected):
    script = run("completion", "bash").stdout
    words = [f"'{word}'" for word in line.split(" ")]
    found = subprocess.run(
        ["bash", "-c", COMPLETE.format(words=" ".join(words), last=len(words) - 1)],
        input=script,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert [word for word in found.stdout.split() if not word.startswith("--") or "--" in line] == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_command(shell):
    script = run("completion", shell).stdout
    for command in COMMANDS:
        assert f"'{command}'" in script or f'"{command}"' in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=20)
