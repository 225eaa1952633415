"""As much of systemd as a service with FileDescriptorStoreMax= sees: it takes descriptors, and gives them to the next start."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path


class DescriptorStore:
    """`address` is the NOTIFY_SOCKET of a service; `kept` are its descriptors by name. `close` closes them all."""

    def __init__(self, address: Path) -> None:
        self.address = address
        self.kept: dict[str, int] = {}
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._ending = False
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.bind(str(address))
        self._inbox.settimeout(0.2)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def expect_ready(self) -> None:
        """Before a start, for `is_ready`."""
        self._ready.clear()

    def is_ready(self, seconds: float) -> bool:
        """Whether the service says READY within so many seconds."""
        return self._ready.wait(seconds)

    def command(self, argv: list[str]) -> tuple[list[str], dict[str, str], list[int]]:
        """How to start the service: argv, what to add to its environment, and the descriptors to pass on and close."""
        with self._lock:
            names = sorted(self.kept)
            passed = [os.dup(self.kept[name]) for name in names]
        environment = {"NOTIFY_SOCKET": str(self.address)}
        if not passed:
            return argv, environment, []
        # As systemd does before exec: descriptors from 3 on, LISTEN_PID the process's own.
        for fd in passed:
            os.set_inheritable(fd, True)
        moves = " ".join(f"{3 + number}<&{fd}" for number, fd in enumerate(passed))
        shell = f'export LISTEN_PID=$$; exec "$@" {moves}'
        environment |= {"LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": ":".join(names)}
        return ["/bin/bash", "-c", shell, "sh", *argv], environment, passed

    def forget(self) -> None:
        """What systemd does when the service was stopped."""
        with self._lock:
            for fd in self.kept.values():
                os.close(fd)
            self.kept = {}

    def close(self) -> None:
        self._ending = True
        self._thread.join()
        self._inbox.close()
        self.forget()

    def _listen(self) -> None:
        while not self._ending:
            try:
                data, control, _, _ = self._inbox.recvmsg(4096, socket.CMSG_SPACE(64))
            except TimeoutError:
                continue
            lines = data.decode().splitlines()
            received = [fd for _, _, raw in control for fd in struct.unpack(f"{len(raw) // 4}i", raw)]
            name = next((line.partition("=")[2] for line in lines if line.startswith("FDNAME=")), "")
            with self._lock:
                if name:
                    with contextlib.suppress(KeyError):
                        os.close(self.kept.pop(name))
                if "FDSTORE=1" in lines:
                    self.kept[name] = received.pop()
            for fd in received:
                os.close(fd)
            if "READY=1" in lines:
                self._ready.set()
