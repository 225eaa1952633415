"""Which of a node's images are given to the store, and by whom: one node for each layer, and never against the store's rules.

A node offers what it unpacked the ordinary way. Layers that nobody has stored are leased through the index first, all those of
an image or none: two nodes that pulled the same image therefore never upload the same layer, and when one dies the other
goes on when the lease ends. What a node may not write, or no longer has, it asks an indexer for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cachetools import LRUCache

from floe.ingest.oci import stubs
from floe.ingest.oci.image import index_resolved
from floe.ingest.oci.layerplan import missing_layers
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.references import RegistryRef
from floe.ingest.oci.source import Image, resolve
from floe.seeding.containerd import Node, StoredImage
from floe.seeding.gently import Pace
from floe.seeding.source import ContainerdSource, registry_name
from floe.store.catalog import Catalog
from floe.store.errors import (
    AccessDeniedError,
    BadInputError,
    CancelledError,
    DamagedError,
    FloeError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
    UntrustedError,
)
from floe.store.ids import chain_ids
from floe.store.imagepolicy import ImageRule, rule_for
from floe.store.index.jobs import NODE, Job, Lease, Queue
from floe.store.progress import Progress

_log = logging.getLogger(__name__)
OFF, LABEL, ALL = "off", "label", "all"
SEED = (OFF, LABEL, ALL)
"""No image is seeded; those whose configuration has the label SEED_LABEL; all that policies want."""
SEED_LABEL = "io.floe.seed"
SEEDED, ASKED, LEFT, FAILED = "seeded", "asked", "left", "failed"
"""What became of an image: stored by this node; asked of an indexer; another node's, or not to be had; tried again later."""
ASK_AGAIN = 3600.0  # seconds after which an indexer is asked once more
PAUSE = 30.0  # seconds between two looks at what was unpacked
_REMEMBERED = 4096  # images
_TRIES = 3  # failures after which an indexer is asked


@dataclass(frozen=True)
class SeedConfig:
    """`policy`: one of SEED; `rules` bind it further. `rate`: bytes a second that are read of layers' blobs, 0 for no bound."""

    policy: str
    spool_dir: Path
    rules: tuple[ImageRule, ...] = ()
    rate: int = 0
    pause: float = PAUSE


