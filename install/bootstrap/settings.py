"""Floe's settings for this node: where they come from, whether they are good, and the file that holds them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bootstrap.errors import NodeError, UsageError
from bootstrap.flags import check_fixed
from bootstrap.system import read, run

FILE = Path("/etc/floe/config.toml")
PREFIX, ATTRIBUTE = "FLOE_", "floe-"
HEADER = "# Floe's settings on this node. bootstrap-node.sh wrote the lines below, and changes no others.\n"
_KEY = re.compile(r"""\s*["']?(?P<key>[A-Za-z0-9_-]+)["']?\s*=\s*(?P<value>.*)""", re.DOTALL)
_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
_SECONDS = 3.0
_KINDS = {"store": ("file:///", "s3://", "gs://"), "index": ("sqlite:/", "redis://", "rediss://", "none")}
# Google's own name for the variable; their libraries go by it too.
_HOST_VARIABLE, _HOST = "GCE_METADATA_HOST", "metadata.google.internal"

# Run by the node's Python with Floe's code on its path: settings need the standard library alone.
_CHECK = """
import json, sys, types
from pathlib import Path
sys.dont_write_bytecode = True
sys.path[:0] = sys.argv[1:]
try:
    import blake3
except ImportError:
    # What judges addresses imports it and calls none of it, and it may not be installed yet.
    sys.modules["blake3"] = types.ModuleType("blake3")
    sys.modules["blake3"].blake3 = None
from floe.cli import settings
from floe.store.errors import BadInputError, FloeError

def judge(key, value):
    if key not in settings.KEYS:
        raise BadInputError("there is no such setting", hint=settings._suggest(key, settings.KEYS))
    found = getattr(settings.load({key: value}, {}, ""), key)
    if isinstance(found, Path) and not value.startswith("/"):
        raise BadInputError(f"{value!r} is not an absolute path", hint="write it from / on")
    if key == "store" and value.startswith("s3:"):
        from floe.store.objects.s3_address import S3Address
        S3Address.parse(value)
    elif key == "store" and value.startswith("gs:"):
        from floe.store.objects.gcs_address import GCSAddress
        GCSAddress.parse(value)
    elif key == "store":
        from floe.store.objects import open_store
        open_store(value, retry=False)
    elif key == "index" and value.startswith("redis"):
        from floe.store.index.redis.address import RedisAddress
        RedisAddress.parse(value)
    elif key == "index":
        from floe.store.index import open_index
        open_index(value)

asked = json.load(sys.stdin)
answer = {"keys": list(settings.KEYS)}
try:
    for place, key, value in asked["given"]:
        try:
            judge(key, value)
        except FloeError as error:
            text = str(error).removeprefix(f"--{settings.flag_name(key)}: ")
            raise BadInputError(f"{place}: {text}", hint=error.hint or settings.HELP[key].replace("%%", "%")) from error
    settings.load({}, asked["environ"], "")
    settings.load({key: value for _, key, value in asked["given"]}, {}, "").cache_roots
    if asked["file"]:
        found = settings.load({}, {}, asked["file"])
        found.cache_roots
        answer["store"], answer["index"] = found.store, found.index
except FloeError as error:
    answer["error"], answer["hint"] = str(error), error.hint
print(json.dumps(answer))
"""


class Checker:
    """Floe's own judgement of settings. `python` with `path` (a checkout or a wheel), or that of an installed Floe."""

    def __init__(self, python: str = sys.executable, path: Path | None = None) -> None:
        self._command = [python, "-I", "-B", "-c", _CHECK, *([str(path)] if path else [])]

    def keys(self) -> list[str]:
        """All settings that there are."""
        keys: list[str] = self._ask()["keys"]
        return keys

    def check(self, given: Sequence[tuple[str, str, str]], environ: Mapping[str, str]) -> None:
        """`given`: settings as (where, key, value), of which later ones count. UsageError."""
        answer = self._ask(given=given, environ=environ)
        if "error" in answer:
            raise UsageError(answer["error"], answer["hint"])

    def check_file(self, path: Path) -> None:
        """A whole settings file. NodeError."""
        answer = self._ask(file=str(path))
        if "error" in answer:
            raise NodeError(answer["error"], answer["hint"] or f"mend {FILE}")

    def _ask(
        self,
        given: Sequence[tuple[str, str, str]] = (),
        environ: Mapping[str, str] | None = None,
        file: str = "",
    ) -> dict[str, Any]:
        asked = {"given": given, "environ": environ or {}, "file": file}
        done = run(*self._command, text=json.dumps(asked), hint="see whether --source is a whole checkout or wheel")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def gather(
    flags: Mapping[str, str], environ: Mapping[str, str], metadata: Mapping[str, str], checker: Checker
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What was given for this node: the values, where each comes from, and notes. UsageError for what is not good."""
    keys = checker.keys()
    ours = {name: value for name, value in environ.items() if name.startswith(PREFIX) and value}
    from_environ = {key: ours[PREFIX + key.upper()] for key in keys if PREFIX + key.upper() in ours}
    named = {
        name[len(ATTRIBUTE) :].replace("-", "_"): text for name, text in metadata.items() if name.startswith(ATTRIBUTE)
    }
    from_metadata = {key: value for key, value in named.items() if key in keys}
    notes = [
        f"instance metadata {ATTRIBUTE}{key.replace('_', '-')} is none of Floe's settings, and ignored"
        for key in named
        if key not in keys
    ]
    check_fixed(from_environ, "environment")
    check_fixed(from_metadata, "instance metadata")
    ours.pop(f"{PREFIX}CONFIG", None)
    given = [
        (f"instance metadata {ATTRIBUTE}{key.replace('_', '-')}", key, from_metadata[key]) for key in from_metadata
    ]
    given += [(PREFIX + key.upper(), key, from_environ[key]) for key in from_environ]
    given += [(f"--{key}" if key in ("store", "index") else f"--set {key}", key, flags[key]) for key in flags]
    for place, key, value in given:
        _check_kind(place, key, value)
    checker.check(given, ours)
    values = {**from_metadata, **from_environ, **flags}
    sources = dict.fromkeys(from_metadata, "metadata") | dict.fromkeys(from_environ, "environment")
    return values, sources | dict.fromkeys(flags, "flag"), notes


def _check_kind(place: str, key: str, value: str) -> None:
    kinds = _KINDS.get(key)
    if kinds is not None and not value.startswith(kinds):
        raise UsageError(f"{place}: {shown(value)!r} is of an unknown kind", f"it begins with {', '.join(kinds)}")


def shown(value: str) -> str:
    """A value without the password that may be in it."""
    return _PASSWORD.sub(lambda match: match[0].rpartition(":")[0] + ":...@", value)


# the file


def keys_of(text: str) -> dict[str, str]:
    """The keys of a settings file before its first table, with what stands behind the `=`."""
    return {match["key"]: match["value"].strip() for line in _head(text) if (match := _KEY.fullmatch(line))}


def merge(text: str, wanted: Mapping[str, str], gone: tuple[str, ...] = ()) -> str:
    """The file with some keys set, and those of `gone` taken out; all other lines as they were.

    NodeError for a key whose value has several lines: that is left to people.
    """
    lines, head = text.splitlines(keepends=True), _head(text)
    rest = lines[len(head) :]
    done, kept = set(), []
    for line in head:
        match = _KEY.fullmatch(line.rstrip("\n"))
        key = match["key"] if match else ""
        if match and (key in wanted or key in gone):
            if _goes_on(match["value"]):
                raise NodeError(f"{FILE}: {key} has several lines", "set it there by hand")
            if key in gone or key in done:
                continue
            done.add(key)
            line = _line(key, wanted[key])  # noqa: PLW2901 - the line that takes its place
        kept.append(line)
    new = [_line(key, value) for key, value in wanted.items() if key not in done]
    if new and kept and not kept[-1].endswith("\n"):
        kept[-1] += "\n"
    if not text:
        return HEADER + "".join(new)
    # First of all, so that no unfinished value before them can swallow them.
    return "".join((*new, *kept, *rest))


def _line(key: str, value: str) -> str:
    # A JSON text is a TOML text, but for what lies beyond the first plane, which is written as it is.
    return f"{key} = {json.dumps(value, ensure_ascii=False)}\n".replace("\x7f", "\\u007f")


def _goes_on(value: str) -> bool:
    text = value.partition("#")[0].strip()
    if text.startswith(("'''", '"""')):
        return len(text) < 6 or not text.endswith(text[:3])
    return text.startswith("[") and text.count("[") != text.count("]")


def _head(text: str) -> list[str]:
    """The lines before the first table."""
    head, inside = [], 0
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if inside <= 0 and bare.startswith("["):
            break
        if inside > 0 or "=" in bare:
            value = bare if inside > 0 else bare.partition("=")[2]
            inside += _brackets(value)
        head.append(line)
    return head


def _brackets(text: str) -> int:
    """How many lists are left open, texts and comments aside."""
    bare = re.sub(r'"(?:\\.|[^"\\])*"|\'[^\']*\'', "", text).partition("#")[0]
    return bare.count("[") - bare.count("]")


def mode_for(text: str) -> int:
    """What may be read by all may hold no password."""
    if _PASSWORD.search(text):
        return 0o600
    return FILE.stat().st_mode & 0o7777 if FILE.exists() else 0o644


# instance metadata


def on_google() -> bool:
    """Whether there is a metadata server to ask."""
    product = read(Path("/sys/class/dmi/id/product_name"))
    return bool(os.environ.get(_HOST_VARIABLE)) or product.strip() == "Google Compute Engine"


def platform_takes_disks(attributes: Mapping[str, str]) -> bool:
    """Whether empty local disks may be GKE's own, which makes file systems on them only after our unit has run.

    Those of --local-nvme-ssd-block are the node's users': GKE puts this label on such nodes.
    """
    of_gke = "kube-labels" in attributes or "kube-env" in attributes
    return of_gke and "cloud.google.com/gke-local-nvme-ssd=true" not in attributes.get("kube-labels", "").split(",")


def metadata(attempts: int = 3) -> dict[str, str]:
    """The instance's attributes; none where this is no machine of Google's. NodeError when they cannot be had."""
    if not on_google():
        return {}
    host = os.environ.get(_HOST_VARIABLE) or _HOST
    url = f"http://{host}/computeMetadata/v1/instance/attributes/?recursive=true"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is reached directly or not at all
    problem: Exception | None = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(2**attempt)
        try:
            with opener.open(request, timeout=_SECONDS) as answer:
                if answer.headers.get("Metadata-Flavor") != "Google":
                    raise NodeError(f"{host} is no metadata server of Google's", f"check {_HOST_VARIABLE}")
                found = json.loads(answer.read())
                return {str(key): str(value) for key, value in found.items() if isinstance(value, str)}
        except (OSError, ValueError, AttributeError) as error:
            problem = error
    raise NodeError(
        f"the metadata server {host} does not answer: {problem}",
        "see whether the machine may reach it, then run this again",
    )
