"""The worker's parts put together: what its store hides from the reader, and what it asks of the node."""

import resource

import pytest
from support.packs import make_pack, random_content
from support.reading import submit
from support.stores import UnreachableStore

from floe.cli import packfs_worker
from floe.cli.settings import load
from floe.store.errors import DeadlineError
from floe.store.objects.memory import MemoryStore
from floe.store.objects.retry import RetryingStore


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the worker with `serve(reader)` in place of the pack filesystem, over a store that nobody reaches."""

    def run(serve):
        settings = load(
            {"run_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "read_deadline": "1"}, {}
        )
        down = UnreachableStore(MemoryStore())
        monkeypatch.setattr(
            packfs_worker, "open_store", lambda _, *, retry=True: RetryingStore(down) if retry else down
        )
        monkeypatch.setattr(packfs_worker.worker, "run_worker", lambda _, reader, **_kept: serve(reader) or 0)
        assert packfs_worker.run_worker(settings) == 0

    return run


def test_a_deadline_far_below_a_minute_names_its_cause(run):
    pack = make_pack(random_content(1 << 20, 1))
    errors = []

    def serve(reader):
        reader._writer.cache.add_index(pack.id, pack.index.encode())
        errors.append(submit(reader, pack.id, 0, 100).wait())

    run(serve)
    assert isinstance(errors[0], DeadlineError)
    assert "cannot be reached" in str(errors[0])


def test_it_may_open_as_many_files_as_the_machine_allows(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        found = []
        run(lambda _: found.append(resource.getrlimit(resource.RLIMIT_NOFILE)))
        assert found == [(hard, hard)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
