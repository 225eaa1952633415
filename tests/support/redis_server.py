"""Real Redis servers for tests, on loopback in private folders: standalone, a TLS cluster with ACL users, Sentinel.

`standalone()`, `cluster()` and `sentinel()` share one of each among all tests of a pytest session; a test keeps to itself by a
store uuid or a prefix of its own. `RedisServer(folder)` and the like are for tests that stop or fill theirs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import time
from pathlib import Path

import redis
from support import sweep
from support.certificates import Authority
from support.ports import low_port

ADMIN_PASSWORD, PASSWORD = "floe-test-admin", "floe test/pass@word"
# What the users may do whose file Floe's operators are given: docs/OPERATIONS.md has the same, a test compares.
RULES = {
    line.split()[1]: line.partition(" resetchannels ")[2]
    for line in (Path(__file__).parents[2] / "install/identity/redis-users.acl").read_text().splitlines()
}
PUSH_RULES = RULES["floe"]
_START_SECONDS = 30


class RedisServer:
    """A running redis-server. `port`; `client()`: an administrator's connection; `url(...)`: an index address.

    `binary` may be valkey-server. `tls`: a Certificates, then there is no plain port. `acl`: with the users of RULES.
    """

    def __init__(self, folder, *options, binary="redis-server", tls=None, acl=False, port=None):
        self.folder, self.tls, self.acl = Path(folder), tls, acl
        self.folder.mkdir(parents=True, exist_ok=True)
        self._binary, self._options = binary, options
        self.process = None
        self.port = port
        for attempt in range(5):  # another program may take a port between our choice and the server's bind
            self.port = port or low_port()
            try:
                self.start()
            except RuntimeError:
                self.stop()
                if port or attempt == 4:
                    raise
            else:
                return

    def start(self, *options):
        """Start it, again after `stop`: at the same port, and empty."""
        words = ["--dir", str(self.folder), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        words += ["--repl-diskless-sync-delay", "0", "--daemonize", "no"]
        if self.tls is None:
            words += ["--port", str(self.port)]
        else:
            words += ["--port", "0", "--tls-port", str(self.port), *self.tls.options()]
        if self.acl:
            file = self.folder / "users.acl"
            file.write_text(
                f"user default off\nuser admin on >{ADMIN_PASSWORD} ~* &* +@all\n"
                + "".join(f"user {name} on {_hashed(PASSWORD)} resetchannels {RULES[name]}\n" for name in RULES)
            )
            words += ["--aclfile", str(file)]
        self._run([self._binary, *words, *self._options, *options])

    def _run(self, command):
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
            )  # fmt: skip
        wait_for(self._answers, lambda: (self.folder / "redis.log").read_text(errors="replace")[-2000:])

    def _answers(self):
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "redis.log").read_text(errors="replace")[-2000:])
        try:
            with contextlib.closing(self.client()) as client:
                return client.ping()
        except redis.RedisError:
            return False

    def stop(self):
        """Kill it: what was in it is lost."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(30)

    def restart_empty(self):
        self.stop()
        self.start()

    def client(self):
        """A connection of an administrator."""
        more = {"ssl": True, "ssl_ca_certs": str(self.tls.ca), "ssl_check_hostname": False} if self.tls else {}
        if self.acl:
            more |= {"username": "admin", "password": ADMIN_PASSWORD}
        retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        return redis.Redis(port=self.port, host="127.0.0.1", protocol=2, retry=retry, **more)

    def empty(self):
        """Forget all data, and what users were refused."""
        self.ask("FLUSHALL")
        if self.acl:
            self.ask("ACL", "LOG", "RESET")

    def calls(self):
        """How often each command was called since `forget_calls`, by its name in lower case; not the administrator's."""
        stats = self.ask("INFO", "commandstats")
        found = {name.removeprefix("cmdstat_"): values["calls"] for name, values in stats.items()}
        return {name: count for name, count in found.items() if name not in ("info", "config|resetstat")}

    def forget_calls(self):
        self.ask("CONFIG RESETSTAT")

    def ask(self, *words):
        """One command of an administrator."""
        with contextlib.closing(self.client()) as client:
            return client.execute_command(*words)

    def url(self, query="", user="floe", port=None):
        return address([port or self.port], query, tls=self.tls, user=user if self.acl else None, folder=self.folder)


