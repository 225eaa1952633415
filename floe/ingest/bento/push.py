"""A Bento's models, each stored as a model of its own: what several Bentos have in common is there once.

`name:version` of BentoML's store becomes the model of that name, one of Hugging Face's hub `org/name:<commit>`. BentoML never changes
a version once it is saved: a version that the store has is not read again, however large it is. Times of files say when a model was
downloaded or unpacked, and bits of modes what umask that was done with: neither is kept, so that the same model is the same tree,
whoever pushed it, and nodes share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from floe.ingest.bento import hub
from floe.ingest.bento.find import Bento, FoundModel
from floe.ingest.directory import scan_directory
from floe.ingest.model import push_model
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, DamagedError, NotFoundError, UnsupportedError, UntrustedError
from floe.store.ids import TAG_MAX, ModelRef, hexdigest
from floe.store.progress import Progress
from floe.store.records import Manifest

_COMMIT_DIGITS, _LEAST_DIGITS = 12, 7  # of a commit in a tag of several: as git shortens them, at least
BENTO_MODEL_LABEL, YAML_LABEL, HUB_LABEL = "floe.bento-model", "floe.bento-yaml", "floe.hub-model"


@dataclass(frozen=True)
class PushedModel:
    """A model of a Bento in the store, as `ref` at `digest`, formerly `previous`. `reused`: it was there, and not read.

    Sizes in bytes: of the content, and of what was stored anew.
    """

    found: FoundModel
    ref: ModelRef
    digest: str
    total_bytes: int
    new_bytes: int
    reused: bool
    previous: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def moved(self) -> bool:
        """Whether the name meant another content before."""
        return self.previous is not None and self.previous != self.digest


def push_models(
    catalog: Catalog,
    bento: Bento,
    models: list[FoundModel],
    *,
    spool_dir: Path,
    workers: int | None = None,
    progress: Progress | None = None,
    read_again: bool = False,
    verify: bool = False,
) -> list[PushedModel]:
    """Store the `models` of a Bento, in their order; `read_again` those too that the store has.

    What can be told without reading content is refused before the first is stored. Each is named when it is complete: after a later
    error those before it are there. Raises what `push_model` raises.
    """
    pusher = _Pusher(catalog, bento, spool_dir, workers, _Growing(progress) if progress else None)
    plans = [pusher.plan(model, read_again=read_again or verify) for model in models]
    return [pusher.push(plan, verify=verify) for plan in plans]


def ref_of(model: FoundModel) -> ModelRef:
    """What the store calls a Bento's model. BadInputError: it cannot be called so.

    One commit of the hub is a tag; of several the tag has the beginnings, 12 digits, or fewer where so many have no room.
    """
    if not model.named.from_hub:
        return ModelRef.parse(str(model.named.tag))
    commits = model.named.commits
    if len(commits) == 1:
        return ModelRef.parse(f"{model.named.hub_id}:{commits[0]}")
    digits = min(_COMMIT_DIGITS, (TAG_MAX + 1) // len(commits) - 1)
    if digits < _LEAST_DIGITS:
        raise BadInputError(
            f"a Bento names {len(commits)} commits of {model.named.hub_id}: more than one model's tag can tell apart",
            hint="give the services fewer revisions of it",
        )
    return ModelRef.parse(f"{model.named.hub_id}:{'-'.join(commit[:digits] for commit in commits)}")


class _Growing:
    """Tells one progress of several pushes."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._total = progress, 0

    def total(self, nbytes: int) -> None:
        self._total += nbytes
        self._progress.total(self._total)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(nbytes)


@dataclass(frozen=True)
class _Plan:
    """What is to be done about a model: with `there`, which the store has as `ref`, nothing. `only`: see scan_directory."""

    model: FoundModel
    ref: ModelRef
    labels: dict[str, str]
    only: frozenset[bytes] | None
    there: tuple[str, Manifest] | None


@dataclass(frozen=True)
class _Pusher:
    catalog: Catalog
    bento: Bento
    spool_dir: Path
    workers: int | None
    progress: Progress | None

    def plan(self, model: FoundModel, *, read_again: bool) -> _Plan:
        """Look what the model, and the store's of its name, are; what cannot be pushed is refused."""
        ref = ref_of(model)
        only = hub.files_of(model.path, model.named.commits) if model.named.from_hub else None
        labels = _labels(model)
        size = scan_directory(model.path, only=only).total
        known = _known(self.catalog, ref)
        # Whether it is the same is told without reading: by origin, model.yaml, size.
        if known is not None and not read_again:
            manifest = known[1]
            if labels.items() <= manifest.labels.items() and size == manifest.sizes.content:
                return _Plan(model, ref, labels, only, known)
        there = known[1] if known is not None else _there(self.catalog, ref)
        if there is not None and not labels.items() & there.labels.items():
            raise BadInputError(
                f"the store's model {ref} is not that of Bento {self.bento}: it was pushed by other means",
                hint=f"if it may go, `floe model rm {ref}` first; `floe model tag` keeps it under another name",
            )
        return _Plan(model, ref, labels, only, None)

    def push(self, plan: _Plan, *, verify: bool) -> PushedModel:
        """Do what was planned."""
        model, ref = plan.model, plan.ref
        if plan.there is not None:
            digest, manifest = plan.there
            return PushedModel(model, ref, digest, manifest.sizes.content, 0, reused=True)
        done = push_model(
            self.catalog,
            model.path,
            ref,
            spool_dir=self.spool_dir,
            labels=plan.labels,
            workers=self.workers,
            progress=self.progress,
            verify=verify,
            only=plan.only,
            mtime=max(0, int(model.info.created.timestamp())) if model.info else 0,
            plain_modes=True,
            source=f"huggingface:{model.named}" if model.named.from_hub else f"bentoml:{model.named}",
        )
        return PushedModel(
            model,
            ref,
            done.digest,
            done.total_bytes,
            done.new_bytes,
            reused=False,
            previous=done.previous,
            warnings=done.warnings,
        )


def _labels(model: FoundModel) -> dict[str, str]:
    if model.named.from_hub:
        return {HUB_LABEL: str(model.named)}
    return {BENTO_MODEL_LABEL: str(model.named.tag), YAML_LABEL: hexdigest(model.yaml)}


def _known(catalog: Catalog, ref: ModelRef) -> tuple[str, Manifest] | None:
    try:
        return catalog.resolve_model(ref)
    except (NotFoundError, DamagedError, UnsupportedError, UntrustedError):
        return None  # it is stored, and signed, anew


def _there(catalog: Catalog, ref: ModelRef) -> Manifest | None:
    """What a tag names, whoever signed it; None when that is nothing that can be read. UnsupportedError: a newer version's."""
    digest = catalog.find_model(ref)
    try:
        return catalog.get_manifest(digest) if digest else None
    except (NotFoundError, DamagedError):
        return None
