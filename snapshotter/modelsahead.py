"""Models' content on its way while their image is still pulled: what a Prepare says is coming is fetched beside it.

All of it is advice. Nothing here holds a request up, and what fails is a line in the log: the model's own layer asks again,
and says what is wrong.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from floe.snapshotter.lazylayers import LazyLayers
from floe.snapshotter.lookups import LookUps
from floe.snapshotter.schema import Snapshot
from floe.store.errors import AlreadyExistsError, FloeError
from floe.store.ids import is_hexdigest
from floe.store.stub import ANNOTATION, MODELS_AHEAD, parse_models_ahead

log = logging.getLogger(__name__)

_FETCHES = 4  # threads
_DEADLINE = 30.0  # seconds for a tree and its indexes; a model's own Prepare waits less
_REMEMBERED = 512  # trees


def models_in(labels: Mapping[str, str]) -> list[str]:
    """The trees of the models that a snapshot's labels name: its own, and those of its image."""
    own = labels.get(ANNOTATION, "")
    return [*([own] if is_hexdigest(own) else []), *parse_models_ahead(labels.get(MODELS_AHEAD, ""))]


class ModelsAhead:
    """Thread-safe. `nbytes` of each model are fetched where no profile knows better; 0: nothing is done at all.

    `living` lists the snapshots that are not removed, `count` is told of events. A tree is begun once, until no snapshot
    names it any more.
    """

    def __init__(
        self,
        layers: LazyLayers,
        nbytes: int,
        *,
        living: Callable[[], Iterable[Snapshot]],
        count: Callable[[str], None],
    ) -> None:
        self._layers = layers
        self._nbytes = nbytes
        self._living = living
        self._count = count
        self._fetches = LookUps(_FETCHES)
        self._lock = threading.Lock()
        self._begun: dict[str, object] = {}  # by tree, a token of this attempt

    @contextmanager
    def beside(self, labels: Mapping[str, str]) -> Iterator[None]:
        """A Prepare with these labels: the models they name are fetched beside it, and no further when nothing comes of it."""
        begun = [tree for tree in models_in(labels) if self._begin(tree)]
        try:
            yield
        except AlreadyExistsError:  # the layer is there
            raise
        except BaseException:
            self._drop(begun)
            raise

    def removed(self, snapshot: Snapshot) -> None:
        """A snapshot is gone: what only it named is fetched no further."""
        self._drop(models_in(snapshot.labels))

    def _begin(self, tree: str) -> bool:
        token = object()
        with self._lock:
            if not self._nbytes or tree in self._begun:
                return False
            while len(self._begun) >= _REMEMBERED:  # those that came first are mounted, or never will be
                del self._begun[next(iter(self._begun))]
            self._begun[tree] = token
        self._count("models_ahead")
        future = self._fetches.start(lambda: self._fetch(tree, token))
        # `_fetch` itself raises nothing: no thread could be started then.
        if future.done() and future.exception() is not None:
            with self._lock:
                self._begun.pop(tree, None)
            return False
        return True

    def _drop(self, trees: Sequence[str]) -> None:
        with self._lock:
            begun = [tree for tree in trees if tree in self._begun]
        if not begun:
            return
        named = {tree for found in self._living() for tree in models_in(found.labels)}
        for tree in begun:
            if tree not in named:
                with self._lock:
                    self._begun.pop(tree, None)
                    self._layers.unexpect(tree)
                log.info("model tree %s is fetched no further: no snapshot names it any more", tree)

    def _fetch(self, tree: str, token: object) -> None:
        try:
            self._layers.vouch(tree)
            self._layers.fetch(tree, _DEADLINE)
            with self._lock:
                if self._begun.get(tree) is token:
                    self._layers.expect(tree, self._nbytes)
                    log.info("model tree %s is fetched while its image is pulled", tree)
        except Exception as error:
            # Also what nobody thought of: no pull may fail for this. The next Prepare that names it tries again.
            with self._lock:
                if self._begun.get(tree) is token:
                    del self._begun[tree]
            level = logging.INFO if isinstance(error, FloeError) else logging.ERROR
            log.log(level, "model tree %s is not fetched before its layer: %r", tree, error)