class Cluster:
    """Three primaries with TLS and ACL users, each a third of the slots. `url()` names one of them."""

    def __init__(self, folder, *more):
        self.folder = Path(folder)
        self.tls = Certificates(self.folder)
        self._more = more
        self.nodes = []
        try:
            for number in range(3):
                self._start(number)
            self._join()
        except BaseException:
            self.stop()
            raise

    def _start(self, number):
        options = ["--cluster-enabled", "yes", "--tls-cluster", "yes", "--tls-replication", "yes", *self._more]
        options += ["--masteruser", "admin", "--masterauth", ADMIN_PASSWORD]
        node = RedisServer(self.folder / f"node-{number}", *options, tls=self.tls, acl=True)
        self.nodes.append(node)
        return node

    def _join(self):
        edges = [0, 5461, 10923, 16384]
        for number, node in enumerate(self.nodes):
            node.ask("CLUSTER ADDSLOTS", *range(edges[number], edges[number + 1]))
            node.ask("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            self.nodes[0].ask("CLUSTER MEET", "127.0.0.1", node.port)
        wait_for(lambda: all(self._is_whole(node) for node in self.nodes))

    def add_replica(self, number):
        """A fourth node, which takes the place of node `number` when that dies."""
        replica = self._start(len(self.nodes))
        self.nodes[0].ask("CLUSTER MEET", "127.0.0.1", replica.port)
        wait_for(lambda: all(self._is_whole(node) for node in self.nodes))
        replica.ask("CLUSTER REPLICATE", self.nodes[number].ask("CLUSTER MYID").decode())
        wait_for(lambda: replica.ask("INFO", "replication").get("master_link_status") == "up")
        place = f"127.0.0.1:{replica.port}"
        wait_for(lambda: all("slave" in node.ask("CLUSTER NODES")[place]["flags"] for node in self.nodes))
        return replica

    def _is_whole(self, node):
        info = node.ask("CLUSTER INFO")
        known = str(len(self.nodes))
        return (info["cluster_state"], info["cluster_known_nodes"], info["cluster_slots_ok"]) == ("ok", known, "16384")

    def url(self, query="", user="floe"):
        return self.nodes[0].url(query, user)

    def empty(self):
        for node in self.nodes:
            node.empty()

    def stop(self):
        for node in self.nodes:
            node.stop()


class SentinelServer(RedisServer):
    """A Sentinel that watches `primary` as "floe" and alone may declare it dead. With TLS it wants a password."""

    def __init__(self, folder, primary, tls=None):
        self._primary = primary
        super().__init__(folder, tls=tls)

    def start(self, *options):
        config = self.folder / "sentinel.conf"
        place = f"port {self.port}\n"
        if self.tls:
            options = iter(self.tls.options())
            place = f"port 0\ntls-port {self.port}\ntls-replication yes\nrequirepass sentinel-secret\n"
            place += "".join(f"{name.removeprefix('--')} {next(options)}\n" for name in options)
        config.write_text(
            f"{place}bind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor floe 127.0.0.1 {self._primary.port} 1\n"
            "sentinel down-after-milliseconds floe 500\nsentinel failover-timeout floe 3000\n"
        )
        self._run(["redis-server", str(config), "--sentinel", *options])

    def client(self):
        made = super().client()
        if self.tls:
            made.connection_pool.connection_kwargs["password"] = "sentinel-secret"
        return made


class Guarded:
    """A primary, a replica of it, and a Sentinel. `url()` names the Sentinel."""

    def __init__(self, folder, tls=None):
        self.servers = []
        more = ["--tls-replication", "yes"] if tls else []
        try:
            self.primary = self._keep(RedisServer(folder / "primary", *more, tls=tls))
            more += ["--replicaof", f"127.0.0.1 {self.primary.port}"]
            self.replica = self._keep(RedisServer(folder / "replica", *more, tls=tls))
            wait_for(lambda: self.replica.ask("INFO", "replication")["master_link_status"] == "up")
            self.sentinel = self._keep(SentinelServer(folder / "sentinel", self.primary, tls))
            if tls is None:  # with TLS it may take the Sentinel ten seconds, and no test needs it
                wait_for(lambda: self._master()["num-slaves"] == 1)
        except BaseException:
            self.stop()
            raise

    def _keep(self, server):
        self.servers.append(server)
        return server

    def _master(self):
        return self.sentinel.ask("SENTINEL MASTER", "floe")

    def wait_for_fail_over(self):
        wait_for(lambda: self._master()["port"] == self.replica.port and self.replica.ask("ROLE")[0] == b"master")

    def empty(self):
        self.primary.empty()

    def url(self, query=""):
        return self.sentinel.url(f"sentinel=floe{query and '&' + query}")

    def stop(self):
        for server in reversed(self.servers):
            server.stop()


class Certificates:
    """A CA of one's own, and a certificate for `hosts` signed by it: PEM files."""

    def __init__(self, folder, *hosts):
        authority = Authority(folder)
        self.ca = authority.ca
        self.cert, self.key = authority.issue("redis", *(hosts or ("127.0.0.1", "localhost")), peer=True)

    def options(self):
        return [
            "--tls-cert-file", str(self.cert), "--tls-key-file", str(self.key),
            "--tls-ca-cert-file", str(self.ca), "--tls-auth-clients", "no",
        ]  # fmt: skip


def _hashed(password):
    import hashlib  # noqa: PLC0415 - a password with spaces cannot stand in an ACL file

    return "#" + hashlib.sha256(password.encode()).hexdigest()


def address(ports, query="", *, tls=None, user=None, folder=None):
    """An index address on loopback; the password of `user` comes from a file in `folder`."""
    options = [query] if query else []
    if tls:
        options.append(f"ca={tls.ca}")
    if user:
        file = folder / "password"
        file.write_text(PASSWORD + "\n")
        options.append(f"password_file={file}")
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"redis{'s' if tls else ''}://{user + '@' if user else ''}{hosts}" + (
        f"?{'&'.join(options)}" if options else ""
    )


def wait_for(condition, say=lambda: "it did not come about"):
    end = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(say())
        time.sleep(0.02)


def _shared(kind, make):
    folder = sweep.folder(kind, Path("/var/tmp"))
    try:
        made = make(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

    owner = os.getpid()

    def stop():
        if os.getpid() == owner:  # not in a forked child
            made.stop()
            shutil.rmtree(folder, ignore_errors=True)

    sweep.at_end(stop)
    return made


@functools.cache
def standalone(binary="redis-server"):
    """The standalone server that all tests of this process share; nobody stops it or changes its configuration."""
    return _shared("redis", lambda folder: RedisServer(folder, binary=binary))


@functools.cache
def cluster():
    """The cluster that all tests of this process share."""
    return _shared("cluster", Cluster)


@functools.cache
def sentinel():
    """The primary with replica and Sentinel that all tests of this process share."""
    return _shared("sentinel", Guarded)
