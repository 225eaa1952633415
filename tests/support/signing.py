"""Keys and signed stores for tests."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from floe.store.catalog import Catalog
from floe.store.index import open_index
from floe.store.signing import Signer, Trust
from floe.store.vouching import Vouching


def signer(number: int) -> Signer:
    """The same key for the same number."""
    return Signer(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


def signing(store, key: Signer, index=None) -> Catalog:
    """The catalog of somebody who publishes with this key and believes it alone."""
    return Catalog(store, open_index(index), Vouching(Trust([key.public]), key))


def trusting(store, *keys: Signer, index=None) -> Catalog:
    """The catalog of a node that believes these keys."""
    return Catalog(store, index or open_index(None), Vouching(Trust(key.public for key in keys)))
