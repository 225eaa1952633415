"""The session's side of the protocol, over a socket in the kernel's place."""

import os
import socket
import struct
import threading

import pytest

from floe.fuse import protocol as p
from floe.fuse import slots
from floe.fuse.known import KnownPacks
from floe.fuse.session import Session

PACK = "ab" * 32


class Reader:
    def lookup(self, pack_id):
        return 8192 if pack_id == PACK else None


@pytest.fixture
def kernel(tmp_path):
    """Sends requests to a session and receives its replies, one datagram each."""
    memfd = slots.create((0, 77))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(10)
    mine = slots.Slots(memfd)
    known = KnownPacks(tmp_path)
    session = Session(theirs.fileno(), mine, known, Reader())
    thread = threading.Thread(target=session.serve)
    thread.start()
    yield Kernel(ours)
    session.stop(0)
    ours.send(bytes(p.IN_BYTES))  # wakes the thread
    thread.join(10)
    ours.close()
    theirs.close()
    known.close()
    mine.close()
    os.close(memfd)


class Kernel:
    def __init__(self, sock):
        self.sock = sock
        self.unique = 0

    def send(self, opcode, node, body=b""):
        self.unique += 2
        self.sock.send(p.IN_HEADER.pack(p.IN_BYTES + len(body), opcode, self.unique, node, 0, 0, 0, 0, 0) + body)

    def ask(self, opcode, node, body=b""):
        """(errno, the reply's body); the reply must be this request's."""
        self.send(opcode, node, body)
        reply = self.sock.recv(1 << 16)
        length, error, unique = p.OUT_HEADER.unpack_from(reply)
        assert (length, unique) == (len(reply), self.unique)
        return -error, reply[p.OUT_BYTES :]


def test_forget_is_ignored_and_never_answered(kernel):
    error, _ = kernel.ask(p.LOOKUP, p.ROOT_NODE, PACK.encode() + b"\0")
    assert error == 0
    node = p.node_id(PACK)
    before = kernel.ask(p.GETATTR, node)
    assert before[0] == 0
    kernel.send(p.FORGET, node, struct.pack("<Q", 1))
    kernel.send(p.BATCH_FORGET, 0, struct.pack("<IIQQ", 1, 0, node, 1))
    # The next reply is this request's: there was none before it. And the node is what it was.
    assert kernel.ask(p.GETATTR, node) == before
    assert kernel.ask(p.OPEN, node)[0] == 0
