"""A start out of the events of a node's daemons, as text and as a page."""

import json
import random
import re
from html.parser import HTMLParser

import pytest

from floe.cli import live, trace
from floe.cli.settings import Settings
from floe.cli.timeline import Start, starts, timeline
from floe.cli.trace_page import page
from floe.store.errors import BadInputError, NotFoundError
from floe.store.eventlog import FOLDER

TREE, OTHER = "a" * 64, "b" * 64
PACK = "c" * 64
NAME = "registry.example/app:1"
KEY = "k8s.io/12/0123456789abcdef"


def event(at, kind, **fields):
    return {"at": at, "by": "test", "kind": kind, **fields}


def prepare(at, chain, seconds, **fields):
    return event(at, "prepare", chain=f"sha256:{chain}", seconds=seconds, **fields)


def stall(at, seconds, offset=0, cause="store", pack=PACK, **fields):
    return event(at, "stall", pack=pack, offset=offset, bytes=4096, seconds=seconds, cause=cause, detail="", **fields)


EVENTS = [
    event(1.0, "worker", pid=7, version="1"),
    prepare(10.0, "1" * 64, 0.2, outcome="lazy", tree=TREE, image=NAME, look_up_seconds=0.15, mount_seconds=0.04),
    event(10.1, "mounted", tree=TREE, packs=1),
    event(10.2, "replay", tree=TREE, frames=40),
    prepare(10.3, "2" * 64, 1.2, outcome="unpacked", image=NAME, reason="timeout", detail="too late"),
    prepare(11.0, "3" * 64, 0.1, outcome="lazy", tree=OTHER, image="another:1"),
    event(12.0, "prepare", key=KEY, outcome="container", seconds=0.05, trees=[TREE], image=NAME),
    event(12.05, "begun", key=KEY, name=NAME, trees=[TREE]),
    stall(12.5, 0.3, offset=8192, reads=3),
    stall(12.6, 0.1, offset=0, cause="read_ahead"),
    stall(12.7, 5.0, pack="d" * 64),  # of somebody else
    event(13.0, "worker", pid=8, version="1"),
    event(
        12.05, "start", key=KEY, name=NAME, trees=[TREE], first_read=0.3, last_read=2.0, reads=9, bytes=36864,
        meanwhile={"store_requests": 4},
    ),
    event(22.0, "prefetch", tree=TREE, used=30, unused=10, read=33),
    stall(30.0, 0.2),  # long after it
]  # fmt: skip


@pytest.fixture
def found():
    (start,) = starts(EVENTS)
    asked = []

    def files(places):
        asked.extend(places)
        return [["bin/app", "bin/other"] if offset else [] for _, offset, _ in places]

    made = timeline(EVENTS, start, {PACK: TREE}, files)
    assert asked == [(PACK, 8192, 4096), (PACK, 0, 4096)]
    return made


def test_all_that_belongs_to_a_start_is_there_in_order_and_nothing_else(found):
    assert (found.start.key, found.start.name, found.start.id) == (KEY, NAME, "0123456789abcdef")
    assert [(round(span.at, 2), span.kind) for span in found.spans] == [
        (0.0, "pull"), (0.0, "layer"), (0.1, "mount"), (0.2, "prefetch"), (0.3, "layer"), (2.0, "container"),
        (2.35, "first read"), (2.5, "stall"), (2.6, "stall"), (3.0, "worker"), (4.05, "last new read"), (4.55, "prefetch"),
    ]  # fmt: skip
    pull, lazy, *_ = found.spans
    assert pull.seconds == pytest.approx(1.5)
    assert lazy.detail == "look up 0.150 s, mount 0.040 s"
    unpacked = found.spans[4]
    assert (unpacked.what, unpacked.detail) == ("layer 222222222222 unpacked", "timeout, too late")
    assert found.spans[-1].what == f"of tree {TREE[:12]}: 30 frames hit, 3 missed, 10 fetched in vain"


def test_stalls_name_file_cause_bytes_and_the_time_in_which_anybody_waited(found):
    worst, second = found.stalls
    assert (worst.file, worst.cause, worst.bytes, worst.seconds) == ("bin/app", "store", 4096, 0.3)
    assert worst.what == "bin/app, and 1 files beside it"
    assert worst.detail == "3 reads"
    assert (second.file, second.what) == (None, f"pack {PACK[:12]} at 0")
    assert found.waited == pytest.approx(0.3)
    shown = found.encode()
    assert (shown["stalls"], shown["stall_seconds"], shown["over"]) == (2, pytest.approx(0.3), True)
    assert shown["events"][7]["file"] == "bin/app"


