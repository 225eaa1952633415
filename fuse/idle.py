"""Idle processors kept awake for moments in which wake-ups are what a reader waits for.

A processor of a virtual machine that halts gives itself back to its host, and takes 10 microseconds and more to return:
longer than answering a small read does. Those who write 0 to the kernel's PM QoS device forbid that, until they write
something else, close it, or die. Source: the kernel's Documentation/power/pm_qos_interface.rst.
"""

from __future__ import annotations

import logging
import os
import struct
from contextlib import suppress
from io import FileIO
from pathlib import Path

_log = logging.getLogger(__name__)

DEVICE = Path("/dev/cpu_dma_latency")
_AT_ONCE = struct.pack("=i", 0)  # microseconds that waking may take
_ANY_TIME = struct.pack("=i", 2_000_000_000)  # the kernel's own default


class IdleProcessors:
    """All processors of the machine. Where `device` cannot be opened (a container, say), nothing happens.

    `awake` is whether they are kept from halting. Not thread-safe: for whoever leads at the time.
    """

    def __init__(self, device: Path = DEVICE) -> None:
        self.awake = False
        self._device: FileIO | None = None
        try:
            # Not by FileIO itself, which would make a file where there is no device.
            self._device = FileIO(os.open(device, os.O_WRONLY | os.O_CLOEXEC), "w")
        except OSError as error:
            _log.debug("idle processors halt as they like: %s", error)

    def keep_awake(self) -> None:
        """Have them poll for work instead of halting; this costs power, so for moments only."""
        self._ask(_AT_ONCE)
        self.awake = True

    def let_halt(self) -> None:
        """Undo `keep_awake`."""
        self._ask(_ANY_TIME)
        self.awake = False

    def _ask(self, latency: bytes) -> None:
        if self._device is not None:
            with suppress(OSError, ValueError):  # ValueError: closed
                self._device.write(latency)

    def close(self) -> None:
        """Undo all, for good; so does the process's end."""
        if self._device is not None:
            self._device.close()
