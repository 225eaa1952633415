"""Five minutes of the soak: see __main__.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from soak.faults import KILLED

TESTS = Path(__file__).resolve().parents[1]
SECONDS = 300


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_five_minutes_leave_no_wrong_byte_no_failed_read_and_no_leak():
    argv = [sys.executable, "-m", "soak", "--seconds", str(SECONDS), "--json"]
    done = subprocess.run(
        argv,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["wrong_bytes"], report["failed_reads"], report["leaks"]) == (0, 0, 0)
    assert all(report["kills"][name] >= SECONDS // 18 for name in KILLED)
    assert report["reads"]["bytes compared"] > 1 << 30
    assert report["faults"]
