"""Names, labels and selectors of nodes; heartbeats, orders and reports as notes; who is lost, and when all is done."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from floe.agent import heartbeat, orders
from floe.agent.heartbeat import LOST, STOPPED, UP, Heartbeat, Seen, state_of
from floe.agent.orders import CANCEL, CANCELLED, DONE, FULL, REFUSED, RUNNING, WAITING, WARM, Order, Progress, Report
from floe.agent.selector import Labels, Selector, parse_node_name
from floe.agent.watch import Watch
from floe.cli import warm_show
from floe.store.errors import BadInputError, DamagedError, UnsupportedError

TREE = "ab" * 32
ORDER = Order("0123", WARM, "llama:1", "cd" * 32, (TREE,), 100, Selector(("all",)), True, reason="launch", seconds=60)


@pytest.mark.parametrize("text", ["", "-a", "a/b", "a b", "a" * 254, "all", "ä"])
def test_names_that_no_node_can_have(text):
    with pytest.raises(BadInputError) as caught:
        parse_node_name(text)
    assert caught.value.hint


def test_labels_are_their_own_text():
    labels = Labels.parse("zone=eu-1a, gpu,pool=")
    assert labels.by_key == {"zone": "eu-1a", "gpu": "", "pool": ""}
    assert Labels.parse(str(labels)).by_key == labels.by_key
    assert Labels.parse({"zone": "eu-1a"}).by_key == {"zone": "eu-1a"}
    assert str(Labels.parse("none")) == "none"


@pytest.mark.parametrize("text", ["a=b=c", "=b", "a,,b", "a=1,a=2", "a b", 7, {"a": 1}, ""])
def test_labels_that_are_none(text):
    with pytest.raises(BadInputError):
        Labels.parse(text)


@pytest.mark.parametrize(
    ("text", "matching"),
    [
        ("all", {"a", "b", "c"}),
        ("a", {"a"}),
        ("gpu", {"a", "b"}),
        ("zone=1", {"a", "c"}),
        ("zone=1,b", {"a", "b", "c"}),
        ("zone", {"a", "b", "c"}),
        ("zone=", set()),
        ("nobody", set()),
    ],
)
def test_whom_a_selector_means(text, matching):
    nodes = {"a": {"gpu": "", "zone": "1"}, "b": {"gpu": "h100", "zone": "2"}, "c": {"zone": "1"}}
    selector = Selector.parse(text)
    assert {name for name, labels in nodes.items() if selector.matches(name, labels)} == matching
    assert Selector.parse(str(selector)) == selector


@pytest.mark.parametrize("text", ["", "a,", "=x", "a=b c", "a;b"])
def test_selectors_that_are_none(text):
    with pytest.raises(BadInputError):
        Selector.parse(text)


def test_notes_are_read_as_they_were_written():
    assert Order.decode(ORDER.encode()) == ORDER
    beat = Heartbeat("a", {"gpu": ""}, 7.5, gap=8.0, versions={"floe": "1"}, trees={TREE: True}, pins=({"tree": TREE},))
    assert Heartbeat.decode(beat.encode()) == beat
    report = Report({"0123": Progress(RUNNING, 5, 10, 2.5, "why")})
    assert Report.decode(report.encode()) == report


@pytest.mark.parametrize("kind", [Order, Heartbeat, Report])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda _: b"", DamagedError),
        (lambda _: b"[]", DamagedError),
        (lambda note: note[:-1], DamagedError),
        (lambda note: json.dumps({**json.loads(note), "version": 2}).encode(), UnsupportedError),
        (lambda note: json.dumps({**json.loads(note), "format": "floe.x"}).encode(), DamagedError),
        (lambda note: json.dumps({"format": json.loads(note)["format"], "version": 1}).encode(), DamagedError),
    ],
)
def test_notes_that_are_none(kind, spoil, error):
    note = {Order: ORDER, Heartbeat: Heartbeat("a"), Report: Report()}[kind].encode()
    with pytest.raises(error):
        kind.decode(spoil(note))


@pytest.mark.parametrize(
    "changed",
    [
        {"trees": ["x"]},
        {"trees": "x"},
        {"nodes": ""},
        {"content_bytes": -1},
        {"content_bytes": True},
        {"id": 7},
        {"trees": [TREE] * (orders.TREES_MAX + 1)},
    ],
)
def test_orders_with_a_part_that_is_wrong(changed):
    with pytest.raises(DamagedError):
        Order.decode(json.dumps({**json.loads(ORDER.encode()), **changed}).encode())


def test_an_order_of_a_kind_to_come_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="melt"):
        Order.decode(json.dumps({**json.loads(ORDER.encode()), "kind": "melt"}).encode())


# who is lost


def seen(ages, **changed):
    return {name: Seen(replace(Heartbeat(name, interval=10.0, gap=10.0), **changed), age) for name, age in ages.items()}


def states(nodes):
    return {name: state_of(node, nodes) for name, node in nodes.items()}


def test_a_node_is_lost_when_it_missed_three_heartbeats_that_others_gave():
    nodes = seen({"a": 2, "b": 29, "c": 31, "d": 3000})
    assert states(nodes) == {"a": UP, "b": UP, "c": LOST, "d": LOST}


def test_while_nobody_is_heard_nobody_is_lost_for_a_while():
    assert set(states(seen({"a": 61, "b": 70, "c": 119})).values()) == {UP}
    assert set(states(seen({"a": 121, "b": 130})).values()) == {LOST}


def test_after_the_index_was_away_the_first_to_be_heard_does_not_make_the_others_lost():
    nodes = seen({"b": 75, "c": 80})
    nodes["a"] = Seen(Heartbeat("a", interval=10.0, gap=70.0), 1)
    assert states(nodes) == {"a": UP, "b": UP, "c": UP}
    # Others that were heard all the time tell that it was node a which slept.
    nodes["d"] = Seen(Heartbeat("d", interval=10.0, gap=11.0), 1)
    assert states(nodes) == {"a": UP, "b": LOST, "c": LOST, "d": UP}


def test_a_node_that_was_stopped_is_not_lost():
    assert states(seen({"a": 1000}, state=STOPPED)) == {"a": STOPPED}


def test_a_node_is_remembered_for_longer_than_it_takes_to_miss_it():
    assert Heartbeat("a", interval=600.0).kept > heartbeat._ALL_SILENT * 600.0
    assert Heartbeat("a", interval=1.0).kept == heartbeat.KEPT


# when all is done


def reports(**progress):
    return {name: Report({ORDER.id: found}) for name, found in progress.items()}


def test_all_is_done_when_every_node_says_so():
    watch, nodes = Watch(ORDER), seen({"a": 1, "b": 1})
    watch.update(nodes, {})
    assert [(n.node, n.state) for n in watch.nodes] == [("a", WAITING), ("b", WAITING)]
    assert (watch.ended, watch.done) == (False, False)
    watch.update(nodes, reports(a=Progress(DONE, 100, 100), b=Progress(RUNNING, 40, 100, 20.0)))
    assert (watch.ended, watch.done) == (False, False)
    assert watch.nodes[1].as_json()["seconds_left"] == 3.0
    watch.update(nodes, reports(a=Progress(DONE, 100, 100), b=Progress(DONE, 100, 100)))
    assert (watch.ended, watch.done) == (True, True)


@pytest.mark.parametrize("state", [REFUSED, FULL])
def test_a_node_that_cannot_ends_the_wait_and_not_well(state):
    watch = Watch(ORDER)
    watch.update(seen({"a": 1}), reports(a=Progress(state, 1, 100)))
    assert (watch.ended, watch.done) == (True, False)


def test_a_node_that_dies_in_the_middle_is_lost_with_what_it_had_verified():
    watch = Watch(ORDER)
    watch.update(seen({"a": 1, "b": 1}), reports(a=Progress(RUNNING, 40, 100), b=Progress(DONE, 100, 100)))
    watch.update(seen({"a": 31, "b": 1}), reports(a=Progress(RUNNING, 40, 100), b=Progress(DONE, 100, 100)))
    assert [(n.state, n.progress.verified_bytes) for n in watch.nodes] == [(LOST, 40), (DONE, 100)]
    assert (watch.ended, watch.done) == (True, False)
    # The index may even forget it: it stays on the list.
    watch.update(seen({"b": 1}), reports(b=Progress(DONE, 100, 100)))
    assert [(n.node, n.state) for n in watch.nodes] == [("a", LOST), ("b", DONE)]
    # And it may come back.
    watch.update(seen({"a": 1, "b": 1}), reports(a=Progress(DONE, 100, 100), b=Progress(DONE, 100, 100)))
    assert watch.done


def test_a_node_that_was_done_before_it_died_is_done():
    watch = Watch(ORDER)
    watch.update(seen({"a": 100, "b": 1}), reports(a=Progress(DONE, 100, 100), b=Progress(DONE, 100, 100)))
    assert watch.done


def test_a_node_that_joins_is_waited_for_and_one_that_was_stopped_before_is_not():
    watch = Watch(ORDER)
    nodes = seen({"a": 1}) | seen({"gone": 5}, state=STOPPED)
    watch.update(nodes, reports(a=Progress(DONE, 100, 100)))
    assert [n.node for n in watch.nodes] == ["a"]
    watch.update(nodes | seen({"new": 0}), reports(a=Progress(DONE, 100, 100)))
    assert [n.node for n in watch.nodes] == ["a", "new"]
    assert not watch.ended
    watch.update(nodes | seen({"new": 0}, state=STOPPED), reports(a=Progress(DONE, 100, 100)))
    assert [n.state for n in watch.nodes] == [DONE, STOPPED]


def test_an_index_that_comes_back_empty_makes_nobody_lost_at_once():
    watch, nodes = Watch(ORDER), seen({"a": 1, "b": 1})
    running = reports(a=Progress(RUNNING, 40, 100), b=Progress(RUNNING, 40, 100))
    watch.update(nodes, running, 0.0)
    watch.update({}, {}, 20.0)
    assert [(n.state, n.progress.verified_bytes, n.age) for n in watch.nodes] == [(RUNNING, 40, 21.0)] * 2
    assert not watch.ended
    watch.update(seen({"a": 1}), {}, 50.0)  # heard again; the other one is not, for more than three heartbeats
    assert [n.state for n in watch.nodes] == [RUNNING, LOST]


@pytest.mark.parametrize("before", [FULL, REFUSED, RUNNING, DONE])
def test_a_cancel_is_answered_by_what_a_node_says_of_it_and_not_by_what_it_said_before(before):
    watch = Watch(replace(ORDER, kind=CANCEL))
    watch.update(seen({"a": 1}), reports(a=Progress(before, 40, 100)))
    assert (watch.ended, watch.done) == (False, False)
    watch.update(seen({"a": 1}), reports(a=Progress(CANCELLED, reason="given up")))
    assert (watch.ended, watch.done) == (True, True)


def test_all_cancels_are_waited_for_on_each_node_that_they_are_for():
    first = replace(ORDER, id="first", kind=CANCEL, nodes=Selector(("a",)))
    watch = Watch(replace(ORDER, kind=CANCEL, nodes=Selector(("b",))), [first])
    given_up = Progress(CANCELLED, reason="given up")
    watch.update(seen({"a": 1, "b": 1, "c": 1}), reports(b=given_up))
    assert [(n.node, n.state) for n in watch.nodes] == [("a", WAITING), ("b", DONE)]
    watch.update(seen({"a": 1, "b": 1, "c": 1}), reports(b=given_up) | {"a": Report({"first": given_up})})
    assert watch.done


def test_nothing_is_done_where_nobody_is():
    watch = Watch(ORDER)
    watch.update({}, {})
    assert not watch.done


# what is shown of it


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_each_node_at_work_has_a_bar_with_bytes_rate_and_time_left(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "200")
    watch = Watch(ORDER)
    mib = 1 << 20
    told = reports(a=Progress(RUNNING, 40 * mib, 100 * mib, 20.0 * mib), b=Progress(DONE, 100 * mib, 100 * mib))
    watch.update(seen({"a": 1, "b": 1}), told)
    with warm_show.progress(watch, wanted=True) as bars:
        bars.update()
    shown = screen.getvalue()
    for words in ("1 of 2 done", "140.0/200.0 MiB", "40.0/100.0 MiB", "20.0 MiB/s, 3.0 s left"):
        assert words in shown
    assert "100.0/100.0 MiB" not in shown  # node b needs no bar any more


def test_the_list_says_which_nodes_are_not_done_and_why(capsys):
    watch = Watch(ORDER)
    nodes = seen({"a": 1, "b": 1, "c": 31})
    watch.update(nodes, reports(a=Progress(DONE, 100, 100), b=Progress(REFUSED, 0, 100, reason="over the budget")))
    target = SimpleNamespace(missing=())
    warm_show.ended(watch, target, json=False, late=False, stands=True)
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["a", "done"], ["b", "refused"], ["c", "lost"]]
    assert "over the budget" in out
    assert "2 of 3 nodes are not done: b, c" in err