def test_reads_are_counted_from_the_end_of_a_prepare_that_took_long():
    events = [
        event(100.0, "prepare", key=KEY, outcome="container", seconds=5.0, trees=[TREE], image=NAME),
        event(104.9, "mounted", tree=TREE, packs=1),
        event(105.0, "start", key=KEY, name=NAME, trees=[TREE], first_read=1.0, last_read=3.0, reads=5, bytes=10),
        event(105.001, "begun", key=KEY, name=NAME, trees=[TREE]),
        stall(106.0, 1.9),  # later than `last_read` after Prepare's beginning
        stall(108.6, 0.1),  # after the start
    ]
    (start,) = starts(events)
    assert start.at == 100.0
    made = timeline(events, start, {PACK: TREE}, lambda places: [["file"] for _ in places])
    assert [(span.at, span.kind) for span in made.spans] == [
        (0.0, "container"), (4.9, "mount"), (6.0, "stall"), (6.0, "first read"), (8.0, "last new read"),
    ]  # fmt: skip


def test_a_start_whose_end_nobody_saw_and_a_mount_without_snapshotter():
    events = [
        event(5.0, "mounted", tree=TREE, packs=1),
        event(6.0, "begun", key="/mnt", name="iris:1", trees=[TREE]),
        stall(50.0, 1.0),
        stall(500.0, 1.0),
    ]
    (start,) = starts(events)
    assert (start, start.id) == (Start("/mnt", "iris:1", (TREE,), 6.0), "/mnt")
    made = timeline(events, start, {PACK: TREE}, lambda places: [[] for _ in places])
    assert [span.kind for span in made.spans] == ["mount", "container", "stall"]
    assert not made.encode()["over"]


def test_a_container_that_starts_again_has_starts_of_its_own():
    events = [event(at, kind, key=KEY, name=NAME, trees=[TREE]) for at in (10.0, 500.0) for kind in ("begun", "begun")]
    assert [one.at for one in starts(events)] == [10.0, 500.0]


def by_looking_at_all(events):
    """The rule, by looking for each event at all starts before it."""
    found = []
    for one in events:
        end = one if one["kind"] == "start" else None
        near = [n for n, other in enumerate(found) if other.key == one["key"] and one["at"] - other.at < 60]
        if one["kind"] == "prepare" or not near:
            found.append(Start(one["key"], one["name"], tuple(one["trees"]), one["at"], end))
        elif end is not None or not found[near[-1]].name:
            before = found[near[-1]]
            found[near[-1]] = Start(before.key, before.name or one["name"], before.trees, before.at, end or before.end)
    return sorted(found, key=lambda one: one.at)


@pytest.mark.parametrize("seed", range(20))
def test_events_of_a_key_belong_to_its_latest_start_however_many_there_are(seed):
    chance = random.Random(seed)
    times = sorted(chance.choice((chance.uniform(0, 2000), 60.0 * chance.randrange(30))) for _ in range(300))
    events = [
        event(at, chance.choice(("prepare", "begun", "start")), outcome="container", trees=[TREE])
        | {"key": f"k8s.io/{chance.randrange(6)}", "name": chance.choice(("", NAME))}
        for at in times
    ]
    assert starts(events) == by_looking_at_all(events)


