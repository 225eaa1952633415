"""install/gke: the Packer and Terraform definitions, parsed: what is used is declared, and what is named is there. Reads files."""

import functools
import re
from pathlib import Path

import hcl2
import pytest
import yaml

INSTALL = Path(__file__).parents[2] / "install"
GKE = INSTALL / "gke"
PACKER, TERRAFORM = GKE / "floe-node.pkr.hcl", GKE / "node-pool.tf"
BOOTSTRAP = INSTALL / "bootstrap-node.sh"


def plain(value):
    """Without the quotes that some versions of the parser leave on strings, and without its marks of blocks."""
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items() if not str(key).startswith("__")}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value


@functools.cache
def parsed(path):
    with path.open() as file:
        return plain(hcl2.load(file))


def names(found, kind):
    return {name for one in found.get(kind, []) for name in one}


@pytest.mark.parametrize("path", [PACKER, TERRAFORM], ids=lambda path: path.name)
def test_variables_and_locals_that_are_used_are_declared_and_the_other_way_round(path):
    found = parsed(path)
    text = re.sub(r"^\s*#.*$", "", path.read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"\bvar\.(\w+)", text)) == names(found, "variable")
    assert set(re.findall(r"\blocal\.(\w+)", text)) == names(found, "locals")


def test_packer_s_sources_are_there_and_what_it_copies():
    found = parsed(PACKER)
    (build,) = found["build"]
    kinds = {kind: names for one in found["source"] for kind, names in one.items()}
    assert build["sources"] == [f"source.{kind}.{name}" for kind, made in kinds.items() for name in made]
    files = [one["file"] for one in build["provisioner"] if "file" in one]
    copied = [source for one in files for source in one.get("sources", [])]
    assert copied
    assert all(source.startswith("${local.install}/") for source in copied)
    missing = {source.partition("/")[2] for source in copied if not (INSTALL / source.partition("/")[2]).exists()}
    assert missing <= (set() if BOOTSTRAP.exists() else {"bootstrap-node.sh", "bootstrap"})
    last = build["provisioner"][-1]["shell"]["inline"][0]
    assert "/tmp/floe/install/gke/provision.sh /tmp/floe/wheels" in last


def test_the_node_pool_has_label_taint_and_settings_as_the_manifests_want_them():
    pool = next(
        one["google_container_node_pool"]["floe"]
        for one in parsed(TERRAFORM)["resource"]
        if "google_container_node_pool" in one
    )
    (config,) = pool["node_config"]
    (daemonset,) = yaml.safe_load_all((INSTALL / "kubernetes/base/daemonset.yaml").read_text())
    pod = daemonset["spec"]["template"]["spec"]
    assert config["labels"].items() <= pod["nodeSelector"].items()
    untaint = {one["name"]: one.get("value") for one in pod["containers"][1]["env"]}
    assert config["taint"] == [{"key": untaint["TAINT"], "value": "true", "effect": "NO_SCHEDULE"}]
    assert config["metadata"]["floe-store"] == "gs://${var.bucket}/${var.prefix}"


def test_the_node_pool_s_account_gets_what_the_identity_files_list():
    text = TERRAFORM.read_text()
    files = re.findall(r'file\("\$\{path\.module\}/([^"]+)"\)', text)
    assert sorted(files) == ["../identity/gcs-node-recording.yaml", "../identity/gcs-node.yaml"]
    for name in files:
        found = yaml.safe_load((GKE / name).read_text())
        assert {"title", "description", "includedPermissions"} <= set(found)
    condition = re.search(r'expression = "(.+)"', text)[1]
    assert re.findall(r"local\.objects\}/(\w+)/", condition) == ["profiles", "damaged"]
