"""The image of a Bento, without its models: those are attached, at the places where BentoML looks for them.

Below the models lies an ordinary image: the one that the Bento's own Dockerfile builds, or a base image that has its packages, with the
Bento's files in a layer. What BentoML keeps beside its models (`latest` files, its two folders) is in that layer too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floe.ingest.bento.files import ENTRYPOINT, OWNER, FilesLayer, write_layer
from floe.ingest.bento.find import HUB_MODELS, MODELS, Bento, latest_files
from floe.ingest.bento.push import PushedModel
from floe.ingest.oci import carried, derived, places
from floe.ingest.oci.attach import Addition, AttachResult, attach_to, image_layers
from floe.ingest.oci.opening import open_both
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Image, resolve
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


def write_image(
    catalog: Catalog,
    bento: Bento,
    pushed: Sequence[PushedModel],
    base: str,
    target: str,
    *,
    has_files: bool,
    folder: Path,
    platform: str | None = None,
    plain_http: bool = False,
    target_plain_http: bool = False,
    registry_config: Sequence[Path] = (),
    progress: Progress | None = None,
) -> BentoImage:
    """Write `target`: the image `base`, the Bento's files (unless it `has_files`), and `pushed` models at their places.

    `folder`: an empty one for the layer. `plain_http`: see attach, `base` being the source. BadInputError: a base image in which the Bento's
    path leads through a symlink, or which carries models there already. Raises what `attach` raises.
    """
    for name in (base, target):
        check_text(name, "image")
    with open_both(
        base,
        target,
        plain_http=plain_http,
        target_plain_http=target_plain_http,
        registry_config=registry_config,
    ) as (source, written):
        image = resolve(source, Platform.parse(platform) if platform else None)
        root = _root_of(image)
        placed = [(model, f"{root}/{model.found.place}") for model in pushed]
        places.check_apart(path for _, path in placed)
        above = _above(catalog, image, root)
        layer = FilesLayer(
            root,
            {path: node for path, node in above.items() if not path.startswith(f"{root}/")},
            latest_files([model.found for model in pushed]),
            tuple(model.found.place for model in pushed),
            max(0, int(bento.info.created.timestamp())),
        )
        created_by = f"floe bento image {bento}"
        kind = derived.layer_type(image)
        made = write_layer(layer, None if has_files else bento.path, folder / "layer.tar.gz", kind, created_by)
        settings = _settings(image, bento, root, hub=any(model.found.named.from_hub for model in pushed))
        addition = Addition((made,), {BENTO_LABEL: str(bento)}, settings)
        models = [(model.ref, path) for model, path in placed]
        digests = {path: model.digest for model, path in placed}
        result = attach_to(
            catalog, lambda: image, written, models, digests=digests, addition=addition, progress=progress
        )
        warnings = [*result.warnings, *_models_inside(image, above, root)]
        return BentoImage(result, tuple(placed), tuple(warnings))


def _root_of(image: Image) -> str:
    """The Bento's path in the image: what BENTO_PATH says there, as a changed Dockerfile may have it, or BentoML's own."""
    return places.check_path(_environ(image).get(_PATH_VARIABLE) or ROOT)


def _above(catalog: Catalog, image: Image, root: str) -> dict[str, Node]:
    """What the image has on the way to the Bento's models, and at the two folders that hold them."""
    before = carried.carried_models(image)
    for found in before:
        if places.within(found.marker.path, root):
            raise BadInputError(
                f"{image.name} carries a model at {found.marker.path} already: it is a Bento's finished image",
                hint="give the image that it was made from, or `floe image detach` its models first",
            )
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
