"""SIGTERM and SIGINT as an event, for daemons with threads."""

from __future__ import annotations

import os
import signal
import threading


def stop_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set.

    A thread reads of them from a pipe. Handlers of Python's would run in the main thread, and only when it comes back
    from the event it waits for: a signal that arrives just before, or at another thread, was missed until the next one
    (seen); one that arrives while the main thread holds the event's lock would wait for it for ever.
    """
    stop = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def tell() -> None:
        os.read(reader, 1)
        stop.set()

    threading.Thread(target=tell, name="signals", daemon=True).start()
    return stop
