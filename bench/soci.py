"""soci-snapshotter as a subject: its index beside the image in the registry, its daemon as containerd's snapshotter.

It fetches its index by TLS alone, so it gets the registry by TLS, with a certificate that SSL_CERT_FILE makes known; layers
it takes from a mirror, the registry without TLS. Every layer gets an index: one without would be unpacked, slowly.

The binaries are Debian's, unpacked by install/setup.sh bench. What they keep at fixed places below /var/lib lies in a
private folder: the command line runs in a mount namespace of its own, the daemon is told its places.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench import servers  # noqa: F401 - makes the tests' support importable

# isort: split
from support import sweep
from support.containerd import Containerd

TOOLS = Path(__file__).resolve().parents[1] / ".tools" / "soci" / "bin"
_FIXED = "/var/lib/soci-snapshotter-grpc"
_START = 20.0  # seconds


def available() -> bool:
    """Whether its programs are here."""
    return (TOOLS / "soci").exists() and (TOOLS / "soci-snapshotter-grpc").exists()


def index(containerd: Containerd, image: str, home: Path) -> None:
    """Make the index of an image that `containerd` has, and push it to the image's registry."""
    home.mkdir()
    soci = f"{TOOLS}/soci --address {containerd.address} --namespace k8s.io"
    script = f"mkdir -p {_FIXED} && mount --bind {home} {_FIXED} && {soci} create --min-layer-size 0 {image} && {soci} push -q {image}"
    result = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=containerd.env,
    )
    if result.returncode:
        raise SystemExit(f"bench: soci cannot index {image}: {(result.stderr or result.stdout).strip()[-1000:]}")


@contextmanager
def running(home: Path, registry: str, mirror: str, env: Mapping[str, str]) -> Iterator[Path]:
    """The daemon with nothing cached; its socket. `registry` is the one images are named by, `mirror` has them without TLS."""
    home.mkdir()
    folder = sweep.folder("soci", Path("/run"))
    address = folder / "soci.sock"
    config = home / "config.toml"
    config.write_text(
        f'metrics_network = "unix"\nmetrics_address = "{folder}/metrics.sock"\n'
        f'[[resolver.host."{registry}".mirrors]]\nhost = "{mirror}"\ninsecure = true\n'
    )
    root = home / "root"
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [TOOLS / "soci-snapshotter-grpc", "--address", address, "--root", root, "--config", config],
            stdout=log,
            stderr=log,
            env={**os.environ, **env},
        )
    try:
        until = time.monotonic() + _START
        while not address.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"bench: soci-snapshotter did not start: {(home / 'log').read_text()[-1000:]}")
            time.sleep(0.02)
        yield address
    finally:
        process.terminate()
        process.wait(30)
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if (target := line.split()[4]).startswith(f"{root}/"):
                subprocess.run(["umount", "-l", target], check=False)
        shutil.rmtree(folder, ignore_errors=True)
