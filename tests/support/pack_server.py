"""A pack filesystem in one small process, for tests of mounts above it: serves a node cache's pack files over raw FUSE.

It answers reads from the files at once, unless told to hold them. Run as a script by `PackServer`; its control socket
speaks the protocol of floe.protos.packfs_control and two verbs more, "hold" and "go".
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from floe.fuse import protocol as p
from floe.mount.syscalls import unmount
from floe.protos.packfs_control import PackfsClient

ROOT = Path(__file__).parents[2]


class PackServer:
    """Starts one on `run_dir`/packs and talks to it."""

    def __init__(self, run_dir: Path, packs: Path) -> None:
        self.mountpoint = run_dir / "packs"
        with contextlib.suppress(OSError):  # of a server that died
            unmount(str(self.mountpoint), detach=True)
        self.mountpoint.mkdir(exist_ok=True)
        self.client = PackfsClient(run_dir)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(run_dir), str(packs)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == b"ready\n"

    def hold(self) -> None:
        self.client._call({"op": "hold"})

    def go(self) -> None:
        self.client._call({"op": "go"})

    def silence(self) -> None:
        """Answer nothing more, on any socket, and stay alive: what hangs, hangs."""
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it as kill -9 does: the connection is aborted, the mount stays."""
        self.process.kill()
        self.process.wait(10)
        if self.process.stdout:
            self.process.stdout.close()


class Server:
    def __init__(self, run_dir: Path, packs: Path) -> None:
        self.packs = packs
        self.nodes: dict[int, str] = {}
        self.held: list[tuple[int, int, int, int]] = []
        self.holding = False
        self.lock = threading.Lock()
        self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self.fuse},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={p.MAX_READ}"
        libc = ctypes.CDLL(None, use_errno=True)
        target = str(run_dir / "packs").encode()
        if libc.mount(b"test-packs", target, b"fuse", 1 | 2 | 4, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        self.socket = socket.socket(socket.AF_UNIX)
        os.chdir(run_dir)  # an address holds 107 bytes
        with contextlib.suppress(FileNotFoundError):
            Path("packfs.sock").unlink()
        self.socket.bind("packfs.sock")
        self.socket.listen()
        threading.Thread(target=self.control, daemon=True).start()

    def control(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            # A client that gave up waiting may be gone.
            with contextlib.suppress(OSError), connection, connection.makefile("rwb") as stream:
                for line in stream:
                    stream.write(json.dumps({"ok": True, **self.order(json.loads(line))}).encode() + b"\n")
                    stream.flush()

    def order(self, request: dict) -> dict:
        with self.lock:
            if request["op"] == "inflight":
                reads = [unique for unique, node, _, _ in self.held if self.nodes[node] in request["packs"]]
                return {"inflight": len(reads), "reads": reads}
            if request["op"] in {"hold", "go"}:
                self.holding = request["op"] == "hold"
                held, self.held = (self.held, []) if not self.holding else ([], self.held)
                for read in held:
                    self.answer(*read)
        return {"pid": os.getpid()}

    def serve(self) -> None:
        while True:
            try:
                request = memoryview(os.read(self.fuse, p.MAX_READ + 4096))
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                continue
            _, opcode, unique, node, *_ = p.IN_HEADER.unpack_from(request)
            body = request[p.IN_BYTES :]
            if opcode in {p.FORGET, p.BATCH_FORGET, p.INTERRUPT}:
                continue
            if opcode == p.READ:
                _, offset, size, *_ = p.READ_IN.unpack_from(body)
                with self.lock:
                    if self.holding:
                        self.held.append((unique, node, offset, size))
                    else:
                        self.answer(unique, node, offset, size)
                continue
            answer = self.small(opcode, node, body)
            self.reply(unique, answer if isinstance(answer, bytes) else b"", 0 if isinstance(answer, bytes) else answer)

    def small(self, opcode: int, node: int, body: memoryview) -> bytes | int:
        if opcode == p.INIT:
            _, minor, _, flags = p.decode_init(body)
            return p.init_reply(minor, flags)
        if opcode == p.LOOKUP:
            name = p.name(body).decode()
            if not (self.packs / name / "data").exists():
                return errno.ENOENT
            self.nodes[p.node_id(name)] = name
            return p.entry_reply(p.node_id(name), self.size(name))
        if opcode == p.GETATTR:
            return p.attr_reply(node, 0 if node == p.ROOT_NODE else self.size(self.nodes[node]))
        if opcode in {p.OPEN, p.OPENDIR}:
            return p.open_reply()
        if opcode == p.STATFS:
            return p.statfs_reply()
        if opcode == p.READDIR:
            return b""
        return b"" if opcode in {p.RELEASE, p.RELEASEDIR} else errno.ENOSYS

    def size(self, name: str) -> int:
        return (self.packs / name / "data").stat().st_size

    def answer(self, unique: int, node: int, offset: int, size: int) -> None:
        with (self.packs / self.nodes[node] / "data").open("rb") as file:
            self.reply(unique, os.pread(file.fileno(), size, offset))

    def reply(self, unique: int, data: bytes, error: int = 0) -> None:
        with contextlib.suppress(OSError):  # its reader was killed
            os.writev(self.fuse, [p.header(len(data), unique, error), data])


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]), Path(sys.argv[2]))
    print("ready", flush=True)
    server.serve()
