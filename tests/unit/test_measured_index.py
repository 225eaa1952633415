"""An index that is measured answers as the one inside, and says how it goes."""

import pytest

from floe.store.errors import UnavailableError
from floe.store.index.measured import MeasuredIndex
from floe.store.index.memory import MemoryIndex


class Refusing(MemoryIndex):
    def get_ref(self, key):
        raise UnavailableError(f"no answer for {key}")


def test_what_is_asked_is_answered_by_the_one_inside_and_counted():
    index = MeasuredIndex(MemoryIndex())
    index.bind("store")
    assert (index.status()["state"], sum(index.status()["seconds"]["counts"])) == ("unused", 0)
    index.put_ref("layers/a", b"1")
    assert index.get_ref("layers/a") == b"1"
    assert (index.url, index.pack_ids(), index.find_chunks([])) == (index.inner.url, set(), {})
    found = index.status()
    assert (found["state"], found["errors"], sum(found["seconds"]["counts"])) == ("ok", 0, 4)


def test_a_failure_passes_through_and_is_the_state_until_it_answers_again():
    index = MeasuredIndex(Refusing())
    index.bind("store")
    with pytest.raises(UnavailableError, match="layers/a"):
        index.get_ref("layers/a")
    assert (index.status()["state"], index.status()["errors"]) == ("failing", 1)
    index.put_ref("layers/a", b"1")
    assert (index.status()["state"], index.status()["errors"]) == ("ok", 1)
