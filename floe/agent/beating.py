"""The duty of saying, every few seconds, how this node is."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from floe.agent.fleet import Fleet
from floe.agent.heartbeat import MISSED, STOPPED, Heartbeat

MOUNTED_MAX, TREES_MAX, PINS_MAX = 64, 256, 64
"""What a heartbeat names at most: some 45 KB with all of them, names of 20 characters and reasons of 40."""
Facts = Callable[[], Mapping[str, Any]]


class Beating:
    """Tells `fleet` what `facts` says of node `node`: keys are Heartbeat's `versions`, `health`, `cache`, `mounted`, `trees`, `pins`."""

    name = "heartbeat"

    def __init__(self, fleet: Fleet, facts: Facts, *, node: str, labels: Mapping[str, str], interval: float) -> None:
        self._fleet = fleet
        self._facts = facts
        self.again = self._interval = interval
        self._heard: deque[float] = deque(maxlen=MISSED + 1)  # when the index took one, by time.monotonic()
        started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._last = Heartbeat(node=node, labels=dict(labels), interval=interval, started=started)

    def turn(self) -> float:
        """One heartbeat."""
        facts = dict(self._facts())
        facts["mounted"] = tuple(facts.get("mounted", ())[:MOUNTED_MAX])
        facts["pins"] = tuple(facts.get("pins", ())[:PINS_MAX])
        facts["trees"] = dict(list(facts.get("trees", {}).items())[:TREES_MAX])
        self._last = replace(self._last, **facts, gap=self._gap())
        self._fleet.beat(self._last)
        self._heard.append(time.monotonic())
        return self._interval

    def _gap(self) -> float:
        times = [*self._heard, time.monotonic()]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)

    def end(self) -> None:
        """The last one says that no other will follow."""
        self._fleet.beat(replace(self._last, state=STOPPED))
