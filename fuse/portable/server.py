"""Mounts one tree and serves it until it is unmounted."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from floe.fuse.portable.files import FileReader
from floe.fuse.portable.operations import TreeOperations
from floe.fuse.portable.shared import SharedReader, Source
from floe.fuse.reader import Reader
from floe.store import mounttable, process
from floe.store.erofs_inodes import Inodes
from floe.store.errors import DamagedError

_log = logging.getLogger(__name__)
_TASKS = 64  # requests answered at a time; each may hold a READ's bytes
_BACKGROUND = 256  # requests the kernel reads ahead with, where we may say so; it has 12


def serve(request: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    """Mount as told (see __main__), `tell` what was mounted, serve; the exit code, once it is unmounted.

    FloeError or OSError; what is mounted by then is dead, and the one who asked unmounts it: whoever unmounts a mount
    that this process does not serve, but holds, may wait for ever.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s floe portable[%(process)d]: %(message)s", stream=sys.stderr)
    logging.getLogger("pyfuse3").setLevel(logging.CRITICAL)  # reports replies whose reader was killed
    target = request["target"]
    if os.geteuid() == 0:
        for problem in process.harden():
            _log.debug("%s", problem)
    with ExitStack() as stack:
        tree = Inodes(stack.enter_context(_mapped(request["source"])), f"tree {request['source']}")
        reader = _open_reader(request, tree)
        stack.callback(reader.close)
        name = process.identity(os.getpid())
        assert name is not None
        try:
            operations = TreeOperations(tree, reader)
            pyfuse3.init(operations, target, _options(name))
        except RuntimeError as error:
            raise OSError(_why(), f"mount {target} through pyfuse3: {error}") from error
        mount = mounttable.mounts_at(Path(target))[-1]
        device = f"{mount.device[0]}:{mount.device[1]}"
        answer = {"device": device, "bdi": device, "directio": False, "loops": [], "server": name}

        def mounted() -> None:
            _tune(mount.device[1], device, int(request.get("read_ahead_kb", 0)))
            tell(answer)

        trio.run(_serve, target, operations, mounted)
    return 0


@contextmanager
def _mapped(path: str) -> Iterator[memoryview]:
    with open(path, "rb") as file:  # noqa: PTH123 - as the request names it
        if not os.fstat(file.fileno()).st_size:
            raise DamagedError(f"tree {path} is empty")
        # Never closed by hand: the process ends with it.
        yield memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def _open_reader(request: dict[str, Any], tree: Inodes) -> Reader:
    if "store" in request:
        return SharedReader(Source(**request["store"]))
    devices = [Path(path) for path in request["devices"]]
    sizes = zip(tree.packs, devices, strict=True)
    return FileReader({pack: (path, blocks << 12) for (pack, blocks), path in sizes})


def _options(name: str) -> set[str]:
    # No max_read: pyfuse3 cannot tell libfuse to expect it, and without it a READ may have libfuse's most, 1 MiB.
    subtype = mounttable.PORTABLE_TYPE.removeprefix("fuse.")
    options = {"ro", "default_permissions", f"fsname=floe:{name}", f"subtype={subtype}"}
    # A layer's set-id programs and devices count, as in any image; models are shown without, by their bind.
    return options | ({"allow_other", "suid", "dev"} if os.geteuid() == 0 else set())


def _why() -> int:
    """Libfuse says in words only why it could not mount: look for the usual reasons."""
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return errno.EACCES if error.errno in (errno.EACCES, errno.EPERM) else errno.ENXIO
    os.close(fd)
    return errno.EIO


def _tune(minor: int, device: str, read_ahead_kb: int) -> None:
    """Raise what the kernel reads ahead and how much at a time; only root may, the defaults work too."""
    for path, value in (
        (f"/sys/class/bdi/{device}/read_ahead_kb", read_ahead_kb),
        (f"/sys/fs/fuse/connections/{minor}/max_background", _BACKGROUND),
        (f"/sys/fs/fuse/connections/{minor}/congestion_threshold", _BACKGROUND * 3 // 4),
    ):
        if value:
            with contextlib.suppress(OSError):
                Path(path).write_text(str(value), encoding="ascii")


async def _serve(target: str, operations: TreeOperations, mounted: Callable[[], None]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_unmount_when_told, target)
        nursery.start_soon(_say_mounted, target, operations, mounted)
        nursery.start_soon(_end_with_connection, nursery)
        await pyfuse3.main(max_tasks=_TASKS)
        nursery.cancel_scope.cancel()


async def _end_with_connection(nursery: trio.Nursery) -> None:
    """Not when reads have ended that nobody waits for any more: pyfuse3 would wait for them."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names only
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":  # noqa: PTH115 - text, no path
                await trio.to_thread.run_sync(_wait_for_end, int(name), abandon_on_cancel=True)
                nursery.cancel_scope.cancel()
                return


def _wait_for_end(session: int) -> None:
    poll = select.poll()
    poll.register(session, 0)  # an error alone, which is how the kernel says that nothing is mounted any more
    poll.poll()


async def _say_mounted(target: str, operations: TreeOperations, mounted: Callable[[], None]) -> None:
    """Not before the kernel has its answer to INIT: that sets what `_tune` changes."""
    await operations.initialized.wait()
    try:
        mounted()
    except OSError:
        await trio.to_thread.run_sync(unmount, target)  # nobody waits for it any more


async def _unmount_when_told(target: str) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            problem = await trio.to_thread.run_sync(unmount, target)
            if problem:
                _log.warning("told to end, but %s stays mounted: %s", target, problem)


def unmount(target: str) -> str:
    """Unmount as this user may; what went wrong in words, or nothing."""
    command = ["umount", target] if os.geteuid() == 0 else ["fusermount3", "-u", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    return done.stderr.strip() or "it failed without a word" if done.returncode else ""
