"""Floe's keys put into configurations of any shape: no line is lost, nothing else changes, and undoing is exact."""

import copy
import sys
from collections import Counter
from pathlib import Path

import tomlkit
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from floe.containerd import document
from floe.containerd.imports import merge
from floe.containerd.version import Version
from floe.containerd.wanted import CRI, IMAGES, RUNTIME, UNPACK, Append, Request, Set, changes, holds, lookup, missing
from floe.store.errors import PreconditionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path("/config.toml")
KEYS = st.sampled_from(["a", "b-c", "d_e", '"x.y"', "'q\"q'", '"ü"'])
VALUES = st.sampled_from(
    ["1", "-0.5", "true", '"text"', "'lit'", '"""two\nlines = 1\n[no.table]\n"""', "[1, 2]", '[\n  "a", # one\n  "b",\n]', "{k = 1}",
     "1979-05-27T07:32:00Z", "'floe'"]
)  # fmt: skip
COMMENTS = st.sampled_from(["", " # why", "\t#snapshotter = 'x'"])
INDENTS = st.sampled_from(["", "  ", "\t"])
GAPS = st.sampled_from(["", "\n", "# a remark\n", "\n\n# [proxy_plugins.floe]\n", "  \n"])


def header(path):
    return ".".join(path if isinstance(path, tuple) else [path])


# Tables that a configuration may have, as a file writes their names; a table may stand above or below its parent.
QUOTED = [tuple(f'"{key}"' if "." in key else key for key in path) for path in (
    (*CRI, "containerd"), CRI, (*CRI, "containerd", "runtimes", "runc"), (*CRI, "containerd", "runtimes", "runc", "options"),
    IMAGES, RUNTIME, ("plugins", "io.containerd.transfer.v1.local"), (*IMAGES, "registry"),
    ("proxy_plugins",), ("proxy_plugins", "other"), ("proxy_plugins", "other", "exports"), ("plugins",), ("grpc",), ("metrics",),
    ("plugins", "io.containerd.gc.v1.scheduler"), ("timeouts",),
)]  # fmt: skip
OWN = {
    "snapshotter": ["'overlayfs'", '"gcfs"', '"floe"'],
    "discard_unpacked_layers": ["true", "false"],
    "disable_snapshot_annotations": ["true", "false"],
}


@st.composite
def lines(draw, *, own=False):
    found, names = "", set()
    for _ in range(draw(st.integers(0, 3))):
        name = draw(KEYS)
        if name not in names:
            names.add(name)
            found += f"{draw(GAPS)}{draw(INDENTS)}{name} = {draw(VALUES)}{draw(COMMENTS)}\n"
    if own:
        for name, values in OWN.items():
            if draw(st.booleans()):
                found += f"{draw(INDENTS)}{name}{draw(st.sampled_from(['=', ' = ']))}{draw(st.sampled_from(values))}{draw(COMMENTS)}\n"
    return found


@st.composite
def configs(draw):
    """A valid file of version 2 or 3, and that version."""
    version = draw(st.sampled_from([2, 3]))
    text = draw(GAPS) + f"version = {version}\n" + draw(lines())
    for path in draw(st.permutations(QUOTED).flatmap(lambda all_: st.integers(0, 8).map(lambda n: all_[:n]))):
        text += draw(GAPS) + f"{draw(INDENTS)}[{header(path)}]{draw(COMMENTS)}\n"
        if path != ("plugins",) and path != ("proxy_plugins",):
            text += draw(lines(own=path[-1] in ("containerd", '"io.containerd.cri.v1.images"')))
    if draw(st.booleans()):
        text += '[[plugins."io.containerd.transfer.v1.local".unpack_config]]\nplatform = "linux/amd64"\nsnapshotter = "other"\n'
    if draw(st.booleans()):
        text = text.rstrip("\n")
    if draw(st.booleans()) and draw(st.booleans()):
        text = text.replace("\n", "\r\n")
    try:
        config = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assume(False)
    return text, version, config


def request(version, runtime):
    return Request(
        Version(2, 1) if version == 3 else Version(1, 7), Path("/run/f.sock"), Path("/var/f"), runtime, "x86_64"
    )


