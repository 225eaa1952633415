"""What indexers are asked to do, and the queue they take it from. Pure, but for `open_queue`.

A job names an image by its reference, and whoever does it asks the registry what that stands for at that moment: a job that is
done twice, or late, therefore does no harm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from floe.store import fields, jsontext
from floe.store.errors import BadInputError, DamagedError
from floe.store.index import open_index

INDEX, CHECK = "index", "check"
"""Index the image; see whether the registry still has it."""
ACTIONS = (INDEX, CHECK)
NODE, QUEUE, WEBHOOK = "node", "queue", "webhook"
"""Who asks: a node that unpacked the image, `floe image index --queue`, a registry."""
DONE, UNCHANGED, REFUSED = "done", "unchanged", "refused"
OUTCOMES = (DONE, UNCHANGED, REFUSED)
"""The image is indexed; it was already; a policy refuses it."""
_JOB_BYTES = 64 << 10
_TEXTS = ("ref", "action", "platform", "origin", "lay_out", "error")
_ERROR_MAX = 1000  # characters
_LAY_OUT = "new"  # what is asked for without a word of it


@dataclass(frozen=True)
class Job:
    """`ref`: the image as nodes name it; `platform`: `os/arch[/variant]`, "" for what the indexer's policy says.

    `lay_out`: as `floe.ingest.oci.image.index_image` takes `profile`. `asked`: seconds since the epoch. `tries`: attempts that failed,
    `error` what the last of them ended with.
    """

    ref: str
    action: str = INDEX
    platform: str = ""
    origin: str = QUEUE
    lay_out: str = _LAY_OUT
    plain_http: bool = False
    asked: float = 0.0
    tries: int = 0
    error: str = ""

    @property
    def key(self) -> str:
        """What two jobs have in common of which one is enough.

        Who wants more than an ordinary index asks for another job: the first to come would else decide what both get.
        """
        more = (
            f"lay_out={self.lay_out}" if self.lay_out != _LAY_OUT else "",
            "plain_http=true" if self.plain_http else "",
        )
        return " ".join(word for word in (self.action, self.ref, self.platform, *more) if word)

    def failed(self, error: str) -> Job:
        """The job after one more attempt that ended with `error`."""
        # Errors name files, whose names need not be UTF-8; what is not would make the whole job unreadable.
        readable = error.encode("utf-8", "backslashreplace").decode()
        return replace(self, tries=self.tries + 1, error=readable[:_ERROR_MAX])

    def encode(self) -> bytes:
        """As the queue holds it."""
        return json.dumps({**self.__dict__, "key": self.key}, sort_keys=True, ensure_ascii=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> Job:
        """The reverse; DamagedError for what is no job, or one of another Floe."""
        try:
            return cls._from_json(jsontext.parse(data, _JOB_BYTES))
        except ValueError as error:
            raise DamagedError(f"the queue holds what is no job: {error}", hint="upgrade the indexers") from error

    @classmethod
    def _from_json(cls, found: object) -> Job:
        value = fields.mapping(found, "job", "ref", "action")
        if value["action"] not in ACTIONS:
            raise ValueError(f"action is {jsontext.shown(value['action'])}, not one of {', '.join(ACTIONS)}")
        asked = value.get("asked", 0.0)
        return cls(
            **{name: fields.text(value[name], name) for name in _TEXTS if name in value},
            plain_http=value.get("plain_http") is True,
            asked=float(asked) if isinstance(asked, (int, float)) and math.isfinite(asked) else 0.0,
            tries=fields.count(value.get("tries", 0), "tries"),
        )


@dataclass(frozen=True)
class Task:
    """A job that a worker has taken under `id`; `deliveries` counts it and those who took it before and fell silent.

    `data` is what the queue holds; `job` is None when that is no job.
    """

    id: str
    data: bytes
    deliveries: int
    job: Job | None


@dataclass(frozen=True)
class Worker:
    """A worker that the queue knows: jobs it holds, seconds since it last spoke."""

    name: str
    jobs: int
    idle: float


@dataclass(frozen=True)
class Failure:
    """A job that nobody tries any more (`id` in the list of those), or that waits for its next attempt in `due` seconds."""

    id: str
    job: Job | None
    due: float | None = None


@dataclass(frozen=True)
class QueueStatus:
    """`waiting` jobs nobody has taken, `working` taken ones, `retrying` those that wait after a failure, `failed` given up.

    `lag`: seconds since the oldest waiting job was asked for, 0 without one. `counts` by what became of jobs so far. `stream`: the
    key of the stream, for what scales workers by its length.
    """

    waiting: int
    working: int
    retrying: int
    failed: int
    lag: float
    workers: Sequence[Worker] = ()
    failures: Sequence[Failure] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    stream: str = ""


class Lease(Protocol):
    """Names that nobody else has as long as it lasts; a context manager that gives them back."""

    @property
    def lost(self) -> bool:
        """Whether somebody else may have them by now."""
        ...

    def release(self) -> None:
        """Give them back."""
        ...


class Queue(Protocol):
    """Thread-safe. Every method raises UnavailableError when the servers cannot be asked."""

    lease_seconds: float
    """Of silence after which a worker's job is another's."""

    def put(self, job: Job) -> bool:
        """Ask for a job; False when one of its key waits already."""
        ...

    def put_all(self, wanted: Sequence[Job]) -> int:
        """Ask for several in one step, all or none; how many are new."""
        ...

    def take(self, worker: str) -> Task | None:
        """The next job for `worker`, first of all one whose worker fell silent; None: there is none."""
        ...

    def renew(self, worker: str, task: Task) -> bool:
        """Say that it is still worked on; False: somebody else has it by now."""
        ...

    def finish(self, worker: str, task: Task, outcome: str) -> bool:
        """It is done, with one of OUTCOMES; False, and nothing is counted: somebody else has it by now."""
        ...

    def retry(self, worker: str, task: Task, job: Job, delay: float) -> bool:
        """Let it be tried again as `job` after `delay` seconds; False as for `finish`."""
        ...

    def give_back(self, worker: str, task: Task) -> bool:
        """Let somebody else do it at once, no attempt being counted; False as for `finish`."""
        ...

    def bury(self, worker: str, task: Task, job: Job | None) -> bool:
        """Give it up; `job` says why. False as for `finish`."""
        ...

    def leave(self, worker: str) -> None:
        """Forget a worker that holds no job."""
        ...

    def status(self, most: int = 100) -> QueueStatus:
        """How it stands, with at most so many failures of either kind."""
        ...

    def revive(self, ids: Sequence[str] | None = None) -> int:
        """Put jobs that were given up (None: all) back, as if they were new; how many."""
        ...

    def missing_since(self, name: str) -> float | None:
        """When what `name` stands for was first found missing, in seconds since the epoch; None: it was not."""
        ...

    def set_missing(self, name: str, since: float | None) -> None:
        """Remember that, or forget it."""
        ...

    def try_lease(self, names: Sequence[str], seconds: float) -> Lease | None:
        """All of `names`, renewed until it is released; None when anybody else has one of them."""
        ...

    def turn(self, name: str, seconds: float) -> bool:
        """Whether nobody has had this turn for `seconds`; then it is the caller's."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


