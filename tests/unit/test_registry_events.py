"""Notifications of registries: which jobs an envelope asks for, and what is refused."""

import json

import pytest

from floe.indexer.events import BODY_MAX, check_registry, jobs_of
from floe.ingest.oci.media import DOCKER_LIST, OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from floe.store.errors import BadInputError
from floe.store.index.jobs import CHECK, INDEX, WEBHOOK, Job

DIGEST = "sha256:" + "a" * 64


def event(action="push", host="registry.example:5000", **target):
    filled = {"mediaType": OCI_MANIFEST, "digest": DIGEST, "repository": "team/app", "tag": "1", **target}
    return {
        "id": "320678d8-ca14-430f-8bb6-4ca139cd83f7",
        "timestamp": "2026-03-09T14:44:26.402973972-08:00",
        "action": action,
        "target": {key: value for key, value in filled.items() if value is not None},
        "request": {"id": "6df24a34", "addr": "192.0.2.1:42", "host": host, "method": "PUT", "useragent": "test"},
        "actor": {},
        "source": {"addr": "a:5000", "instanceID": "b"},
    }


def jobs(*events, **options):
    return jobs_of(json.dumps({"events": events}).encode(), 7.0, **options)


@pytest.mark.parametrize("kind", [OCI_MANIFEST, OCI_INDEX, DOCKER_LIST])
def test_a_pushed_tag_is_indexed(kind):
    wanted = Job("registry.example:5000/team/app:1", INDEX, origin=WEBHOOK, asked=7.0)
    assert jobs(event(mediaType=kind)) == [wanted]


def test_a_deleted_manifest_is_looked_up():
    wanted = Job(f"registry.example:5000/team/app@{DIGEST}", CHECK, origin=WEBHOOK, asked=7.0)
    assert jobs(event("delete", tag=None, mediaType=None)) == [wanted]


def test_everything_else_asks_for_nothing():
    assert jobs(event("pull"), event("mount"), event(mediaType=OCI_LAYER), event(tag=None), event("delete")) == []
    assert jobs() == []


def test_each_job_comes_once():
    assert [job.ref.rpartition("/")[2] for job in jobs(event(), event(), event(tag="2"))] == ["app:1", "app:2"]


def test_the_registry_may_be_called_otherwise():
    assert jobs(event(host="10.0.0.7:5000"), registry="registry.example")[0].ref == "registry.example/team/app:1"


@pytest.mark.parametrize("text", ["registry.example", "registry:5000", "localhost", "[::1]:5000", "docker.io"])
def test_what_it_may_be_called(text):
    assert check_registry(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "registry",
        "registry.example/team",
        "https://registry.example",
        "registry_1:5000",
        "a:b",
        "registry-1.docker.io",
        " x.y",
    ],
)
def test_what_would_be_no_part_of_a_name_is_refused(text):
    with pytest.raises(BadInputError, match="no registry as images' names have it"):
        check_registry(text)


@pytest.mark.parametrize(
    "changed",
    [
        {"host": "evil/x"}, {"host": ""}, {"host": 7}, {"host": None}, {"host": "registry"}, {"repository": "../x"},
        {"repository": None}, {"repository": "A"}, {"tag": "a b"}, {"tag": ["1"]}, {"tag": "1@" + DIGEST},
        {"host": "registry-1.docker.io"}, {"action": "delete", "tag": None, "digest": "sha512:" + "a" * 128},
    ],
)  # fmt: skip
def test_names_that_are_none_are_passed_over_and_told(changed):
    """What comes with them counts."""
    told = []
    found = jobs(event(**changed), event(tag="2"), event(**changed), skipped=told.append)
    assert [job.ref for job in found] == ["registry.example:5000/team/app:2"]
    assert len(told) == 2


@pytest.mark.parametrize("events", [b"1", b"null", b"[]", b"{}", b'{"action": "push"}', b'{"action": []}'])
def test_events_that_are_none_ask_for_nothing(events):
    assert jobs_of(b'{"events": [' + events + b"]}", 0.0) == []


@pytest.mark.parametrize(
    "body",
    [
        b"", b"x", b"[]", b"{}", b'{"events": {}}', b'{"events": null}',
        b'{"events": []}' + b" " * BODY_MAX, b'{"events": [' + b"[" * 100 + b"]" * 100 + b"]}", b"\xff",
    ],
)  # fmt: skip
def test_what_is_no_envelope_is_refused(body):
    with pytest.raises(ValueError):
        jobs_of(body, 0.0)
