"""`floe model sign` and `verify-signature`, `floe image sign`, and what listings say of signatures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.context import open_catalog, vouching_of
from floe.cli.names import parse_model
from floe.cli.options import SIGNING, TRUSTING, Commands, add_command, add_json, add_settings, settings_of
from floe.cli.settings import Settings
from floe.store.errors import BadInputError, NotFoundError, PreconditionError

if TYPE_CHECKING:
    from floe.store.catalog import Catalog
    from floe.store.ids import ModelRef
    from floe.store.records import ImageRecord, Signature
    from floe.store.signing import Statement, Trust

_SHORT = 16  # hex digits of a key's id
_KEY = "give --signing-key, or set signing_key; `floe key create FILE` makes one"


def add_model_commands(below: Commands) -> None:
    """Add `floe model sign` and `floe model verify-signature`."""
    sign = add_command(below, "sign", "Sign what a model's name stands for in the store now.", run_sign_model)
    text = "Check who has signed a model; fails unless a trusted key did."
    verify = add_command(below, "verify-signature", text, run_verify_model)
    for parser in (sign, verify):
        parser.add_argument("name", metavar="NAME[:TAG]", help="the model, or NAME@DIGEST")
        add_json(parser)
    add_settings(sign, *SIGNING)
    add_settings(verify, *TRUSTING)


def add_image_command(below: Commands, text: str) -> None:
    """Add `floe image sign`; `text` describes REF."""
    sign = add_command(below, "sign", "Sign what the store has of an image's layers and models now.", run_sign_image)
    sign.add_argument("image", metavar="REF", help=text)
    add_settings(sign, *SIGNING)
    add_json(sign)


def run_sign_model(args: argparse.Namespace) -> int:
    """Sign a tag and its tree; of NAME@DIGEST the tree."""
    settings = settings_of(args)
    _require_key(settings)
    ref, _ = parse_model(args.name)
    with open_catalog(settings, signing=True) as catalog:
        key = _key(catalog)
        # Read without trust: to sign what is not signed yet is what this is for.
        digest, manifest = _without_trust(catalog).resolve_model(ref)
        catalog.sign_tree(manifest.tree.digest)
        if ref.digest is None:
            catalog.move_model(ref, digest, digest)
    if args.json:
        output.print_json({"ref": str(ref), "manifest": digest, "tree": manifest.tree.digest, "key": key})
    else:
        output.line(f"{ref}, which is {digest}, is signed by {key[:_SHORT]}")
    return 0


def run_verify_model(args: argparse.Namespace) -> int:
    """Who signed it; UntrustedError unless somebody trusted did."""
    settings = settings_of(args)
    if not settings.trusted_keys.sources:
        raise BadInputError("no trusted keys are set", hint="give --trusted-keys KEY, FILE or DIRECTORY")
    ref, _ = parse_model(args.name)
    with open_catalog(settings, trusting=True) as catalog:
        digest, manifest = catalog.resolve_model(ref)
        found = model_signatures(catalog, catalog.vouching.trust, ref, digest, manifest.tree.digest)
    if args.json:
        output.print_json({"ref": str(ref), "manifest": digest, "tree": manifest.tree.digest, "signatures": found})
        return 0
    output.line(f"{ref} is {digest}")
    output.table(
        ("KEY", "SIGNED", "TRUSTED"), ((s["key"], s["signed"], "yes" if s["trusted"] else "no") for s in found)
    )
    return 0


def run_sign_image(args: argparse.Namespace) -> int:
    """Sign the layers that are stored, and the trees of the models attached."""
    settings = settings_of(args)
    _require_key(settings)
    from floe.cli.image import find  # noqa: PLC0415 - image.py imports this module

    with open_catalog(settings, signing=True) as catalog:
        key = _key(catalog)
        record = find(catalog, args.image)
        layers = _sign_layers(catalog, record)
        attachment = catalog.attachment(record.manifest_digest)
        models = [model["tree"] for model in (attachment.models if attachment else ()) if "tree" in model]
        for tree in models:
            catalog.sign_tree(tree)
    if not layers and not models:
        raise NotFoundError(f"nothing of {args.image} is stored", hint="index it first: `floe image index`")
    if args.json:
        output.print_json({"digest": record.manifest_digest, "layers": layers, "models": models, "key": key})
    else:
        output.line(f"{len(layers)} layers and {len(models)} models of {args.image} are signed by {key[:_SHORT]}")
    return 0


def _sign_layers(catalog: Catalog, record: ImageRecord) -> list[str]:
    signed = []
    plain = _without_trust(catalog)
    for diff_id in dict.fromkeys(record.diff_ids):
        found = plain.layer(diff_id)
        if found is not None:
            catalog.set_layer(diff_id, found[0])
            signed.append(diff_id)
    return signed


def model_signatures(
    catalog: Catalog, trust: Trust | None, ref: ModelRef, digest: str, tree: str
) -> list[dict[str, Any]]:
    """Who signed a model's tag; of NAME@DIGEST, its tree."""
    from floe.store.signing import Statement  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.vouching import tree_signatures  # noqa: PLC0415 - likewise

    if ref.digest is not None:
        return describe(trust, Statement.tree(tree), tree_signatures(catalog.store, tree))
    return describe(trust, Statement.model(ref, digest), catalog.model_ref(ref).signatures)