def open_queue(url: str | None, store_uuid: str) -> Queue:
    """The queue beside the index at `url`, for the store with this uuid. BadInputError for an index that has none."""
    shown = open_index(url).url
    if shown.partition(":")[0] not in ("redis", "rediss"):
        raise BadInputError(
            f"index {shown} has no queue: jobs are shared through Redis",
            hint="give --index redis://HOST:6379; without one, run `floe image index` where the image is built",
        )
    from floe.store.index.redis.address import RedisAddress  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.index.redis.queue import RedisQueue  # noqa: PLC0415 - likewise

    return RedisQueue(RedisAddress.parse(url or ""), store_uuid)


def shown_error(error: BaseException) -> str:
    """What a job's `error` says."""
    text = str(error) or type(error).__name__
    hint = getattr(error, "hint", "")
    return (f"{text} ({hint})" if hint else text)[:_ERROR_MAX]


__all__ = [
    "ACTIONS",
    "CHECK",
    "DONE",
    "INDEX",
    "NODE",
    "OUTCOMES",
    "QUEUE",
    "REFUSED",
    "UNCHANGED",
    "WEBHOOK",
    "Failure",
    "Job",
    "Lease",
    "Queue",
    "QueueStatus",
    "Task",
    "Worker",
    "open_queue",
    "shown_error",
]
