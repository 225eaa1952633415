"""`floe agent`, `floe warm` and `floe nodes` as processes: nodes in network namespaces that share SeaweedFS and Redis, and what dies meanwhile."""

import json
import os
import random
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from support import seaweed
from support.floe_daemons import Starting
from support.floe_node import Node, wait_until
from support.netns import Network
from support.redis_server import RedisServer

from floe.store.cache.bitmap import Bitmap

MIB = 1 << 20
SIZE = 24 * MIB
RATE = 2 * MIB  # bytes a second that a node takes where there has to be a middle
LONG = 300  # seconds, for a machine that does other things

pytestmark = pytest.mark.timeout(600)


class FleetNode(Starting):
    """A machine with a pack filesystem and an agent, started separately."""

    def __init__(self, home, environ, name, *, prefix=()):
        super().__init__(home, environ, prefix=prefix)
        self.environ |= {"FLOE_NODE_NAME": name, "FLOE_HEARTBEAT": "2"}
        self.environ |= {"FLOE_WARM_BUDGET": "1GiB", "FLOE_STORE_TIMEOUT": "30"}
        self.name = name
        self.running = {}

    def begin(self, *names):
        for name in names:
            self.running[name] = self.start(name)

    def kill(self, *names):
        for name in names:
            process = self.running.pop(name)
            process.kill()
            process.wait(20)

    def die(self):
        """All at once, as by a power cut; the mount goes with its last process."""
        worker = int((self.run_dir / "worker.pid").read_text())
        self.kill("agent", "packfs")
        os.kill(worker, signal.SIGKILL)

    def holds_all(self):
        bitmaps = list(self.cache.glob("packs/*/bitmap"))
        decoded = [Bitmap.decode(path.read_bytes()) for path in bitmaps]
        return bool(decoded) and all(bits is not None and bits.is_full() for bits in decoded)

    def pins(self):
        return [path.name for path in self.cache.glob("packs/*/pins/warm-*")]

    def close(self):
        for process in self.running.values():
            process.kill()
            process.wait(20)
        self.clean_up()


