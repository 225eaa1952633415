"""The documentation against the code: tables, commands, test names, links. Reads files, nothing else."""

import ast
import errno
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import redis_server

from floe.agent.daemon import agent_metrics
from floe.cli import packfs_metrics, settings
from floe.cli.completion import words_of
from floe.cli.main import build_parser
from floe.cli.options import SIGNING
from floe.csi import daemon as csi_daemon
from floe.fuse.errno_map import ERRNO
from floe.indexer import metrics as indexer_metrics
from floe.indexer.worker import BECAME
from floe.ingest.oci import layers, links, media, taken, tarheader, tarstream
from floe.snapshotter import daemon, resolver, snapshotter
from floe.store import erofs, errorkinds, fields, jsontext, nodes, packindex, profile, treeobject, waits
from floe.store.objects import check, gcs_address, keys, s3_address

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs/OPERATIONS.md").read_text()
SEMANTICS = (ROOT / "docs/SEMANTICS.md").read_text()
# Settings whose default is another setting's value and more: as the table writes it.
DERIVED = {
    "spool_dir": ("CACHE_DIR/spool", lambda made: made.spool),
    "address": ("RUN_DIR/snapshotter.sock", lambda made: made.socket),
    "packfs_metrics": ("unix:RUN_DIR/packfs-metrics.sock", lambda made: made.metrics("packfs")),
    "agent_metrics": ("unix:RUN_DIR/agent-metrics.sock", lambda made: made.metrics("agent")),
    "snapshotter_metrics": ("unix:RUN_DIR/snapshotter-metrics.sock", lambda made: made.metrics("snapshotter")),
    "csi_metrics": ("unix:RUN_DIR/csi-metrics.sock", lambda made: made.metrics("csi")),
}


def rows(text, header):
    """The rows of the table whose first row begins with `header`, as lists of cells."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {header} |"):
            break
    else:
        pytest.fail(f"no table begins with {header!r}")
    assert set(next(lines)) <= set("|- ")
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def code(cell):
    """The words in backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def column(text, header):
    return [word for row in rows(text, header) for word in code(row[0])]


# What the last column of the settings' table calls commands, where it is not their last word.
COMMANDS = {
    "mount": ("model mount",),
    "show": ("model show", "image show"),
    "containerd": ("containerd configure",),
    "detach and weights": ("image detach", "image weights"),
    "reading": ("packfs", "model mount", "bench", "model export"),
    # Of publishing commands each takes what it needs of the others, but all sign.
    "publishing": (
        *("model push", "model publish", "model copy", "model tag", "model sign", "image index", "image attach"),
        *("image detach", "image sign", "bento push", "bento image", "indexer", "seed"),
    ),
}


def test_the_flag_of_a_setting_may_follow_each_command_that_the_table_names():
    tree = {command: {word.text for word in words} for command, words in words_of(build_parser()).items()}
    by_word = {command.rpartition(" ")[2]: (command,) for command in tree if not command.startswith("image ")}
    everywhere = ("all", "all but packfs, bench", "all but bench", "commands, packfs")
    for row in rows(OPERATIONS, "key"):
        (key,), users = code(row[0]), row[3]
        for name in [] if users in everywhere else users.split(", "):
            if name == "publishing" and key not in SIGNING:
                continue
            for command in COMMANDS.get(name) or by_word.get(name) or (name if name in tree else f"image {name}",):
                assert f"--{settings.flag_name(key)}" in tree[command], (key, command)


def test_the_table_of_settings_is_whole_and_its_defaults_are_the_code_s():
    table = {code(row[0])[0]: row[1] for row in rows(OPERATIONS, "key")}
    assert list(table) == list(settings.KEYS)
    built_in = settings.Settings()
    assert table.pop("workers") == "CPUs, at most 8"
    assert table.pop("node_name") == "the host's name"
    assert built_in.node_name is None
    for key, cell in table.items():
        (written,) = code(cell)
        if key in DERIVED:
            shown, of = DERIVED[key]
            assert written == shown
            expanded = shown.replace("CACHE_DIR", str(built_in.cache_dir)).replace("RUN_DIR", str(built_in.run_dir))
            assert str(of(built_in)) == expanded
        else:
            given = settings.load({key: written}, {}, config="")
            assert getattr(given, key) == getattr(built_in, key), key


def exported(metrics):
    return {
        metric.name + ("_total" if metric.kind == "counter" else ""): ", ".join(f"`{label}`" for label in metric.labels)
        for metric in metrics
    }


