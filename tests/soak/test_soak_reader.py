"""The soak's reader finds what differs: else a soak without problems would say nothing."""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time

import pytest
import soak.reader
from soak import content
from soak.reader import Reader
from soak.readings import Readings
from soak.tally import Tally

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners need root")
STEPS = 150


@pytest.fixture
def tree():
    return content.random_tree(random.Random(3), big=5 << 20, model=True)


@pytest.fixture
def place(tree, tmp_path):
    content.write_directory(tree, tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture(autouse=True)
def every_problem(monkeypatch):
    monkeypatch.setattr(soak.reader, "_MOST_PROBLEMS", 10_000)


def read(tree, place, steps=STEPS):
    """What a reader says of a directory, and the reader."""
    found = []
    reader = Reader(tree, str(place), random.Random(5), found.append)
    reader.walk()
    for _ in range(steps):
        reader.step()
    return found, reader


def kinds(found, path):
    return {problem["kind"] for problem in found if problem["path"].endswith(path)}


def test_an_equal_tree_has_no_problem(tree, place):
    found, reader = read(tree, place)
    assert found == []
    assert reader.walks == 1
    assert reader.reads > STEPS / 2
    assert reader.bytes > 5 << 20


@pytest.mark.parametrize("at", [0, 4 << 20, (5 << 20) - 1])
def test_one_other_bit_is_found_however_it_is_read(tree, place, at):
    with (place / "plain/big").open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(place / "plain/big", ns=(tree["plain/big"].mtime_ns,) * 2)
    found = []
    reader = Reader({"plain/big": tree["plain/big"]}, str(place), random.Random(5), found.append)
    entry = tree["plain/big"]
    reader._span = lambda _: (max(0, at - 100), 4000)
    fd = os.open(place / "plain/big", os.O_RDONLY)
    try:
        for number, way in enumerate(reader._ways, 1):
            way("plain/big", entry, fd)
            assert len(found) >= number, way.__name__
    finally:
        os.close(fd)
    assert kinds(found, "plain/big") == {"wrong"}


def test_zeros_in_place_of_content_and_a_short_file_are_found(tree, place):
    for name, size in (("plain/big", 0), ("plain/middle", 1 << 20)):
        os.truncate(place / name, size)
        os.truncate(place / name, tree[name].size if size == 0 else size)
    found, _ = read(tree, place)
    assert "wrong" in kinds(found, "plain/big")
    assert "wrong" in kinds(found, "plain/middle")


def test_other_attributes_names_and_links_are_found(tree, place):
    def rewrite(path):
        data = (place / path).read_bytes()
        (place / path).unlink()
        (place / path).write_bytes(data)

    (place / "plain/deep").chmod(0o777)
    os.setxattr(place / "odd/attributes", "user.empty", b"x")
    (place / "odd/link").unlink()
    (place / "odd/link").symlink_to("elsewhere")
    rewrite("odd/hard")  # the other name stays the old inode
    (place / "more").write_bytes(b"")
    shutil.rmtree(place / "empty")
    found, _ = read(tree, place, steps=0)
    for path in ("plain/deep", "odd/attributes", "odd/link", "odd/hard", "more", "empty"):
        assert kinds(found, f"/{path}") | kinds([p for p in found if p["path"] == path], path), path
    assert {problem["kind"] for problem in found} == {"wrong"}


def test_a_file_that_cannot_be_read_is_a_failed_read(tree, place):
    (place / "plain/big").unlink()
    (place / "plain/big").mkdir()
    found, _ = read({"plain/big": tree["plain/big"]}, place)
    assert "failed" in {problem["kind"] for problem in found}


def test_layers_hold_a_tree_and_what_changed_of_it(tmp_path):
    """Unpacked one over the other, whiteouts applied, they are the second version."""
    rng = random.Random(11)
    first = content.random_tree(rng, big=300_000, model=True)
    second = content.next_version(rng, first)
    assert first.keys() - second.keys()
    for number, layer in enumerate((content.layer(first, "data"), content.layer(second, "data", first))):
        (tmp_path / f"{number}.tar").write_bytes(layer)
        with tarfile.open(tmp_path / f"{number}.tar") as tar:
            members = [info for info in tar if "/.wh." not in info.name]
            gone = [info.name.replace(".wh.", "") for info in tar if "/.wh." in info.name]
            for info in members:
                if not info.isdir():
                    (tmp_path / info.name).unlink(missing_ok=True)
            tar.extraction_filter = lambda member, _: member  # our own; before Python 3.12 that is so anyway
            tar.extractall(tmp_path, members)
        for name in gone:
            (tmp_path / name).unlink()
    for path, entry in second.items():  # tarfile knows neither attributes nor nanoseconds
        for name, value in entry.xattrs.items():
            os.setxattr(tmp_path / "data" / path, name, bytes.fromhex(value))
    for path, entry in sorted(second.items(), reverse=True):
        os.utime(tmp_path / "data" / path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)
    found, _ = read(second, tmp_path / "data")
    assert found == []


def test_a_reader_s_process_that_dies_or_finds_something_ends_the_run(tree, place, tmp_path):
    tally = Tally()
    readings = Readings(tmp_path / "readings", tally)
    file = content.save(tree, tmp_path / "tree.json")
    assert content.load(file) == tree
    sound = readings.start("sound", file, str(place), random.Random(1))
    readings.end(sound)
    assert tally.problems == []
    assert not tally.ending.is_set()
    killed = readings.start("killed", file, str(place), random.Random(1))
    readings._running[killed].process.kill()
    readings.end(killed)
    assert [problem.startswith("failed: killed") for problem in tally.problems] == [True]
    assert tally.ending.is_set()


def test_figures_come_while_it_reads(tree, place, tmp_path):
    file = content.save(tree, tmp_path / "tree.json")
    out = tmp_path / "out"
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    argv = [sys.executable, "-m", "soak.reader", file, place, "1", out]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": tests}) as process:
        end = time.monotonic() + 60
        while (not out.exists() or not out.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        process.stdin.close()
    assert process.returncode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[-1]["walks"] >= 1
    assert lines[-1]["bytes"] > 0
