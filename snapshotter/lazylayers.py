"""The seam between the snapshotter's rules and the rest of Floe: what a lazy layer needs, in a dozen verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Usage:
    """What is held on this node's disk: `size` in bytes, and `inodes`."""

    size: int
    inodes: int


class LazyLayers(Protocol):
    """Thread-safe. `tree` is a tree digest, `owner` a durable text that names one use of it.

    `trusted` are the ids of the keys whose signatures count; none: nothing need be signed.
    """

    @property
    def trusted(self) -> tuple[str, ...]:
        """See above."""
        ...

    def resolve(self, chain_id: str) -> str | None:
        """The tree of a chain id, None when the layer is not in the store. Asks the network; any FloeError.

        UntrustedError when it need be signed and is not.
        """
        ...

    def vouch(self, tree: str) -> None:
        """UntrustedError when the tree, which an image names, need be signed and is not. Then it asks the network."""
        ...

    def vouched(self, tree: str) -> bool:
        """Whether `vouch` has nothing to ask: nothing need be signed, or this process has seen that the tree is."""
        ...

    def fetch(self, tree: str, deadline: float) -> None:
        """Have the tree and its pack indexes in the node cache within `deadline` seconds. Asks the network."""
        ...

    def fetch_local(self, tree: str) -> bool:
        """Whether the tree and its pack indexes are in the node cache; never asks the network."""
        ...

    def expect(self, tree: str, nbytes: int) -> None:
        """Have content of a tree that is in the node cache fetched, for it will be mounted soon; see packfs_control.expect.

        Returns at once; nothing is raised.
        """
        ...

    def unexpect(self, tree: str) -> None:
        """Take `expect` back."""
        ...

    def started(self, key: str, name: str, trees: Sequence[str]) -> None:
        """Tell whoever reads `trees` that container `key` of image `name` ("" when unknown) begins to. Returns at once."""
        ...

    def index_status(self) -> Mapping[str, Any]:
        """How the index answers; see MeasuredIndex.status. Empty when there is none."""
        ...

    def mount(self, tree: str, owner: str) -> None:
        """Mount a tree that is in the node cache, or add one more owner to its mount; a dead mount is replaced."""
        ...

    def bind(self, tree: str, target: Path) -> None:
        """Show the mounted tree at the directory `target`; a bind of an earlier, dead mount is replaced."""
        ...

    def unbind(self, target: Path) -> None:
        """Undo `bind`; nothing happens when nothing is mounted there."""
        ...

    def release(self, tree: str, owner: str) -> None:
        """End a use; the last one unmounts the tree. BusyError while reads are in flight on it: try again later."""
        ...

    def healthy(self, tree: str) -> bool:
        """Whether the tree is mounted and answers."""
        ...

    def usage(self, tree: str, without: AbstractSet[str] = frozenset()) -> Usage:
        """What the node cache holds of the tree and its packs, but for the packs `without`."""
        ...

    def packs(self, tree: str) -> frozenset[str] | None:
        """The ids of the tree's packs, which never change; None when the tree is not in the node cache."""
        ...

    def uses(self) -> list[tuple[str, str]]:
        """All uses since this boot: (tree, owner)."""
        ...

    def sweep(self) -> None:
        """Clear up what nobody owns: mounts that a release had to leave, pins of before a reboot."""
        ...