NESTED = ("read_seconds", "request_seconds", "store_errors", "seconds", "last")


class Everything(dict):
    """A status that lacks no figure."""

    def __contains__(self, _):
        return True

    def __missing__(self, key):
        return Everything() if key in ("counters", "waits", "starts") else {} if key in NESTED else 0

    def get(self, key, _=None):
        return self[key]


def test_the_table_of_metrics_is_what_is_exported():
    figures = snapshotter.Figures({}, {}, "closed", 0, 0, {})
    driver = SimpleNamespace(counted=dict, restored={}, published=list)
    served = (
        exported(packfs_metrics.packfs_metrics(Everything()))
        | exported(daemon._exposition(SimpleNamespace(metrics=lambda: figures)))
        | exported(csi_daemon.exposition(driver, driver))
    )
    served |= exported(indexer_metrics.indexer_metrics({}, taken.TAKEN, None, 0.0))
    for name, known in (("floe_indexer_jobs_total", BECAME), ("floe_registry_requests_total", taken.CONTENTS)):
        (row,) = (row for row in rows(OPERATIONS, "metric") if code(row[0]) == [name])
        assert tuple(code(row[2])) == known
    counts = dict.fromkeys(("done", "failed", "refused"), 0)
    warming = SimpleNamespace(active=[], counts=counts)
    served |= exported(agent_metrics(SimpleNamespace(failures={"x": 0}), warming, 0.0))
    (row,) = (row for row in rows(OPERATIONS, "metric") if code(row[0]) == ["floe_agent_warm_ended_total"])
    assert code(row[2]) == list(counts)
    assert {code(row[0])[0]: row[1] for row in rows(OPERATIONS, "metric")} == served


