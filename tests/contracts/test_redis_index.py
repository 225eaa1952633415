"""What the index in Redis promises beyond every index: its keys and commands, its users, TLS, and what it survives."""

import contextlib
import re
import time

import pytest
import redis
from support import ports, redis_server
from support.fake_redis import FakeRedis

from floe.store.catalog import Catalog
from floe.store.errors import UnavailableError
from floe.store.ids import digest, hexdigest
from floe.store.index import open_index
from floe.store.index.redis import connecting
from floe.store.index.redis import index as index_module
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.keys import Keys
from floe.store.index.status import index_status
from floe.store.objects.memory import MemoryStore
from floe.store.packindex import ChunkEntry
from floe.store.records import KIND_LAYER, ChainRecord, Manifest, Sizes, TreeEntry

ONE, TWO = hexdigest(b"one"), hexdigest(b"two")
REF = "refs/layers/sha256/" + "a" * 64


def chunks(count, start=0):
    return [ChunkEntry(digest(b"%d" % n), 4096, n) for n in range(start, start + count)]


def key(entry):
    return entry.digest, entry.length


@pytest.fixture
def server():
    shared = redis_server.standalone()
    shared.empty()
    return shared


@pytest.fixture
def cluster():
    shared = redis_server.cluster()
    shared.empty()
    return shared


@pytest.fixture
def own_server(tmp_path):
    made = redis_server.RedisServer(tmp_path / "server")
    yield made
    made.stop()


@pytest.fixture
def own_acl_server(tmp_path):
    made = redis_server.RedisServer(tmp_path / "server", acl=True)
    yield made
    made.stop()


@pytest.fixture
def opened():
    """Opens an index, bound to a store, and closes it afterwards."""
    with contextlib.ExitStack() as stack:

        def make(url, store="store-a"):
            index = stack.enter_context(contextlib.closing(open_index(url)))
            index.bind(store)
            return index

        yield make


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(index_module, "PUSH_SECONDS", 0.3)
    monkeypatch.setattr(index_module, "CHECK_SECONDS", 0.0)
    # A busy machine may take its time; the tests of slowness set these themselves.
    monkeypatch.setattr(index_module, "READ_SECONDS", 10.0)
    monkeypatch.setattr(index_module, "SLOW_SECONDS", 10.0)


def use_everything(index):
    index.pack_ids()
    index.add_pack(ONE, chunks(3000))
    index.add_pack(TWO, chunks(10))
    index.find_chunks([key(entry) for entry in chunks(3100)])
    index.put_ref(REF, b"1")
    index.get_ref(REF)
    index.get_ref(REF + "b")
    index.delete_ref(REF)
    index.put_ref(REF, b"1")
    index.remove_packs([TWO])
    for topic in ("nodes", "orders"):
        index.put_note(topic, "a", b"1", 0.01)
        index.put_note(topic, "b", b"1", 60)
    time.sleep(0.05)  # by Redis' clock: its expiry is what is waited for
    assert list(index.notes("nodes")) == ["b"]
    index.delete_note("nodes", "b")


# Keys and commands


def test_one_prefix_one_database_one_tag(server, opened):
    use_everything(opened(server.url()))
    with contextlib.closing(server.client()) as client:
        names = [name.decode() for name in client.scan_iter()]
        assert list(client.info("keyspace")) == ["db0"]
    assert len(names) > 1000
    assert all(
        re.fullmatch(r"floe:[0-9a-f]{12}:([pcrf]\{[^{}]+\}([0-9a-f]{2})?|n\{[a-z]+\}[ab]?)", name) for name in names
    )
    server.empty()
    use_everything(opened(server.url("prefix=team-a")))
    with contextlib.closing(server.client()) as client:
        assert all(name.startswith(b"team-a:") for name in client.scan_iter())


def test_all_shards_share_the_load(cluster, opened):
    use_everything(opened(cluster.url()))
    sizes = [node.ask("DBSIZE") for node in cluster.nodes]
    assert min(sizes) > sum(sizes) / 5


