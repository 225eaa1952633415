"""Network namespaces for nodes, on a bridge of the test's own: they see each other, this machine, and nothing else.

A bridge has a /24 of RFC 2544's range for benchmarks, which no real network uses; sessions side by side have different
ones. Servers that listen on loopback here are opened to all nodes under one name:

    with Network() as network:
        registry = network.reach(5000)                   # "198.18.7.1:40123", for nodes and for this process
        node = network.namespace()
        Daemons(home, environ, prefix=node.prefix)       # processes there; sockets, files and mounts are this machine's
        Containerd(version, base, prefix=node.prefix, registries=(registry,))

What a killed session leaves is swept by the next one: see support.sweep.
"""

import contextlib
import os
import random
import socket
import subprocess
import threading

from support import sweep

_PREFIX = "floetest"  # of bridges


class Network:
    """`bridge`: its interface here, whose address is `here`. `close` takes the namespaces away; end their processes before."""

    def __init__(self):
        self._mark = os.environ[sweep.MARK]
        self._forwards = {}
        self._namespaces = []
        self._closed = False
        self._number = self._claim()
        self.bridge = f"{_PREFIX}{self._number}"
        self.here = self._address(1)
        sweep.at_end(self.close)
        try:
            _ip(f"addr add {self.here}/24 dev {self.bridge}", f"link set {self.bridge} up")
        except BaseException:
            self.close()
            raise

    def _claim(self):
        """Make a bridge under a name that nobody has: its number is that of the addresses. It is marked before it has that name."""
        fresh = f"ft-{os.getpid()}"  # at most 15 bytes
        _ip(f"link add {fresh} type bridge", f"link set {fresh} alias {sweep.MARK}={self._mark}")
        for number in random.sample(range(256), 256):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(f"link set {fresh} name {_PREFIX}{number}")
                return number
        _ip(f"link del {fresh}")
        raise AssertionError(f"every name from {_PREFIX}0 to {_PREFIX}255 is taken: ip link")

    def _address(self, host):
        return f"198.18.{self._number}.{host}"

    def namespace(self):
        """Another `Namespace` on this network."""
        made = Namespace(
            self.bridge, self._address(len(self._namespaces) + 2), f"{sweep.NETNS}{self._mark}.{self._number}"
        )
        self._namespaces.append(made)
        return made

    def reach(self, port):
        """ADDRESS:PORT, for every namespace and for this process, of what listens on `port` of loopback here."""
        if port not in self._forwards:
            self._forwards[port] = _Forward(self.here, port)
        return f"{self.here}:{self._forwards[port].port}"

    def close(self):
        if self._closed:
            return
        self._closed = True
        for forward in self._forwards.values():
            forward.close()
        for namespace in self._namespaces:
            namespace.close()
        _ip(f"link del {self.bridge}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Namespace:
    """A network namespace. `address`: its own. `prefix`: what runs a command in it, and in nothing else that is its own.

    Unlike `ip netns exec`, that leaves a process in this machine's mount namespace: what it mounts is seen by tests and containers.
    """

    def __init__(self, bridge, address, name):
        number = address.rpartition(".")[2]
        self.address, self.name = address, f"{name}.{number}"
        self._link = f"{bridge}.{number}"
        self.prefix = ("nsenter", f"--net=/run/netns/{self.name}", "--")
        _ip(f"netns add {self.name}")
        try:
            _ip(
                f"link add {self._link} type veth peer name eth0 netns {self.name}",
                f"link set {self._link} alias {sweep.MARK}={os.environ[sweep.MARK]} master {bridge} up",
            )
            _ip(f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up", netns=self.name)
        except BaseException:
            self.close()
            raise

    def close(self):
        # The link by itself: a process that still runs there would keep it, and with it the network's name.
        for command in (f"link del {self._link}", f"netns del {self.name}"):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(command)


def _ip(*commands, netns=None):
    where = ("-netns", netns) if netns else ()
    text = "".join(f"{command}\n" for command in commands)
    subprocess.run(["ip", *where, "-batch", "-"], input=text, check=True, capture_output=True, text=True)


class _Forward:
    """Hands every connection on to a port of loopback."""

    def __init__(self, here, port):
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server((here, 0))
        self.port = self._listener.getsockname()[1]
        self._open = set()
        self._sessions = []
        self._thread = threading.Thread(target=self._accept, name="forward")
        self._thread.start()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for session in self._sessions:
            session.join()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sessions.append(threading.Thread(target=self._serve, args=(client,), name="forward-session"))
            self._sessions[-1].start()

    def _serve(self, client):
        with client:
            try:
                server = socket.create_connection(self._to)
            except OSError:
                return
            with server:
                self._open |= {client, server}
                back = threading.Thread(target=_pump, args=(server, client), name="forward-back")
                back.start()
                _pump(client, server)
                back.join()
                self._open -= {client, server}


def _pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