def test_the_reasons_and_events_are_the_code_s():
    assert column(OPERATIONS, "reason") == list(resolver.REASONS)
    assert sorted(column(OPERATIONS, "event of packfs")) == sorted(packfs_metrics._EVENTS.values())
    assert column(OPERATIONS, "cause of a wait") == list(waits.CAUSES)
    (row,) = (row for row in rows(OPERATIONS, "metric") if code(row[0]) == ["floe_store_errors_total"])
    assert code(row[2]) == list(errorkinds.KINDS)
    counted = {
        call.args[0].value
        for name in ("snapshotter", "cleaning", "modelsahead")
        for call in ast.walk(ast.parse((ROOT / f"snapshotter/{name}.py").read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "_count"
    }
    (row,) = (row for row in rows(OPERATIONS, "metric") if code(row[0]) == ["floe_snapshotter_events_total"])
    assert set(code(row[2])) == counted == set(snapshotter.EVENTS)


def test_the_options_of_addresses_and_what_is_said_of_conditional_puts_are_the_code_s():
    assert column(OPERATIONS, "option of s3://") == list(s3_address._KNOWN)
    assert column(OPERATIONS, "option of gs://") == list(gcs_address._KNOWN)
    assert column(OPERATIONS, "conditional puts") == [check.HONOURED, check.COMPARED, check.IGNORED]


def test_every_line_of_the_containerd_files_is_explained():
    for path in sorted((ROOT / "install/containerd").glob("*.toml")):
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        keys = {match[1] for line in lines if (match := re.match(r"\s*(\w+) *=", line))} - {"version"}
        assert keys
        missing = {key for key in keys if not re.search(rf"`[^`]*\b{key}\b[^`]*`", OPERATIONS)}
        assert not missing, path.name


def test_every_setting_of_the_units_that_is_explained_is_there():
    text = "".join(path.read_text() for path in sorted((ROOT / "install/systemd").glob("*.service")))
    for row in rows(OPERATIONS, "line"):
        if not row[0].startswith("no "):
            for line in code(row[0]):
                assert line in text, line


def test_the_errno_table_is_the_code_s():
    table = {}
    for row in rows(SEMANTICS, "error"):
        table |= dict.fromkeys(code(row[0]), getattr(errno, code(row[1])[0]))
    assert table == {cls.__name__: number for cls, number in ERRNO.items()}


def names_in(path, known={}):  # noqa: B006 - each file is parsed once
    if path not in known:
        tree = ast.parse((ROOT / path).read_text())
        known[path] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return known[path]


def sections():
    """Headings of SEMANTICS.md below the title, with what follows each."""
    parts = re.split(r"^(##+ .*)$", SEMANTICS, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(("heading", "body"), sections(), ids=[heading.lstrip("# ") for heading, _ in sections()])
def test_every_promise_names_tests_that_exist(heading, body):
    named = [
        name
        for line in body.splitlines()
        if line.startswith("Test: ")
        for name in re.split(r",\s*", line.removeprefix("Test: "))
    ]
    assert named, f"{heading!r} has no line `Test: tests/...::test_name`"
    for name in named:
        path, _, function = name.strip("`").partition("::")
        assert re.fullmatch(r"tests/(\w+/)+test_\w+\.py", path), name
        assert (ROOT / path).is_file(), name
        assert function.startswith("test_"), name
        assert function in names_in(path), name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/adr/*.md"])
def test_relative_links_lead_somewhere(page):
    pages = sorted(ROOT.glob(page))
    assert pages
    for path in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if re.match(r"[a-z]+:|#", target):
                continue
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve()
            assert place.exists(), f"{path.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", place.read_text(), flags=re.MULTILINE)
                assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_every_part_of_operations_is_in_its_table_of_contents():
    contents, _, rest = OPERATIONS.partition("\n## ")
    headings = re.findall(r"^## (.*)$", "## " + rest, flags=re.MULTILINE)
    wanted = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert sorted(re.findall(r"\]\(#([^)]+)\)", contents)) == sorted(wanted)


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs/*.md"])
def test_commands_and_flags_in_the_texts_exist(page):
    """Those in backquotes, and those of examples: indented, or in a table's cell."""
    tree = words_of(build_parser())
    for path in sorted(ROOT.glob(page)):
        text = path.read_text()
        for command in re.findall(r"`(floe [a-z][^`]*)`", text) + re.findall(
            r"^ {4}(floe [^#\n]*)", text, flags=re.MULTILINE
        ):
            name, known, before = "", {word.text for word in tree[""]}, ""
            for word in re.findall(r"--?[a-z-]+|[^\s,;]+", command.removeprefix("floe ")):
                if f"{name} {word}".strip() in tree:
                    name = f"{name} {word}".strip()
                    known |= {word.text for word in tree[name]}
                elif word.startswith("--"):
                    assert word in known, f"{path.name}: {command}"
                elif not before.startswith("--"):  # else it may be the flag's value
                    assert name, f"{path.name}: {command}"
                    assert not any(longer.startswith(f"{name} ") for longer in tree), f"{path.name}: {command}"
                before = word


def test_files_named_in_the_texts_exist():
    for page in ("README.md", "CONTRIBUTING.md", "docs/OPERATIONS.md", "docs/SEMANTICS.md", "docs/FORMAT.md"):
        for name in re.findall(
            r"`((?:install|floe|fuse|snapshotter|protos|bench|tests|docs)/[\w./-]*)`", (ROOT / page).read_text()
        ):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_decisions_are_numbered_once_and_listed():
    folder = ROOT / "docs/adr"
    files = sorted(path.name for path in folder.glob("[0-9]*.md"))
    numbers = [name[:4] for name in files]
    assert numbers == [f"{number:04}" for number in range(1, len(files) + 1)]
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == files


def test_the_users_of_the_index_are_those_the_tests_run_with():
    lines = OPERATIONS.splitlines()
    for name, rules in redis_server.RULES.items():
        assert f"    user {name} {rules}" in lines


def test_the_table_of_bounds_is_the_code_s():
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

    def number(cell):
        amount, _, unit = code(cell)[0].partition(" ")
        return int(amount) * units.get(unit, 1)

    assert nodes.INODES_MAX == layers.INODES_MAX
    bounds = [
        nodes.INODES_MAX, treeobject.MAX_IMAGE, treeobject._RATIO, keys.WHOLE_MAX - 4096, erofs.MAX_DEVICES,
        packindex.MAX_CONTENT, packindex.MAX_FRAMES, packindex.MAX_FRAME, packindex.MAX_CHUNK, jsontext.BYTES_MAX,
        jsontext.DEPTH_MAX, fields.ITEMS_MAX, profile._BODY_MAX, profile.FRAMES_MAX, layers.CONTENT_MAX,
        layers.METADATA_MAX, layers.PATH_MAX, links.STEPS_MAX, tarstream._SPECIAL_MAX, tarheader.PLACES_MAX, media.MAX_MANIFEST,
        media.MAX_CONFIG,
    ]  # fmt: skip
    assert [number(row[1]) for row in rows(OPERATIONS, "bound")] == bounds
    assert treeobject._FREE == 64 << 20
