"""Whether containers and images of a used node outlive a change of the snapshotter; looked at before anything is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from floe.containerd import document, used, wanted
from floe.containerd.configure import Configuration, Plan
from floe.containerd.dump import dump
from floe.containerd.used import Container, Daemon, Image
from floe.store.errors import FloeError, PreconditionError, UnavailableError

_BUILT_IN = "overlayfs"
_FORCE = "or go on with --force"


@dataclass(frozen=True)
class Stranded:
    """What would not start after the change. `unasked`: why containerd was not asked, None when it was."""

    containers: tuple[Container, ...] = ()
    images: tuple[Image, ...] = ()
    unasked: FloeError | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people, one a line."""
        return list(used.told(list(self.containers), list(self.images)))

    def as_json(self) -> dict[str, Any]:
        """All of them. `asked` is false when containerd could not be."""
        return {
            "asked": self.unasked is None,
            "containers": [asdict(one) for one in self.containers],
            "images": [asdict(one) for one in self.images],
        }


def after_configure(configuration: Configuration, plan: Plan, runtime: str | None) -> Stranded:
    """Images without layers, which Floe cannot unpack. With a `runtime`, other pods go on as before: nothing is stranded."""
    if runtime is not None or not plan.changed:
        return Stranded()
    try:
        daemon = _daemon(configuration, plan)
        if daemon.is_fresh:
            return Stranded()
        daemon.check()
        images = daemon.images(wanted.NAME)
    except FloeError as error:
        return Stranded(unasked=error)
    later = sum(image.complete and not image.unpacked for image in images)
    notes = []
    if later:
        notes.append(
            f"{later} images are not Floe's: each is unpacked a second time, from layers that are here, when a container of it "
            "first starts; crictl rmi and another pull make one lazy"
        )
    return Stranded(images=tuple(used.lost(images)), notes=tuple(notes))


def after_undo(configuration: Configuration, plan: Plan) -> Stranded:
    """Containers on Floe's snapshots, and images that are only there."""
    if not plan.changed:
        return Stranded()
    try:
        daemon = _daemon(configuration, plan)
        if daemon.is_fresh:
            return Stranded()
        daemon.check()
        containers = daemon.containers(wanted.NAME)
        images = used.lost(daemon.images(_next_snapshotter(configuration, plan)))
    except FloeError as error:
        return Stranded(unasked=error)
    return Stranded(tuple(containers), tuple(images))


def refuse_configure(found: Stranded) -> None:
    """PreconditionError for images that would not start. That nobody could be asked is no reason: nothing is taken away."""
    if found.images:
        raise PreconditionError(
            "\n  ".join([f"{len(found.images)} images have no layers here to unpack for Floe; nothing was changed", *found.lines()]),
            hint=f"for each: ctr -n NAMESPACE content fetch IMAGE, or crictl rmi IMAGE and pull it again afterwards; {_FORCE}",
        )  # fmt: skip


def refuse_undo(found: Stranded, configuration: Configuration) -> None:
    """PreconditionError for what would not start; UnavailableError when it is not known."""
    file = configuration.kept.path
    if found.unasked is not None:
        raise UnavailableError(
            f"whether containers or images here need Floe is not known: {found.unasked}; {file} was not changed",
            hint=f"{found.unasked.hint or 'see what containerd says'}, and try again; {_FORCE}",
        )
    if found.containers or found.images:
        counts = f"{len(found.containers)} containers and {len(found.images)} images"
        steps = []
        if found.containers:
            steps.append(
                "drain the node, stop kubelet if it runs (else it makes pods anew), and remove them (crictl rmp -fa)"
            )
        if found.images:
            steps.append("for each image: ctr -n NAMESPACE content fetch IMAGE, or crictl rmi IMAGE")
        raise PreconditionError(
            "\n  ".join([f"{counts} need Floe and would not start without it; {file} was not changed", *found.lines()]),
            hint=f"{'; '.join(steps)}; {_FORCE}",
        )


def _daemon(configuration: Configuration, plan: Plan) -> Daemon:
    """The containerd of the configuration as it is now."""
    if configuration.binary is not None and (plan.before is not None or configuration.main != configuration.file):
        return Daemon.of(dump(configuration.binary, configuration.main), configuration.binary)
    text = (plan.before or b"").decode(errors="replace")
    return Daemon.of(document.parse(text, configuration.file), configuration.binary)


def _next_snapshotter(configuration: Configuration, plan: Plan) -> str:
    """What CRI uses when Floe is gone."""
    config = document.parse((plan.after or b"").decode(errors="replace"), configuration.file)
    images = wanted.lookup(config, wanted.IMAGES) or wanted.lookup(config, (*wanted.CRI, "containerd")) or {}
    return str(images.get("snapshotter") or _BUILT_IN)
