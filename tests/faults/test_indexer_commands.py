"""What people see of indexers: `floe image index --queue`, `floe indexer status`, `retry`, and what the commands refuse."""

import contextlib
import json
import os

import pytest
from support import pushing, redis_server

from floe.cli.main import main
from floe.store.catalog import Catalog
from floe.store.index import open_index
from floe.store.index.jobs import NODE, WEBHOOK, Job
from floe.store.objects import open_store

LOST, LATER = "registry.example/lost:1", "registry.example/later:1"


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The queue of a store that the commands' settings name."""
    url = redis_server.standalone().url()
    for name in [name for name in os.environ if name.startswith("FLOE_")]:
        monkeypatch.delenv(name)
    for name, value in (("CONFIG", ""), ("STORE", f"file://{tmp_path}/store"), ("INDEX", url), ("SPOOL_DIR", tmp_path)):
        monkeypatch.setenv(f"FLOE_{name}", str(value))
    with contextlib.closing(Catalog(open_store(f"file://{tmp_path}/store"), open_index(None))) as catalog:
        catalog.ensure_store()
        with contextlib.closing(pushing.open_jobs(catalog, url)) as made:
            yield made


def status(capsys):
    assert main(["indexer", "status", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_status_shows_what_waits_who_works_and_what_failed_and_why_and_retry_takes_that_back(queue, capsys):
    for ref in (LOST, LATER):
        queue.put(Job(ref, origin=NODE, asked=1.0))
    queue.bury("host:1:a", task := queue.take("host:1:a"), task.job.failed("no such image"))
    queue.retry("host:1:a", task := queue.take("host:1:a"), task.job.failed("the registry is away"), 600.0)
    assert main(["image", "index", "--queue", "registry.example/new:1"]) == 0
    capsys.readouterr()
    assert main(["indexer", "status"]) == 0
    shown = capsys.readouterr().out
    for words in (LOST, "no such image", "never", LATER, "the registry is away", "host:1:a", queue.status().stream):
        assert words in shown
    found = status(capsys)
    assert (found["waiting"], found["working"], found["retrying"], found["failed"]) == (1, 0, 1, 1)
    assert found["lag_seconds"] > 0
    assert [one["name"] for one in found["workers"]] == ["host:1:a"]
    by_image = {one["image"]: one for one in found["failures"]}
    assert (by_image[LOST]["error"], by_image[LOST]["due_seconds"]) == ("no such image", None)
    assert by_image[LATER]["id"] is None
    assert main(["indexer", "retry", "1-1"]) == 2
    assert "no job 1-1 was given up" in capsys.readouterr().err
    assert main(["indexer", "retry", by_image[LOST]["id"]]) == 0
    assert "1 jobs wait again" in capsys.readouterr().out
    found = status(capsys)
    assert (found["waiting"], found["failed"]) == (2, 0)
    assert {queue.take("x").job.ref for _ in range(2)} == {LOST, "registry.example/new:1"}


def test_a_profile_that_is_asked_for_is_not_lost_behind_what_a_registry_told(queue, capsys):
    queue.put(Job(LATER, origin=WEBHOOK))
    for words, new in (((), False), (("--profile",), True), (("--profile",), False), (("--plain-http",), True)):
        assert main(["image", "index", "--queue", *words, "--json", LATER]) == 0
        assert json.loads(capsys.readouterr().out) == {"queued": new}
    jobs = [queue.take("a").job for _ in range(3)]
    assert [(job.lay_out, job.plain_http) for job in jobs] == [("new", False), ("all", False), ("new", True)]


def test_a_queue_with_nothing_in_it(queue, capsys, tmp_path):
    assert queue.status().failures == ()
    assert main(["indexer", "status"]) == 0
    assert "nothing" in capsys.readouterr().out
    assert pushing.start_indexer(os.environ, tmp_path / "log", "--once").wait(60) == 0
    assert status(capsys)["workers"] == []


@pytest.mark.usefixtures("queue")
def test_once_ends_at_a_queue_that_refuses_it(tmp_path):
    """A wrong password does not pass by itself."""
    refused = os.environ["FLOE_INDEX"].replace("redis://", "redis://nobody:wrong@")
    log = tmp_path / "log"
    assert pushing.start_indexer({**os.environ, "FLOE_INDEX": refused}, log, "--once").wait(60) == 1
    assert "refused the user or the password" in log.read_text()


@pytest.mark.usefixtures("queue")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("indexer", "--webhook", ":0"), "--webhook needs a secret"),
        (("indexer", "--sweep", "0.1"), "--sweep 0.1"),
        (("indexer", "--webhook-secret", "/nosuch"), "--webhook-secret says nothing without --webhook"),
        (("indexer", "--webhook-registry", "host:5000"), "--webhook-registry says nothing without --webhook"),
        (
            ("indexer", "--webhook", ":0", "--webhook-secret", "/nosuch", "--webhook-registry", "registry"),
            "no registry as images' names have it",
        ),
        (("indexer", "status", "--index", "none"), "has no queue"),
        (("image", "index", "--queue", "oci:/some/folder"), "cannot be indexed by another machine"),
        (("seed", "--once"), "seeding is off"),
        (("seed", "--seed", "all", "--json"), "--json is for a single look"),
    ],
)
def test_what_cannot_be_done_is_said(words, said, capsys):
    assert main(list(words)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("queue")
@pytest.mark.parametrize(
    ("secret", "said"),
    [("nosuch", "openssl rand -hex 32 > "), ("", "Is a directory\nfloe: hint: let this user read it")],
)
def test_a_secret_that_cannot_be_read_is_said_with_what_to_do_before_anything_is_made(secret, said, tmp_path, capsys):
    store = f"file://{tmp_path}/new"
    argv = ("indexer", "--store", store, "--webhook", ":0", "--webhook-secret", str(tmp_path / secret), "--once")
    assert main(list(argv)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
