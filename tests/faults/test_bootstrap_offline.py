"""bootstrap-node.sh --offline: the program out of a directory of wheels, on a machine without a network and without a compiler."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
from support.own_root import OwnRoot
from support.wheelhouse import floe_wheel, pip_wheel, wheelhouse

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "as", "ld", "make")
PREPARE = ("--yes", "--image", "--disks", "none")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    return wheelhouse(tmp_path_factory.mktemp("offline") / "wheels")


@pytest.fixture
def node(tmp_path):
    with OwnRoot(tmp_path) as node:
        for place in node.environ["PATH"].split(":"):
            for name in COMPILERS:
                if Path(place).is_relative_to("/usr") or Path(place).is_relative_to("/bin"):
                    node.path(f"{place}/{name}").unlink(missing_ok=True)
        assert node.run("sh", "-c", "command -v " + " || command -v ".join(COMPILERS)).returncode != 0
        yield node


@pytest.fixture
def offered(node, wheels):
    """The wheels, where the machine may read them."""
    place = node.scratch / "wheels"
    shutil.copytree(wheels, place, copy_function=os.link)
    return place


def without_venv(node):
    """As Debian and Ubuntu are without python3-venv."""
    shutil.rmtree(node.path(f"{sysconfig.get_path('stdlib')}/ensurepip"))


@pytest.mark.slow  # pip unpacks some forty wheels
@pytest.mark.timeout(600)
def test_a_checkout_with_the_wheels_of_what_it_needs(node, offered):
    assert node.run("sh", "-c", "ls /sys/class/net; ip -brief link", isolated=True).stdout.count("UP") == 0
    done = node.bootstrap(*PREPARE, "--offline", offered, "--store", "s3://bucket/x", isolated=True, seconds=500)
    assert done.returncode == 0, done.stderr
    assert "installed Floe" in done.stdout
    program = node.run("/usr/local/bin/floe", "version")
    assert program.returncode == 0, program.stderr
    # Its own environment, and nothing of the tests' in it.
    where = node.run(
        "/opt/floe/current/bin/python", "-I", "-c", "import floe, boto3, obstore; print(floe.__file__)"
    ).stdout
    assert where.startswith("/opt/floe/")
    again = node.bootstrap(*PREPARE, "--offline", offered, isolated=True)
    assert (again.returncode, "nothing was changed" in again.stdout) == (0, True), again
    booted = node.boot(isolated=True)
    assert booted.returncode == 0, booted.stderr
    done = node.bootstrap("--yes", "--uninstall", isolated=True)
    assert done.returncode == 0, done.stderr
    left = [path for path in node.changed() if "floe" in path and not path.startswith(str(node.scratch))]
    assert left == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheels_alone_and_a_python_without_venv(node, offered):
    floe_wheel(offered)
    pip_wheel(offered)
    without_venv(node)
    said = node.bootstrap("--dry-run", *PREPARE[1:], "--offline", offered, isolated=True).stdout
    assert f"from {offered}/floe-" in said
    done = node.bootstrap(*PREPARE, "--offline", offered, isolated=True, seconds=500)
    assert done.returncode == 0, done.stderr
    program = node.run("/usr/local/bin/floe", "version")
    assert program.returncode == 0, program.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_missing_wheel_is_named_and_a_second_run_finishes(node, offered, wheels):
    (missing,) = offered.glob("obstore-*.whl")
    missing.unlink()
    done = node.bootstrap(*PREPARE, "--offline", offered, isolated=True, seconds=500)
    assert done.returncode == 1
    assert "obstore" in done.stderr
    assert f"hint: see that {offered} has the wheels of all packages, for this Python" in done.stderr
    assert not node.path("/usr/local/bin/floe").exists()
    assert not node.path("/etc/floe").exists()
    os.link(wheels / missing.name, missing)
    done = node.bootstrap(*PREPARE, "--offline", offered, isolated=True, seconds=500)
    assert done.returncode == 0, done.stderr
    assert node.run("/usr/local/bin/floe", "version").returncode == 0


def test_without_venv_and_without_a_wheel_of_pip_it_is_refused(node):
    place = node.scratch / "wheels"
    place.mkdir()
    (place / "boto3-1.0-py3-none-any.whl").touch()
    without_venv(node)
    before = node.changed()
    done = node.bootstrap(*PREPARE, "--offline", place, isolated=True)
    assert done.returncode == 1
    assert "--offline, and this system lacks python3-venv" in done.stderr
    assert "hint: put a wheel of pip beside the others" in done.stderr
    assert node.changed() == before
