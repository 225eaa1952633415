"""install/kubernetes/wheelhouse.sh: all wheels for every Python that a node may have."""

import contextlib
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging import tags
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

KUBERNETES = Path(__file__).resolve().parents[2] / "install/kubernetes"


def needed(python):
    """All packages that Floe wants of a Python, by what those that are installed here say of themselves."""
    found, left = set(), [("floe", frozenset([""]))]
    while left:
        one = left.pop()
        if one in found:
            continue
        found.add(one)
        with contextlib.suppress(PackageNotFoundError):
            for line in distribution(one[0]).requires or ():
                wanted = Requirement(line)
                environ = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
                if wanted.marker is None or any(wanted.marker.evaluate({**environ, "extra": name}) for name in one[1]):
                    left.append((canonicalize_name(wanted.name), frozenset(wanted.extras or [""])))
    return {name for name, _ in found}


def installable(wheels, package, minor):
    """Whether one of the wheels is for this machine's CPython 3.`minor`: its own, or one for the stable interface."""
    fits = set(tags.cpython_tags((3, minor)))
    return any(not fits.isdisjoint(parse_wheel_filename(name)[3]) for name in wheels if name.startswith(f"{package}-"))


@pytest.mark.parametrize("python", ["3.10.12", "3.11.2", "3.12.3", "3.13.5"])
def test_the_wheelhouse_names_what_only_that_python_needs(python):
    """Of Ubuntu 22.04, Debian 12, Ubuntu 24.04 and Debian 13, made with the Containerfile's."""
    line = re.search(r'^of_older="(.*)"$', (KUBERNETES / "wheelhouse.sh").read_text(), re.MULTILINE)
    assert needed(python) - needed("3.12.11") <= set(line[1].split())


@pytest.mark.slow
def test_the_wheelhouse_has_wheels_for_every_python(tmp_path):
    wheels = tmp_path / "wheels"
    made = subprocess.run(
        [KUBERNETES / "wheelhouse.sh", wheels], capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    names = [path.name for path in wheels.iterdir()]
    assert all(name.endswith(".whl") for name in names)
    assert sum(name.startswith("floe-") for name in names) == 1
    for minor in (10, 11, 12, 13):
        assert installable(names, "obstore", minor), minor
    for name in ("tomli-", "async_timeout-"):
        assert any(wheel.startswith(name) for wheel in names), name
    again = subprocess.run([KUBERNETES / "wheelhouse.sh", wheels], capture_output=True, text=True, check=False, timeout=60,
                           env={**os.environ, "PYTHON": sys.executable})  # fmt: skip
    assert (again.returncode, "not empty" in again.stderr) == (1, True)
    # What stands there is enough: nothing is looked up elsewhere.
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", place], check=True, timeout=120)
    subprocess.run(
        [place / "bin/pip", "install", "-q", "--no-index", "--find-links", wheels, "floe"], check=True, timeout=300
    )
    assert subprocess.run([place / "bin/floe", "version"], check=True, capture_output=True, timeout=60).stdout