def test_nothing_but_the_documented_commands_is_sent(server, cluster, opened):
    """The cluster's ACL users enforce it; here also what a standalone server counts."""
    server.forget_calls()
    use_everything(opened(server.url()))
    index_status(server.url(), "store-a", 10)
    documented = {word.removeprefix("+") for word in redis_server.PUSH_RULES.split() if word.startswith("+")}
    assert set(server.calls()) <= documented
    use_everything(opened(cluster.url()))
    assert index_status(cluster.url(), "store-a", 10)["state"] == "ok"
    for node in cluster.nodes:
        assert node.ask("ACL LOG") == []


def test_what_a_push_and_a_start_send(server, opened):
    """The figures of docs/OPERATIONS.md, "What Redis has to do"."""
    nobody = opened(server.url())
    nobody.pack_ids()
    server.forget_calls()
    push = opened(server.url())
    push.pack_ids()
    assert server.calls() == {"hgetall": 256}
    server.forget_calls()
    push.add_pack(ONE, chunks(3000))
    counted = server.calls()
    assert counted.pop("eval") <= 256
    assert counted.pop("hset") == 3000 + 1  # one for each chunk, from within the scripts; one for the pack
    assert counted == {"hget": 3000}
    server.forget_calls()
    push.find_chunks([key(entry) for entry in chunks(2048)])
    assert server.calls() == {"eval": 256, "hget": 2048 + 256}
    node = opened(server.url())
    push.put_ref(REF, b"1")
    server.forget_calls()
    for _ in range(10):
        assert node.get_ref(REF) == b"1"
    assert server.calls() == {"get": 10}


def test_two_commands_for_each_layer_of_an_image(server, opened):
    """An index writes two refs a layer, so that every start, the first one too, reads two and writes none."""
    store, layers = MemoryStore(), [f"sha256:{n:064x}" for n in range(1, 31)]
    push = Catalog(store, opened(server.url()))
    push.ensure_store()
    manifest = Manifest(KIND_LAYER, TreeEntry("0" * 64, 1), (), Sizes(1, 1, 1), "test", "2026-01-01T00:00:00Z")
    stored = push.put_manifest(manifest)
    server.forget_calls()
    for layer in layers:
        push.set_layer(layer, stored)
        push.set_chain(layer, ChainRecord(layer))
    assert server.calls() == {"set": 2 * len(layers)}
    node = Catalog(store, opened(server.url()))
    server.forget_calls()
    for layer in layers:
        assert node.resolve_chain(layer)[1] == stored
    assert server.calls() == {"get": 2 * len(layers)}


def test_many_chunks_take_little_memory(server, opened):
    """Chunks of one hash stay in Redis's compact encoding, also those in as many packs as are kept."""
    index = opened(server.url())
    many = [ChunkEntry(b"\x01\x02" + digest(b"%d" % n)[2:], 4096, n) for n in range(400)]
    packs = [hexdigest(b"pack %d" % n) for n in range(6)]
    for pack in packs:
        index.add_pack(pack, many)
    name = Keys("floe", "store-a").chunks(1, 2)
    assert server.ask("OBJECT", "ENCODING", name) == b"listpack"
    assert server.ask("MEMORY", "USAGE", name) < 400 * (38 + 5 * 11 + 10)
    index.remove_packs(packs[1:5])
    assert index.find_chunks([key(many[7])])[key(many[7])].pack_id == packs[5]
    server.empty()
    once = opened(server.url(), "store-b")
    once.add_pack(ONE, many)
    name = Keys("floe", "store-b").chunks(1, 2)
    assert server.ask("MEMORY", "USAGE", name) < 400 * 56


# Lost, replaced, evicting


def test_a_lost_part_ends_what_was_known_and_is_filled_again(server, opened):
    index = opened(server.url())
    index.pack_ids()
    index.add_pack(ONE, chunks(1000))
    assert index.pack_ids() == {ONE}
    lost = chunks(1)[0].digest[0]
    names = server.ask("KEYS", f"*{{{lost:02x}}}*")
    assert len(names) > 1
    server.ask("DEL", *names)
    with pytest.raises(UnavailableError, match="emptied or replaced"):
        index.find_chunks([key(entry) for entry in chunks(1000)])
    other = opened(server.url())
    assert index_status(server.url(), "store-a", 10)["state"] == "empty"
    assert other.pack_ids() == set()
    assert index_status(server.url(), "store-a", 10)["state"] == "refilling"
    other.add_pack(ONE, chunks(1000))
    assert len(other.find_chunks([key(entry) for entry in chunks(1000)])) == 1000
    state = index_status(server.url(), "store-a", 10)
    assert (state["state"], state["packs"]) == ("ok", 1)
    assert opened(server.url()).pack_ids() == {ONE}


