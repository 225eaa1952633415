"""The JSON objects: manifests, refs, chain, image and attachment records. Pure; see docs/FORMAT.md.

All are canonical JSON (keys sorted, no spaces, UTF-8, no NaN), carry `format` and `version`, and a reader
ignores keys it does not know within a version, at any depth. What it knows is checked: a record that was read can be
relied upon. A manifest's `encryption` and `signatures` are reserved: null and []; signatures stand in refs, see signing.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from floe.store import fields, jsontext
from floe.store.erofs import MAX_DEVICES
from floe.store.errors import BadInputError, DamagedError, UnsupportedError
from floe.store.ids import Buffer, hexdigest

VERSION = 1
KIND_LAYER, KIND_MODEL = "layer", "model"
MOVES_KEPT = 100  # of a tag, besides the last: some 15 KiB that every reader of the tag reads
# A label of layers with directories that took their attributes from lower ones: the chain id of those ("" for none).
PARENT_LABEL = "floe.parent-chain"
R = TypeVar("R", bound="Record")


def canonical_json(value: object) -> bytes:
    """JSON with one spelling only, so that equal values have equal digests. BadInputError: a text is not UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{text[error.start : error.end]!a} cannot be stored: it is not UTF-8") from error


@dataclass(frozen=True)
class Record:
    """Base of the JSON objects: `FORMAT` names the kind on disk, `REPAIR` says what to do about a damaged one."""

    FORMAT: ClassVar[str] = ""
    REPAIR: ClassVar[str] = "push its model or index its image again"

    def encode(self) -> bytes:
        """The object's bytes."""
        return canonical_json({"format": self.FORMAT, "version": VERSION, **asdict(self)})

    @property
    def digest(self) -> str:
        """blake3 of `encode()`, in hex."""
        return hexdigest(self.encode())

    @classmethod
    def decode(cls: type[R], data: Buffer, key: str) -> R:
        """Parse the object found at `key`; DamagedError or UnsupportedError names that key."""
        try:
            value = jsontext.parse(data)
            kind, version = value.pop("format"), value.pop("version")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{key} is not a {cls.FORMAT} record", hint=cls.REPAIR) from error
        if kind != cls.FORMAT:
            raise DamagedError(f"{key} holds a {jsontext.shown(kind)} record, not {cls.FORMAT!r}", hint=cls.REPAIR)
        if version != VERSION or type(version) is not int:
            raise UnsupportedError(
                f"{key} has format version {jsontext.shown(version)}; this Floe reads version {VERSION}",
                hint="upgrade Floe on this node",
            )
        try:
            return cls._from_json(value)
        except KeyError as error:
            raise DamagedError(f"{key} is a {cls.FORMAT} record without {error}", hint=cls.REPAIR) from error
        except ValueError as error:
            raise DamagedError(
                f"{key} is a {cls.FORMAT} record with a wrong field: {error}", hint=cls.REPAIR
            ) from error

    @classmethod
    def _from_json(cls: type[R], value: dict[str, Any]) -> R:
        """Raises KeyError for a field that is missing, ValueError for one that is wrong."""
        raise NotImplementedError


@dataclass(frozen=True)
class TreeEntry:
    """A tree: `digest` of its EROFS image and that image's `size` in bytes."""

    digest: str
    size: int

    @classmethod
    def from_json(cls, value: object, name: str) -> TreeEntry:
        """As the field `name` holds it; ValueError."""
        tree = fields.mapping(value, name, "digest", "size")
        return cls(fields.hexdigest(tree["digest"], f"{name}.digest"), fields.count(tree["size"], f"{name}.size"))


@dataclass(frozen=True)
class PackEntry:
    """A pack as a manifest names it; sizes in bytes. The order is that of the tree's device table."""

    id: str
    content_size: int
    stored_size: int
    frame_size: int

    @classmethod
    def from_json(cls, value: object, name: str) -> PackEntry:
        """As the field `name` holds it; ValueError."""
        pack = fields.mapping(value, name, "id", "content_size", "stored_size", "frame_size")
        sizes = (fields.count(pack[size], f"{name}.{size}") for size in ("content_size", "stored_size", "frame_size"))
        return cls(fields.hexdigest(pack["id"], f"{name}.id"), *sizes)


