"""The agent's work done by `floe warm` itself goes on when a turn of it fails."""

from contextlib import closing
from types import SimpleNamespace

from support.floe_node import wait_until

from floe.agent.warming import Warming
from floe.cli.warm_here import here
from floe.store.catalog import Catalog
from floe.store.errors import DiskError
from floe.store.index import open_index
from floe.store.objects import open_store


def test_a_turn_that_fails_is_said_once_and_others_follow(tmp_path, monkeypatch, capsys):
    turns = []

    def turn(self):
        turns.append(self)
        raise DiskError("the disk is away")

    monkeypatch.setattr(Warming, "turn", turn)
    monkeypatch.setattr("floe.cli.warm_here.open_cache", lambda settings: SimpleNamespace(size=1 << 30))
    labels, budget = SimpleNamespace(by_key={}), SimpleNamespace(of=lambda size: size)
    settings = SimpleNamespace(run_dir=tmp_path, node="n", node_labels=labels, heartbeat=1.0, warm_budget=budget)
    with closing(open_store(f"file://{tmp_path}/store")) as store:
        catalog = Catalog(store, open_index(None))
        catalog.ensure_store()
        with here(settings, catalog, SimpleNamespace(kind="unpin")):
            wait_until(lambda: len(turns) > 2)
    assert capsys.readouterr().err.count("the disk is away; it is tried again") == 1