def test_a_push_that_began_before_the_loss_records_nothing_that_counts(server, opened):
    early = opened(server.url())
    early.pack_ids()
    server.empty()
    late = opened(server.url())
    late.pack_ids()
    early.add_pack(ONE, chunks(5))
    assert late.pack_ids() == set()
    late.add_pack(ONE, chunks(5))
    assert opened(server.url()).pack_ids() == {ONE}


def test_keys_of_another_store_are_never_taken_for_ours(server, opened):
    index = opened(server.url())
    server.ask("HSET", Keys("floe", "store-a").packs(7), "g", "store-b 0123456789abcdef")
    with pytest.raises(UnavailableError, match="another store's") as caught:
        index.pack_ids()
    assert caught.value.hint


def test_an_empty_index_is_noticed_by_a_look_up_and_said_once(server, opened, caplog):
    index = opened(server.url())
    for _ in range(3):
        assert index.get_ref(REF) is None
    assert caplog.text.count("is empty or was replaced") == 1


def test_eviction_is_noticed_said_and_mended(own_server, opened, caplog, monkeypatch):
    index = opened(own_server.url())
    index.pack_ids()
    index.add_pack(ONE, chunks(100))
    assert index.pack_ids() == {ONE}
    assert "noeviction" not in caplog.text
    used = own_server.ask("INFO", "memory")["used_memory"]
    own_server.ask("CONFIG SET", "maxmemory-policy", "allkeys-random", "maxmemory", used + (1 << 20))
    assert opened(own_server.url()).pack_ids() == {ONE}  # it may evict, but did not yet
    assert "maxmemory-policy allkeys-random" in caplog.text
    assert "warning" in index_status(own_server.url(), "store-a", 10)
    for n in range(64):
        own_server.ask("SET", f"filler {n}", "x" * (64 << 10))
    assert own_server.ask("INFO", "stats")["evicted_keys"] > 0
    with pytest.raises(UnavailableError, match="dropped keys") as caught:
        opened(own_server.url()).pack_ids()
    assert "noeviction" in caught.value.hint
    assert index_status(own_server.url(), "store-a", 10)["state"] == "evicting"
    own_server.ask("CONFIG SET", "maxmemory-policy", "noeviction", "maxmemory", 0)
    again = opened(own_server.url())
    assert again.pack_ids() == set()  # it has holes, so it is filled again
    again.add_pack(ONE, chunks(100))
    assert opened(own_server.url()).pack_ids() == {ONE}


# Users, passwords, TLS


def test_a_node_s_user_reads_and_its_refused_write_is_said_once(cluster, opened, caplog):
    opened(cluster.url()).put_ref(REF, b"1")
    node = opened(cluster.url(user="node"))
    assert node.get_ref(REF) == b"1"
    for _ in range(3):
        node.put_ref(REF, b"2")
        node.delete_ref(REF)
    assert node.get_ref(REF) == b"1"
    assert caplog.text.count("refs are not written to it") == 1
    with pytest.raises(UnavailableError, match="refused a command") as caught:
        node.add_pack(ONE, chunks(1))
    assert "ACL" in caught.value.hint
    assert index_status(cluster.url(user="node"), "store-a", 10)["state"] in ("ok", "empty")


def test_a_node_s_user_says_how_it_is_and_gives_no_orders(cluster, opened):
    operator, node = opened(cluster.url()), opened(cluster.url(user="node"))
    for topic in ("nodes", "warm"):
        node.put_note(topic, "a", b"1", 60)
        assert operator.notes(topic)["a"].data == b"1"
        with pytest.raises(UnavailableError, match="refused a command"):
            node.delete_note(topic, "a")
    operator.put_note("orders", "x", b"2", 60)
    assert node.notes("orders")["x"].data == b"2"
    for name in ("x", "y"):
        with pytest.raises(UnavailableError, match="refused a command"):
            node.put_note("orders", name, b"3", 60)
    assert {name: note.data for name, note in operator.notes("orders").items()} == {"x": b"2"}


