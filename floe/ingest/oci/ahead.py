"""A stream that is read ahead by a thread of its own: reading, hashing and decompressing beside what is done with the result."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType

_HELD = 8 << 20  # bytes that may wait to be taken; one piece may exceed it
_PIECE = 512 << 10  # bytes; smaller pieces are handed over together: waking a thread for each would cost more than they


class Ahead:
    """Iterates over `pieces`, which a thread reads meanwhile, in larger pieces; a context manager.

    An error of `pieces` is raised where its piece would have come. Leaving it ends the thread behind the piece it is at,
    and closes `pieces`.
    """

    def __init__(self, pieces: Iterator[bytes], *, held: int = _HELD) -> None:
        self._pieces = pieces
        self._limit = held
        self._ready: deque[bytes] = deque()
        self._held = 0
        self._ended = self._left = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()  # guards all of these
        self._thread = threading.Thread(target=self._run, name="floe-ahead", daemon=True)

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._left = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                while not self._ready and not self._ended:
                    self._changed.wait()
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                piece = self._ready.popleft()
                self._held -= len(piece)
                self._changed.notify_all()
            yield piece

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            small: list[bytes] = []
            size = 0
            for piece in self._pieces:
                small.append(piece)
                size += len(piece)
                if self._left:
                    return
                if size >= _PIECE:
                    if not self._hand_over(small, size):
                        return
                    small, size = [], 0
            self._hand_over(small, size)
        except BaseException as raised:
            error = raised
        finally:
            close = getattr(self._pieces, "close", None)
            if close is not None:
                close()
            with self._changed:
                self._error, self._ended = error, True
                self._changed.notify_all()

    def _hand_over(self, pieces: list[bytes], size: int) -> bool:
        """Let `pieces` be taken, once there is room; False when nobody wants them any more."""
        if not pieces:
            return True
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        with self._changed:
            while self._held and self._held + size > self._limit and not self._left:
                self._changed.wait()
            self._ready.append(piece)
            self._held += size
            self._changed.notify_all()
            return not self._left
