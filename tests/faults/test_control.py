"""The worker's end of the control socket, when its process is short of what it needs."""

import os
import resource
import socket
import time
from contextlib import closing

from support.floe_node import wait_until

from floe.fuse import control
from floe.protos import packfs_control as wire


class Counting(socket.socket):
    """A listener that counts what it is asked for."""

    accepts = 0

    def accept(self):
        self.accepts += 1
        return super().accept()


def ask(client):
    client.sendall(wire.encode({"op": wire.PING}))
    with client.makefile("rb") as answers:
        return wire.decode(answers.readline())


def test_without_descriptors_newcomers_wait_and_the_thread_rests(tmp_path, monkeypatch):
    listener = Counting(fileno=control._bind(tmp_path).detach())
    monkeypatch.setattr(control, "_bind", lambda _run_dir: listener)
    server = control.ControlServer(tmp_path, status=dict, inflight=lambda _packs: (0, []))
    clients = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with closing(server), closing(clients[0]), closing(clients[1]):
        known, newcomer = clients
        for client in clients:
            client.settimeout(20)
        known.connect(str(tmp_path / wire.SOCKET_NAME))
        assert ask(known)["ok"]
        with closing(socket.socket()) as free:
            lowest = free.fileno()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
            newcomer.connect(str(tmp_path / wire.SOCKET_NAME))
            wait_until(lambda: listener.accepts > 1)
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                assert ask(known)["pid"] == os.getpid()  # who is known is answered
                time.sleep(0.02)
            assert listener.accepts < 10
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert ask(newcomer)["ok"]