@dataclass(frozen=True)
class Sizes:
    """What a tree presents: regular `files`, all `inodes`, `content` bytes (each hard link once)."""

    files: int
    inodes: int
    content: int

    @classmethod
    def from_json(cls, value: object, name: str) -> Sizes:
        """As the field `name` holds it; ValueError."""
        sizes = fields.mapping(value, name, "files", "inodes", "content")
        return cls(*(fields.count(sizes[size], f"{name}.{size}") for size in ("files", "inodes", "content")))


@dataclass(frozen=True)
class Manifest(Record):
    """One layer or model version. `kind` is KIND_LAYER or KIND_MODEL; `created` is RFC 3339, UTC."""

    FORMAT: ClassVar[str] = "floe.manifest"

    kind: str
    tree: TreeEntry
    packs: tuple[PackEntry, ...]
    sizes: Sizes
    source: str
    created: str
    labels: dict[str, str] = field(default_factory=dict)
    encryption: None = None
    signatures: tuple[dict[str, str], ...] = ()

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Manifest:
        if value.get("encryption") is not None:
            raise UnsupportedError("this manifest is encrypted", hint="upgrade Floe on this node")
        return cls(
            kind=fields.text(value["kind"], "kind"),
            tree=TreeEntry.from_json(value["tree"], "tree"),
            packs=fields.each(value["packs"], "packs", PackEntry.from_json, most=MAX_DEVICES),
            sizes=Sizes.from_json(value["sizes"], "sizes"),
            source=fields.text(value["source"], "source"),
            created=fields.text(value["created"], "created"),
            labels=fields.texts(value["labels"], "labels"),
            signatures=fields.each(value["signatures"], "signatures", fields.texts),
        )


@dataclass(frozen=True)
class StoreRecord(Record):
    """`floe.json`: marks a store; `uuid` tells two stores apart."""

    FORMAT: ClassVar[str] = "floe.store"
    REPAIR: ClassVar[str] = "delete it: the next push makes another, and indexes are filled anew from the store"

    uuid: str
    created: str

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> StoreRecord:
        return cls(fields.text(value["uuid"], "uuid"), fields.text(value["created"], "created"))


@dataclass(frozen=True)
class Signature:
    """A `signature` (base64) by the key with the id `key`, made at `signed` (RFC 3339, UTC); signing.py says of what."""

    key: str
    signature: str
    signed: str

    @classmethod
    def from_json(cls, value: object, name: str) -> Signature:
        """As the field `name` holds it; ValueError."""
        found = fields.mapping(value, name, "key", "signature", "signed")
        return cls(*(fields.text(found[part], f"{name}.{part}") for part in ("key", "signature", "signed")))


@dataclass(frozen=True)
class Move:
    """That a tag named `manifest` from `updated` on, RFC 3339, UTC; `by`: who moved it there, "" where it is not known."""

    manifest: str
    updated: str
    by: str = ""

    @classmethod
    def from_json(cls, value: object, name: str) -> Move:
        """As the field `name` holds it; ValueError."""
        found = fields.mapping(value, name, "manifest", "updated")
        manifest = fields.hexdigest(found["manifest"], f"{name}.manifest")
        return cls(manifest, *(fields.text(found.get(part, ""), f"{name}.{part}") for part in ("updated", "by")))


