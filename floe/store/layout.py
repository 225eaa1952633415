"""Where each object lies in the store: keys only, no I/O. docs/FORMAT.md explains the write order."""

from __future__ import annotations

from floe.store.errors import BadInputError
from floe.store.ids import ModelRef, check_hexdigest, check_oci_digest, hexdigest

STORE_KEY = "floe.json"
PACKS, PACK_INDEXES, CHUNK_TABLES = "packs", "indexes", "chunks"
TREES, MANIFESTS = "trees", "manifests"
MODEL_REFS, LAYER_REFS, CHAIN_REFS = "refs/models", "refs/layers", "refs/chains"
IMAGE_REFS, ATTACHMENT_REFS = "refs/images", "refs/attachments"
PROFILES, TREE_PROFILES, SOURCE_PROFILES = "profiles/", "profiles/trees", "profiles/sources"
SOURCE_LAYOUTS = "profiles/layouts"
TREE_SIGNATURES = "signatures/trees"
REMOVAL_KEY, MARKS_KEY, PUSHES = "gc/removal", "gc/marks", "gc/pushes"
RETENTION_KEY = "gc/retention"
DAMAGE = "damaged"
NO_ORG = "_"  # where an org would stand; no valid name begins so


def _sharded(prefix: str, digest: str) -> str:
    # Two hex digits first: S3 scales requests by prefix, and a local folder stays listable.
    return f"{prefix}/{check_hexdigest(digest)[:2]}/{digest}"


def pack_key(pack_id: str) -> str:
    """The pack object: its frames, as stored, one after another."""
    return _sharded(PACKS, pack_id)


def pack_index_key(pack_id: str) -> str:
    """The pack index, whose blake3 is the pack id."""
    return _sharded(PACK_INDEXES, pack_id)


def chunk_table_key(pack_id: str) -> str:
    """The pack's chunk table: read only when pushing, to find what is stored already."""
    return _sharded(CHUNK_TABLES, pack_id)


def tree_key(tree_digest: str) -> str:
    """The tree object; named by the blake3 of the EROFS image inside."""
    return _sharded(TREES, tree_digest)


def manifest_key(digest: str) -> str:
    """A manifest, named by the blake3 of its bytes."""
    return _sharded(MANIFESTS, digest)


def model_ref_key(ref: ModelRef) -> str:
    """`refs/models/<org, or _>/<name>/<tag>`; BadInputError for a ref that has no tag.

    Always three levels, for in a folder the tag `b` of model `a` and the tags of `a/b` would want the same name.
    """
    if ref.tag is None:
        raise BadInputError(f"{ref} names a digest, not a tag", hint="use NAME:TAG")
    return f"{model_refs_of(ref.name)}/{ref.tag}"


def model_refs_of(model: str) -> str:
    """The folder of all tags of `[ORG/]NAME`."""
    org, _, name = model.rpartition("/")
    return f"{MODEL_REFS}/{org or NO_ORG}/{name}"


def parse_model_ref_key(key: str) -> ModelRef:
    """The model that `model_ref_key` gave this key; BadInputError when it gave none."""
    parts = key.removeprefix(f"{MODEL_REFS}/").split("/")
    if len(parts) != 3:
        raise BadInputError(f"{key} is not a model's ref")
    org, name, tag = parts
    return ModelRef.parse(f"{name}:{tag}" if org == NO_ORG else f"{org}/{name}:{tag}")


def _oci(prefix: str, digest: str) -> str:
    return f"{prefix}/{check_oci_digest(digest).replace(':', '/')}"


def layer_ref_key(diff_id: str) -> str:
    """The ref of the layer with this diff id (`sha256:<hex>`)."""
    return _oci(LAYER_REFS, diff_id)


def chain_ref_key(chain_id: str) -> str:
    """What diff id, and which parent chain, a chain id stands for."""
    return _oci(CHAIN_REFS, chain_id)


def image_ref_key(manifest_digest: str) -> str:
    """The image record of an OCI image manifest."""
    return _oci(IMAGE_REFS, manifest_digest)


def attachment_ref_key(manifest_digest: str) -> str:
    """Which models an attached image carries; keeps them from garbage collection."""
    return _oci(ATTACHMENT_REFS, manifest_digest)


def tree_signatures_key(tree_digest: str) -> str:
    """Who vouches for a tree; a model's tag and a layer have their signatures in the ref."""
    return _sharded(TREE_SIGNATURES, tree_digest)


def tree_profile_key(tree_digest: str) -> str:
    """What of a tree is read first."""
    return _sharded(TREE_PROFILES, tree_digest)


def source_profile_key(source: str) -> str:
    """What is read first of all trees that are versions of `source`, by path; named by the blake3 of its name."""
    return _sharded(SOURCE_PROFILES, hexdigest(source.encode()))


def source_layout_key(source: str) -> str:
    """Where hot content of trees of `source` was laid out; named like its profile."""
    return _sharded(SOURCE_LAYOUTS, hexdigest(source.encode()))


def push_key(push: str) -> str:
    """What the push with this uuid relies on, while it runs; keeps that from garbage collection."""
    return f"{PUSHES}/{push}"


def damage_key(pack_id: str) -> str:
    """That a pack was found damaged, and where."""
    return _sharded(DAMAGE, pack_id)
