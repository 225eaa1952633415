"""`python -m floe.fuse.portable`: mount one tree and serve it in the background, told by one JSON object on stdin.

    source          the tree's EROFS image
    target          the mountpoint
    devices         files of the packs, in the order of the image's device table; or, without them,
    store           {"url", "cache_dir", "cache_size", "cache_min_free", "readahead", "deadline", "budget", "more_caches",
                    "cache_bypass"}: read them from this store through this node cache (sizes in bytes, times in seconds;
                    of each further directory of the cache [path, size, min_free])
    log             a file that messages are appended to
    read_ahead_kb   what the kernel reads ahead, where it lets us say so

The answer is an object of stdout, given once the tree is mounted: {"device": "major:minor", "bdi", "server": names the
process, see floe.store.process}; or {"errno", "step": what failed, "log": [words of libfuse], "hint"}. So it takes the place of
the mount process (floe.mount.helper) where there is no EROFS.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from typing import Any

from floe.store.errors import BusyError, DamagedError, FloeError


def main() -> int:
    """Start the server and pass its answer on."""
    request = json.load(sys.stdin)
    request.pop("op", None)
    try:
        import pyfuse3  # noqa: F401, PLC0415 - before the fork, to say so
    except ImportError as error:
        json.dump({"errno": errno.ENOPKG, "step": f"load pyfuse3: {error}", "log": []}, sys.stdout)
        return 0
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if not os.fork():
        os.close(reader)
        try:
            _be_server(request, writer)
        except BaseException:
            import traceback  # noqa: PLC0415 - rarely needed

            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    if not answer:
        answer = json.dumps({"errno": errno.EIO, "step": "the server ended", "log": _tail(request["log"])}).encode()
    sys.stdout.buffer.write(answer)
    return 0


def _be_server(request: dict[str, Any], answer_fd: int) -> None:
    log = request["log"]
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    begin = os.fstat(file).st_size
    os.dup2(null, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir("/")
    from floe.fuse.portable.server import serve  # noqa: PLC0415 - loads everything

    def tell(answer: dict[str, Any]) -> None:
        """BrokenPipeError when nobody waits for the mount any more."""
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(answer_fd, data) :]
        os.close(answer_fd)

    try:
        code = serve(request, tell)
    except FloeError as error:
        kinds = ((DamagedError, errno.EUCLEAN), (BusyError, errno.EBUSY))
        number = next((number for kind, number in kinds if isinstance(error, kind)), errno.EIO)
        failure = {"errno": number, "step": str(error), "log": [], "hint": error.hint}
    except OSError as error:
        failure = {"errno": error.errno or errno.EIO, "step": str(error), "log": _tail(log, begin)}
    else:
        os._exit(code)
    with contextlib.suppress(OSError):
        tell(failure)
    os._exit(1)


def _tail(path: str, begin: int = 0) -> list[str]:
    """What libfuse and fusermount3 wrote since `begin`, at most the last three lines."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - small process, no pathlib
            file.seek(max(begin, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip()][-3:]


if __name__ == "__main__":
    sys.exit(main())
