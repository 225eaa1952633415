"""What a node is used for, at random: containers and models come, are read, and go; new versions are pushed meanwhile.

Whatever is started must succeed in the end, however often something is killed: it is tried again for a while. Only a read
is never tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
from soak import content
from soak.content import MIB, Tree
from soak.readings import Readings
from soak.tally import Tally
from soak.world import World
from support.images import build_oci, busybox

from floe.protos.gen.containerd.mount_pb2 import Mount
from floe.store.errors import FloeError

T = TypeVar("T")
_PATIENCE = 600.0  # seconds in which what is tried again must succeed, on a machine that does much else, too
_VERSIONS = 3  # of a model or an image that are kept
# What containerd says of a container whose end it did not see, as it was dead itself; its log may lack the end then, too.
_LOST = 255
# Ends with 3 when anything differs or cannot be read; the log says what, and /tmp/end has the last word.
_SCRIPT = """n=0
while [ ! -e /tmp/stop ]; do
  for d in $DIRS; do
    cd $d && md5sum -c -s SUMS >/tmp/said 2>&1 || { (echo "in $d:"; cat /tmp/said) | tee /tmp/end; exit 3; }
  done
  n=$((n+1)); echo $n >/tmp/rounds; sleep 0.1
done
echo $n | tee /tmp/end"""


class Worker:
    """What the two kinds of work share."""

    def __init__(self, world: World, tally: Tally, readings: Readings, seed: int) -> None:
        self.world, self.tally, self.readings = world, tally, readings
        self.random = random.Random(seed)
        self.folder = world.base / type(self).__name__.lower()
        self.folder.mkdir()
        self._number = 0

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def again(self, what: str, call: Callable[[], T]) -> T:
        """The result of `call`, which is made until it does not fail; AssertionError when it always does."""
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                return call()
            except (grpc.RpcError, AssertionError, FloeError) as error:
                reason = error.details() if isinstance(error, grpc.RpcError) else str(error)
                self.tally.count("tried again", what, note=" ".join(str(reason).split())[-160:])
                if time.monotonic() > end:
                    raise AssertionError(f"{what} failed for {_PATIENCE:g} s, at last: {reason}") from error
            time.sleep(0.3)

    def floe(self, *words: object) -> str:
        """A command that must succeed in the end; what it printed."""

        def run() -> str:
            done = self.world.command(*words)
            if "Traceback" in done.stderr:
                self.tally.problem(f"floe {words}: {done.stderr[-3000:]}")
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout

        return self.again(f"floe {words[0]} {words[1]}" if words[0] != "umount" else "floe umount", run)

    def store_tree(self, name: str, tree: Tree) -> Path:
        return content.save(tree, self.folder / f"{name}.json")

    def choose(self, weights: dict[str, int]) -> str:
        return self.random.choices([*weights], [*weights.values()])[0]


@dataclass(frozen=True)
class Model:
    """A pushed version; `tree` is the file of what its mounts show."""

    ref: str
    source: Tree
    tree: Path


@dataclass
class Place:
    model: Model
    readers: list[int] = field(default_factory=list)


class Models(Worker):
    """Pushes, mounts, unmounts and removes models; `versions` by name, oldest first."""

    def __init__(self, world: World, tally: Tally, readings: Readings, seed: int) -> None:
        super().__init__(world, tally, readings, seed)
        self.versions: dict[str, list[Model]] = {}
        self.places: dict[Path, Place] = {}
        for name, size in (("m0", 12 * MIB), ("m1", 20 * MIB)):
            self.push(name, content.random_tree(self.random, big=size, model=True))

    def push(self, name: str, tree: Tree, *, die: bool = False) -> None:
        number = self.next_number()
        ref, source = f"{name}:v{number}", self.folder / f"source{number}"
        content.write_directory(tree, source)
        if die:
            self.world.command("model", "push", source, ref, kill_after=self.random.random() * 2.5)
            self.tally.count("kills", "floe model push")
        self.floe("model", "push", source, ref)
        self.tally.count("actions", "model pushed", note=ref)
        shutil.rmtree(source)
        shown = self.store_tree(f"{name}-v{number}", content.as_model(tree))
        self.versions.setdefault(name, []).append(Model(ref, tree, shown))

    def act(self) -> None:
        weights = {
            "push_next": 1,
            "push_and_die": 1,
            "mount": 6 if len(self.places) < 4 else 1,
            "unmount": 3,
            "hold": 1,
        }
        getattr(self, self.choose(weights))()

    def push_and_die(self) -> None:
        self.push_next(die=True)

    def push_next(self, *, die: bool = False) -> None:
        name = self.random.choice([*self.versions])
        kept = self.versions[name]
        self.push(name, content.next_version(self.random, kept[-1].source), die=die)
        mounted = {place.model.ref for place in self.places.values()}
        if len(kept) > _VERSIONS:
            old = kept.pop(1)  # the first is in images
            self.floe("model", "rm", old.ref)
            self.tally.count("actions", "model removed while mounted" if old.ref in mounted else "model removed")

    def mount(self) -> None:
        model = self.random.choice([model for kept in self.versions.values() for model in kept])
        place = self.folder / f"at{self.next_number()}"
        self.floe("model", "mount", model.ref, place)
        self.tally.count("actions", "model mounted", note=f"{model.ref} {place.name}")
        self.places[place] = made = Place(model)
        for _ in range(self.random.choice((1, 1, 2))):
            made.readers.append(
                self.readings.start(f"{model.ref} at {place.name}", model.tree, str(place), self.random)
            )

    def unmount(self) -> None:
        if not self.places:
            return
        place = self.random.choice([*self.places])
        for reader in self.places.pop(place).readers:
            self.readings.end(reader)
        self._unmount(place)

    def _unmount(self, place: Path) -> None:
        def run() -> None:
            done = self.world.command("umount", place)
            gone = not os.path.ismount(place) and "no model is mounted" in done.stderr  # an attempt that was cut short
            assert done.returncode == 0 or gone, done.stderr[-2000:]

        self.again("floe umount", run)
        self.tally.count("actions", "model unmounted", note=place.name)

    def hold(self) -> None:
        """An unmount while a file is open: it is refused, and the file reads on."""
        if not self.places:
            return
        place = self.random.choice([*self.places])
        path, entry = next(item for item in self.places[place].model.source.items() if item[0] == "plain/big")
        with (place / path).open("rb") as file:
            done = self.world.command("umount", place)
            start = self.random.randrange(entry.size)
            if done.returncode == 0 or not os.path.ismount(place):
                self.tally.problem(f"{place} was unmounted under an open file: {done.stderr}")
            elif os.pread(file.fileno(), 5000, start) != entry.content(start, 5000):
                self.tally.problem(f"wrong: {place / path} after an unmount that was refused")
        self.tally.count("actions", "unmount refused")

    def finish(self) -> None:
        for place, made in list(self.places.items()):
            for reader in made.readers:
                self.readings.end(reader)
            self._unmount(place)
        self.places.clear()


@dataclass(frozen=True)
class Image:
    """`trees`: directory in a container -> the file of what it shows. `nbytes` are read by one round of the script.

    `records` are the names of what the store has of it.
    """

    reference: str
    records: list[str]
    data: Tree
    trees: dict[str, Path]
    nbytes: int
    number: int


@dataclass
class Container:
    id: str
    pod: str
    image: Image
    readers: list[int] = field(default_factory=list)


class Containers(Worker):
    """Indexes images, starts containers of them, which read all the time, and ends these in every way."""

    def __init__(self, world: World, tally: Tally, readings: Readings, seed: int, models: Models) -> None:
        super().__init__(world, tally, readings, seed)
        self._models = {name: kept[0] for name, kept in models.versions.items()}
        self.images: list[Image] = []
        self.running: list[Container] = []
        self.rounds = 0
        self.add_image(content.random_tree(self.random, big=6 * MIB, model=False), attach=False)
        self.add_image(content.random_tree(self.random, big=6 * MIB, model=False), attach=True)

    def add_image(self, base: Tree, *, attach: bool) -> None:
        """An image of three layers, the last of which changes the second; perhaps with a model attached."""
        number = self.next_number()
        data = content.next_version(self.random, base)
        layers = [busybox(), content.layer(base, "data"), content.layer(data, "data", base)]
        built = build_oci(self.folder / f"image{number}", layers, tag="1", compression=self.random.choice(("", "gzip")))
        self.floe("image", "index", built.source)
        trees = {"/data": self.store_tree(f"data{number}", data)}
        nbytes, records = content.summed_bytes(data), [built.source]
        if attach:
            target = f"oci:{self.folder}/attached{number}"
            words = [
                word for name, model in self._models.items() for word in ("--model", f"{model.ref}=/models/{name}")
            ]
            attached = json.loads(self.floe("image", "attach", built.source, f"{target}:1", *words, "--json"))
            records.append(f"{target}@{attached['digest']}")
            trees |= {f"/models/{name}": model.tree for name, model in self._models.items()}
            nbytes += sum(content.summed_bytes(model.source) for model in self._models.values())
            reference = self.world.registry.add_layout(self.folder / f"attached{number}", "1", f"app{number}")
        else:
            reference = self.world.registry.add(built, f"app{number}")
        self.images.append(Image(reference, records, data, trees, nbytes, number))
        self.tally.count("actions", "image attached" if attach else "image indexed", note=reference)

    def act(self) -> None:
        weights = {
            "start": 6 if len(self.running) < 4 else 1,
            "stop": 3 if len(self.running) > 1 else 0,
            "execute": 2,
            "look_inside": 2,
            "new_image": 1,
            "pull_again": 1,
        }
        getattr(self, self.choose(weights))()
        self.check()

    def check(self) -> None:
        """All containers run."""
        for container in self.running:
            status = self.again(
                "status of a container", lambda container=container: self.world.cri.status(container.id)
            )
            if status.state != self.world.cri.pb.CONTAINER_RUNNING:
                said = self.again("logs", lambda container=container: self.world.cri.logs(container.id))
                self.tally.problem(
                    f"failed: a container of {container.image.reference} ended, {status.exit_code}: {said}"
                )

    def start(self) -> None:
        cri, image = self.world.cri, self.random.choice(self.images)

        def run() -> Container:
            cri.pull(image.reference)
            number = self.next_number()
            pod = cri.run_pod(f"pod{number}")
            environment = {"DIRS": " ".join(image.trees)}
            container = cri.run_container(
                pod, image.reference, ["sh", "-c", _SCRIPT], name=f"c{number}", env=environment
            )
            return Container(container, pod, image)

        started = self.again("start of a container", run)
        self.running.append(started)
        self.tally.count("actions", "container started", note=image.reference)
        if self.random.random() < 0.4:
            self._read_from_host(started)

    def look_inside(self) -> None:
        if self.running:
            self._read_from_host(self.random.choice(self.running))

    def _read_from_host(self, container: Container) -> None:
        """A reader in the container's root, as its processes see it."""
        if container.readers:
            return
        tasks = self.again("list of tasks", lambda: self.world.containerd.ctr("tasks", "ls").stdout)
        pids = [line.split()[1] for line in tasks.splitlines() if line.startswith(container.id)]
        if not pids:
            return
        place, tree = self.random.choice([*container.image.trees.items()])
        root = f"/proc/{pids[0]}/root{place}"
        container.readers.append(self.readings.start(f"{container.image.reference} {place}", tree, root, self.random))

    def stop(self) -> None:
        if self.running:
            self._stop(self.running.pop(self.random.randrange(len(self.running))), kindly=self.random.random() < 0.5)

    def _end(self, container: Container) -> int:
        """The exit code, once the container has ended; `_LOST` when containerd, killed just then, knows of no task any more."""
        cri, until = self.world.cri, time.monotonic() + _PATIENCE
        while (status := cri.status(container.id)).state not in (cri.pb.CONTAINER_EXITED, cri.pb.CONTAINER_UNKNOWN):
            assert time.monotonic() < until, f"container {container.id} did not end within {_PATIENCE:g} s"
            time.sleep(0.05)
        return status.exit_code if status.state == cri.pb.CONTAINER_EXITED else _LOST

    def _last_word(self, container: Container) -> str:
        """What its program wrote at its end, from the directory that containerd writes into for it."""

        def mounts() -> list[Mount]:  # containerd names snapshots NAMESPACE/NUMBER/KEY
            (name,) = (name for name in self.world.snapshots.names() if name.rpartition("/")[2] == container.id)
            return self.world.snapshots.mounts(name)

        (mount,) = self.again("mounts of a container", mounts)
        upper = next(option for option in mount.options if option.startswith("upperdir="))
        written = Path(upper.partition("=")[2]) / "tmp" / "end"

        def read() -> str:
            said = written.read_text().strip() if written.exists() else ""
            assert said, f"nothing in {written} yet"
            return said

        return self.again("last word of a container", read)

    def _stop(self, container: Container, *, kindly: bool) -> None:
        cri = self.world.cri
        for reader in container.readers:
            self.readings.end(reader)
        rounds = ""
        if kindly:
            self.again("stop", lambda: cri.execute(container.id, "touch", "/tmp/stop"))
            code = self.again("end of a container", lambda: self._end(container))
            rounds = self.again("logs", lambda: cri.logs(container.id)).strip()
            if code == _LOST:
                rounds = self._last_word(container)
            if code == _LOST and rounds.isdigit():
                self.tally.count("tried again", "status of a container lost by containerd")
            elif code != 0:
                self.tally.problem(f"failed: a container of {container.image.reference} ended with {code}: {rounds}")
        else:
            with contextlib.suppress(grpc.RpcError):  # it may have none yet
                rounds = cri.execute(container.id, "cat", "/tmp/rounds")[1].decode().strip()
        if rounds.isdigit():
            self.rounds += int(rounds)
            self.tally.count("reads", "rounds in containers", int(rounds))
            self.tally.count("reads", "bytes compared", int(rounds) * container.image.nbytes)
        self._remove(container.pod)
        cri.containers.remove(container.id)
        self.tally.count("actions", "container stopped" if kindly else "container killed")

    def _remove(self, pod: str) -> None:
        def run() -> None:
            try:
                self.world.cri.remove_pod(pod)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise

        self.again("removal of a pod", run)
        self.world.cri.pods.pop(pod, None)

    def execute(self) -> None:
        """Another process in a container reads a file and compares."""
        if not self.running:
            return
        container = self.random.choice(self.running)
        data = container.image.data
        path = self.random.choice([p for p, e in data.items() if stat.S_ISREG(e.mode) and p.startswith("plain/")])
        wanted = f"""while read -r sum name; do [ "$name" = {path} ] && echo "$sum  $name"; done <SUMS"""
        script = f"cd /data && {wanted} | md5sum -c"
        code, out, err = self.again(
            "exec", lambda: self.world.cri.execute(container.id, "sh", "-c", script, timeout=int(_PATIENCE))
        )
        if code != 0:
            self.tally.problem(f"failed: exec in {container.image.reference} of {path}: {code} {out!r} {err!r}")
        self.tally.count("actions", "exec")
        self.tally.count("reads", "bytes compared", data[path].size)

    def new_image(self) -> None:
        self.add_image(self.random.choice(self.images).data, attach=self.random.random() < 0.4)
        used = {container.image.number for container in self.running}
        old = next((image for image in self.images[2:] if image.number not in used), None)
        if len(self.images) > _VERSIONS + 1 and old is not None:
            self.images.remove(old)
            self.again("removal of an image", lambda: self.world.cri.remove_image(old.reference))
            for record in old.records:
                self._remove_record(record)
            self.tally.count("actions", "image removed", note=old.reference)

    def _remove_record(self, record: str) -> None:
        before = 0

        def run() -> None:
            nonlocal before
            done, before = self.world.command("image", "rm", record), before + 1
            # A command that failed may have removed it.
            gone = before > 1 and "no indexed image" in done.stderr
            assert done.returncode == 0 or gone, done.stderr[-2000:]

        self.again("floe image rm", run)

    def pull_again(self) -> None:
        """Remove an image that nothing runs of; the next start pulls it again."""
        used = {container.image.number for container in self.running}
        idle = [image for image in self.images if image.number not in used]
        if idle:
            image = self.random.choice(idle)
            self.again("removal of an image", lambda: self.world.cri.remove_image(image.reference))
            self.tally.count("actions", "image removed from the node", note=image.reference)

    def finish(self) -> None:
        while self.running:
            self._stop(self.running.pop(), kindly=True)
        # Starts that were cut short left pods and containers, as kubelet would find them.
        for pod in self.again("list of pods", self.world.cri.list_pods):
            self._remove(pod)
        self.world.cri.containers.clear()
