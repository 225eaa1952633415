"""A folder in which every look-up hangs in the kernel, where no signal reaches: a dead disk, for tests."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

from floe.fuse import descriptors
from floe.fuse import protocol as p
from floe.store import mounttable

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


class StuckFolder:
    """A FUSE mount at `path` whose server takes requests and never answers. `asked` is set by the first look-up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other"
        if _libc.mount(b"test-stuck", bytes(path), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        self._device = mounttable.mounts_at(path)[-1].device
        self.asked = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                request = memoryview(os.read(self._fd, p.MAX_READ + 4096))
            except OSError:
                return
            _, opcode, unique, *_ = p.IN_HEADER.unpack_from(request)
            if opcode == p.INIT:
                _, minor, _, flags = p.decode_init(request[p.IN_BYTES :])
                data = p.init_reply(minor, flags)
                os.writev(self._fd, [p.header(len(data), unique), data])
            elif opcode == p.LOOKUP:
                self.asked.set()

    def let_go(self) -> None:
        """Fail what hangs; the folder is gone."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        descriptors.abort(self._device)
        _libc.umount2(bytes(self.path), _MNT_DETACH)
        self._thread.join(10)
        os.close(fd)