def test_names_of_notes_that_expired_are_taken_out_by_who_may(cluster, opened):
    operator, node = opened(cluster.url()), opened(cluster.url(user="node"))
    node.put_note("nodes", "gone", b"", 0.01)
    node.put_note("nodes", "here", b"", 60)
    names = Keys("floe", "store-a").notes("nodes")
    redis_server.wait_for(lambda: list(node.notes("nodes")) == ["here"])

    def left():
        with contextlib.closing(index_module.Link(RedisAddress.parse(cluster.url()), 10)) as link:
            return set(link.server(10).client.hgetall(names))

    assert left() == {b"gone", b"here"}  # the node's user may not
    assert list(operator.notes("nodes")) == ["here"]
    assert left() == {b"here"}


def test_another_prefix_is_out_of_reach(cluster, opened):
    with pytest.raises(UnavailableError, match="refused a command"):
        opened(cluster.url("prefix=theirs")).pack_ids()


@pytest.mark.parametrize("spoil", ["password", "user", "default"])
def test_who_may_not_enter_is_told_so_without_the_password(cluster, opened, spoil):
    url = cluster.url()
    if spoil == "password":
        url = re.sub(r"&password_file=\S+", "", url).replace("floe@", "floe:wr0ng@")
    elif spoil == "user":
        url = url.replace("floe@", "nobody@")
    else:
        url = re.sub(r"&password_file=\S+", "", url).replace("floe@", "")
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="refused the user or the password") as caught:
        opened(url).pack_ids()
    assert time.monotonic() - began < 30
    assert "wr0ng" not in str(caught.value) + caught.value.hint
    assert index_status(url, "store-a", 10)["state"] == "unreachable"


def test_a_password_in_the_address_works_too(cluster, opened):
    url = re.sub(r"&password_file=\S+", "", cluster.url()).replace("floe@", "floe:floe%20test%2Fpass%40word@")
    index = opened(url)
    index.put_ref(REF, b"1")
    assert index.get_ref(REF) == b"1"
    assert "pass%40word" not in index.url


def test_a_password_that_was_rotated_is_read_from_its_file(own_acl_server, opened):
    index = opened(own_acl_server.url())
    index.put_ref(REF, b"1")
    own_acl_server.ask("ACL SETUSER", "floe", "resetpass", ">new")
    (own_acl_server.folder / "password").write_text("new\n")
    own_acl_server.ask("CLIENT KILL", "USER", "floe")
    assert index.get_ref(REF) == b"1"


def test_a_certificate_that_is_not_trusted_is_refused(cluster, opened, tmp_path):
    other = redis_server.Certificates(tmp_path / "other")
    url = cluster.url().replace(f"ca={cluster.tls.ca}", f"ca={other.ca}")
    with pytest.raises(UnavailableError, match="not trusted") as caught:
        opened(url).pack_ids()
    assert "ca=" in caught.value.hint
    with pytest.raises(UnavailableError, match="cannot read"):
        opened(url.replace(str(other.ca), f"{tmp_path}/none.pem")).pack_ids()


def test_the_host_name_of_every_discovered_node_is_verified(tmp_path, opened):
    """The seed's name is in the certificate; the address that CLUSTER SLOTS gives for the node is not."""
    tls = redis_server.Certificates(tmp_path / "tls", "localhost")
    node = redis_server.RedisServer(tmp_path / "node", "--cluster-enabled", "yes", tls=tls)
    try:
        node.ask("CLUSTER ADDSLOTS", *range(16384))
        redis_server.wait_for(lambda: node.ask("CLUSTER INFO")["cluster_state"] == "ok")
        with pytest.raises(UnavailableError, match="not trusted"):
            opened(node.url().replace("127.0.0.1", "localhost")).pack_ids()
    finally:
        node.stop()