SETTINGS = settings(
    max_examples=60,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@SETTINGS
@given(configs(), st.sampled_from([None, "runc-floe"]))
def test_no_line_is_lost_nothing_else_changes_and_undoing_is_exact(made, runtime):
    text, version, config = made
    wanted = changes(request(version, runtime), version, config)
    own = missing(wanted, config)
    edited, blocks = document.apply(text, own, FILE)
    # What containerd reads: Floe's keys, and for the rest what was there.
    after = tomllib.loads(edited)
    assert all(holds(change, after) for change in wanted)
    assert after == document.expected(config, own)
    # Line by line: only those with a key whose value changed are others now.
    replaced = [change for change in own if isinstance(change, Set) and lookup(config, change.path) is not None]
    gone = Counter(text.splitlines()) - Counter(edited.splitlines())
    assert sum(gone.values()) <= len(replaced)
    assert all(any(change.path[-1] in line for change in replaced) for line in gone)
    # A second time there is nothing to do.
    assert missing(wanted, after) == []
    # Without the backup: the keys are taken out one by one.
    old = [(change, lookup(config, change.path) if isinstance(change, Set) else None) for change in own]
    undone, left = document.take_out(edited, old, document.tables_made(config, own), blocks, FILE)
    assert left == []
    assert tomllib.loads(undone) == config
    lost = Counter(line.strip() for line in text.splitlines()) - Counter(line.strip() for line in undone.splitlines())
    assert all(not line or any(change.path[-1] in line for change in replaced) for line in lost)


def as_rewritten(table, path=()):
    """As programs write the file that they parsed: keys sorted, no comments, a heading for each table."""
    inner = [(key, value) for key, value in sorted(table.items()) if isinstance(value, dict)]
    lines = [tomlkit.dumps({key: value}) for key, value in sorted(table.items()) if not isinstance(value, dict)]
    return "".join(lines) + "".join(
        f"\n[{document.dotted((*path, key))}]\n{as_rewritten(value, (*path, key))}" for key, value in inner
    )


@SETTINGS
@given(
    configs(),
    st.sampled_from([None, "runc-floe"]),
    st.sampled_from(["", "[debug]\n  level = 'debug'\n", "# BEGIN\n[debug]\n"]),
)
def test_what_others_append_stays_and_what_they_rewrote_is_undone_too(made, runtime, tail):
    text, version, config = made
    own = missing(changes(request(version, runtime), version, config), config)
    edited, blocks = document.apply(text, own, FILE)
    assume(edited.endswith("\n"))
    old = [(change, lookup(config, change.path) if isinstance(change, Set) else None) for change in own]
    undo = [old, document.tables_made(config, own)]
    undone, left = document.take_out(edited + tail, *undo, blocks, FILE)
    assert left == []
    assert tomllib.loads(undone) == {**config, **tomllib.loads(tail)}
    assert undone.endswith(tail)
    rewritten = as_rewritten(tomllib.loads(edited))
    # Entries of arrays are found where they were written, not elsewhere; nor does this write them.
    if not any(isinstance(change, Append) for change in own) and tomllib.loads(rewritten) == tomllib.loads(edited):
        undone, left = document.take_out(rewritten, *undo, blocks, FILE)
        assert left == []
        assert tomllib.loads(undone) == config


@SETTINGS
@given(configs(), configs(), st.booleans())
def test_imports_are_merged_and_change_neither_file(one, other, deep):
    main, more = copy.deepcopy(one[2]), copy.deepcopy(other[2])
    merge(main, more, deep=deep)
    assert more == other[2]
    for key, value in more.items():
        if not isinstance(value, dict):
            assert main[key] == value
    for name, table in more.get("plugins", {}).items():
        if not deep:
            assert main["plugins"][name] == table
        else:
            assert set(main["plugins"][name]) == set(table) | set(one[2].get("plugins", {}).get(name, {}))


INLINE = [
    'version = 2\nplugins = {"io.containerd.grpc.v1.cri" = {containerd = {snapshotter = "x"}}}\n',
    'version = 2\nplugins."io.containerd.grpc.v1.cri".containerd.snapshotter = "x" # mine\n',
    'version = 2\n[plugins]\n"io.containerd.grpc.v1.cri".containerd = {snapshotter = "x"}\n',
    "version = 2\nproxy_plugins = {}\n",
    'version = 2\nproxy_plugins.other.type = "snapshot"\n',
]


def test_inline_and_dotted_tables_are_edited_rightly_or_refused():
    done = 0
    for text in INLINE:
        config = tomllib.loads(text)
        own = missing(changes(request(2, None), 2, config), config)
        try:
            edited, _ = document.apply(text, own, FILE)
        except PreconditionError:
            continue
        else:
            done += 1
            assert tomllib.loads(edited) == document.expected(config, own)
    assert done >= 3


def test_entries_for_other_snapshotters_stay():
    text = f'version = 3\n[[{document.dotted(UNPACK)}]]\nplatform = "linux/amd64" # theirs\nsnapshotter = "overlayfs"\n'
    config = tomllib.loads(text)
    own = missing(changes(request(3, None), 3, config), config)
    edited, _ = document.apply(text, own, FILE)
    entries = lookup(tomllib.loads(edited), UNPACK)
    assert [entry["snapshotter"] for entry in entries] == ["overlayfs", "floe"]
    assert text.strip() in edited
