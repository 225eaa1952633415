"""`floe packfs` and `floe snapshotter` as processes on a machine of one's own, beside support.floe_node's commands."""

import socket
import subprocess
import sys
import time
from pathlib import Path

from support.floe_node import Node
from support.snapshots import SnapshotsClient

START_TIME = 60  # seconds; most take one, on a busy machine many


class Starting(Node):
    """A machine whose daemons are started by name; `prefix`: words before their command lines."""

    def __init__(self, home, environ=None, *, prefix=()):
        home.mkdir(exist_ok=True)
        super().__init__(home)
        self.prefix = tuple(prefix)
        self.environ |= environ or {}

    def start(self, name, *flags):
        """Start a daemon; returns once it says READY as systemd wants it."""
        notify = self.home / f"notify-{name}"
        notify.unlink(missing_ok=True)
        log = self.log(name)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox, log.open("ab") as output:
            inbox.bind(str(notify))
            inbox.settimeout(0.2)
            process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "floe", name, *flags],
                cwd="/",  # as systemd does
                env={**self.environ, "NOTIFY_SOCKET": str(notify)},
                stdout=output,
                stderr=output,
            )
            until = time.monotonic() + START_TIME
            while process.poll() is None and time.monotonic() < until:
                try:
                    if b"READY=1" in inbox.recv(4096):
                        return process
                except TimeoutError:
                    continue
        raise AssertionError(f"floe {name} did not start:\n{log.read_text()[-3000:]}")

    def log(self, name):
        return self.home / f"{name}.log"


class Daemons(Starting):
    """Both daemons running, with `environ` added to theirs; `client` talks to the snapshotter. `close` ends everything."""

    def __init__(self, home, environ=None, *, prefix=()):
        super().__init__(home, environ, prefix=prefix)
        self.address = self.run_dir / "snapshotter.sock"
        self.root = home / "root"
        self.packfs = self.start("packfs")
        self.snapshotter = self.start("snapshotter")
        self.client = SnapshotsClient(self.address)

    def restart_snapshotter(self):
        """kill -9 and start again."""
        self.snapshotter.kill()
        self.snapshotter.wait()
        self.snapshotter = self.start("snapshotter")

    def close(self):
        """Stop in the order of a machine that shuts down: what uses packs first, the pack filesystem last."""
        self.client.close()
        self.snapshotter.terminate()
        self.snapshotter.wait(timeout=20)
        for below in (self.root, self.run_dir / "trees"):
            for target in sorted(self.mounts(), reverse=True):
                if Path(target).is_relative_to(below):
                    subprocess.run(["umount", target], check=True, timeout=20)
        self.packfs.terminate()
        try:
            assert self.packfs.wait(timeout=20) == 0
        except subprocess.TimeoutExpired:
            # Packs are still in use: without its keeper the kernel ends every read, and unmounting cannot hang.
            self.packfs.kill()
            self.packfs.wait()
            raise
        finally:
            super().clean_up()


def tree_listing(cri, container):
    """Every file of a container with what a user could see of it, and its content's sum."""
    # The root's own times are those of the container's start, a directory's size is its file system's business.
    own = " ".join(f"! -path ./{name} ! -path './{name}/*'" for name in ("proc", "sys", "dev", "etc"))
    seen = f"find . -xdev ! -path . {own}"
    script = (
        f"cd /; {seen} -type d -exec stat -c '%n %f %u %g %Y %h' {{}} + | sort;"
        f"{seen} ! -type d -exec stat -c '%n %f %u %g %s %Y %h %N' {{}} + | sort;"
        "find data bin -xdev -type f -exec md5sum {} + | sort"
    )
    code, out, err = cri.execute(container, "sh", "-c", script)
    assert code == 0, err
    return out.decode()
