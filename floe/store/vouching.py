"""What one process trusts and signs with: checks on the way in, signatures on the way out.

Without trust everything in the store is believed, without a signer nothing is signed: so it is where no keys are set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone

from floe.store import layout
from floe.store.errors import DamagedError, NotFoundError
from floe.store.objects.base import ObjectStore
from floe.store.records import Ref, Signature, TreeSignatures
from floe.store.refs import replace_record
from floe.store.signing import MAX_SIGNATURES, Signer, Statement, Trust


class Vouching:
    """`trust`: whose word counts, None: no signature is asked for. `signer`: what is published is signed by it."""

    def __init__(self, trust: Trust | None = None, signer: Signer | None = None) -> None:
        self.trust = trust
        self.signer = signer

    def check(self, statement: Statement, signatures: Sequence[Signature]) -> None:
        """UntrustedError when signatures are asked for and none of these counts."""
        if self.trust is not None:
            self.trust.check(statement, signatures)

    def check_tree(self, store: ObjectStore, tree: str) -> None:
        """The same for a tree that something outside the store names by digest; asks the store for its signatures."""
        if self.trust is not None:
            self.trust.check(Statement.tree(tree), tree_signatures(store, tree))

    def sign_ref(self, statement: Statement, ref: Ref) -> Ref:
        """The ref with a signature of ours, if there is a signer; unchanged when it has one already."""
        return replace(ref, signatures=self._signed(statement, ref.signatures))

    def sign_tree(self, store: ObjectStore, tree: str) -> None:
        """Store a signature of ours of a tree, if there is a signer."""
        if self.signer is None:
            return
        statement = Statement.tree(tree)

        def change(known: TreeSignatures | None) -> TreeSignatures:
            before = known.signatures if known is not None and known.tree == tree else ()
            return TreeSignatures(tree, self._signed(statement, before))

        replace_record(store, layout.tree_signatures_key(tree), TreeSignatures, change)

    def _signed(self, statement: Statement, before: tuple[Signature, ...]) -> tuple[Signature, ...]:
        if self.signer is None:
            return before
        own = self.signer.public
        if any(own.made(signature, statement) for signature in before):
            return before
        others = [signature for signature in before if signature.key != own.id]
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return (*others[1 - MAX_SIGNATURES :], self.signer.sign(statement, now))


def claims(trust: Trust | None, statement: Statement, signatures: Sequence[Signature]) -> list[tuple[Signature, bool]]:
    """The signatures as they stand in the store, and whether each is a trusted key's of this very statement; for people."""
    known = () if trust is None else trust.signers(statement, signatures)
    return [(signature, signature.key in known) for signature in signatures[:MAX_SIGNATURES]]


def tree_signatures(store: ObjectStore, tree: str) -> tuple[Signature, ...]:
    """The signatures of a tree, unchecked; none when there are none, or they cannot be read."""
    key = layout.tree_signatures_key(tree)
    try:
        return TreeSignatures.decode(store.get(key), key).signatures
    except (NotFoundError, DamagedError):
        return ()
