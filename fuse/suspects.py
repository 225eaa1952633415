"""Requests that end workers: found among all that were under way, answered with an error alone, remembered for a minute.

A worker's end may be the fault of a request: of a frame whose unpacking crashes, say. Its successors would take the same
request up, and end too. The keeper marks (marks.py) each request that was under way when a worker crashed, was killed for want of memory
or fell silent; a kill -9 by others is no request's fault. What was there three times is a suspect.

Suspects are tried: half of them are taken up by a new worker before all else, and nothing beside them for a while. When the worker
ends meanwhile, one of that half did it, and the others are cleared; so on, until it is one alone. That is exact: nothing else was
asked of that worker. One who passes may be slow to do its harm: the next trial of it is longer.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from floe.fuse.marks import COUNT_MASK, ENDED, ON_TRIAL, OVERDUE, PASSED

if TYPE_CHECKING:
    from floe.fuse.slots import Slots

SUSPICIOUS = 3  # ends of workers
_LONGEST = 16.0  # seconds of a trial
_REMEMBERED = 60 * 10**9  # nanoseconds, as for damage


@dataclass(frozen=True)
class Verdict:
    """Slots by what is to be done with their requests; what is in none of the lists is taken up as ever.

    `tried`: to be taken up before the others and without them, for at most `seconds`. `cleared` are no suspects any more.
    `anew`: all suspects have passed a trial, which says nothing any more.
    """

    overdue: list[int]
    guilty: list[int]
    tried: list[int]
    cleared: list[int]
    seconds: float = 0.0
    anew: bool = False


def judge(marks: Mapping[int, int]) -> Verdict:
    """What to do with requests that a predecessor left, by their slots' marks."""
    overdue = [slot for slot, mark in marks.items() if mark == OVERDUE]
    rest = {slot: mark for slot, mark in marks.items() if mark != OVERDUE}
    ended = [slot for slot, mark in rest.items() if mark & ENDED]
    cleared = [slot for slot in rest if ended and slot not in ended]
    if len(ended) == 1:
        return Verdict(overdue, ended, [], cleared)
    suspects = ended or [slot for slot, mark in rest.items() if mark & COUNT_MASK >= SUSPICIOUS]
    if not suspects:
        return Verdict(overdue, [], [], cleared)
    candidates = [slot for slot in suspects if not rest[slot] & PASSED]
    anew = not candidates
    candidates = candidates or suspects
    tried = candidates[: (len(candidates) + 1) // 2]
    often = max(rest[slot] & COUNT_MASK for slot in tried)
    return Verdict(overdue, [], tried, cleared, min(2.0 ** (often - SUSPICIOUS), _LONGEST), anew)


def take_up(
    slots: Slots, order: list[int], handle: Callable[[int], object], refuse: Callable[[int, int], object]
) -> None:
    """Deal with the requests in the slots `order`: `handle(slot)` answers one or begins to.

    `refuse(slot, errno)` answers one with an error: ETIMEDOUT because a worker did not answer it in time, EIO because it
    ended workers.
    """
    verdict = judge({slot: slots.mark(slot) for slot in order})
    for slot in verdict.overdue:
        slots.count("overdue")
        refuse(slot, errno.ETIMEDOUT)
    for slot in verdict.guilty:
        slots.count("poisonous")
        refuse(slot, errno.EIO)
    refused = {*verdict.overdue, *verdict.guilty}
    for slot in order:
        if slots.mark(slot) and slot not in refused:
            kept = 0 if slot in verdict.cleared else COUNT_MASK if verdict.anew else COUNT_MASK | PASSED
            slots.set_mark(slot, slots.mark(slot) & kept)
    _try(slots, verdict, handle)
    for slot in order:
        if slot not in refused and slot not in verdict.tried:
            slots.pulse[0] = time.perf_counter_ns()
            handle(slot)


def _try(slots: Slots, verdict: Verdict, handle: Callable[[int], object]) -> None:
    until = time.monotonic() + verdict.seconds
    for slot in verdict.tried:
        slots.set_mark(slot, slots.mark(slot) | ON_TRIAL)
    for slot in verdict.tried:
        slots.pulse[0] = time.perf_counter_ns()
        handle(slot)
    while (left := [slot for slot in verdict.tried if slots.mark(slot)]) and time.monotonic() < until:
        slots.pulse[0] = time.perf_counter_ns()
        time.sleep(0.005)
    for slot in left:
        slots.change_mark(slot, ON_TRIAL, PASSED)


class Poison:
    """What ended workers lately: reads of it fail at once, lest each ends workers again. False when there is none."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._past = slots.remembered()

    def __bool__(self) -> bool:
        return bool(self._past)

    def add(self, node: int, offset: int, nbytes: int) -> None:
        """Remember `nbytes` at `offset` of a node, also for other workers."""
        self._slots.remember(node, offset, nbytes)
        self._past = self._slots.remembered()

    def covers(self, node: int, offset: int, nbytes: int) -> bool:
        """Whether a read touches any of it."""
        oldest = time.perf_counter_ns() - _REMEMBERED
        self._past = [past for past in self._past if past[3] > oldest]
        return any(
            at == node and offset < start + length and start < offset + nbytes for at, start, length, _ in self._past
        )