def test_iam_authenticates_again_in_time_and_never_inside_multi(own_acl_server, opened, monkeypatch):
    class Signer(redis.CredentialProvider):
        token = "token-1"

        def get_credentials(self):
            return "floe", self.token

    class Clock:
        now = 0.0

    signer, clock = Signer(), Clock()
    monkeypatch.setattr(connecting, "provider", lambda _: signer)
    monkeypatch.setattr(connecting._Reauthenticating, "clock", lambda _: clock.now)

    def rotate():
        signer.token = f"token-{clock.now}"
        own_acl_server.ask("ACL SETUSER", "floe", "resetpass", f">{signer.token}")
        own_acl_server.forget_calls()

    def counted():
        return {name: n for name, n in own_acl_server.calls().items() if name in ("auth", "get", "hgetall")}

    rotate()
    index = opened(own_acl_server.url())
    index.pack_ids()
    clock.now += connecting.REAUTH_SECONDS - 1
    rotate()
    index.get_ref(REF)
    assert counted() == {"get": 1, "auth": 1}  # the administrator's, who asks
    clock.now += 1
    rotate()
    index.get_ref(REF)
    index.get_ref(REF)
    assert counted() == {"get": 2, "auth": 2}
    clock.now += connecting.REAUTH_SECONDS
    rotate()
    index.pack_ids()  # a pipeline
    assert counted() == {"hgetall": 256, "auth": 2}
    own_acl_server.ask("ACL SETUSER", "floe", "+multi", "+exec")
    clock.now += connecting.REAUTH_SECONDS
    rotate()
    client = index._link.server(10).client
    with client.pipeline(transaction=True) as pipe:
        pipe.get("floe:x")
        pipe.get("floe:y")
        assert pipe.execute() == [None, None]
    assert counted() == {"get": 2, "auth": 2}
    clock.now += connecting.REAUTH_SECONDS
    rotate()
    signer.token = "refused"
    with pytest.raises(UnavailableError, match="refused the user or the password"):
        index.get_ref(REF)
    assert connecting.REAUTH_SECONDS < 12 * 3600 - 3600


def test_credentials_that_cannot_be_had_are_said_and_nothing_is_sent_without(own_acl_server, opened):
    index = opened(own_acl_server.url())
    index.put_ref(REF, b"1")
    (own_acl_server.folder / "password").unlink()
    own_acl_server.ask("CLIENT KILL", "USER", "floe")
    for _ in range(2):
        with pytest.raises(UnavailableError, match="cannot read the index's password"):
            index.get_ref(REF)
    own_acl_server.url()  # writes the file
    assert index.get_ref(REF) == b"1"


# A cluster that changes


@pytest.mark.slow
def test_moved_slots_a_fail_over_and_a_missing_shard(tmp_path, opened, monkeypatch):
    cluster = redis_server.Cluster(tmp_path / "cluster", "--cluster-node-timeout", "1000")
    try:
        index = opened(cluster.url())
        index.pack_ids()
        index.add_pack(ONE, chunks(300))
        name = Keys("floe", "store-a").ref(REF)
        index.put_ref(REF, b"before")
        slot = cluster.nodes[0].ask("CLUSTER KEYSLOT", name)
        ids = [node.ask("CLUSTER MYID").decode() for node in cluster.nodes]
        at = next(n for n, node in enumerate(cluster.nodes) if name.encode() in node.ask("KEYS", "*"))
        source, target = cluster.nodes[at], cluster.nodes[(at + 1) % 3]
        target.ask("CLUSTER SETSLOT", slot, "IMPORTING", ids[at])
        source.ask("CLUSTER SETSLOT", slot, "MIGRATING", ids[(at + 1) % 3])
        assert index.get_ref(REF) == b"before"  # not moved yet
        index.delete_ref(REF)
        index.put_ref(REF, b"asked")  # ASK: the source no longer has it
        assert index.get_ref(REF) == b"asked"
        assert name.encode() in target.ask("KEYS", "*")
        for node in (target, source):
            node.ask("CLUSTER SETSLOT", slot, "NODE", ids[(at + 1) % 3])
        assert index.get_ref(REF) == b"asked"  # MOVED
        assert len(index.find_chunks([key(entry) for entry in chunks(300)])) == 300
        replica = cluster.add_replica(2)
        cluster.nodes[2].stop()
        redis_server.wait_for(lambda: replica.ask("ROLE")[0] == b"master")
        monkeypatch.setattr(index_module, "PUSH_SECONDS", 30.0)
        assert len(index.find_chunks([key(entry) for entry in chunks(300)])) == 300  # after the fail-over
        assert index.pack_ids() == {ONE}
        monkeypatch.setattr(index_module, "PUSH_SECONDS", 0.3)
        replica.stop()
        redis_server.wait_for(lambda: cluster.nodes[0].ask("CLUSTER INFO")["cluster_state"] == "fail")
        with pytest.raises(UnavailableError):
            index.pack_ids()
        assert index_status(cluster.url(), "store-a", 30)["state"] == "unreachable"
    finally:
        cluster.stop()


