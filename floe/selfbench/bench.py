"""All parts, one after another; what one of them cannot do does not keep the others from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from floe.selfbench import cpu, disk, mounted, network, store, upload
from floe.selfbench.figures import ENOUGH_BYTES, Cpu, Disk, Mount, Network, Store
from floe.selfbench.plan import Plan
from floe.selfbench.scratch import Scratch
from floe.selfbench.store import Source
from floe.selfbench.subject import Subject
from floe.selfbench.verdict import Measured
from floe.store.errors import FloeError
from floe.store.objects.base import ObjectStore

T = TypeVar("T")

MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"
_EMPTY = "the store holds no packs to read: push a model, or give --write"
_SOCKET = 107  # bytes of a socket's path, at most; unix(7)
_LONGEST = len("/packfs-metrics.sock") + 8  # in the run directory


@dataclass
class Results:
    """By part: its state and why, and its figures when it was measured."""

    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    figures: dict[str, object] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether any part failed."""
        return any(state == FAILED for state, _ in self.states.values())

    def of(self, kind: type[T]) -> T | None:
        """The figures of this kind, if they were measured."""
        return next((found for found in self.figures.values() if isinstance(found, kind)), None)

    def measured(self) -> Measured:
        """For the verdict."""
        return Measured(self.of(Store), self.of(Network), self.of(Cpu), self.of(Disk), self.of(Mount))


class Bench:
    """Measures in the folder `scratch`, with a line to `say` for each part.

    `subject`: what look() found, or the error it ended with. `node(made)`: the private node's settings, for a mount of a
    model of the store or of one that is `made`.
    """

    def __init__(
        self,
        plan: Plan,
        objects: ObjectStore,
        *,
        subject: Subject | FloeError,
        scratch: Scratch,
        node: Callable[[bool], mounted.Node],
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._objects = objects
        self._found = subject
        self._subject = subject if isinstance(subject, Subject) else Subject(None, ())
        self._scratch = scratch
        self._node = node
        self._say = say
        self._results = Results()

    def run(self) -> Results:
        """Measure what the plan names. A part that fails is noted; KeyboardInterrupt passes."""
        for part in self._plan.parts:
            {"store": self._store, "cpu": self._cpu, "disk": self._disk, "mount": self._mount}[part]()
        return self._results

    def _try(self, part: str, work: Callable[[], T]) -> T | None:
        self._say(part)
        try:
            figures = work()
        except (FloeError, OSError) as error:
            hint = f"; {error.hint}" if isinstance(error, FloeError) and error.hint else ""
            self._results.states[part] = (FAILED, f"{error}{hint}")
            return None
        self._results.states[part] = (MEASURED, "")
        self._results.figures[part] = figures
        return figures

    def _skip(self, part: str, why: str) -> None:
        self._results.states[part] = (SKIPPED, why)

    def _store(self) -> None:
        url = network.endpoint(getattr(self._objects, "inner", self._objects))
        if url is None:
            self._skip("network", "there is none between this machine and the store")
        else:
            self._try("network", lambda: network.measure(url))
        if isinstance(self._found, FloeError):
            hint = f"; {self._found.hint}" if self._found.hint else ""
            self._results.states["store"] = (FAILED, f"{self._found}{hint}")
            return
        sources = self._subject.packs
        if self._plan.write:
            put = upload.objects(self._plan.upload_bytes)
            keys = [source.key for source in put]

            def note() -> None:
                self._scratch.note_objects(self._objects, keys)

            if self._try("upload", lambda: upload.measure(self._objects, put, note)) is not None:
                # Of small packs nothing could be told.
                few = _total(sources) < min(ENOUGH_BYTES, _total(put))
                sources = put if few else sources
        if not sources:
            self._skip("store", _EMPTY)
            return
        drop = partial(store.forget, self._objects, sources)
        self._try("store", lambda: store.measure(self._objects, sources, self._plan, drop))

    def _cpu(self) -> None:
        pack_id = self._subject.pack_id

        def measure() -> Cpu:
            sample = cpu.made_sample() if pack_id is None else cpu.sample_of(self._objects, pack_id)
            return cpu.measure(sample, self._plan.cpu_seconds)

        self._try("cpu", measure)

    def _disk(self) -> None:
        path = self._scratch.root / "disk"

        def measure() -> Disk:
            try:
                return disk.measure(path, self._plan.disk_bytes, self._plan.disk_seconds)
            finally:
                path.unlink(missing_ok=True)

        self._try("disk", measure)

    def _mount(self) -> None:
        if os.geteuid() != 0:
            self._skip("mount", "mounting needs root: run floe bench as root")
            return
        if len(os.fsencode(self._scratch.run_dir)) + _LONGEST > _SOCKET:
            self._skip("mount", f"{self._scratch.run_dir} is too long a path for sockets: give a shorter --cache-dir")
            return
        model, size = self._subject.model, self._plan.mount_bytes

        def measure() -> Mount:
            node = self._node(model is None)
            if model is None:
                mounted.make_model(node, self._scratch, self._plan.model_bytes)
            self._scratch.mountpoint.mkdir()
            return mounted.measure(node, self._scratch, model or mounted.MADE, size, self._plan.mount_seconds)

        self._try("mount", measure)


def _total(sources: Iterable[Source]) -> int:
    return sum(source.size for source in sources)
