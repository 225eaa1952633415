"""The keys of the settings: whether the daemons and writers can read them, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Iterator

from floe.doctor.finding import ERROR, OK, WARNING, Finding, Node
from floe.store.errors import FloeError
from floe.store.keyfiles import load_trust, read_signer

_TRUSTED, _SIGNING = "trusted keys", "signing key"


def keys(node: Node) -> Iterator[Finding]:
    """Read as they are when something is mounted or published."""
    trust = None
    try:
        trust = load_trust(node.trusted_keys)
    except FloeError as error:
        mend = error.hint or "put the public key there, or correct trusted_keys in /etc/floe/config.toml"
        yield Finding(_TRUSTED, ERROR, f"{error}: nothing can be mounted or pulled lazily", mend)
    else:
        said = "none: what the store holds is believed" if trust is None else f"{len(trust.ids)} keys can be read"
        yield Finding(_TRUSTED, OK, said)
    if node.signing_key is None:
        if node.role == "writer" and node.trusted_keys:
            text = "none, and trusted_keys are set: nodes with them refuse what is published here"
            yield Finding(_SIGNING, WARNING, text, "floe key create FILE, and set signing_key to it")
        return
    try:
        public = read_signer(node.signing_key).public
    except FloeError as error:
        mend = error.hint or "put the private key there, or correct signing_key in /etc/floe/config.toml"
        yield Finding(_SIGNING, ERROR, f"{error}: nothing can be published", mend)
        return
    if trust is not None and public.id not in trust.ids:
        text = f"{node.signing_key} is none of trusted_keys: nodes with the same ones refuse what it signs"
        yield Finding(_SIGNING, WARNING, text, f"add {node.signing_key}.pub to trusted_keys, here and on the nodes")
    else:
        yield Finding(_SIGNING, OK, str(node.signing_key))