class Operator(Node):
    """A machine from which orders are given."""

    def run(self, *argv):
        """Exit status and the JSON document."""
        done = subprocess.run(
            [sys.executable, "-m", "floe", *argv, "--json"],
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONG,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def begin(self, *argv):
        """The same, to be waited for by `finish`."""
        command = [sys.executable, "-m", "floe", *argv, "--json"]
        return subprocess.Popen(command, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def nodes(self):
        return {node["node"]: node for node in self.run("nodes")[1]}

    def progress(self, name):
        """(state, verified bytes) of a node's only order."""
        return next(((o["state"], o["verified_bytes"]) for o in self.nodes()[name]["warm"]), ("", 0))


def finish(process):
    out, err = process.communicate(timeout=LONG)
    assert "Traceback" not in err, err
    assert out, err
    return process.returncode, {node["node"]: node for node in json.loads(out)["nodes"]}, json.loads(out)


class Fleet:
    def __init__(self, folder):
        self.folder = folder
        self.weed = seaweed.running()
        self.redis = RedisServer(folder / "redis")
        self.made = []
        bucket = self.weed.bucket()
        common = self.weed.environment()
        home = folder / "operator"
        home.mkdir()
        self.operator = Operator(home)
        self.operator.environ |= {**common, "FLOE_STORE": self.weed.url(bucket, "f"), "FLOE_INDEX": self.redis.url()}
        self.operator.environ["FLOE_STORE_TIMEOUT"] = "30"
        self._common = common
        self.network = Network()
        weed = self.network.reach(urlsplit(self.weed.endpoint).port)
        self.store = self.weed.url(bucket, "f", endpoint=f"http://{weed}")
        self.index = f"redis://{self.network.reach(self.redis.port)}"
        weights = folder / "weights"
        weights.mkdir()
        (weights / "w.bin").write_bytes(random.Random(1).randbytes(SIZE))
        self.operator.floe("model", "push", weights, "m:1")

    def node(self, number, *, slow=False):
        """In a network namespace of its own, which reaches the two servers and the other nodes; `slow`: it takes RATE at the most."""
        environ = {**self._common, "FLOE_STORE": self.store, "FLOE_INDEX": self.index}
        if slow:
            environ["FLOE_COMPLETION_RATE"] = str(RATE)
        environ["FLOE_NODE_LABELS"] = f"number={number},gpu"
        prefix = self.network.namespace().prefix
        made = FleetNode(self.folder / f"n{number}", environ, f"n{number}", prefix=prefix)
        self.made.append(made)
        made.begin("packfs", "agent")
        return made

    def close(self):
        for made in reversed(self.made):
            made.close()
        self.network.close()
        self.redis.stop()


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.close()


def test_two_nodes_are_warmed_each_as_it_is_ordered(fleet):
    first, second = (fleet.node(number) for number in (1, 2))
    operator = fleet.operator
    wait_until(lambda: [n["state"] for n in operator.nodes().values()] == ["up"] * 2, LONG)
    assert operator.run("warm", "m:1", "--nodes", "number=2")[0] == 0
    assert (first.holds_all(), second.holds_all()) == (False, True)
    code, said = operator.run("warm", "m:1", "--check")
    assert (code, [n["node"] for n in said["nodes"] if n["state"] != "done"]) == (1, ["n1"])


@pytest.mark.slow
def test_three_nodes_are_warmed_and_one_dies_in_the_middle_of_it(fleet):
    first, second, third = (fleet.node(number, slow=True) for number in (1, 2, 3))
    operator = fleet.operator
    wait_until(lambda: [n["state"] for n in operator.nodes().values()] == ["up"] * 3, LONG)
    found = operator.nodes()["n2"]
    assert found["labels"] == {"number": "2", "gpu": ""}
    assert found["health"] == {"packfs": "running", "snapshotter": "not running"}
    assert found["versions"]["kernel"] == os.uname().release
    assert operator.run("warm", "m:1", "--check")[0] == 1
    warm = operator.begin("warm", "m:1", "--pin", "--reason", "launch")
    wait_until(lambda: operator.progress("n2")[1] > 0, LONG)
    second.die()
    code, nodes, said = finish(warm)
    assert code == 1
    assert (said["what"], said["complete"], said["timed_out"]) == ("m:1", False, False)
    assert {name: node["state"] for name, node in nodes.items()} == {"n1": "done", "n2": "lost", "n3": "done"}
    for name in ("n1", "n3"):
        assert nodes[name]["verified_bytes"] == nodes[name]["total_bytes"] >= SIZE
    assert 0 < nodes["n2"]["verified_bytes"] < nodes["n2"]["total_bytes"]
    # The report is true: frames and pins lie on the disks as it says.
    assert (first.holds_all(), second.holds_all(), third.holds_all()) == (True, False, True)
    assert len(first.pins()) == len(third.pins()) == 1
    wait_until(lambda: [p["reason"] for p in operator.nodes()["n1"]["pins"]] == ["launch"], LONG)
    code, said = operator.run("warm", "m:1", "--check")
    assert (code, [n["node"] for n in said["nodes"] if n["state"] != "done"]) == (1, ["n2"])
    assert operator.run("warm", "m:1", "--check", "--nodes", "n1,number=3")[0] == 0
    # It comes back, and the order still stands.
    second.begin("packfs", "agent")
    wait_until(second.holds_all, LONG)
    wait_until(lambda: operator.run("warm", "m:1", "--check")[0] == 0, LONG)
    assert operator.run("warm", "m:1", "--check", "--deep")[0] == 0
    wait_until(lambda: len(operator.run("nodes", "--has", "m:1")[1]) == 3, LONG)
    assert operator.run("warm", "m:1", "--unpin")[0] == 0
    assert [node.pins() for node in (first, second, third)] == [[], [], []]
    third.running["agent"].terminate()
    third.running.pop("agent").wait(20)
    assert operator.nodes()["n3"]["state"] == "stopped"


@pytest.mark.slow
def test_agent_worker_and_redis_die_while_a_node_is_warmed(fleet):
    node, operator = fleet.node(1, slow=True), fleet.operator
    wait_until(lambda: operator.nodes().get("n1", {}).get("state") == "up", LONG)
    warm = operator.begin("warm", "m:1")
    wait_until(lambda: operator.progress("n1")[1] > 0, LONG)
    for _ in range(2):
        node.kill("agent")
        node.begin("agent")
    os.kill(int((node.run_dir / "worker.pid").read_text()), signal.SIGKILL)
    fleet.redis.restart_empty()
    node.kill("agent")
    node.begin("agent")
    code, nodes, _ = finish(warm)
    assert (code, nodes["n1"]["state"]) == (0, "done")
    assert node.holds_all()
    # Nobody is left to do anything, and it says so.
    node.kill("agent")
    wait_until(lambda: operator.nodes()["n1"]["state"] == "lost", LONG)
    assert operator.run("nodes", "--forget", "n1") == (0, {"forgotten": "n1"})
    assert operator.nodes() == {}


def test_an_order_beyond_the_budget_is_refused_by_the_node(fleet):
    node, operator = fleet.node(1), fleet.operator
    node.kill("agent")
    node.environ["FLOE_WARM_BUDGET"] = "1MiB"
    node.begin("agent")
    wait_until(lambda: operator.nodes().get("n1", {}).get("state") == "up", LONG)
    code, said = operator.run("warm", "m:1", "--pin", "--reason", "x")
    assert (code, said["nodes"][0]["state"]) == (1, "refused")
    assert "warm_budget" in said["nodes"][0]["reason"]
    assert (node.pins(), node.holds_all()) == ([], False)


@pytest.fixture
def alone(tmp_path):
    node = FleetNode(tmp_path / "h", {"FLOE_INDEX": "none"}, "alone")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "w.bin").write_bytes(random.Random(2).randbytes(3 * MIB))
    node.floe("model", "push", weights, "m:1")
    yield node
    node.close()


def test_a_machine_of_its_own_is_warmed_by_the_command(alone):
    assert "packfs" in alone.floe("warm", "m:1", code=1).stderr
    alone.begin("packfs")
    found = alone.json("warm", "m:1", "--pin", "--reason", "demo")
    assert (found["complete"], [n["node"] for n in found["nodes"]]) == (True, ["alone"])
    assert alone.holds_all()
    assert len(alone.pins()) == 1
    assert alone.json("warm", "m:1", "--check", "--deep")["complete"]
    assert "done" in alone.floe("warm", "m:1", "--check").stdout
    assert "--no-wait" in alone.floe("warm", "m:1", "--unpin", "--no-wait", code=2).stderr
    assert len(alone.pins()) == 1
    alone.floe("warm", "m:1", "--unpin")
    assert alone.pins() == []


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("nobody",), 1, "neither a model nor an indexed image"),
        (("m:1", "--profile-only"), 1, "nobody recorded a start"),
        (("m:1", "--deep"), 2, "--check"),
        (("m:1", "--reason", "x"), 2, "--pin"),
        (("m:1", "--pin", "--check"), 2, "exclude"),
        (("m:1", "--nodes", "a b"), 2, "names no nodes"),
        (("m:1", "--nodes", "other"), 1, "no node is other"),
        (("m:1", "--for", "soon"), 2, "span of time"),
        (("m:1", "--cancel"), 1, "no order"),
        (("gone:1", "--cancel"), 1, "no order"),
        (("m:1", "--no-wait"), 2, "no agent runs here"),
    ],
)
def test_what_cannot_be_ordered_is_refused_before_anything_changes(alone, argv, code, said):
    alone.begin("packfs")
    assert said in alone.floe("warm", *argv, code=code).stderr
    assert not list(alone.cache.glob("packs/*/bitmap"))


def test_there_are_no_nodes_and_no_agent_without_an_index(alone):
    assert "index" in alone.floe("nodes", code=1).stderr
    assert "index" in alone.floe("agent", code=1).stderr
    wanted = [sys.executable, "-m", "floe", "agent", "--wanted"]
    assert subprocess.run(wanted, env=alone.environ, check=False).returncode == 1
    alone.environ["FLOE_INDEX"] = "redis://127.0.0.1:1"
    assert subprocess.run(wanted, env=alone.environ, check=False).returncode == 0
