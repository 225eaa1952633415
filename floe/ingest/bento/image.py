"""The image of a Bento, without its models: those are attached, at the places where BentoML looks for them.

Below the models lies an ordinary image: the one that the Bento's own Dockerfile builds, or a base image that has its packages, with the
Bento's files in a layer. What BentoML keeps beside its models (`latest` files, its two folders) is in that layer too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe.ingest.bento.files import ENTRYPOINT, OWNER, FilesLayer, check_files, write_layer
from floe.ingest.bento.find import HUB_MODELS, MODELS, Bento, FoundModel, latest_files
from floe.ingest.bento.push import PushedModel
from floe.ingest.oci import carried, derived, places
from floe.ingest.oci.attach import Addition, AttachResult, attach_to, image_layers
from floe.ingest.oci.opening import open_both
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Image, Target, resolve
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError
from floe.store.ids import check_text
from floe.store.nodes import Node
from floe.store.progress import Progress

BENTO_LABEL = "io.floe.bento"
"""NAME:VERSION of the Bento: a label of the config."""
ROOT = "/home/bentoml/bento"
_PATH_VARIABLE = "BENTO_PATH"
_PORTS = ("3000/tcp", "3001/tcp")  # requests; Prometheus
# As in BentoML's base.j2 and base_v2.j2.
_DEFAULTS = {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "UTF-8", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class BentoImage:
    """The image that was written, and which model it has at which path."""

    result: AttachResult
    models: tuple[tuple[PushedModel, str], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PreparedImage:
    """An image that fits the Bento and can be written: both sides are open, its models need only be stored."""

    _catalog: Catalog
    _bento: Bento
    _image: Image
    _target: Target
    _above: Mapping[str, Node]
    _has_files: bool

    def write(self, pushed: Sequence[PushedModel], folder: Path, *, progress: Progress | None = None) -> BentoImage:
        """Write the target: the base image, the Bento's files (unless it has them), and `pushed` models at their places.

        `folder`: an empty one for the layer. Raises what `attach` and `write_layer` raise.
        """
        root, image = _root_of(self._image), self._image
        placed = [(model, f"{root}/{model.found.place}") for model in pushed]
        layer = FilesLayer(
            root,
            {path: node for path, node in self._above.items() if not path.startswith(f"{root}/")},
            latest_files([model.found for model in pushed]),
            tuple(model.found.place for model in pushed),
            max(0, int(self._bento.info.created.timestamp())),
        )
        created_by = f"floe bento image {self._bento}"
        kind = derived.layer_type(image)
        files = None if self._has_files else self._bento.path
        made = write_layer(layer, files, folder / "layer.tar.gz", kind, created_by)
        settings = _settings(image, self._bento, root, hub=any(model.found.named.from_hub for model in pushed))
        addition = Addition((made,), {BENTO_LABEL: str(self._bento)}, settings)
        models = [(model.ref, path) for model, path in placed]
        digests = {path: model.digest for model, path in placed}
        result = attach_to(
            self._catalog, lambda: image, self._target, models, digests=digests, addition=addition, progress=progress
        )
        warnings = [*result.warnings, *_models_inside(image, self._above, root)]
        return BentoImage(result, tuple(placed), tuple(warnings))


@contextlib.contextmanager
def prepare_image(
    catalog: Catalog,
    bento: Bento,
    models: Sequence[FoundModel],
    base: str,
    target: str,
    *,
    has_files: bool,
    platform: str | None = None,
    plain_http: bool = False,
    target_plain_http: bool = False,
    registry_config: Sequence[Path] = (),
) -> Iterator[PreparedImage]:
    """What `target` will be, before anything is stored: the image `base`, the Bento's files unless it `has_files`, its `models`.

    `plain_http`: see attach, `base` being the source. BadInputError: a base image in which the Bento's path leads through a symlink, or
    which carries models there already; a file of the Bento that no layer can hold. NotFoundError: no such base. The registry's errors.
    """
    for name in (base, target):
        check_text(name, "image")
    check_files(bento.path)
    with open_both(
        base,
        target,
        plain_http=plain_http,
        target_plain_http=target_plain_http,
        registry_config=registry_config,
    ) as (source, written):
        image = resolve(source, Platform.parse(platform) if platform else None)
        root = _root_of(image)
        above = _above(catalog, image, root, [f"{root}/{model.place}" for model in models])
        yield PreparedImage(catalog, bento, image, written, above, has_files)


def _root_of(image: Image) -> str:
    """The Bento's path in the image: what BENTO_PATH says there, as a changed Dockerfile may have it, or BentoML's own."""
    return places.check_path(_environ(image).get(_PATH_VARIABLE) or ROOT)


def _above(catalog: Catalog, image: Image, root: str, paths: Sequence[str]) -> dict[str, Node]:
    """What the image has on the way to the Bento's models, which go to `paths`, and at the two folders that hold them."""
    before = carried.carried_models(image)
    for found in before:
        if places.within(found.marker.path, root):
            raise BadInputError(
                f"{image.name} carries a model at {found.marker.path} already: it is a Bento's finished image",
                hint="give the image that it was made from, or `floe image detach` its models first",
            )
    places.check_apart([*(found.marker.path for found in before), *paths])
    models = f"{root}/{MODELS}"
    wanted = [*places.parents_of(models), models, f"{root}/{HUB_MODELS}"]
    return places.look_up(wanted, image_layers(catalog, image, {found.number for found in before}), image.name)


def _models_inside(image: Image, above: Mapping[str, Node], root: str) -> list[str]:
    """Warnings of weights that the base image brings along: hidden, but pulled by whoever unpacks its layers."""
    return [
        f"{image.name} has files of its own in {root}/{folder}: they are hidden, and yet part of the image; build it without models"
        for folder in (MODELS, HUB_MODELS)
        if (node := above.get(f"{root}/{folder}")) is not None and any(child.is_dir for child in node.children.values())
    ]


def _environ(image: Image) -> dict[str, str]:
    inner = image.config.value.get("config")
    env = inner.get("Env") if isinstance(inner, dict) else None
    pairs = (str(item).partition("=") for item in (env if isinstance(env, list) else ()))
    return {name: value for name, _, value in pairs}


def _settings(image: Image, bento: Bento, root: str, *, hub: bool) -> dict[str, Any]:
    """Members of the config that the image needs. One that BentoML's Dockerfile built has all but one of them."""
    known = _environ(image)
    built = _PATH_VARIABLE in known
    env = dict(known)
    settings: dict[str, Any] = {}
    if not built:
        env = {**_DEFAULTS, **known, _PATH_VARIABLE: root, "BENTOML_HOME": "/home/bentoml/"}
        env["BENTOML_CONTAINERIZED"] = "true"
        env |= {name: value for name, value, stage in bento.info.envs if stage == "all"}
        inner = image.config.value.get("config") or {}
        settings |= {
            "Entrypoint": [f"{root}/{ENTRYPOINT}"],
            "Cmd": None,
            "User": f"{OWNER}:{OWNER}",
            "WorkingDir": root,
            "ExposedPorts": {**(inner.get("ExposedPorts") or {}), **{port: {} for port in _PORTS}},
        }
    env["BENTOML_HF_CACHE_DIR"] = f"{root}/{HUB_MODELS}"
    if hub:
        env["HF_HUB_OFFLINE"] = "1"  # the cache is read-only, and complete
    return {**settings, "Env": [f"{name}={value}" for name, value in env.items()]}
