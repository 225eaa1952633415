"""What an operator wants: of models on this node, completed or not, kept or not, and how much of the cache at most. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

OFF, IDLE, ALWAYS = "off", "idle", "always"
COMPLETION = (OFF, IDLE, ALWAYS)
AUTO, NEVER = "auto", "never"
BYPASS = (AUTO, NEVER, ALWAYS)
"""Whether reads go around a cache disk: when a hit costs more than a miss, or without asking."""


@dataclass(frozen=True)
class Policy:
    """For the models whose name (all tags) matches `name`, a shell pattern in which `*` also stands for `/`.

    `completion`: one of COMPLETION, None for the node's. `pin`: nothing else takes its content out of the cache. `share`: the
    most bytes of the cache for one model, None for no bound.
    """

    name: str
    completion: str | None = None
    pin: bool = False
    share: int | None = None


def policy_for(model: str | None, policies: Iterable[Policy]) -> Policy | None:
    """The first policy that matches a model's name; None when none does, and for what is no model."""
    if model is None:
        return None
    return next((policy for policy in policies if fnmatchcase(model, policy.name)), None)
