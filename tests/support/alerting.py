"""Alerting rules over scrapes of a test's own, by a clock of the test's own: as much of Prometheus as the rules tested need.

`increase`, `rate` and `delta` are not extrapolated to the ends of their range: whether they are 0 is the same.
"""

import itertools
import math
import operator
import re

import pytest
from support import promfiles

EVERY = 15  # seconds from scrape to scrape, and from evaluation to evaluation
_LOOKBACK = 300  # seconds for which the last sample of a series counts
_COMPARED = {"==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}
_UNITS = {"s": 1, "m": 60, "h": 3600}


class Watched:
    """The rule `alert` over what `source` exports (see floe.store.exposition.Metric); `source` is called at each scrape."""

    def __init__(self, alert, source):
        parser = pytest.importorskip("promql_parser", reason="promql-parser, of the extra `dev`, is not installed")
        (rule,) = (rule for rule in promfiles.rules() if rule["alert"] == alert)
        self.source = source
        self.now = 1_000_000.0
        self._expr = parser.parse(rule["expr"])
        found = re.fullmatch(r"(\d+)([smh])", rule.get("for", "0s"))
        self._for = int(found[1]) * _UNITS[found[2]]
        self._series = {}
        self._since = None

    def run(self, minutes, each=lambda: None):
        """Whether it fires at each evaluation of that time; `each` is called before each scrape."""
        fired = []
        for _ in range(round(minutes * 60 / EVERY)):
            self.now += EVERY
            each()
            self._scrape()
            if not self._value(self._expr):
                self._since = None
            elif self._since is None:
                self._since = self.now
            fired.append(self._since is not None and self.now - self._since >= self._for)
        return fired

    def _scrape(self):
        told = set()
        for metric in self.source():
            name = f"{metric.name}_total" if metric.kind == "counter" else metric.name
            for values, number in metric.values.items():
                if isinstance(number, (int, float)):
                    key = (name, *zip(metric.labels, values, strict=True), ("instance", "node"))
                    told.add(key)
                    self._series.setdefault(key, []).append((self.now, float(number)))
        for key in self._series.keys() - told:  # what is not there any more is marked as stale
            self._series[key].append((self.now, math.nan))

    def _value(self, expr):
        """A number, or what is left of series: (labels, value) of each."""
        kind = type(expr).__name__
        if kind == "NumberLiteral":
            return expr.val
        if kind == "ParenExpr":
            return self._value(expr.expr)
        if kind == "VectorSelector":
            last = [(labels, samples[-1]) for labels, samples in self._selected(expr, _LOOKBACK)]
            return [(labels, value) for labels, (_, value) in last if not math.isnan(value)]
        if kind == "Call":
            (argument,) = expr.args
            ranges = self._selected(argument.vector_selector, argument.range.total_seconds())
            sound = [(labels, [value for _, value in samples if not math.isnan(value)]) for labels, samples in ranges]
            found = [(labels, _FUNCTIONS[expr.func.name](values)) for labels, values in sound if values]
            return [(labels, value) for labels, value in found if value is not None]
        if kind == "AggregateExpr":
            assert (str(expr.op), str(expr.modifier).split()[0]) == ("sum", "by")
            sums = {}
            for labels, value in self._value(expr.expr):
                key = tuple((name, labels[name]) for name in expr.modifier.labels if name in labels)
                sums[key] = sums.get(key, 0.0) + value
            return [(dict(key), value) for key, value in sums.items()]
        assert kind == "BinaryExpr", kind
        return self._both(expr)

    def _both(self, expr):
        op, left, right = str(expr.op), self._value(expr.lhs), self._value(expr.rhs)
        if op in _COMPARED:
            assert isinstance(right, float)
            return [(labels, value) for labels, value in left if _COMPARED[op](value, right)]
        (words,) = re.fullmatch(r"(?:ignoring \(([\w, ]+)\))?", str(expr.modifier or "")).groups("")
        passed_over = set(re.findall(r"\w+", words))

        def matched(labels):
            return frozenset((name, value) for name, value in labels.items() if name not in passed_over)

        known = {matched(labels) for labels, _ in (right if op == "and" else left)}
        if op == "and":
            return [(labels, value) for labels, value in left if matched(labels) in known]
        assert op == "or"
        return left + [(labels, value) for labels, value in right if matched(labels) not in known]

    def _selected(self, selector, seconds):
        """Labels and samples of the last `seconds`, of series that have any."""
        found = []
        for (name, *pairs), samples in self._series.items():
            labels = dict(pairs)
            if name == selector.name and all(_matches(one, labels) for one in selector.matchers.matchers):
                lately = [(at, value) for at, value in samples if self.now - seconds < at]
                if lately:
                    found.append((labels, lately))
        return found


def _matches(matcher, labels):
    value, kind = labels.get(matcher.name, ""), str(matcher.op).rpartition(".")[2]
    if kind in ("Equal", "NotEqual"):
        return (value == matcher.value) == (kind == "Equal")
    return (re.fullmatch(matcher.value, value) is not None) == (kind == "Re")


def _increase(values):
    if len(values) < 2:
        return None
    pairs = itertools.pairwise(values)
    return sum(after - before if after >= before else after for before, after in pairs)  # a counter begins anew at 0


_FUNCTIONS = {
    "increase": _increase,
    "rate": _increase,
    "delta": lambda values: values[-1] - values[0] if len(values) > 1 else None,
    "min_over_time": min,
    "max_over_time": max,
}
