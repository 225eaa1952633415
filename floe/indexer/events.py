"""What a registry tells of itself, as jobs. Pure.

Source: the notifications of the CNCF's distribution (notifications/event.go): an envelope `{"events": [...]}`, each event with an
`action`, a `target` (`mediaType`, `digest`, `repository`, `tag`) and a `request` whose `host` is the registry as its client
named it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeAlias

from floe.ingest.oci import media
from floe.ingest.oci.references import RegistryRef, parse_registry_ref
from floe.store import fields, jsontext
from floe.store.errors import BadInputError
from floe.store.index.jobs import CHECK, INDEX, WEBHOOK, Job

BODY_MAX = 1 << 20  # bytes of an envelope
_KINDS = tuple(kind.strip() for kind in media.ACCEPT.split(","))
Skipped: TypeAlias = Callable[[str], None]
"""Told of an event that no job can be made of, and why."""


def check_registry(text: str) -> str:
    """`text` as names of images have it; BadInputError when none has it so."""
    read: RegistryRef | None = None
    with contextlib.suppress(BadInputError):
        read = parse_registry_ref(f"{text}/a/b:c")
    if read is None or read.host != text:
        raise BadInputError(
            f"{text!r} is no registry as images' names have it", hint="give HOST[:PORT], a host with a dot or a port"
        )
    return text


def jobs_of(body: bytes, now: float, registry: str | None = None, skipped: Skipped = lambda _: None) -> list[Job]:
    """The jobs that an envelope asks for, each once. `registry`: how nodes name the registry, where it names itself otherwise.

    A tag that was pushed is indexed; a manifest that was deleted is looked up. What was pushed without a tag is part of an
    index whose tag follows; pulls, layers and tags that were taken away ask for nothing. ValueError: no envelope. An event
    that makes no sense is left out, and `skipped` is told: a registry sends what was refused again before all that follows.
    """
    envelope = fields.mapping(jsontext.parse(body, BODY_MAX), "the envelope", "events")
    found: dict[str, Job] = {}
    for event in fields.each(envelope["events"], "events", lambda value, _: value):
        try:
            job = _job(fields.mapping(event, "an event"), now, registry)
        except ValueError as error:
            skipped(str(error))
            continue
        if job is not None:
            found.setdefault(job.key, job)
    return list(found.values())


def _job(event: dict[str, Any], now: float, registry: str | None) -> Job | None:
    action = event.get("action")
    if action not in ("push", "delete"):
        return None
    target = fields.mapping(event.get("target"), "target")
    repository = fields.text(target.get("repository"), "target.repository")
    host = registry or fields.text(fields.mapping(event.get("request"), "request").get("host"), "request.host")
    tag, digest = target.get("tag"), target.get("digest")
    if action == "push" and tag and target.get("mediaType") in _KINDS:
        tag = fields.text(tag, "target.tag")
        return Job(_name(RegistryRef(host, repository, tag)), INDEX, origin=WEBHOOK, asked=now)
    if action == "delete" and digest and not tag:
        digest = fields.oci_digest(digest, "target.digest")
        return Job(_name(RegistryRef(host, repository, None, digest)), CHECK, origin=WEBHOOK, asked=now)
    return None


def _name(ref: RegistryRef) -> str:
    """The full name; ValueError for one that would be read as another image's."""
    text = str(ref)
    try:
        read = parse_registry_ref(text)
    except BadInputError as error:
        raise ValueError(str(error)) from error
    if read != ref:
        raise ValueError(f"{jsontext.shown(text)} is no name of an image")
    return text
