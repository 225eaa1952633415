"""`floe model profile` and `floe image profile`: what the start-up profiles of trees say, and taking them away."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from floe.cli import output
from floe.cli.options import Commands, add_command, add_json
from floe.cli.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from floe.store.profiles import ProfileStore
    from floe.store.records import PackEntry

_SHOWN = 20  # files, for people


def add_profile(
    below: Commands, what: str, run: Callable[[argparse.Namespace], int], *, name: str, metavar: str, text: str
) -> None:
    """Add `profile` to the commands of a noun; `what` says whose, the rest describes its argument."""
    parser = add_command(below, "profile", f"Show what is read first of {what}, and replayed at its next start.", run)
    parser.add_argument(name, metavar=metavar, help=text)
    parser.add_argument(
        "--clear",
        action="store_true",
        help="forget it, and what its predecessors recorded; the next start records anew",
    )
    add_json(parser)


def describe(profiles: ProfileStore, tree: str, packs: Sequence[PackEntry]) -> dict[str, Any]:
    """A tree's profile as --json shows it; sizes in bytes, times in ms from the tree's first read. Files in order of need."""
    from floe.store.profile import Profile  # noqa: PLC0415 - lazy: keeps --help fast

    profile = profiles.of_tree(tree) or Profile()
    of_source = profiles.of_source(profile.source) if profile.source else None
    files: dict[bytes, dict[str, Any]] = {}
    for path, number in profile.hot_pieces():
        touch = profile.pieces[path, number]
        file = files.setdefault(path, {"path": _text(path), "pieces": 0, "first_ms": touch.first, "starts": 0})
        file["pieces"] += 1
        file["starts"] = max(file["starts"], touch.starts)
    hot = profile.hot_frames()
    return {
        "tree": tree,
        "starts": profile.starts,
        "source": profile.source or None,
        "prefix": _text(profile.prefix),
        "source_starts": of_source.starts if of_source is not None else 0,
        "frames": len(hot),
        "frame_bytes": sum(packs[pack].frame_size for pack, _ in hot if pack < len(packs)),
        "files": list(files.values()),
    }


def show(found: dict[str, Any]) -> None:
    """One profile for people."""
    known = f"{found['starts']} start{'' if found['starts'] == 1 else 's'} recorded"
    source = f"{found['source']} ({found['source_starts']} recorded)" if found["source"] else "none"
    output.pairs(
        (
            ("tree", found["tree"]),
            ("profile", known if found["starts"] else "none yet"),
            ("versions", source),
            ("replayed", f"{found['frames']} frames ({format_size(found['frame_bytes'])})"),
            ("files", str(len(found["files"]))),
        )
    )
    if found["files"]:
        output.line()
        output.table(("FIRST", "STARTS", "PIECES", "PATH"), (_row(file) for file in found["files"][:_SHOWN]))
    if len(found["files"]) > _SHOWN:
        output.note(f"and {len(found['files']) - _SHOWN} files more; --json lists all")


def _row(file: dict[str, Any]) -> tuple[str, ...]:
    return f"{file['first_ms'] / 1000:.3f} s", str(file["starts"]), str(file["pieces"]), file["path"]


def _text(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
