"""The pack filesystem's side of /dev/fuse: takes requests, answers them, each exactly once.

Concurrency: several threads run `serve`, each with a slot of its own for the request it reads. A READ is in
`_reads` from the moment it is understood until its reply is due; whoever pops it from there (the thread
that served it from cache, the reader's callback, an INTERRUPT) answers it and disposes of its slot. Dict and
list operations that this rests on are atomic in CPython; no lock is held over a system call.

One thread at a time waits for requests: the leader. Waking a sleeping thread costs more than answering a small read, on
virtual machines most of all, so after an answer the leader asks on for some 50 microseconds before it sleeps, and stays
leader while it serves small reads from memory: 20,000 small files take 0.6 of the time. For anything that takes
longer it lets another thread lead first. While many small reads come in a row it also keeps the reader's processor from
halting (docs/adr/0007): a reader is woken for every answer.

A reply is written in one writev from memory that is present and locked. The kernel copies it with the
pages pinned, so that a kill in the middle leaves either an answered request or one that still lies in its slot.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence

from floe.fuse import protocol as p
from floe.fuse import suspects
from floe.fuse.errno_map import errno_of
from floe.fuse.idle import IdleProcessors
from floe.fuse.known import KnownPacks, NodeCollisionError
from floe.fuse.lead import Lead
from floe.fuse.reader import Done, LateReader, Ticket
from floe.fuse.slots import Slots
from floe.store.errors import FloeError
from floe.store.ids import Buffer, is_hexdigest

_log = logging.getLogger(__name__)
_IOV_MAX = 1000  # the kernel's limit is 1024
_GONE = (errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN)
_PASSING = (errno.ENOENT, errno.EINTR, errno.EAGAIN)  # the request went away while it was read
_SMALL_READ = 64 << 10  # bytes; a longer copy is worth waking another thread for
_SPIN = 50_000  # nanoseconds the leader asks for the next request before it sleeps
_PULSE = 1000  # milliseconds; a leader that waits for requests shows so often that it is there (see watchdog.py)
_BURST = 32  # small reads without a pause of _SPIN from which on processors are kept awake
_EINTR_RETRY = 0.001  # seconds before an INTERRUPT for an unknown request is handed back to the kernel


class _Read:
    """A READ that is not answered yet."""

    __slots__ = ("cancelled", "pack_id", "slot", "ticket", "unique")

    def __init__(self, unique: int, slot: int, pack_id: str) -> None:
        self.unique = unique
        self.slot = slot
        self.pack_id = pack_id
        self.ticket: Ticket | None = None
        self.cancelled = False


class Session:
    """Serves one mounted connection from `fuse_fd` with `reader` until it is gone or `stop` is called.

    `idle`: spend processor time on the latency of small reads, as said above, and keep these awake; None: sleep at once.
    """

    def __init__(
        self, fuse_fd: int, slots: Slots, known: KnownPacks, reader: LateReader, *, idle: IdleProcessors | None = None
    ) -> None:
        self._fd = fuse_fd
        self._slots = slots
        self._known = known
        self._reader = reader
        self._reads: dict[int, _Read] = {}
        self._stopping = False
        self._silent = False
        self._leading = threading.Lock()
        self._idle = idle
        # The leader sleeps in poll, so that it can also look without sleeping.
        os.set_blocking(fuse_fd, False)
        self.on_gone: Callable[[], object] = lambda: None  # the connection was unmounted or aborted
        self.initialized = threading.Event()  # INIT is answered, by whichever worker
        if slots.initialized:
            self.initialized.set()
        self.requests = 0
        self.reads = 0
        self.read_bytes = 0
        self.errors = 0
        self.interrupts = 0
        self._poison = suspects.Poison(slots)
        self._left: set[int] = set()  # `unique` of requests that a predecessor left, until answered

    # --- life -------------------------------------------------------------------------------------

    def answer_left(self) -> int:
        """Take up what a predecessor left in the slots; INTERRUPTs last, when their targets are known."""
        buffer = memoryview(bytearray(p.OUT_BYTES + p.MAX_READ))
        left, nobody = self._slots.left, Lead(self._leading)
        views = {slot: self._slots.view(slot) for slot in left}
        order = sorted(left, key=lambda s: p.IN_HEADER.unpack_from(views[s])[1] == p.INTERRUPT)
        self._left.update(p.IN_HEADER.unpack_from(views[slot])[2] for slot in left)

        def handle(slot: int) -> None:
            if self._handle(slot, views[slot], buffer, nobody):
                self._slots.release(slot)

        suspects.take_up(self._slots, order, handle, self._refuse)
        return len(left)

    def _refuse(self, slot: int, error: int) -> None:
        """Answer a request that a predecessor left with an error: see suspects.take_up."""
        view, late = self._slots.view(slot), error == errno.ETIMEDOUT
        _, opcode, unique, node, *_ = p.IN_HEADER.unpack_from(view)
        what = f"request {opcode} of node {node:016x}"
        if opcode == p.READ:
            _, offset, size, *_ = p.READ_IN.unpack_from(view, p.IN_BYTES)
            pack_id, end = self._known.get(node) or ("?", offset)
            what = f"read of {min(size, end - offset)} bytes at {offset} of pack {pack_id}"
            if not late:
                self._poison.add(node, offset, size)
        how = "was not answered in time, and its worker was replaced" if late else "ended workers again and again"
        _log.error("a %s %s: answered with an error", what, how)
        self._fail(unique, error)
        self._slots.release(slot)

    def serve(self) -> None:
        """Read and answer requests until the connection is gone or stopping begins; for one thread."""
        lead = Lead(self._leading, self._idle)
        try:
            self._serve(lead)
        finally:
            lead.give_up()

    def _serve(self, lead: Lead) -> None:
        fd, slots, clock, idle = self._fd, self._slots, time.perf_counter_ns, self._idle
        pulse = slots.pulse
        buffer = memoryview(bytearray(p.OUT_BYTES + p.MAX_READ))
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        slot = -1
        view = buffer
        spin_until = 0
        burst = 0  # small reads since the last pause
        while not self._stopping:
            lead.take()
            pulse[0] = clock()
            if slot < 0:
                try:
                    slot = slots.take()
                except IndexError:
                    time.sleep(0.005)  # 8192 unanswered requests: the kernel's queue holds the rest
                    continue
                view = slots.view(slot)
            if not poller.poll(0):  # cheaper than the exception of a readv that finds nothing
                if clock() > spin_until:
                    burst = 0
                    if idle is not None and idle.awake:
                        idle.let_halt()
                    poller.poll(_PULSE)
                continue
            try:
                os.readv(fd, [view])
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno in _PASSING:
                    continue
                if error.errno not in _GONE:
                    _log.exception("reading /dev/fuse failed")
                self.on_gone()
                return
            if self._silent:
                return  # the request stays in its slot for the successor
            if self._handle(slot, view, buffer, lead):
                slots.clear(slot)
            else:
                slot = -1
            if idle is not None and lead.held:
                spin_until = clock() + _SPIN
                burst += 1
                if burst == _BURST:
                    idle.keep_awake()
            else:
                burst = 0

    def stop(self, drain: float) -> None:
        """Take no more requests and wait up to `drain` seconds for reads under way.

        After that nothing is answered any more, whatever the reader's end does to its reads: what is still
        open stays in its slot for a successor.
        """
        self._stopping = True
        deadline = time.monotonic() + drain
        while self._reads and time.monotonic() < deadline:
            time.sleep(0.005)
        self._silent = True

    def inflight(self, pack_ids: Sequence[str]) -> list[int]:
        """The kernel's numbers of the reads on these packs that are not answered."""
        wanted = set(pack_ids)
        return [unique for unique, read in list(self._reads.items()) if read.pack_id in wanted]

    @property
    def inflight_total(self) -> int:
        """How many reads are not answered."""
        return len(self._reads)

    # --- requests ---------------------------------------------------------------------------------

    def _handle(self, slot: int, view: memoryview, buffer: memoryview, lead: Lead) -> bool:
        """Deal with the request in `slot`; True when the slot is the caller's again."""
        length, opcode, unique, node, _, _, _, _, _ = p.IN_HEADER.unpack_from(view)
        self.requests += 1
        if opcode == p.READ:
            return self._read(slot, unique, node, view, buffer, lead=lead)
        lead.give_up()
        try:
            self._small(opcode, unique, node, view[p.IN_BYTES : length])
        except Exception as error:
            _log.exception("request %d failed", opcode)
            self._fail(unique, errno_of(error))
        return True

    def _small(self, opcode: int, unique: int, node: int, body: memoryview) -> None:
        if opcode in (p.FORGET, p.BATCH_FORGET):
            return  # node ids are for ever; no reply is expected
        if opcode == p.LOOKUP:
            self._lookup(unique, node, p.name(body))
        elif opcode == p.GETATTR:
            self._getattr(unique, node)
        elif opcode == p.OPEN:
            if self._known.get(node) is None:
                self._fail(unique, errno.ESTALE)
            else:
                self._reply(unique, p.open_reply())
        elif opcode == p.OPENDIR:
            self._reply(unique, p.open_reply(0))
        elif opcode == p.READDIR:
            _, offset, size, _, _, _, _ = p.READ_IN.unpack_from(body)
            self._reply(unique, p.readdir_reply(self._known.entries(), offset, size))
        elif opcode == p.STATFS:
            self._reply(unique, p.statfs_reply())
        elif opcode in (p.RELEASE, p.RELEASEDIR, p.ACCESS, p.DESTROY):
            self._reply(unique, b"")
        elif opcode == p.INTERRUPT:
            self._interrupt(unique, p.interrupted(body))
        elif opcode == p.INIT:
            self._init(unique, body)
        else:
            self._fail(unique, errno.ENOSYS)  # most of them the kernel then never asks again

    def _init(self, unique: int, body: memoryview) -> None:
        major, minor, _, flags = p.decode_init(body)
        if major > p.MAJOR:
            self._reply(unique, p.version_reply())
            return
        self._reply(unique, p.init_reply(minor, flags))
        self._slots.set_initialized()
        self.initialized.set()

    def _lookup(self, unique: int, node: int, name: bytes) -> None:
        pack_id = name.decode("ascii", "replace")
        if node != p.ROOT_NODE or not is_hexdigest(pack_id):
            self._fail(unique, errno.ENOENT)
            return
        known = self._known.get(p.node_id(pack_id))
        size = known[1] if known is not None and known[0] == pack_id else self._reader.lookup(pack_id)
        if size is None:
            self._fail(unique, errno.ENOENT)
            return
        try:
            found = self._known.add(pack_id, size)
        except NodeCollisionError:
            _log.error("pack %s cannot be served: its node id belongs to another", pack_id)
            self._fail(unique, errno.EIO)
            return
        self._reply(unique, p.entry_reply(found, size))

    def _getattr(self, unique: int, node: int) -> None:
        known = self._known.get(node)
        if node == p.ROOT_NODE:
            self._reply(unique, p.attr_reply(node, 0))
        elif known is None:
            self._fail(unique, errno.ESTALE)
        else:
            self._reply(unique, p.attr_reply(node, known[1]))

    # --- reads ------------------------------------------------------------------------------------

    def _read(self, slot: int, unique: int, node: int, view: memoryview, buffer: memoryview, *, lead: Lead) -> bool:
        known = self._known.get(node)
        if known is None:
            self._fail(unique, errno.ESTALE)
            return True
        pack_id, end = known
        _, offset, size, _, _, _, _ = p.READ_IN.unpack_from(view, p.IN_BYTES)
        length = min(size, end - offset, p.MAX_READ)
        self.reads += 1
        if length <= 0:
            self._reply(unique, b"")
            return True
        if self._poison and self._poison.covers(node, offset, length):
            self._fail(unique, errno.EIO)
            return True
        read = _Read(unique, slot, pack_id)
        self._reads[unique] = read
        try:
            if length > _SMALL_READ:
                lead.give_up()
            parts: list[Buffer]
            pieces = self._reader.on_hand(pack_id, offset, length, told=False)
            if pieces is not None:
                parts = [p.header(length, unique), *pieces]
            elif self._read_cached(pack_id, offset, buffer[p.OUT_BYTES : p.OUT_BYTES + length], lead):
                p.OUT_HEADER.pack_into(buffer, 0, p.OUT_BYTES + length, 0, unique)
                parts = [buffer[: p.OUT_BYTES + length]]
            else:
                read.ticket = self._reader.submit(pack_id, offset, length, self._callback(read, length))
                if read.cancelled:
                    read.ticket.cancel()
                return False
        except Exception as error:
            if self._silent or self._reads.pop(unique, None) is None:
                return False
            if not isinstance(error, FloeError):
                _log.exception("reading %d bytes at %d of pack %s failed", length, offset, pack_id)
            self._fail(unique, errno_of(error))
            return True
        if self._reads.pop(unique, None) is None:
            return False
        self.read_bytes += length  # first: who has its answer finds it counted
        self._write(unique, parts)
        self._reader.answered(pack_id, offset, length)
        return True

    def _read_cached(self, pack_id: str, offset: int, buffer: memoryview, lead: Lead) -> bool:
        if lead.held:
            try:
                return self._reader.read_cached_into(pack_id, offset, buffer, wait=False, told=False)
            except BlockingIOError:
                pass  # from the disk, then, and with another leader
        lead.give_up()
        return self._reader.read_cached_into(pack_id, offset, buffer, told=False)

    def _callback(self, read: _Read, length: int) -> Done:
        def done(result: Sequence[Buffer] | FloeError) -> None:
            if self._silent or self._reads.pop(read.unique, None) is None:
                return
            try:
                self._finish(read, length, result)
            finally:
                self._slots.release(read.slot)

        return done

    def _finish(self, read: _Read, length: int, result: Sequence[Buffer] | FloeError) -> None:
        if isinstance(result, FloeError):
            _log.warning("a read of pack %s failed: %s", read.pack_id, result)
            self._fail(read.unique, errno_of(result))
            return
        got = sum(memoryview(piece).nbytes for piece in result)
        if got != length:
            # Kernels before 6.12.117 and 7.0 take a short read for a good one, filled with zeros.
            _log.error("a read of pack %s gave %d bytes instead of %d", read.pack_id, got, length)
            self._fail(read.unique, errno.EIO)
            return
        pieces = list(result) if len(result) < _IOV_MAX else [b"".join(result)]
        self.read_bytes += length
        self._write(read.unique, [p.header(length, read.unique), *pieces])

    def _interrupt(self, unique: int, target: int) -> None:
        read = self._reads.pop(target, None)
        if read is None:
            # Answered already, or just being read by another thread: the kernel tells which, and repeats.
            time.sleep(_EINTR_RETRY)
            self._write(unique, [p.header(0, unique, errno.EAGAIN)])
            return
        self.interrupts += 1
        self._write(target, [p.header(0, target, errno.EINTR)])
        read.cancelled = True
        if read.ticket is not None:
            read.ticket.cancel()
        self._slots.release(read.slot)

    # --- replies ----------------------------------------------------------------------------------

    def _reply(self, unique: int, data: bytes) -> None:
        self._write(unique, [p.header(len(data), unique), data] if data else [p.header(0, unique)])

    def _fail(self, unique: int, error: int) -> None:
        if error not in (errno.ENOENT, errno.ENOSYS):
            self.errors += 1
        self._write(unique, [p.header(0, unique, error)])

    def _write(self, unique: int, parts: list[Buffer]) -> None:
        left = unique in self._left
        if left:
            self._left.discard(unique)
        try:
            os.writev(self._fd, parts)
            if left:
                self._slots.count_replay()
        except OSError as error:
            if error.errno == errno.ENOENT:
                return  # answered by a predecessor, or its reader is gone
            if error.errno in _GONE:
                self.on_gone()
                return
            _log.exception("a reply was refused by the kernel")
