"""Every input that fuzzing kept, and every one that was a finding once: each is refused or good, as ever."""

from __future__ import annotations

import pytest
from fuzz.runner import CORPUS, KEPT, KEPT_BYTES
from fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_holds(name):
    target = TARGETS[name]
    kept = sorted((CORPUS / name).glob("*"))
    assert kept
    for data in (*target.seeds(), *(path.read_bytes() for path in kept)):
        target.run(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_stays_small(name):
    files = [path for path in (CORPUS / name).glob("*") if not path.name.startswith("found-")]
    assert len(files) <= KEPT
    assert sum(path.stat().st_size for path in files) <= KEPT_BYTES


def test_no_corpus_is_left_over():
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)


def test_seeds_reach_what_is_meant():
    """A seed that is refused reaches nothing: of every target at least one is good."""
    for name, target in TARGETS.items():
        good = 0
        for seed in target.seeds():
            try:
                target.check(seed)
            except Exception:
                continue
            good += 1
        assert good, name