@dataclass
class Seeder:
    """Gives the images of `node` to the store of `catalog`. Not thread-safe: one thread calls `run`, or `round`.

    `shown` is told of the bytes of layers, those of all images together.
    """

    catalog: Catalog
    queue: Queue
    node: Node
    config: SeedConfig
    shown: Progress | None = None
    _done: LRUCache[str, bool] = field(default_factory=lambda: LRUCache(_REMEMBERED))
    _asked: LRUCache[str, float] = field(default_factory=lambda: LRUCache(_REMEMBERED))
    _failures: LRUCache[str, int] = field(default_factory=lambda: LRUCache(_REMEMBERED))
    _refusal_said: bool = False

    def run(self, stop: threading.Event) -> None:
        """Look again and again until `stop` is set, at the priority of this process: see gently.step_back."""
        while not stop.is_set():
            try:
                self.round(stop)
            except FloeError as error:
                _log.warning("%s", error)
            except Exception:
                _log.exception("seeding goes on after a failure")
            stop.wait(self.config.pause)

    def round(self, stop: threading.Event) -> dict[str, list[str]]:
        """Look once, and seed what is to be seeded: names of images by what became of them. Raises the node's errors."""
        found: dict[str, list[str]] = {SEEDED: [], ASKED: [], LEFT: [], FAILED: []}
        if self.config.policy == OFF:
            return found
        for namespace, chains in self.node.ordinary_layers().items():
            for name, stored in _named(self.node.images(namespace), self.config.rules):
                if stop.is_set():
                    return found
                if stored.target.digest in self._done:
                    continue
                outcome = self._try(namespace, stored, name, chains, stop)
                if outcome is not None:
                    found[outcome].append(name)
        return found

    def _try(
        self, namespace: str, stored: StoredImage, name: str, chains: frozenset[str], stop: threading.Event
    ) -> str | None:
        try:
            image = resolve(ContainerdSource(self.node, namespace, stored, name))
            wanted = self._is_wanted(image, chains)
            if wanted is None:
                self._done[stored.target.digest] = True
            if not wanted:
                return None
            if self._was_asked(stored):  # it is not worth the lease, nor what is read until it fails again
                return LEFT
            outcome = self._seed(image, stop)
        except CancelledError as error:
            _log.info("%s: %s", name, error)
            return None if stop.is_set() else FAILED
        except (NotFoundError, DamagedError) as error:
            _log.info("%s is not whole on this node: %s", name, error)
            return self._ask(name, stored)
        except AccessDeniedError as error:
            self._say_refused(error)
            return self._ask(name, stored)
        except (UnsupportedError, UntrustedError, BadInputError) as error:
            _log.warning("%s is not seeded: %s", name, error)
            self._done[stored.target.digest] = True
            return LEFT
        except FloeError as error:
            return self._failed(name, stored, error)
        except Exception as error:  # those behind it are not to wait for what is wrong with this one
            _log.exception("%s", name)
            return self._failed(name, stored, error)
        if outcome != LEFT:
            self._done[stored.target.digest] = True
        return outcome

    def _is_wanted(self, image: Image, chains: frozenset[str]) -> bool | None:
        """Whether this node has unpacked all of it that nobody has stored; None: all is stored, or no policy wants it.

        Whoever stored its layers may have died before the image's own record: who has unpacked all of them writes that.
        The store is asked for no more than it takes: most images of a node may be another snapshotter's, at every look.
        """
        rule = rule_for(image.name, self.config.rules)
        size = sum(layer.size for layer in image.manifest.layers)
        if rule is None or not rule.fits_size(size) or (self.config.policy == LABEL and not _is_labelled(image)):
            return None
        if rule.platforms and not any(Platform.parse(text).accepts(image.platform) for text in rule.platforms):
            return None
        pairs = zip(chain_ids(image.config.diff_ids), image.manifest.layers, strict=True)
        own = [chain for chain, layer in pairs if not stubs.is_annotated(layer)]
        if own and chains.isdisjoint(own):
            return False
        foreign = [chain for chain in own if chain not in chains]
        # From the top: what is below is more often another image's too, and stored.
        if any(self._is_unknown(chain) for chain in reversed(foreign)):
            return False
        if any(self._is_unknown(chain) for chain in own if chain in chains):
            return True
        return True if own and not foreign and not self._is_recorded(image) else None

    def _is_recorded(self, image: Image) -> bool:
        try:
            self.catalog.image(image.manifest.digest)
        except NotFoundError:
            return False
        return True

    def _is_unknown(self, chain: str) -> bool:
        try:
            return self.catalog.resolve_chain(chain) is None
        except UntrustedError:  # of somebody who does not count: this node signs it, if it has a key
            return True

    def _seed(self, image: Image, stop: threading.Event) -> str:
        missing = missing_layers(self.catalog, image)
        lease: Lease | None = None
        if missing:
            lease = self._lease(missing)
            if lease is None:
                _log.debug("%s: another node stores layers of it", image.name)
                return LEFT
        try:
            result = index_resolved(
                self.catalog,
                image,
                spool_dir=self.config.spool_dir,
                workers=1,
                progress=Pace(self.config.rate, lambda: _check(lease, stop), stop, self.shown),
            )
        finally:
            if lease is not None:
                lease.release()
        for warning in result.warnings:
            _log.warning("%s", warning)
        _log.info("%s is seeded: %d layers new, %d bytes", image.name, result.new_layers, result.new_bytes)
        return SEEDED

    def _lease(self, missing: list[str]) -> Lease | None:
        try:
            return self.queue.try_lease(missing, self.queue.lease_seconds)
        except UnavailableError as error:
            if error.retryable:
                raise
            raise AccessDeniedError(str(error), hint=error.hint) from error

    def _failed(self, name: str, stored: StoredImage, error: Exception) -> str:
        failures = self._failures.get(stored.target.digest, 0) + 1
        self._failures[stored.target.digest] = failures
        _log.warning("%s is not seeded now: %s", name, error)
        return self._ask(name, stored) if failures % _TRIES == 0 else FAILED

    def _was_asked(self, stored: StoredImage) -> bool:
        return time.time() - self._asked.get(stored.target.digest, 0.0) < ASK_AGAIN

    def _ask(self, name: str, stored: StoredImage) -> str:
        """Ask an indexer, unless that was done a while ago; FAILED when it cannot be asked, which the next look tries again."""
        if self._was_asked(stored):
            return LEFT
        now = time.time()
        try:
            self.queue.put(Job(name, origin=NODE, asked=now))
        except FloeError as error:
            _log.warning("no indexer can be asked to index %s: %s", name, error)
            return FAILED
        self._asked[stored.target.digest] = now
        _log.info("%s: an indexer is asked to index it", name)
        return ASKED

    def _say_refused(self, error: FloeError) -> None:
        if not self._refusal_said:
            _log.warning("this node may not write to the store, and asks indexers instead: %s", error)
            self._refusal_said = True


def _named(images: Iterable[StoredImage], rules: tuple[ImageRule, ...]) -> list[tuple[str, StoredImage]]:
    """Each image that `rules` want once, by a name that they want and its registry has for it: a tag, else a digest."""
    found: dict[str, tuple[RegistryRef, StoredImage]] = {}
    for image in sorted(images, key=lambda one: one.name):
        ref = registry_name(image.name)
        if ref is None or rule_for(image.name, rules) is None:
            continue
        known = found.get(image.target.digest)
        if known is None or (known[0].tag is None and ref.tag is not None):
            found[image.target.digest] = (ref, image)
    return [(str(ref), image) for ref, image in found.values()]


def _is_labelled(image: Image) -> bool:
    config = image.config.value.get("config")
    labels = config.get("Labels") if isinstance(config, Mapping) else None
    return isinstance(labels, Mapping) and str(labels.get(SEED_LABEL, "")).lower() in ("true", "1", "on", "yes")


def _check(lease: Lease | None, stop: threading.Event) -> None:
    if stop.is_set():
        raise CancelledError("seeding was stopped")
    if lease is not None and lease.lost:
        raise CancelledError("another node may store the same layers by now")
