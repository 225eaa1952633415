"""The duty of warm orders: what a node does with them, whatever the worker, the index or the store do meanwhile."""

import json
import time

import pytest
from support.floe_node import wait_until
from support.stores import SilentStore
from test_residency import FILE, Pack

from floe.agent.beating import Beating
from floe.agent.duties import Running
from floe.agent.fleet import Fleet
from floe.agent.heartbeat import STOPPED, Heartbeat
from floe.agent.holdings import Holdings
from floe.agent.orders import (
    CANCEL,
    CANCELLED,
    CHECK,
    DONE,
    FAILED,
    INCOMPLETE,
    REFUSED,
    RUNNING,
    UNPIN,
    WAITING,
    WARM,
    Order,
)
from floe.agent.pins import WarmPins
from floe.agent.selector import Selector
from floe.agent.warming import Warming
from floe.agent.watch import Watch
from floe.cli import warm
from floe.store import layout
from floe.store.cache import open_cache
from floe.store.cache.shares import WARM_PIN
from floe.store.catalog import Catalog
from floe.store.errors import FloeError, UnavailableError
from floe.store.index.memory import MemoryIndex
from floe.store.objects.memory import MemoryStore
from floe.store.treeobject import encode_tree
from floe.store.trees import TreeStore

PACK = 8 * FILE


class Worker:
    """A worker of which the test says how far it is. `asked`: what it was told, by name."""

    def __init__(self):
        self.asked, self.forgotten = {}, []
        self.answer = {"state": "running", "content_bytes": PACK, "verified_bytes": 0, "problem": ""}
        self.down = False

    def warm(self, name, trees, **flags):
        if self.down:
            raise UnavailableError("the pack filesystem does not answer")
        self.asked[name] = (tuple(trees), flags)
        return self.answer

    def forget(self, name):
        self.forgotten.append(name)

    def done(self):
        self.answer = {**self.answer, "state": "done", "verified_bytes": PACK}


class Index(MemoryIndex):
    """An index that can be away. Its notes come by name, as those of a fleet's do."""

    down = False

    def notes(self, topic):
        if self.down:
            raise UnavailableError("the index is away")
        return dict(sorted(super().notes(topic).items()))

    def put_note(self, *args):
        if self.down:
            raise UnavailableError("the index is away")
        super().put_note(*args)


class Machine:
    """A node, and an operator's view of the fleet."""

    def __init__(self, folder, store=None):
        self.store = store or MemoryStore()
        self.index = Index()
        Catalog(MemoryStore() if store else self.store, self.index).ensure_store()
        self.catalog = Catalog(self.store, self.index)
        self.fleet = Fleet(self.catalog)
        self.cache = open_cache([folder])
        self.worker = Worker()
        self.now = 0.0
        self.budget = 1 << 40
        self.restart()

    def restart(self):
        """The agent dies, and another begins with nothing."""
        self.duty = Warming(
            self.fleet,
            TreeStore(self.store, self.cache),
            WarmPins(self.cache, self.budget),
            self.worker,
            node="a",
            labels={"gpu": ""},
            clock=lambda: self.now,
        )

    def turn(self):
        self.now += 10.0
        return self.duty.turn()

    def until(self, order, state):
        wait_until(lambda: (self.turn(), self.progress(order).state == state)[1])
        return self.progress(order)

    def progress(self, order):
        return self.fleet.reports()["a"].orders[order.id]

    def pins(self, pack):
        return {owner for owner in self.cache.pins(pack.pack.id) if owner.startswith(WARM_PIN)}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "cache")


@pytest.fixture
def pack(machine):
    return Pack(machine.store, "a")


def publish(machine, pack, *numbers, folder):
    """A tree in the store that is not on the node yet."""
    elsewhere = open_cache([folder])
    tree = pack.tree(elsewhere, *numbers)
    machine.store.put(layout.tree_key(tree), encode_tree(elsewhere.tree_path(tree).read_bytes()))
    return tree


@pytest.fixture
def tree(machine, pack, tmp_path):
    return publish(machine, pack, *range(8), folder=tmp_path / "elsewhere")


