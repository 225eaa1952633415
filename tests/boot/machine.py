"""A machine that boots, by qemu, from the image that `install/setup.sh boot` makes; commands are run in it by its guest agent.

With KVM where that works. Where the kernel offers one that cannot run an ordinary kernel (a machine in a machine may),
qemu emulates: a boot takes some 20 s instead of 5.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import ports

IMAGE = Path(__file__).resolve().parents[2] / ".tools/boot"
HOST = "10.0.2.2"  # the machine that runs qemu, as its guests see it
CRI_PORT = 5001  # in the guest, cri.socket
# Seconds that only failures take: emulated, beside others' work, a boot may take ten minutes and a bootstrap forty.
PATIENCE, LONG = 600, 3600
_BOOT, _TRIAL = 300.0, 15.0  # seconds; of a boot only pauses between questions count
_numbers = itertools.count(1)


class GuestError(AssertionError):
    """A command in the guest failed, or the guest does not answer."""


@dataclass(frozen=True)
class Disk:
    """An NVMe disk. `serial` is what it is known by; it is `/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_SERIAL` in the guest."""

    path: Path
    serial: str

    @property
    def name(self) -> str:
        """The device in the guest, by a name that a boot does not change."""
        return f"/dev/disk/by-id/nvme-QEMU_NVMe_Ctrl_{self.serial}"


@functools.cache
def accelerator() -> list[str]:
    """qemu's flags: KVM where a kernel says something by it, else emulation."""
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        kvm = ["-accel", "kvm", "-cpu", "host"]
        command = [*_PLAIN, *kvm, "-m", "256", "-serial", "stdio", "-no-reboot", "-kernel", str(IMAGE / "vmlinuz")]
        with contextlib.suppress(subprocess.TimeoutExpired):
            trial = subprocess.run(
                [*command, "-append", "console=ttyS0 panic=-1"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_TRIAL,
            )
            if b"Linux version" in trial.stdout:
                return kvm
    return ["-accel", "tcg,thread=multi", "-cpu", "Westmere"]  # newer instructions only cost more to emulate


_PLAIN = ["qemu-system-x86_64", "-machine", "q35", "-nodefaults", "-no-user-config", "-display", "none"]


class Machine:
    """A node. `folder` gets its console's log and its sockets; `tests_disk` is mounted at /srv, `disks` are NVMe disks.

    What it writes to its root disk is gone when it is closed; reboots keep it.
    """

    def __init__(self, folder: Path, tests_disk: Path, disks: Sequence[Disk] = ()) -> None:
        self.folder = folder
        self.console = folder / "console.log"
        self.cri_port = ports.free_port()
        self._agent: _Agent | None = None
        self._sockets = {name: folder / name for name in ("agent", "qmp")}
        drives = [
            f"file={IMAGE / 'root.img'},id=root,format=raw,snapshot=on",
            f"file={tests_disk},id=tests,format=raw,readonly=on",
            *(f"file={one.path},id={one.serial},format=raw,cache=unsafe,discard=unmap" for one in disks),
        ]
        devices = ["virtio-blk-pci,drive=root", "virtio-blk-pci,drive=tests", "virtio-rng-pci"]
        devices += [f"nvme,drive={one.serial},serial={one.serial}" for one in disks]
        devices += [
            "virtio-net-pci,netdev=net",
            "virtio-serial",
            "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
        ]
        command = [
            *_PLAIN,
            *accelerator(),
            "-smp",
            "2",
            "-m",
            "2048",
            "-kernel",
            IMAGE / "vmlinuz",
            "-initrd",
            IMAGE / "initrd",
        ]
        command += ["-append", "root=/dev/vda rw console=ttyS0 mitigations=off"]
        for drive in drives:
            command += ["-drive", f"if=none,{drive}"]
        for device in devices:
            command += ["-device", device]
        command += ["-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self.cri_port}-:{CRI_PORT}"]
        command += ["-chardev", f"socket,id=agent,path={self._sockets['agent']},server=on,wait=off"]
        command += ["-qmp", f"unix:{self._sockets['qmp']},server=on,wait=off", "-serial", f"file:{self.console}"]
        with (folder / "qemu.log").open("wb") as log:
            # What is written to a disk of snapshot=on goes to TMPDIR.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)}
            )
        self.boot_id = ""
        try:
            self._wait_booted()
        except BaseException:
            self.close()
            raise

    # commands

    def run(self, *command: str | Path, text: str = "", check: bool = True, seconds: float = PATIENCE) -> Any:
        """Run a command to its end, as root: a CompletedProcess of texts. GuestError when it fails (with `check`)."""
        words = [str(word) for word in command]
        pid = self.start(*words, text=text)
        waited, pause = 0.0, 0.05  # pauses are counted, so that time in which this process was stopped is not
        while not (state := self.ask("guest-exec-status", pid=pid))["exited"]:
            if waited > seconds:
                raise GuestError(f"{shlex.join(words)}: not done within {seconds:g} s")
            time.sleep(pause)
            waited, pause = waited + pause, min(1.0, pause * 1.3)
        out, err = (base64.b64decode(state.get(key, "")).decode(errors="replace") for key in ("out-data", "err-data"))
        code = state.get("exitcode", -state.get("signal", 0))
        if check and code != 0:
            raise GuestError(f"{shlex.join(words)}: {code}\n{out}{err}")
        return subprocess.CompletedProcess(words, code, out, err)

    def start(self, *command: str | Path, text: str = "") -> int:
        """Start a command; its process id in the guest."""
        program, *arguments = (str(word) for word in command)
        more = {"input-data": base64.b64encode(text.encode()).decode()} if text else {}
        found = self.ask("guest-exec", path=program, arg=arguments, **more, **{"capture-output": True})
        pid = found["pid"]
        assert isinstance(pid, int)
        return pid

    def sh(self, script: str, *arguments: str | Path, **options: Any) -> str:
        """A shell's standard output for a script."""
        return str(self.run("/bin/sh", "-euc", script, "sh", *arguments, **options).stdout)

    def read(self, path: str | Path) -> str:
        return str(self.run("cat", path).stdout)

    def write(self, path: str | Path, text: str) -> None:
        self.run("tee", path, text=text or "\n")

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return str(self.run("systemctl", "show", "--property", name, "--value", unit).stdout).strip()

    def until(self, script: str, seconds: float = PATIENCE) -> None:
        """Wait for a shell's yes."""
        waited = 0.0
        while self.run("/bin/sh", "-c", script, check=False).returncode != 0:
            if waited > seconds:
                raise GuestError(f"not so within {seconds:g} s: {script}")
            time.sleep(0.5)
            waited += 0.5

    def ask(self, command: str, **arguments: Any) -> Any:
        """The guest agent's answer."""
        assert self._agent is not None
        return self._agent.ask(command, arguments)

    # its life

    def reboot(self) -> None:
        """In order, by systemd."""
        with contextlib.suppress(GuestError, OSError):  # the agent may go before it answers
            self.run("systemctl", "reboot", seconds=5)
        self._wait_booted()

    def cut_power(self) -> None:
        """What the guest had not written to its disks is lost."""
        self._qmp("system_reset")
        self._wait_booted()

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()
        self._process.kill()
        self._process.wait()

    def _wait_booted(self) -> None:
        """Until the agent of another boot than the last one answers, and systemd has come to the end of its start."""
        waited = 0.0
        boot_id = ""
        while boot_id in ("", self.boot_id):
            if self._process.poll() is not None:
                raise GuestError(f"qemu ended: {(self.folder / 'qemu.log').read_text()}")
            if waited > _BOOT:
                raise GuestError(f"the guest does not boot; the end of its console:\n{self._last_lines()}")
            time.sleep(0.5)
            waited += 0.5
            with contextlib.suppress(OSError, GuestError):
                if self._agent is not None:
                    self._agent.close()
                self._agent = _Agent(self._sockets["agent"])
                boot_id = self.read("/proc/sys/kernel/random/boot_id").strip()
        self.boot_id = boot_id
        self.run("systemctl", "is-system-running", "--wait", check=False, seconds=PATIENCE)

    def _last_lines(self) -> str:
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-20:]) if self.console.exists() else ""

    def _qmp(self, command: str, **arguments: Any) -> None:
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.settimeout(20)
            qmp.connect(str(self._sockets["qmp"]))
            lines = qmp.makefile("r")
            lines.readline()  # the greeting
            for what, more in (("qmp_capabilities", {}), (command, arguments)):
                qmp.sendall(json.dumps({"execute": what, "arguments": more}).encode() + b"\n")
                while "return" not in (answer := json.loads(lines.readline())):
                    if "error" in answer:
                        raise GuestError(f"{command}: {answer['error']['desc']}")


class _Agent:
    """A connection to qemu's guest agent: JSON lines. OSError when it does not answer in time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(3)
        try:
            self._socket.connect(str(path))
            self._lines = self._read()
            # A number that comes back tells this conversation's answers from earlier ones'.
            number = os.getpid() * 1000 + next(_numbers)
            self._send("guest-sync", {"id": number})
            while self._answer() != number:
                pass
        except BaseException:
            self._socket.close()
            raise
        self._socket.settimeout(60)

    def ask(self, command: str, arguments: dict[str, Any]) -> Any:
        self._send(command, arguments)
        return self._answer()

    def close(self) -> None:
        self._socket.close()

    def _send(self, command: str, arguments: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def _answer(self) -> Any:
        while True:
            with contextlib.suppress(ValueError):  # half a line, of before
                answer = json.loads(next(self._lines))
                break
        if "error" in answer:
            raise GuestError(answer["error"]["desc"])
        return answer["return"]

    def _read(self) -> Iterator[bytes]:
        kept = b""
        while True:
            got = self._socket.recv(1 << 16)
            if not got:
                raise ConnectionError("the guest agent's channel is closed")
            *lines, kept = (kept + got).split(b"\n")
            yield from lines
