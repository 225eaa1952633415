"""What the mounter is given: trees on this node and the node cache, as far as mounting needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Pack(Protocol):
    """floe.store.trees.LocalPack. `content_size` in bytes; `data` is the sparse file in the node cache."""

    @property
    def id(self) -> str:
        """64 hex digits."""
        ...

    @property
    def content_size(self) -> int:
        """Bytes."""
        ...

    @property
    def data(self) -> Path:
        """Absolute."""
        ...

    @property
    def complete(self) -> bool:
        """Whether all of it was in the cache when the tree was looked up."""
        ...


class Tree(Protocol):
    """floe.store.trees.LocalTree. `packs` in the order of the image's device table."""

    @property
    def digest(self) -> str:
        """64 hex digits."""
        ...

    @property
    def image(self) -> Path:
        """Absolute."""
        ...

    @property
    def packs(self) -> Sequence[Pack]:
        """All packs of the tree."""
        ...


class PackCache(Protocol):
    """floe.store.cache.Cache. Between pin and unpin what `is_complete` says does not turn from yes to no."""

    @property
    def roots(self) -> Sequence[Path]:
        """The cache's folders."""
        ...

    def pack_ids(self) -> Sequence[str]:
        """All packs of which anything is here."""
        ...

    def data_path(self, pack_id: str) -> Path:
        """The file of the pack's content."""
        ...

    def is_complete(self, pack_id: str) -> bool:
        """Whether the pack's file may be mounted as it is."""
        ...

    def pin(self, pack_id: str, owner: str) -> None:
        """Keep the pack whole; durable."""
        ...

    def unpin(self, pack_id: str, owner: str) -> None:
        """Undo `pin`."""
        ...

    def pins(self, pack_id: str) -> set[str]:
        """Who pins the pack."""
        ...