@pytest.mark.parametrize(
    "answer",
    [
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-CLUSTERDOWN The cluster is down\r\n",
        b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
        b"-MOVED 1 127.0.0.1:1\r\n",
        b"-ASK 1 127.0.0.1:1\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
        b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
        b"-MISCONF Redis is configured to save RDB snapshots, but it's unable to persist to disk.\r\n",
        b"-OOM command not allowed when used memory > 'maxmemory'.\r\n",
        b"-NOPERM this user has no permissions\r\n",
        b"-ERR max number of clients reached\r\n",
        b"nonsense that is no RESP\r\n",
    ],
    ids=lambda answer: answer.split()[0].decode(),
)
def test_every_error_of_a_server_is_an_unavailable_index(answer, opened):
    fake = FakeRedis({"*": answer})
    try:
        index = opened(fake.url)
        for use in (
            lambda: index.get_ref(REF),
            index.pack_ids,
            lambda: index.add_pack(ONE, chunks(1)),
            lambda: index.find_chunks([key(chunks(1)[0])]),
            lambda: index.remove_packs([ONE]),
        ):
            with pytest.raises(UnavailableError, match="redis://127") as caught:
                use()
            assert caught.value.hint
        for write in (lambda: index.put_ref(REF, b"1"), lambda: index.delete_ref(REF)):
            with contextlib.suppress(UnavailableError):
                write()
        assert index_status(fake.url, "store-a", 10)["state"] == "unreachable"
    finally:
        fake.close()


def test_a_standalone_server_replaced_by_a_cluster_is_noticed(tmp_path, opened):
    server = redis_server.RedisServer(tmp_path / "server")
    index = opened(server.url())
    index.put_ref(REF, b"1")
    server.stop()
    server.start("--cluster-enabled", "yes")
    try:
        server.ask("CLUSTER ADDSLOTS", *range(16384))
        redis_server.wait_for(lambda: server.ask("CLUSTER INFO")["cluster_state"] == "ok")
        with contextlib.suppress(UnavailableError):
            index.get_ref(REF)
        index.put_ref(REF, b"2")
        assert index.get_ref(REF) == b"2"
        assert index_status(server.url(), "store-a", 10)["mode"] in ("cluster", "standalone")
    finally:
        server.stop()


def test_sentinel_with_tls_and_a_password_of_its_own(tmp_path, opened):
    tls = redis_server.Certificates(tmp_path / "tls")
    guarded = redis_server.Guarded(tmp_path / "guarded", tls)
    try:
        (tmp_path / "sentinel-password").write_text("sentinel-secret\n")
        index = opened(guarded.url(f"sentinel_password_file={tmp_path}/sentinel-password"))
        index.put_ref(REF, b"1")
        assert index.get_ref(REF) == b"1"
        with pytest.raises(UnavailableError, match=r"name no primary: .*Authentication") as caught:
            opened(guarded.url()).pack_ids()
        assert "sentinel_password_file" in caught.value.hint
        assert len(str(caught.value)) < 200
    finally:
        guarded.stop()


def test_any_of_several_seeds_will_do(server, opened):
    dead = ports.low_port()
    index = opened(redis_server.address([dead, server.port]))
    index.put_ref(REF, b"1")
    assert index.get_ref(REF) == b"1"
    assert RedisAddress.parse(index.url).hosts == (("127.0.0.1", dead), ("127.0.0.1", server.port))
