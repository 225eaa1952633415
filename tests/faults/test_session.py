"""The session's side of the protocol, over a socket in the kernel's place."""

import os
import socket
import struct
import threading
import time

import pytest

from floe.fuse import protocol as p
from floe.fuse import slots
from floe.fuse.idle import IdleProcessors
from floe.fuse.known import KnownPacks
from floe.fuse.session import Session

PACK = "ab" * 32


class Reader:
    def lookup(self, pack_id):
        return 8192 if pack_id == PACK else None

    def on_hand(self, _pack, _offset, _length, *, told):
        return None

    def read_cached_into(self, pack_id, offset, buffer, *, wait=True, told):
        buffer[:] = b"x" * len(buffer)
        return True

    def answered(self, pack_id, offset, length): ...


@pytest.fixture
def latency(tmp_path):
    """Stands for the kernel's device; what was written to it, in microseconds."""
    device = tmp_path / "cpu_dma_latency"
    device.touch()
    return device


@pytest.fixture
def kernel(tmp_path, latency):
    """Sends requests to a session and receives its replies, one datagram each."""
    memfd = slots.create((0, 77))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(10)
    mine = slots.Slots(memfd)
    known = KnownPacks(tmp_path)
    idle = IdleProcessors(latency)
    session = Session(theirs.fileno(), mine, known, Reader(), idle=idle)
    thread = threading.Thread(target=session.serve)
    thread.start()
    yield Kernel(ours)
    session.stop(0)
    ours.send(bytes(p.IN_BYTES))  # wakes the thread
    thread.join(10)
    idle.close()
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


def asked(device):
    return [value for (value,) in struct.iter_unpack("=i", device.read_bytes())]


def waits_for(device, expected):
    deadline = time.monotonic() + 10
    while asked(device) != expected:
        assert time.monotonic() < deadline, asked(device)
        time.sleep(0.001)


def test_processors_stay_awake_for_a_burst_of_small_reads_and_no_longer(kernel, latency):
    kernel.ask(p.LOOKUP, p.ROOT_NODE, PACK.encode() + b"\0")
    node, read = p.node_id(PACK), p.READ_IN.pack(0, 0, 64, 0, 0, 0, 0)
    for _ in range(8):  # each after a pause
        kernel.ask(p.READ, node, read)
        time.sleep(0.002)
    assert asked(latency) == []
    for _ in range(64):  # all there at once, so that a slow machine makes no pause between them
        kernel.send(p.READ, node, read)
    for _ in range(64):
        kernel.sock.recv(1 << 16)
    waits_for(latency, [0, 2_000_000_000])


def test_without_the_kernels_device_none_is_made(tmp_path):
    idle = IdleProcessors(tmp_path / "none")
    idle.keep_awake()
    idle.let_halt()
    idle.close()
    assert not (tmp_path / "none").exists()