def order(tree, name="0001", kind=WARM, at="2026-01-01T00:00:00.000Z", nodes="all", **changed):
    what = {"what": "m:1", "digest": "cd" * 32, "content_bytes": PACK, "seconds": 3600, "by": "me", "at": at}
    return Order(id=name, kind=kind, trees=(tree,), nodes=Selector.parse(nodes), **{**what, **changed})


def test_an_order_is_fetched_pinned_and_reported_with_its_rate(machine, pack, tree):
    given = order(tree, pin=True, reason="launch")
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    assert machine.worker.asked["0001"] == ((tree,), {"profile": False, "pinned": True, "fetch": True, "deep": False})
    assert machine.cache.tree_path(tree) is not None
    said = json.loads(machine.cache.pin_reason(pack.pack.id, WARM_PIN + tree))
    assert said == {"name": "m:1", "reason": "launch", "by": "me", "at": given.at}
    machine.worker.answer["verified_bytes"] = PACK // 2
    machine.turn()
    progress = machine.progress(given)
    assert (progress.verified_bytes, progress.total_bytes) == (PACK // 2, PACK)
    assert progress.rate == pytest.approx(PACK / 2 / 10)
    assert progress.seconds_left == pytest.approx(10)
    machine.worker.done()
    assert machine.until(given, DONE).verified_bytes == PACK
    asked = dict(machine.worker.asked)
    machine.worker.asked.clear()
    machine.turn()
    assert asked
    assert machine.worker.asked == {}  # done is done


@pytest.mark.parametrize(
    ("nodes", "ours"), [("all", True), ("a", True), ("gpu", True), ("b", False), ("zone=1", False)]
)
def test_only_orders_for_this_node_count(machine, tree, nodes, ours):
    given = order(tree, nodes=nodes)
    machine.fleet.give(given)
    if ours:
        machine.until(given, RUNNING)
    else:
        for _ in range(3):
            machine.turn()
        assert machine.worker.asked == {}
        assert machine.fleet.reports().get("a") is None or machine.fleet.reports()["a"].orders == {}


def test_an_agent_that_was_killed_goes_on_with_what_is_ordered(machine, pack, tree):
    given = order(tree, pin=True)
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    machine.restart()
    machine.worker.asked.clear()
    machine.until(given, RUNNING)
    assert "0001" in machine.worker.asked
    assert machine.pins(pack) == {WARM_PIN + tree}


def test_a_worker_that_is_away_is_asked_again(machine, tree):
    given = order(tree)
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    machine.worker.down = True
    assert "does not answer" in machine.until(given, WAITING).reason
    machine.worker.down = False
    machine.worker.asked.clear()
    machine.until(given, RUNNING)
    assert "0001" in machine.worker.asked


def test_while_the_index_is_away_the_work_goes_on_and_is_reported_afterwards(machine, tree):
    given = order(tree)
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    machine.index.down = True
    machine.worker.done()
    machine.worker.asked.clear()
    with pytest.raises(UnavailableError):
        machine.turn()
    assert "0001" in machine.worker.asked
    machine.index.down = False
    machine.turn()
    assert machine.progress(given).state == DONE


def test_an_index_that_was_emptied_ends_no_order_that_is_under_way(machine, tree):
    given = order(tree)
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    machine.fleet.withdraw(given.id)
    machine.turn()
    assert machine.worker.forgotten == []
    machine.worker.done()
    machine.turn()
    assert machine.progress(given).state == DONE
    machine.turn()  # now nothing is left of it
    assert machine.worker.forgotten == ["0001"]


def test_an_order_is_taken_back(machine, tree):
    given = order(tree)
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    machine.fleet.give(order(tree, kind=CANCEL))
    assert machine.until(given, CANCELLED).reason == "given up"
    assert machine.worker.forgotten == ["0001"]


def test_who_waits_for_an_order_that_another_takes_back_does_not_take_it_for_done(machine, tree):
    given, taken_back = order(tree), order(tree, kind=CANCEL)
    waiting, cancelling = Watch(given), Watch(taken_back)
    machine.fleet.beat(Heartbeat("a"))
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    machine.fleet.give(taken_back)
    cancelling.update(machine.fleet.nodes(), machine.fleet.reports())
    assert not cancelling.ended
    machine.until(given, CANCELLED)
    for watch in (waiting, cancelling):
        watch.update(machine.fleet.nodes(), machine.fleet.reports())
    assert (waiting.ended, waiting.done, waiting.nodes[0].state) == (True, False, CANCELLED)
    assert (cancelling.ended, cancelling.done) == (True, True)


def test_an_order_beyond_the_budget_is_refused_with_the_reason_and_pins_nothing(machine, pack, tree, tmp_path):
    other = Pack(machine.store, "b")
    second = publish(machine, other, 0, folder=tmp_path / "more")
    machine.budget = PACK + 1
    machine.restart()
    first = order(tree, pin=True)
    machine.fleet.give(first)
    machine.until(first, RUNNING)
    late = order(second, "0002", pin=True)
    machine.fleet.give(late)
    progress = machine.until(late, REFUSED)
    assert "warm_budget" in progress.reason
    assert machine.pins(other) == set()
    assert machine.pins(pack) == {WARM_PIN + tree}
    assert "0002" not in machine.worker.asked
    # What is pinned already costs nothing once more.
    again = order(tree, "0003", pin=True)
    machine.fleet.give(again)
    machine.until(again, RUNNING)


def test_unpinning_lets_go_and_no_later_agent_pins_again(machine, pack, tree):
    given = order(tree, pin=True)
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    machine.cache.pin(pack.pack.id, "tree-of-a-mount")
    let_go = order(tree, "0002", kind=UNPIN, at="2026-01-02T00:00:00.000Z")
    machine.fleet.give(let_go)
    machine.until(let_go, DONE)
    assert machine.cache.pins(pack.pack.id) == {"tree-of-a-mount"}
    machine.until(given, CANCELLED)
    assert given.id in machine.worker.forgotten
    machine.restart()
    machine.until(let_go, DONE)
    machine.turn()
    assert machine.pins(pack) == set()
    assert machine.progress(given).state == "cancelled"
    # One given after that pins again.
    anew = order(tree, "0003", pin=True, at="2026-01-03T00:00:00.000Z")
    machine.fleet.give(anew)
    machine.until(anew, RUNNING)
    assert machine.pins(pack) == {WARM_PIN + tree}


@pytest.mark.parametrize("note_gone", [False, True])
@pytest.mark.parametrize("names", [("0002", "0003"), ("0003", "0002")])
def test_a_new_agent_that_meets_an_old_unpin_lets_nothing_go_that_was_pinned_since(
    machine, pack, tree, names, note_gone
):
    let_go = order(tree, names[0], kind=UNPIN)
    machine.fleet.give(let_go)
    machine.until(let_go, DONE)
    anew = order(tree, names[1], pin=True, at="2026-01-02T00:00:00.000Z")
    machine.fleet.give(anew)
    machine.until(anew, RUNNING)
    machine.worker.done()
    machine.until(anew, DONE)
    if note_gone:
        machine.fleet.withdraw(anew.id)
    machine.restart()
    machine.until(let_go, DONE)
    machine.turn()
    assert machine.pins(pack) == {WARM_PIN + tree}


def test_unpinning_by_name_finds_what_the_store_no_longer_has(machine, pack, tree):
    given = order(tree, pin=True)
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    let_go = order("ee" * 32, "0002", kind=UNPIN, at="2026-01-02T00:00:00.000Z")
    machine.fleet.give(let_go)
    machine.until(let_go, DONE)
    assert machine.pins(pack) == set()


def test_orders_are_taken_back_by_name_also_when_the_tag_has_moved_or_gone(machine, tree):
    machine.fleet.beat(Heartbeat("a"))
    given = order(tree, pin=True, seconds=30 * 86400)
    machine.fleet.give(given)
    moved = {"digest": "ff" * 32, "at": "2026-01-02T00:00:00.000Z"}
    unpin = warm._give(machine.fleet, order("ee" * 32, "0002", kind=UNPIN, **moved), wait=True)
    assert unpin.order.seconds == given.seconds  # an agent that starts within that time must not pin again
    cancel = warm._give(machine.fleet, order("ee" * 32, "0003", kind=CANCEL, **moved), wait=True)
    assert [(one.id, one.kind) for one in cancel.orders] == [(given.id, CANCEL)]


def test_a_check_fetches_no_tree_and_tells_what_is_missing(machine, tree):
    given = order(tree, kind=CHECK)
    machine.fleet.give(given)
    progress = machine.until(given, INCOMPLETE)
    assert (progress.verified_bytes, progress.total_bytes) == (0, PACK)
    assert machine.cache.tree_path(tree) is None
    assert machine.worker.asked == {}


def test_a_tree_that_the_store_does_not_have_fails_the_order(machine):
    given = order("ab" * 32)
    machine.fleet.give(given)
    assert "is not in" in machine.until(given, FAILED).reason


def test_a_silent_store_keeps_nobody_waiting(tmp_path):
    machine = Machine(tmp_path / "cache", SilentStore(MemoryStore()))
    machine.catalog._bind(Catalog(MemoryStore(), machine.index).ensure_store())
    given = order("ab" * 32)
    machine.fleet.give(given)
    assert "being fetched" in machine.until(given, WAITING).reason


def test_what_holds_is_told(machine, pack, tree):
    given = order(tree, pin=True, reason="launch")
    machine.fleet.give(given)
    machine.until(given, RUNNING)
    (pin,) = WarmPins(machine.cache, 0).listed()
    assert (pin["tree"], pin["name"], pin["reason"], pin["bytes"]) == (tree, "m:1", "launch", PACK)
    assert Holdings(machine.cache).trees(10) == {tree: False}
    path = machine.cache.data_path(pack.pack.id)
    (path.parent / "complete").touch()
    assert Holdings(machine.cache).trees(10) == {tree: True}
    assert Holdings(machine.cache).trees(0) == {}


# duties


class Failing:
    name, again = "failing", 0.01

    def __init__(self):
        self.turns, self.ended, self.error = 0, False, UnavailableError("away")

    def turn(self):
        self.turns += 1
        if self.error is not None:
            raise self.error
        return 0.01

    def end(self):
        self.ended = True


def test_a_duty_that_fails_is_tried_again_said_once_and_keeps_no_other_from_its_work(caplog):
    caplog.set_level("INFO")
    bad, good = Failing(), Failing()
    good.name, good.error = "good", None
    running = Running([bad, good])
    running.start()
    wait_until(lambda: bad.turns > 5 and good.turns > 5)
    assert caplog.text.count("failing: away") == 1
    assert running.failures["failing"] >= 5
    bad.error = None
    wait_until(lambda: "works again" in caplog.text)
    bad.error = ZeroDivisionError("a bug")
    wait_until(lambda: "a bug" in caplog.text)
    running.stop(10)
    assert bad.ended
    assert good.ended


def test_heartbeats_say_how_long_the_index_was_away_and_that_the_last_is_the_last(machine):
    facts = {
        "versions": {"floe": "1"},
        "mounted": [{"tree": "x"}] * 100,
        "trees": {f"{n:064x}": True for n in range(300)},
    }
    beating = Beating(machine.fleet, lambda: facts, node="a", labels={"gpu": ""}, interval=0.01)
    beating.turn()
    beat = machine.fleet.nodes()["a"].beat
    assert (beat.node, dict(beat.labels), beat.versions["floe"]) == ("a", {"gpu": ""}, "1")
    assert (len(beat.mounted), len(beat.trees)) == (64, 256)
    machine.index.down = True
    with pytest.raises(FloeError):
        beating.turn()
    time.sleep(0.2)  # for the clock that is measured
    machine.index.down = False
    beating.turn()
    assert machine.fleet.nodes()["a"].beat.gap >= 0.2
    for _ in range(4):
        beating.turn()
    assert machine.fleet.nodes()["a"].beat.gap < 0.2
    beating.end()
    assert machine.fleet.nodes()["a"].beat.state == STOPPED


def test_notes_that_nobody_can_read_are_said_once_and_passed_over(machine, caplog):
    machine.index.put_note("nodes", "bad", b"{", 60)
    machine.index.put_note("warm", "bad", b"{}", 60)
    machine.index.put_note("orders", "bad", b"null", 60)
    for _ in range(3):
        assert (machine.fleet.nodes(), machine.fleet.orders(), machine.fleet.reports()) == ({}, {}, {})
    assert caplog.text.count("is passed over") == 3
