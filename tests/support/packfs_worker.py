"""A worker over local files, for tests: `packfs_worker.py RUN_DIR PACKS_DIR GATE_DIR`.

PACKS_DIR/<pack id> holds a pack's content. A pack is cached unless GATE_DIR/<pack id>.slow exists: then each read
goes to a thread that waits while GATE_DIR/<pack id>.shut exists, and fails while <pack id>.fail does (short: it lies).
A cached pack's reads hang, each in its serving thread, while <pack id>.disk exists, as on a disk that is silent.
A read of the byte whose number <pack id>.crash holds ends the worker as a fault in memory would.
GATE_DIR/patience holds the seconds within which the worker says that it answers.
GATE_DIR/stuck names a file that a thread of the worker looks up at its start.
"""

import logging
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from floe.fuse.worker import run_worker
from floe.store.errors import CancelledError, DamagedError


class _Ticket:
    def __init__(self):
        self.cancelled = threading.Event()

    def cancel(self):
        self.cancelled.set()


class FileReader:
    def __init__(self, packs, gates):
        self.packs, self.gates = packs, gates
        self.submitted = self.cancelled = 0
        self.closed = threading.Event()

    def lookup(self, pack_id):
        path = self.packs / pack_id
        return path.stat().st_size if path.exists() else None

    def on_hand(self, _pack, _offset, _length, *, told):
        return None

    def answered(self, _pack, _offset, _length): ...

    def _crash(self, pack_id, offset, length):
        bomb = self.gates / f"{pack_id}.crash"
        if bomb.exists() and offset <= int(bomb.read_text()) < offset + length:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.raise_signal(signal.SIGSEGV)

    def read_cached_into(self, pack_id, offset, buffer, *, wait=True, told):
        if (self.gates / f"{pack_id}.slow").exists():
            return False
        while (self.gates / f"{pack_id}.disk").exists() and not self.closed.is_set():
            time.sleep(0.005)
        self._crash(pack_id, offset, len(buffer))
        with (self.packs / pack_id).open("rb") as file:
            file.seek(offset)
            return file.readinto(buffer) == len(buffer)

    def submit(self, pack_id, offset, length, done):
        self.submitted += 1
        ticket = _Ticket()
        threading.Thread(target=self._read, args=(pack_id, offset, length, done, ticket), daemon=True).start()
        return ticket

    def _read(self, pack_id, offset, length, done, ticket):
        while (self.gates / f"{pack_id}.shut").exists():
            if ticket.cancelled.wait(0.005) or self.closed.is_set():
                self.cancelled += 1
                done(CancelledError("nobody waits"))
                return
        if (self.gates / f"{pack_id}.fail").exists():
            done(DamagedError("frame 0 does not match its digest"))
            return
        time.sleep(0.002)
        self._crash(pack_id, offset, length)
        with (self.packs / pack_id).open("rb") as file:
            file.seek(offset)
            data = file.read(length - (self.gates / f"{pack_id}.short").exists())
        half = length // 2
        done([memoryview(data)[:half], data[half:]])

    def counters(self):
        return {"submitted": self.submitted, "cancelled": self.cancelled}

    def close(self):
        self.closed.set()


def main():
    logging.basicConfig(level=logging.INFO, format="worker[%(process)d]: %(message)s")
    run_dir, packs, gates = map(Path, sys.argv[1:4])
    if (gates / "stuck").exists():
        threading.Thread(target=Path((gates / "stuck").read_text()).exists, daemon=True).start()
    reader = FileReader(packs, gates)
    patience = gates / "patience"
    code = run_worker(run_dir, reader, patience=float(patience.read_text()) if patience.exists() else 0.0)
    reader.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
