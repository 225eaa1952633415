"""Which directory of a node cache a pack belongs to. Pure.

Rendezvous hashing, weighted: the same for every process that knows the directories, in proportion to their weights, and with
a directory more or less only its own share of the packs has another place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

_BITS = 53  # of a hash: as many as a float holds exactly


def ranked(pack_id: str, weights: Mapping[str, int]) -> list[str]:
    """The names of `weights` (above 0) for this pack, the best first."""
    return sorted(weights, key=lambda name: (_distance(pack_id, name) / weights[name], name))


def _distance(pack_id: str, name: str) -> float:
    """Exponentially distributed, so that the least of some divided by their weights is each one's in proportion to its weight."""
    digest = hashlib.blake2b(f"{pack_id} {name}".encode(), digest_size=8).digest()
    drawn = ((int.from_bytes(digest, "big") >> (64 - _BITS)) + 1) / (1 << _BITS)  # above 0, at most 1
    return -math.log(drawn)