def layer_signatures(catalog: Catalog, trust: Trust | None, diff_id: str) -> list[dict[str, Any]]:
    """Who signed a layer, as the bucket says."""
    from floe.store.signing import Statement  # noqa: PLC0415 - lazy: keeps --help fast

    ref = catalog.layer_ref(diff_id)
    return [] if ref is None else describe(trust, Statement.layer(diff_id, ref.manifest), ref.signatures)


def describe(trust: Trust | None, statement: Statement, signatures: Sequence[Signature]) -> list[dict[str, Any]]:
    """Signatures as --json shows them; `trusted` only of those that a trusted key made of this very statement."""
    from floe.store.vouching import claims  # noqa: PLC0415 - lazy: keeps --help fast

    return [
        {"key": signature.key, "signed": signature.signed, "trusted": counts}
        for signature, counts in claims(trust, statement, signatures)
    ]


def warn_unsigned(settings: Settings, what: str) -> None:
    """Say that what was published is not signed, on a machine where that would be refused."""
    if settings.trusted_keys.sources and settings.signing_key is None:
        output.note(
            f"warning: {what} is published unsigned, and trusted_keys are set: nodes with them refuse it; {_KEY}"
        )


def trust_of(settings: Settings) -> Trust | None:
    """The trusted keys that listings go by."""
    vouching = vouching_of(settings, trusting=True)
    return None if vouching is None else vouching.trust


def short(signatures: Sequence[dict[str, Any]]) -> str:
    """Signatures in a table's cell: the keys that are trusted, else how many others there are."""
    trusted = [signature["key"][:_SHORT] for signature in signatures if signature["trusted"]]
    others = f"by {len(signatures)} not trusted" if signatures else "no"
    return ", ".join(dict.fromkeys(trusted)) or others


def _require_key(settings: Settings) -> None:
    if settings.signing_key is None:
        raise BadInputError("there is no key to sign with", hint=_KEY)


def _key(catalog: Catalog) -> str:
    signer = catalog.vouching.signer
    if signer is None:
        raise PreconditionError("there is no key to sign with", hint=_KEY)
    return signer.public.id


def _without_trust(catalog: Catalog) -> Catalog:
    from floe.store.catalog import Catalog as Plain  # noqa: PLC0415 - lazy: keeps --help fast
    from floe.store.index import open_index  # noqa: PLC0415 - likewise

    # And without the index: what is signed is what the bucket says.
    return Plain(catalog.store, open_index("none"))