def test_each_event_is_compared_with_one_start_at_most():
    compared = []

    class Key(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

        def __str__(self):
            return self

    events = [event(float(n), "begun", key=Key(f"k8s.io/{n}"), name=NAME, trees=[TREE]) for n in range(2000)]
    assert len(starts(events)) == 2000
    assert len(compared) <= 2000


def test_starts_are_made_anew_when_events_are_new_and_not_for_each_look(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(live, "starts", lambda events: made.append(len(events)) or starts(events))
    (tmp_path / FOLDER).mkdir()
    log = tmp_path / FOLDER / "packfs.jsonl"
    log.write_text(json.dumps(event(6.0, "begun", key="/mnt", name="iris:1", trees=[TREE])) + "\n")
    node = live.Live(
        Settings(run_dir=tmp_path, cache_dir=tmp_path / "cache", store=f"file://{tmp_path}/store", index="none")
    )
    for _ in range(3):
        assert node.start("/mnt", 6.0)[1] == Start("/mnt", "iris:1", (TREE,), 6.0)
        assert [one["key"] for one in node.sample()["starts"]] == ["/mnt"]
    with log.open("a") as file:
        file.write(json.dumps(event(700.0, "begun", key="/mnt", name="iris:1", trees=[TREE])) + "\n")
    assert [one["at"] for one in node.sample()["starts"]] == [700.0, 6.0]
    assert made == [1, 2]


@pytest.mark.parametrize(
    "what", [KEY, "0123456789abcdef", "0123", NAME, "registry.example/app:1"]
)  # the whole key, the id, its beginning, the image
def test_a_start_is_found_by(what):
    known = [Start(KEY, NAME, (TREE,), 1.0), Start("k8s.io/13/ffff", "other:1", (OTHER,), 2.0)]
    assert trace._choose(what, known, None).key == KEY


def test_the_latest_start_counts_and_beginnings_that_several_have_are_refused(monkeypatch):
    known = [Start(f"k8s.io/{n}/abcd{n}", NAME, (TREE,), float(n)) for n in range(3)]
    assert trace._choose(NAME, known, None).at == 2.0
    with pytest.raises(BadInputError, match="abcd0, abcd1, abcd2"):
        trace._choose("abcd", known, None)
    monkeypatch.setattr(trace, "_trees", lambda what, _settings: {TREE} if what == "model" else set())
    assert trace._choose("model", known, None).at == 2.0
    with pytest.raises(NotFoundError):
        trace._choose("abc", known, None)


class Page(HTMLParser):
    """Tags that are open, and what refers to the outside."""

    def __init__(self, text):
        super().__init__()
        self.open, self.outside = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href")]
        assert tag not in ("script", "link", "img", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_needs_nothing_and_believes_no_name(found):
    evil = found.spans[7]._replace(what="<script>alert(1)</script>", file="x")
    text = page(found.__class__(found.start, found.began, found.seconds, (*found.spans, evil), found.meanwhile))
    parsed = Page(text)
    assert (parsed.open, parsed.outside) == ([], [])
    assert "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text
    for left, width in re.findall(r'x="([\d.]+)" y="1" width="([\d.]+)"', text):
        assert float(left) + float(width) <= 100.01
    assert text.count("<rect ") == len(found.spans) + 1
    assert text.count('class="bar stall"') == 3
    assert "bin/app" in text


def test_what_the_container_itself_did_is_shown_where_it_is_told_of():
    told = [
        event(12.4, "running", key=KEY),
        event(14.5, "output", key=KEY, stream="stderr"),
        event(12.5, "output", key="k8s.io/13/another", stream="stdout"),
    ]
    (start,) = starts(EVENTS)
    made = timeline([*EVENTS, *told], start, {}, lambda _places: [])
    found = [(span.at, span.kind, span.what) for span in made.spans if span.kind in ("running", "first output")]
    assert found == [
        (2.4, "running", "containerd says that it runs"),
        (4.5, "first output", "the first line on stderr"),
    ]
    # What it prints hours later is no part of the start.
    late = timeline([*EVENTS, event(9000.0, "output", key=KEY, stream="stdout")], start, {}, lambda _places: [])
    assert late.spans == timeline(EVENTS, start, {}, lambda _places: []).spans


def test_a_bar_lies_where_the_span_does(found):
    whole = found.seconds
    bars = [trace.bar(span, whole) for span in found.spans]
    assert all(len(bar) == 30 for bar in bars)
    assert bars[0].startswith("#")
    assert bars[-1].endswith("|")


def test_a_pull_of_hours_ago_is_no_part_of_the_start_and_neither_is_a_stall_after_it():
    events = [
        prepare(10.0, "1" * 64, 0.2, outcome="lazy", tree=TREE, image=NAME),
        event(9000.0, "prepare", key=KEY, outcome="container", seconds=0.05, trees=[TREE], image=NAME),
        event(
            9000.0, "start", key=KEY, name=NAME, trees=[TREE], first_read=0.3, last_read=2.0, reads=9, bytes=1
        ),
        stall(9001.0, 0.1),
        stall(9003.0, 0.1),
    ]  # fmt: skip
    (start,) = starts(events)
    made = timeline(events, start, {PACK: TREE}, lambda places: [[] for _ in places])
    assert [span.kind for span in made.spans] == ["container", "first read", "stall", "last new read"]
