"""The stub layer that carries a model: the annotation on its descriptor and the marker file inside. Pure.

The annotation's value is the digest of the model's tree, placed at its path; containerd hands annotations with the
prefix `containerd.io/snapshot/` to Prepare as labels. The marker is canonical JSON; see docs/FORMAT.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from floe.store import jsontext
from floe.store.errors import BadInputError, DamagedError, UnsupportedError
from floe.store.ids import Buffer, is_hexdigest
from floe.store.records import canonical_json

ANNOTATION = "containerd.io/snapshot/floe.model"
# On the image's other layers, since stubs come last: the trees of its models, so that their content is on its way early.
MODELS_AHEAD = "containerd.io/snapshot/floe.models-ahead"
# Trees named there; containerd takes no label of more than 4096 bytes, its key included.
AHEAD_MAX = 60
# Relative to the layer's root.
MARKER = ".floe/model.json"
FORMAT, VERSION = "floe.stub", 1
# A marker holds three short strings and a path; a longer file is something else.
MARKER_MAX = 64 * 1024


@dataclass(frozen=True)
class Marker:
    """What a stub stands for.

    `tree` is the digest of the tree to mount in the stub's place (64 hex digits), `path` the absolute path of the model
    inside the container, `model` its name as the user gave it, `manifest` the model's manifest digest.
    """

    tree: str
    path: str
    model: str
    manifest: str

    def encode(self) -> bytes:
        """The marker file's bytes."""
        return canonical_json(
            {
                "format": FORMAT,
                "version": VERSION,
                "tree": self.tree,
                "path": self.path,
                "model": self.model,
                "manifest": self.manifest,
            }
        )

    @classmethod
    def decode(cls, data: Buffer, where: str) -> Marker:
        """Parse a marker found at `where`; DamagedError or UnsupportedError names that place."""
        try:
            value = jsontext.parse(data, MARKER_MAX)
            found = (value["format"], value["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{where} is not a {FORMAT} marker: {error!r}") from error
        if found[0] != FORMAT:
            raise DamagedError(f"{where} holds a {jsontext.shown(found[0])} record, not {FORMAT!r}")
        if found[1] != VERSION or type(found[1]) is not int:
            raise UnsupportedError(
                f"{where} has format version {jsontext.shown(found[1])}; this Floe reads version {VERSION}",
                hint="upgrade Floe on this node",
            )
        texts = [value.get(name) for name in ("tree", "path", "model", "manifest")]
        if not all(isinstance(text, str) for text in texts):
            raise DamagedError(f"{where} lacks one of tree, path, model, manifest")
        tree, path, model, manifest = texts
        if not is_hexdigest(tree) or not is_hexdigest(manifest):
            raise DamagedError(f"{where} names a tree or manifest that is not 64 hex digits")
        return cls(tree, path, model, manifest)


def check_annotation(value: str) -> str:
    """The tree digest in the annotation's value; BadInputError when it is none."""
    if not is_hexdigest(value):
        raise BadInputError(
            f"label {ANNOTATION} is {value!r}, not the 64 hex digits of a tree",
            hint="attach the model again with `floe image attach`",
        )
    return value


def models_ahead(trees: Iterable[str]) -> str:
    """The value of MODELS_AHEAD for these trees, each once; what does not fit is fetched with its own layer."""
    return ",".join(list(dict.fromkeys(filter(is_hexdigest, trees)))[:AHEAD_MAX])


def parse_models_ahead(value: str) -> list[str]:
    """The trees that MODELS_AHEAD names; what is no tree is passed over, since it is advice."""
    return [tree for tree in value.split(",")[:AHEAD_MAX] if is_hexdigest(tree)]
