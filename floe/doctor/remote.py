"""What is not on this node: the store and what may be done with it, credentials, the clock beside the server's, the index."""

from __future__ import annotations

import email.utils
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime, timezone
from typing import Any

from floe.doctor.finding import ERROR, OK, SKIPPED, WARNING, Finding, Node
from floe.selfbench.network import endpoint
from floe.store import layout
from floe.store.errors import AccessDeniedError, DamagedError, FloeError, NotFoundError, StoreMissingError
from floe.store.objects import ObjectStore, open_store
from floe.store.objects.answers import STRANGER
from floe.store.objects.check import OK as DONE
from floe.store.objects.check import UNTRIED, check_store
from floe.store.objects.multipart import uploads_of
from floe.store.objects.permissions import GET, LIST, RANGE, missing_policy, permissions
from floe.store.records import StoreRecord

_SKEWED, _REFUSED = 60.0, 300.0  # seconds: worth a word; soon refused, by S3 after 15 minutes, by others after 5
_HTTP_SECONDS = 5.0
_SOON = 3600.0  # seconds before an expiry that nobody renews


def store(node: Node) -> Iterator[Finding]:
    """Each thing that the role needs, tried; a reader's things write nothing."""
    with closing(open_store(node.store, retry=False)) as opened:
        yield from _writes(node, opened) if node.may_write else _reads(node, opened)


def _reads(node: Node, opened: ObjectStore) -> Iterator[Finding]:
    check, mend = "store", f"floe store check --role {node.role}"
    denied: list[str] = []

    def listed() -> object:
        return next(iter(opened.list("refs")), None)

    def got() -> object:
        return StoreRecord.decode(opened.get(layout.STORE_KEY), layout.STORE_KEY)

    for name, work in ((LIST, listed), (GET, got), (RANGE, lambda: opened.get(layout.STORE_KEY, 1, 4))):
        try:
            work()
        except StoreMissingError as error:
            yield Finding(check, ERROR, str(error), "floe store init")
            return
        except NotFoundError:
            if name == GET:
                yield Finding(check, WARNING, f"there is no Floe store at {opened.url} yet", "floe store init")
            return
        except AccessDeniedError as error:
            if any(sign in str(error) for sign in ("no credentials", *STRANGER)):
                yield Finding(check, ERROR, str(error), error.hint or "see the finding about credentials")
                return
            denied.append(name)
            needs = ", ".join(permissions(node.store, name))
            text = f"{name} is denied{f' ({needs})' if needs else ''}: {error}"
            yield Finding(check, ERROR, text, _allow(opened, [name]) or error.hint or mend)
        except DamagedError as error:
            yield Finding(check, ERROR, str(error), error.hint or mend)
        except FloeError as error:
            yield Finding(
                check, ERROR, str(error), error.hint or "see whether the store's address and the network are right"
            )
            return
    if not denied:
        yield Finding(check, OK, f"{opened.url} can be listed and read")
    if node.role != "reader":
        yield Finding(check, SKIPPED, f"what a {node.role} writes was not tried: give --probe-writes", mend)


def _writes(node: Node, opened: ObjectStore) -> Iterator[Finding]:
    try:
        report = check_store(opened, uploads_of(opened))
    except FloeError as error:
        yield Finding(
            "store", ERROR, str(error), error.hint or "see whether the store's address and the network are right"
        )
        return
    wanted = {"reader": {"reader"}, "writer": {"reader", "writer"}, "remover": {"reader", "remover"}}[node.role]
    for one in report.findings:
        if one.role in wanted and one.state not in (DONE, UNTRIED):
            named = f" ({', '.join(one.permissions)})" if one.permissions else ""
            mend = _allow(opened, [one.operation]) or f"floe store check --role {node.role}"
            yield Finding("store", ERROR, f"{one.operation} is {one.state}{named}: {one.detail}", mend)
    if report.satisfied(node.role):
        yield Finding("store", OK, f"{opened.url} allows all that a {node.role} does")
    elif all(one.state in (DONE, UNTRIED) for one in report.findings if one.role in wanted):
        yield Finding("store", WARNING, f"there is nothing in {opened.url} to try reading with", "floe store init")
    if report.left:
        yield Finding("store", WARNING, f"probe objects could not be removed: {', '.join(report.left)}", "delete them")


