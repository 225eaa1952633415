"""`floe store init` and `floe store check` over every store: what is tried, named, missing, and cleaned up."""

import json
import os
import stat
import uuid

import pytest
from support import seaweed
from support.capabilities import ordinary_file_access
from support.fakegcs import FakeGCS
from support.s3gate import S3Gate

from floe.cli.main import main
from floe.store.objects import multipart, open_store
from floe.store.objects.permissions import ROLES, permissions

READER_ALLOWED = {"s3:ListBucket", "s3:GetObject", "storage.objects.list", "storage.objects.get"}


@pytest.fixture(autouse=True)
def _machine(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("FLOE_", "AWS_")):
            monkeypatch.delenv(name)
    for name, value in seaweed.running().environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLOE_CONFIG", "")
    monkeypatch.setenv("FLOE_INDEX", "none")
    monkeypatch.setenv("FLOE_STORE_TIMEOUT", "1")


@pytest.fixture
def gate():
    with S3Gate(seaweed.running(), {seaweed.ACCESS_KEY: None}) as made:
        yield made


@pytest.fixture(params=["s3", "gs"])
def server(request, gate, monkeypatch):
    """A server of either kind; FLOE_STORE names an empty store on it."""
    if request.param == "s3":
        monkeypatch.setenv("FLOE_STORE", gate.address(seaweed.shared_bucket(), f"check/{uuid.uuid4().hex}"))
        yield gate
    else:
        with FakeGCS() as google:
            monkeypatch.setenv("FLOE_STORE", google.address(google.bucket(), "check"))
            yield google


