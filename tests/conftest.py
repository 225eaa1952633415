"""What every test shares: the paths to `support` and to what runs before Floe is installed, and a sweep of leftovers first and last."""

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
    if os.getuid() == 0:
        session.config.stash[_LEFT] = sweep.end()


def pytest_terminal_summary(terminalreporter, config):
    for key, whose in ((_SWEPT, "an earlier session, killed"), (_LEFT, "these tests")):
        for line in config.stash.get(key, []):
            terminalreporter.write_line(f"swept, left by {whose}: {line}")


_SWEPT, _LEFT = pytest.StashKey[list[str]](), pytest.StashKey[list[str]]()