def _allow(opened: ObjectStore, denied: list[str]) -> str:
    policy = missing_policy(opened.url, denied)
    return f"allow it: {json.dumps(policy)}" if policy else ""


def credentials(node: Node) -> Iterator[Finding]:
    """Where they come from, and until when they hold. Asks their source, not the store."""
    check = "credentials"
    with closing(open_store(node.store, retry=False)) as opened:
        provider: Any = getattr(opened, "_credentials", None)
        if provider is None:
            yield Finding(check, OK, "a folder needs none")
            return
        try:
            provider.current()
        except FloeError as error:
            yield Finding(check, ERROR, str(error), error.hint or "see docs/OPERATIONS.md, The store")
            return
        source, until, renews = _aws(provider) if node.store.startswith("s3:") else _google(provider)
    left = None if until is None else (until - datetime.now(timezone.utc)).total_seconds()
    held = "" if until is None or left is None else f", until {until:%Y-%m-%d %H:%M} UTC"
    if left is not None and left <= 0:
        yield Finding(check, ERROR, f"{source}{held}: they have expired", "renew them where they come from")
    elif left is not None and left < _SOON and not renews:
        yield Finding(check, WARNING, f"{source}{held}, and nobody renews them", "give the machine a role")
    elif not renews and os.environ.get("AWS_SESSION_TOKEN"):
        text = f"{source}: a session's, which expires, and cannot change under a running daemon"
        yield Finding(check, WARNING, text, "give the machine a role, or a profile whose file is rewritten")
    else:
        yield Finding(check, OK, f"{source}{held}{', renewed before' if renews else ''}")


def _aws(provider: Any) -> tuple[str, datetime | None, bool]:
    """Source, expiry, and whether they are renewed by themselves."""
    if os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"):
        return "AWS credentials of the environment", None, False
    found = provider.session().get_credentials()
    until = getattr(found, "_expiry_time", None)
    return f"AWS credentials by {getattr(found, 'method', 'unknown')}", until, until is not None


def _google(provider: Any) -> tuple[str, datetime | None, bool]:
    source = getattr(provider, "_source", None)
    if source is None:
        return "an emulator, which wants none", None, True
    until = getattr(source, "expiry", None)
    who = getattr(source, "service_account_email", None)
    name = f"Google's {type(source).__module__.rpartition('.')[2]}{f' of {who}' if who else ''}"
    return name, None if until is None else until.replace(tzinfo=timezone.utc), True


def clock(node: Node) -> Iterator[Finding]:
    """This clock beside the Date that the store's server gives: signatures are refused when they differ."""
    check = "clock"
    with closing(open_store(node.store, retry=False)) as opened:
        url = endpoint(opened)
        ca = getattr(getattr(opened, "address", None), "ca", None)
    if url is None:
        yield Finding(check, SKIPPED, "a folder has no clock of its own")
        return
    import requests  # noqa: PLC0415 - slow, and for buckets only

    try:
        before = time.time()
        # Whatever it answers, it says when: no credentials are sent.
        answer = requests.head(url, timeout=_HTTP_SECONDS, verify=str(ca) if ca else True, allow_redirects=False)
        after = time.time()
    except requests.RequestException as error:
        yield Finding(check, SKIPPED, f"{url} does not answer: {type(error).__name__}")
        return
    dated = None
    with suppress(TypeError, ValueError):
        dated = email.utils.parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
    if dated is None:
        yield Finding(check, SKIPPED, f"{url} does not say what time it is")
        return
    # A Date is cut to seconds, and was made at some moment between the two.
    off = 0.0 if before - 1 <= dated <= after else (before - 1 - dated if dated < before else after - dated)
    if abs(off) < _SKEWED:
        yield Finding(check, OK, "as the store's server has it")
        return
    text = f"this clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the store's server"
    level = ERROR if abs(off) >= _REFUSED else WARNING
    yield Finding(check, level, f"{text}; requests are refused when it is much", "timedatectl set-ntp true")


