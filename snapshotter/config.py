"""What the snapshotter needs to be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from floe.rpc.sockets import check_address
from floe.store.errors import BadInputError

UNPACK, ERROR = "unpack", "error"
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class SnapshotterConfig:
    """Settings of `floe snapshotter`.

    `address` is the unix socket containerd dials; `root` holds the database and the snapshots' directories, `run_dir`
    the tree mounts and sockets, `cache_dir` and `cache_dirs` the node cache. `store_url` and `index_url` (None: no index) name the
    store; `trusted_keys` say whose signatures of what is in it count (keyfiles.load_trust), none: nothing need be signed.
    `prepare_timeout` is in seconds, shared by the look-ups of one pull. `on_store_error` is "unpack" (a layer
    that cannot be had lazily in time is unpacked the ordinary way) or "error" (the pull fails as unavailable).
    `prefetch_at_prepare`: bytes of a model's content to fetch from its image's first Prepare on where no profile knows
    better; 0: nothing of models is fetched before they are read.
    `mounter` and `loop`: see floe.mount.mounter.TreeMounter.
    `otlp_endpoint`: see floe.store.spans.endpoint_of.
    `metrics_address` is a unix socket or loopback HOST:PORT, None for no metrics.
    """

    address: Path
    root: Path
    run_dir: Path
    cache_dir: Path
    store_url: str
    index_url: str | None = None
    trusted_keys: tuple[str, ...] = ()
    cache_dirs: tuple[Path, ...] = ()
    prepare_timeout: float = 2.0
    on_store_error: str = UNPACK
    prefetch_at_prepare: int = 4 << 30
    mounter: str = "auto"
    loop: str = "auto"
    log_level: str = "info"
    metrics_address: str | None = None
    otlp_endpoint: str | None = None

    def check(self) -> None:
        """BadInputError for settings that cannot work together."""
        if self.on_store_error not in (UNPACK, ERROR):
            raise BadInputError(f"on_store_error is {self.on_store_error!r}", hint=f"use {UNPACK!r} or {ERROR!r}")
        if self.prepare_timeout <= 0:
            raise BadInputError(f"prepare_timeout is {self.prepare_timeout}", hint="use a number of seconds above 0")
        if self.log_level not in LOG_LEVELS:
            raise BadInputError(f"log_level is {self.log_level!r}", hint=f"use one of {', '.join(LOG_LEVELS)}")
        check_address(self.address)
        if ":" in str(self.root) or "," in str(self.root):
            raise BadInputError(
                f"root {self.root} holds ':' or ',', which separate overlay's lower directories and mount options",
                hint="choose another root directory",
            )
        # containerd idmaps the common parent of the lower directories with all that is mounted below it; the pack
        # filesystem must stay outside.
        if self.run_dir.resolve().is_relative_to(self.root.resolve()):
            raise BadInputError(
                f"run directory {self.run_dir} lies inside root {self.root}",
                hint="choose a run directory outside root",
            )