def run(capsys, *argv):
    """Exit code, the JSON on stdout, stderr."""
    code = main(["store", *argv, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def states(found):
    return {entry["operation"]: entry["state"] for entry in found["operations"]}


def keys():
    store = open_store(os.environ["FLOE_STORE"], retry=False)
    found = {info.key for info in store.list("")}
    store.close()
    return found


def all_permissions(url):
    return {name for operation in ROLES for name in permissions(url, operation)}


def test_all_is_tried_named_and_cleaned_up(server, capsys):
    code, found, err = run(capsys, "check")
    assert (code, err) == (0, "")
    assert list(states(found)) == list(ROLES)
    assert set(states(found).values()) == {"ok"}
    assert {name for entry in found["operations"] for name in entry["permissions"]} == all_permissions(found["store"])
    assert found["roles"] == {"reader": True, "writer": True, "remover": True}
    assert (found["conditional_puts"], found["missing_policy"], found["left_objects"]) == ("honoured", None, [])
    assert keys() == set()
    store = open_store(os.environ["FLOE_STORE"], retry=False)
    assert store.multipart.uploads.find("") == []
    store.close()


def test_a_reader_s_rights_are_a_reader_s(server, capsys):
    open_store(os.environ["FLOE_STORE"], retry=False).put("floe.json", b'{"not": "read as such"}')
    server.denied = all_permissions(os.environ["FLOE_STORE"]) - READER_ALLOWED
    code, found, err = run(capsys, "check", "--role", "reader")
    assert (code, err) == (0, "")
    assert found["roles"] == {"reader": True, "writer": False, "remover": False}
    assert {states(found)[name] for name in ("list", "get", "ranged get")} == {"ok"}
    assert {states(found)[name] for name in ("put", "multipart upload", "delete")} == {"denied"}
    code, found, _ = run(capsys, "check")
    assert code == 1
    assert found["satisfied"] is False
    missing = found["missing_policy"]
    named = missing.get("permissions") or [a for s in missing["Statement"] for a in s["Action"]]
    assert set(named) <= server.denied
    assert any("ut" in name or "create" in name for name in named)
    assert keys() == {"floe.json"}


@pytest.mark.parametrize("operation", ["list", "get", "put", "delete", "abort an upload", "resume an upload"])
def test_each_thing_denied_is_named_and_only_what_needs_it_fails(server, capsys, operation):
    url = os.environ["FLOE_STORE"]
    open_store(url, retry=False).put("floe.json", b"{...}")
    server.denied = {permissions(url, operation)[0]}
    found = run(capsys, "check")[1]
    denied = {entry["operation"] for entry in found["operations"] if entry["state"] == "denied"}
    assert operation in denied
    # Google counts a replacement as a deletion.
    needs = {name for name in ROLES if server.denied & set(permissions(url, name))}
    assert denied <= needs
    needy_roles = {ROLES[name] for name in denied} - {ROLES[name] for name in ("abort an upload", "resume an upload")}
    assert all(not found["roles"][role] for role in needy_roles)
    assert found["roles"]["reader"] == (operation not in ("list", "get"))
    server.denied = set()
    assert keys() - {"floe.json"} == set(found["left_objects"])
    assert operation == "delete" or not found["left_objects"]


def test_the_policy_that_is_missing_for_s3(gate, capsys, monkeypatch):
    bucket, prefix = seaweed.shared_bucket(), f"check/{uuid.uuid4().hex}"
    monkeypatch.setenv("FLOE_STORE", gate.address(bucket, prefix))
    gate.denied = {"s3:ListBucket", "s3:DeleteObject"}
    found = run(capsys, "check")[1]
    assert found["missing_policy"] == {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": f"arn:aws:s3:::{bucket}"},
            {"Effect": "Allow", "Action": ["s3:DeleteObject"], "Resource": f"arn:aws:s3:::{bucket}/{prefix}/*"},
        ],
    }


def test_a_key_that_may_not_be_used_is_what_is_missing(gate, capsys, monkeypatch):
    key = "arn:aws:kms:us-east-1:123456789012:key/floe"
    monkeypatch.setenv("FLOE_STORE", gate.address(seaweed.shared_bucket(), uuid.uuid4().hex, kms_key=key))
    gate.denied, gate.reason = {"s3:PutObject"}, "no identity-based policy allows the kms:GenerateDataKey action"
    code, found, _ = run(capsys, "check")
    assert code == 1
    assert found["missing_policy"]["Statement"] == [
        {"Effect": "Allow", "Action": ["kms:Decrypt", "kms:GenerateDataKey"], "Resource": key}
    ]


@pytest.mark.parametrize(("conditions", "said"), [("refused", "compared"), ("ignored", "ignored")])
def test_a_server_without_conditional_puts_is_found_out(gate, capsys, monkeypatch, conditions, said):
    monkeypatch.setenv("FLOE_STORE", gate.address(seaweed.shared_bucket(), f"check/{uuid.uuid4().hex}"))
    gate.conditions = conditions
    code, found, _ = run(capsys, "check")
    assert (code, found["conditional_puts"]) == (0, said)
    assert main(["store", "check"]) == 0
    assert "one may be lost unseen" in capsys.readouterr().out


def test_uploads_begun_days_ago_are_dropped(server, capsys, monkeypatch):
    store = open_store(os.environ["FLOE_STORE"], retry=False)
    uploads = store.multipart.uploads
    uploads.create("packs/aa/x")
    assert run(capsys, "check")[1]["open_uploads"] == 1
    monkeypatch.setattr(multipart, "ABANDONED", multipart.timedelta(seconds=-60))
    found = run(capsys, "check")[1]
    assert (found["dropped_uploads"], found["open_uploads"]) == (1, 0)
    assert uploads.find("packs/") == []
    store.close()


def test_wrong_credentials_are_no_missing_policy(gate, capsys, monkeypatch):
    monkeypatch.setenv("FLOE_STORE", gate.address(seaweed.shared_bucket(), "x"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    code, found, err = run(capsys, "check")
    assert (code, found) == (1, None)
    assert "InvalidAccessKeyId" in err


def test_init_makes_bucket_and_store_once(server, capsys, monkeypatch):
    name = f"floe-{uuid.uuid4().hex[:12]}"
    monkeypatch.setenv("FLOE_STORE", server.address(name, "models"))
    code, found, err = run(capsys, "check")
    assert (code, found) == (1, None)
    assert f"no bucket {name}" in err
    assert "floe store init" in err
    project = ["--project", "p"] if isinstance(server, FakeGCS) else []
    if project:
        code, _, err = run(capsys, "init")
        assert code == 2
        assert "--project" in err
    code, made, _ = run(capsys, "init", *project)
    assert (code, made["created"], made["created_bucket"]) == (0, True, True)
    assert keys() == {"floe.json"}
    again = run(capsys, "init", *project)[1]
    assert again == {**made, "created": False, "created_bucket": False}
    assert run(capsys, "check")[0] == 0


def test_init_says_that_it_may_not(server, capsys, monkeypatch):
    name = f"floe-{uuid.uuid4().hex[:12]}"
    monkeypatch.setenv("FLOE_STORE", server.address(name, "models"))
    server.denied = {"s3:CreateBucket", "storage.buckets.create"}
    code, _, err = run(capsys, "init", *(["--project", "p"] if isinstance(server, FakeGCS) else []))
    assert code == 1
    assert f"write the bucket {name}" in err


def test_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLOE_STORE", f"file://{tmp_path}/store")
    code, found, err = run(capsys, "check")
    assert (code, found) == (1, None)
    assert "does not exist" in err
    assert run(capsys, "init")[1]["created"] is True
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    code, found, _ = run(capsys, "check")
    assert (code, found["roles"]) == (0, {"reader": True, "writer": True, "remover": True})
    assert "multipart upload" not in states(found)
    assert keys() == {"floe.json"}
    for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with ordinary_file_access():
        code, found, _ = run(capsys, "check")
    assert (code, found["roles"]) == (1, {"reader": True, "writer": False, "remover": False})


def test_what_people_see(server, capsys):
    assert main(["store", "check"]) == 0
    out = capsys.readouterr().out
    for operation in ROLES:
        assert operation in out
    assert "the server honours them" in out
    server.denied = {"s3:PutObject", "storage.objects.create"}
    assert main(["store", "check"]) == 1
    out, err = capsys.readouterr()
    assert "this would allow what was denied" in out
    assert "the needs of a writer are not met" in err


def test_project_is_for_google_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLOE_STORE", f"file://{tmp_path}/store")
    assert run(capsys, "init", "--project", "p")[0] == 2
    assert not (tmp_path / "store").exists()