def index(node: Node) -> Iterator[Finding]:
    """Reachable, writable, and whether it drops keys. Nothing waits for an index: no finding here is an error."""
    check, found = "index", node.index_state()
    shown, state = found["url"], found["state"]
    if found["kind"] == "none" or (found["kind"] == "sqlite" and state == "ok"):
        yield Finding(check, OK, shown if found["kind"] == "none" else f"{shown}, for this machine alone")
    elif found["kind"] == "sqlite":
        yield Finding(check, OK, f"{shown}, not made yet")
    elif state == "unreachable":
        yield Finding(
            check, WARNING, str(found["error"]), found.get("hint") or "check the address, the user and the network"
        )
        if "refused a command" in str(found["error"]):  # floe.store.index.redis.faults; by name, which
            yield from _index_rights(node, shown, writable=True)
    else:
        yield from _index_rights(node, shown, writable=state != "read-only")
        if state in ("read-only", "evicting"):
            mend = "name the primary in index" if "replica" in str(found.get("reason")) else "raise maxmemory in Redis"
            yield Finding(check, WARNING, f"{shown} is {state}: {found['reason']}", mend)
        if "warning" in found:
            policy = found["maxmemory_policy"]
            text = f"maxmemory-policy is {policy}: Redis drops keys when its memory is full, and pushes get slower"
            yield Finding("index eviction", WARNING, text, "redis-cli CONFIG SET maxmemory-policy noeviction")
        elif state not in ("read-only", "evicting"):
            yield Finding(check, OK, f"{shown}, {state}")


def _index_rights(node: Node, shown: str, *, writable: bool) -> Iterator[Finding]:
    """Each command that the role gives, tried; what writes only with leave, and where anything can be written."""
    check, writes = "index permissions", node.role != "reader"
    tried = writes and node.may_write and writable
    try:
        denied = node.index_denied(tried)
    except FloeError as error:
        yield Finding(check, WARNING, str(error), error.hint or "check the address, the user and the network")
        return
    if denied:
        text = f"{shown} does not let this user give {', '.join(denied)}"
        allow = " ".join(f"+{name.lower()}" for name in denied)
        yield Finding(
            check, WARNING, text, f"redis-cli ACL SETUSER NAME {allow} (install/identity/redis-users.acl has all)"
        )
    elif writes and not tried:
        yield Finding(
            check, SKIPPED, f"what a {node.role} writes was not tried: give --probe-writes, to a primary with room"
        )
    else:
        yield Finding(check, OK, f"all that a {node.role} does")
    if node.may_write and writable:
        yield from _note_rights(node, shown)


def _note_rights(node: Node, shown: str) -> Iterator[Finding]:
    """What an agent writes, which no reader else does."""
    check = "agent's permissions"
    try:
        denied = node.notes_denied()
    except FloeError as error:
        yield Finding(check, WARNING, str(error), error.hint or "check the address, the user and the network")
        return
    if denied:
        text = (
            f"{shown} does not let this user give {', '.join(denied)} for heartbeats: this node is in no `floe nodes`"
        )
        allow = "'(~floe:*:n{nodes}* ~floe:*:n{warm}* +set +hset)'"
        yield Finding(check, WARNING, text, f"redis-cli ACL SETUSER NAME {allow} (Redis 7 and later)")
    else:
        yield Finding(check, OK, "all that an agent writes")
