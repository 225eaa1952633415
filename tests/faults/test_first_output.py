"""When a container first printed: the logs of containers as they are, and as they may be; a runtime that does not answer."""

import contextlib
import os
import socket

import pytest

from floe.cli import firstoutput
from floe.cli.firstoutput import first_output, told_of

KEY = "k8s.io/7/" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"2026-11-27T04:30:00.123456789Z stdout F hello\n2026-11-27T04:30:01Z stdout F x\n", (0.123456789, "stdout")),
        (b"2026-11-27T05:30:00.5+01:00 stderr P a part of a long line", (0.5, "stderr")),
        (b"2026-11-27T04:30:00Z stdout F \n", (0.0, "stdout")),
        (b"2026-13-27T04:30:00Z stdout F x\n", None),
        (b'{"log":"of docker","time":"2026-11-27T04:30:00Z"}\n', None),
        (b"2026-11-27T04:30:00Z stdout F", None),  # the text is still to come
        (b"", None),
    ],
)
def test_the_first_line_of_a_log_says_when(tmp_path, line, found):
    log = tmp_path / "0.log"
    log.write_bytes(line)
    expected = found and (pytest.approx(1795753800 + found[0], abs=1e-6), found[1])
    assert first_output(log) == expected
    # What was rotated began before.
    (tmp_path / "0.log.20261127-050000.gz").touch()
    assert first_output(log) is None


def test_what_is_no_file_is_no_log(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", ".", "missing", "missing/0.log"):
        assert first_output(tmp_path / name) is None


def test_a_runtime_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(firstoutput, "_SECONDS", 0.1)
    assert told_of(KEY, tmp_path / "missing.sock") == []
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as silent:
        silent.bind(str(tmp_path / "c.sock"))
        assert told_of(KEY, tmp_path / "c.sock") == []  # nobody listens
        silent.listen()
        assert told_of(KEY, tmp_path / "c.sock") == []
        for key in ("default/7/by-ctr", "/mnt/of/a/model"):
            assert told_of(key, tmp_path / "c.sock") == []
