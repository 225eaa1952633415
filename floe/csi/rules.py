"""Which namespaces' pods may have which models. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from floe.store.errors import AccessDeniedError


@dataclass(frozen=True)
class Rule:
    """Pods of the namespaces that match `namespace` may have the models (all tags) whose names match one of `models`.

    Both are shell patterns; `*` in a model's also stands for `/`. A rule without models allows none.
    """

    namespace: str
    models: tuple[str, ...] = ()


def check_allowed(namespace: str, model: str, rules: Sequence[Rule]) -> None:
    """AccessDeniedError, in words for the pod's owner, unless there are no rules at all or one of them allows it."""
    if not rules:
        return
    allowed = _allowed(namespace, rules)
    if any(fnmatchcase(model, pattern) for pattern in allowed):
        return
    if not any(fnmatchcase(namespace, rule.namespace) for rule in rules):
        raise AccessDeniedError(
            f"no rule of this node allows pods of namespace {namespace!r} any model",
            hint="whoever runs the nodes can add one to csi_rules",
        )
    raise AccessDeniedError(
        f"pods of namespace {namespace!r} may not have model {model!r}",
        hint=f"csi_rules of this node allow them {', '.join(allowed) or 'none'}",
    )


def allows_all(namespace: str, rules: Sequence[Rule]) -> bool:
    """Whether it does not matter which model it is."""
    return not rules or "*" in _allowed(namespace, rules)


def _allowed(namespace: str, rules: Iterable[Rule]) -> list[str]:
    return [pattern for rule in rules if fnmatchcase(namespace, rule.namespace) for pattern in rule.models]
