"""What a failed request means, in few words for people."""

from __future__ import annotations

import json

import requests

from floe.store import jsontext

_SAID_MAX = 300  # characters of a registry's own message


def reason(failure: BaseException) -> str:
    """The innermost cause in few words; the whole chain is long and repeats itself."""
    seen: BaseException = failure
    while True:
        inside = (part for part in seen.args if isinstance(part, BaseException))
        inner = next(inside, getattr(seen, "reason", None))
        inner = inner if isinstance(inner, BaseException) else seen.__cause__
        if inner is None or inner is seen:
            known = seen.strerror if isinstance(seen, OSError) else None
            return (known or str(seen).rpartition(": ")[2] or type(seen).__name__)[:_SAID_MAX]
        seen = inner


def message(response: requests.Response) -> str:
    """What the registry says of its own refusal, as printable text."""
    try:
        body = response.raw.read(8192, decode_content=True) or b""
    except Exception:  # a body that cannot be read says nothing
        return ""
    text = body.decode("utf-8", "replace")
    try:
        errors = jsontext.parse(text.encode())["errors"]
        text = "; ".join(str(item.get("message") or item.get("code")) for item in errors)
    except (ValueError, KeyError, TypeError, AttributeError):
        text = text if "<" not in text else ""
    text = "".join(c if c.isprintable() else " " for c in text).strip()
    return f": {text[:_SAID_MAX]}" if text else ""


def codes(response: requests.Response) -> list[str]:
    """The codes by which a registry says why it refuses (distribution-spec, "Error Codes"); [] when it does not."""
    try:
        found = json.loads(response.raw.read(8192, decode_content=True) or b"")["errors"]
        return [str(item["code"]) for item in found if isinstance(item, dict) and "code" in item]
    except Exception:  # a body that cannot be read says nothing
        return []