@dataclass(frozen=True)
class Ref(Record):
    """A model's tag or a layer's diff id: names a `manifest` by digest; `updated` is RFC 3339, UTC.

    `by`: who moved a tag there, as that machine said; `before`: what it named earlier, latest first. They are for people; besides, a pod
    that rules allow the name may have by digest what it named.
    """

    FORMAT: ClassVar[str] = "floe.ref"

    manifest: str
    updated: str
    signatures: tuple[Signature, ...] = ()
    by: str = ""
    before: tuple[Move, ...] = ()

    @property
    def moves(self) -> tuple[Move, ...]:
        """What it names and named, latest first."""
        return (Move(self.manifest, self.updated, self.by), *self.before)

    def encode(self) -> bytes:
        """The object's bytes; one without signatures, `by` or `before` is what it was before there were any."""
        value = {"format": self.FORMAT, "version": VERSION, **asdict(self)}
        for name in ("signatures", "by", "before"):
            if not value[name]:
                del value[name]
        return canonical_json(value)

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Ref:
        return cls(
            fields.hexdigest(value["manifest"], "manifest"),
            fields.text(value["updated"], "updated"),
            fields.each(value.get("signatures", []), "signatures", Signature.from_json),
            fields.text(value.get("by", ""), "by"),
            fields.each(value.get("before", []), "before", Move.from_json),
        )


@dataclass(frozen=True)
class TreeSignatures(Record):
    """Who vouches for a `tree` whatever names it: a model's own, and one placed at a path in an image."""

    FORMAT: ClassVar[str] = "floe.tree-signatures"
    REPAIR: ClassVar[str] = "sign its model, or attach it, again"

    tree: str
    signatures: tuple[Signature, ...]

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> TreeSignatures:
        return cls(
            fields.hexdigest(value["tree"], "tree"),
            fields.each(value["signatures"], "signatures", Signature.from_json),
        )


@dataclass(frozen=True)
class ChainRecord(Record):
    """What a chain id stands for: the topmost layer's `diff_id` and the `parent` chain id (None: bottom)."""

    FORMAT: ClassVar[str] = "floe.chain"

    diff_id: str
    parent: str | None = None

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> ChainRecord:
        parent = value.get("parent")
        return cls(
            fields.oci_digest(value["diff_id"], "diff_id"),
            None if parent is None else fields.oci_digest(parent, "parent"),
        )


@dataclass(frozen=True)
class ImageRecord(Record):
    """An indexed OCI image: where it was seen (`names`), its `platform`, its layers bottom first.

    `manifest_digest` is the OCI manifest's digest (`sha256:<hex>`), the record's name; `size` is the sum of the
    layers' blob sizes in bytes, what an ordinary pull would download.
    """

    FORMAT: ClassVar[str] = "floe.image"

    manifest_digest: str
    names: tuple[str, ...]
    platform: str
    diff_ids: tuple[str, ...]
    chain_ids: tuple[str, ...]
    size: int
    indexed: str

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> ImageRecord:
        diff_ids, chain_ids = (fields.each(value[key], key, fields.oci_digest) for key in ("diff_ids", "chain_ids"))
        if len(diff_ids) != len(chain_ids):
            raise ValueError(f"chain_ids has {len(chain_ids)} items, diff_ids {len(diff_ids)}")
        return cls(
            manifest_digest=fields.oci_digest(value["manifest_digest"], "manifest_digest"),
            names=fields.each(value["names"], "names", fields.text),
            platform=fields.text(value["platform"], "platform"),
            diff_ids=diff_ids,
            chain_ids=chain_ids,
            size=fields.count(value["size"], "size"),
            indexed=fields.text(value["indexed"], "indexed"),
        )


@dataclass(frozen=True)
class AttachmentRecord(Record):
    """The models an attached image carries: each {`name`, `manifest`, `tree`, `path`}."""

    FORMAT: ClassVar[str] = "floe.attachment"

    target: str
    source: str
    models: tuple[dict[str, str], ...]
    created: str

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> AttachmentRecord:
        models = fields.each(value["models"], "models", fields.texts)
        for number, model in enumerate(models):
            fields.mapping(model, f"models[{number}]", "name", "path")
        return cls(
            target=fields.oci_digest(value["target"], "target"),
            source=fields.text(value["source"], "source"),
            models=models,
            created=fields.text(value["created"], "created"),
        )
