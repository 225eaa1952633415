"""What every test shares: the paths to `support` and to what runs before Floe is installed, and a sweep of leftovers first and last."""

import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "install"))

from support import sweep

# The same examples each time, so that a run fails for what was changed; `--hypothesis-profile search` draws others. How
# long one takes is the machine's affair.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")


def pytest_sessionstart(session):
    session.config.stash[_SWEPT] = sweep.begin() if os.getuid() == 0 else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    left = sweep.end() if os.getuid() == 0 else []
    session.config.stash.setdefault(_LEFT, []).extend(left)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = left


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Each worker of pytest-xdist is a session of its own, and sweeps what is its own."""
    node.config.stash.setdefault(_LEFT, []).extend(getattr(node, "workeroutput", {}).get("left", []))


def pytest_terminal_summary(terminalreporter, config):
    for key, whose in ((_SWEPT, "an earlier session, killed"), (_LEFT, "these tests")):
        for line in config.stash.get(key, []):
            terminalreporter.write_line(f"swept, left by {whose}: {line}")


@pytest.fixture(autouse=True)
def _logging_as_before():
    """Floe's commands set up logging to the stderr of their time, which in a test is that of the test alone."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


_SWEPT, _LEFT = pytest.StashKey[list[str]](), pytest.StashKey[list[str]]()
