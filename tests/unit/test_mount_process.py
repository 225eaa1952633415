"""The mount process starts once or twice for each layer of a pull: what it imports is what a pull waits for."""

import json
import subprocess

from floe.mount.runner import _PACKAGE_ROOT, HELPER_COMMAND

SLOW = {"dataclasses", "inspect", "logging", "pathlib", "subprocess", "tempfile", "urllib.parse"}


def test_the_mount_process_imports_nothing_slow():
    script = "import json, sys, floe.mount.helper; print(json.dumps(sorted(sys.modules)))"
    python = [*HELPER_COMMAND[: HELPER_COMMAND.index("-m")], "-c", script]
    loaded = json.loads(subprocess.run(python, cwd=_PACKAGE_ROOT, capture_output=True, check=True).stdout)
    assert "floe.mount.helper" in loaded
    assert not SLOW.intersection(loaded)
