"""Profiles in a store that is shared, damaged, newer, or not this node's to write."""

import logging
import threading

import pytest
from support.stores import CountdownFailureStore, StoreWrapper

from floe.store import layout
from floe.store import profiles as module
from floe.store.catalog import Catalog
from floe.store.errors import AccessDeniedError, ConflictError, UnavailableError
from floe.store.index import NullIndex
from floe.store.objects.memory import MemoryStore
from floe.store.profile import Profile, Touch
from floe.store.profiles import ProfileStore, layer_source, model_source

TREE, OTHER = "a" * 64, "b" * 64
KEY, SOURCE = layout.tree_profile_key(TREE), layout.source_profile_key("models/m")


def recording(*numbers, path=b"file"):
    return Profile(1, frames={(0, n): Touch(n, 1) for n in numbers}, pieces={(path, n): Touch(n, 1) for n in numbers})


@pytest.fixture
def store():
    made = MemoryStore()
    Catalog(made, NullIndex()).ensure_store()
    return made


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.001)


def profiles(store):
    return ProfileStore(Catalog(store, NullIndex()))


def test_there_is_none_before_the_first_start(store):
    assert profiles(store).of_tree(TREE) is None
    profiles(store).seed(TREE, "models/m")
    assert profiles(store).of_tree(TREE) == Profile(source="models/m")
    assert profiles(store).of_source("models/m") is None


def test_a_recording_reaches_the_tree_and_its_source(store):
    found = profiles(store)
    found.seed(TREE, "models/m", b"opt/m/")
    assert found.add(TREE, recording(1, 2, path=b"opt/m/file"))
    assert found.of_tree(TREE).hot_frames() == [(0, 1), (0, 2)]
    of_source = found.of_source("models/m")
    assert of_source.hot_pieces() == [(b"file", 1), (b"file", 2)]
    assert (of_source.frames, of_source.source, of_source.prefix) == ({}, "models/m", b"")


def test_a_tree_without_a_source_has_a_profile_of_its_own(store):
    assert profiles(store).add(TREE, recording(1))
    assert profiles(store).of_tree(TREE).starts == 1
    assert [info.key for info in store.list("profiles")] == [KEY]


def test_nodes_that_finish_at_once_lose_nothing(store):
    nodes = 12
    profiles(store).seed(TREE, "models/m")
    barrier = threading.Barrier(nodes)
    errors = []

    class Together(StoreWrapper):
        """The first look of every node sees the same."""

        first = True

        def get_versioned(self, key):
            found = super().get_versioned(key)
            if self.first:
                self.first = False
                barrier.wait(20)
            return found

    def node(number):
        try:
            profiles(Together(store)).add(TREE, recording(number, 100 + number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=node, args=(number,)) for number in range(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    found = profiles(store).of_tree(TREE)
    assert found.starts == nodes
    assert set(found.frames) == {(0, n) for number in range(nodes) for n in (number, 100 + number)}
    of_source = profiles(store).of_source("models/m")
    assert of_source.starts == nodes
    assert len(of_source.pieces) == 2 * nodes


def test_what_is_known_is_not_written_again(store):
    found = profiles(store)
    for _ in range(3):
        assert found.add(TREE, recording(1, 2))
    version = store.head(KEY).version
    assert not found.add(TREE, recording(1, 2))
    assert store.head(KEY).version == version


def test_a_put_whose_answer_is_lost_leaves_a_whole_profile(store):
    failing = CountdownFailureStore(store, fail_put_after={1: UnavailableError("the answer was lost")})
    with pytest.raises(UnavailableError):
        profiles(failing).add(TREE, recording(1))
    assert profiles(store).of_tree(TREE).starts == 1


def test_a_store_that_changes_all_the_time_is_given_up(store):
    class Busy(StoreWrapper):
        def put_if(self, key, data, version):
            raise ConflictError("somebody else was faster")

    with pytest.raises(ConflictError, match=KEY):
        profiles(Busy(store)).add(TREE, recording(1))


@pytest.mark.parametrize("data", [b"", b"no profile at all", recording(1).encode()[:-3]])
def test_a_damaged_one_is_passed_over_and_replaced(store, data, caplog):
    store.put(KEY, data)
    found = profiles(store)
    with caplog.at_level(logging.WARNING):
        assert found.of_tree(TREE) is None
    assert KEY in caplog.text
    assert found.add(TREE, recording(5))
    assert found.of_tree(TREE).hot_frames() == [(0, 5)]


def test_one_of_a_newer_floe_is_passed_over_and_left_alone(store):
    data = bytearray(recording(1).encode())
    data[8] = 2
    store.put(KEY, bytes(data))
    found = profiles(store)
    assert found.of_tree(TREE) is None
    assert not found.add(TREE, recording(5))
    assert bytes(store.get(KEY)) == bytes(data)


def test_a_node_without_permission_is_told(store):
    denied = CountdownFailureStore(store, fail_put={1: AccessDeniedError("not yours")})
    with pytest.raises(AccessDeniedError):
        profiles(denied).add(TREE, recording(1))


def test_a_push_never_fails_for_a_profile(store):
    for error in (AccessDeniedError("no"), UnavailableError("away"), ConflictError("there")):
        profiles(CountdownFailureStore(store, fail_put={1: error})).seed(TREE, "models/m")
    assert profiles(store).of_tree(TREE) is None


def test_the_source_is_said_once(store):
    found = profiles(store)
    found.seed(TREE, "models/m")
    found.add(TREE, recording(1))
    found.seed(TREE, "models/other")
    assert found.of_tree(TREE) == Profile(1, "models/m", b"", recording(1).frames, recording(1).pieces)


def test_clearing_keeps_the_source_and_nothing_else(store):
    found = profiles(store)
    found.seed(TREE, "models/m")
    assert not found.clear(TREE)
    found.add(TREE, recording(1))
    assert found.clear(TREE)
    assert found.of_tree(TREE) == Profile(source="models/m")
    assert found.of_source("models/m") is None
    assert not found.clear(OTHER)
    store.put(KEY, b"damaged")
    assert found.clear(TREE)
    assert found.of_tree(TREE) is None


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("docker.io/library/app:v1", "images/docker.io/library/app@linux/amd64#2"),
        ("localhost:5000/app:v1@sha256:" + "0" * 64, "images/localhost:5000/app@linux/amd64#2"),
        ("localhost:5000/app", "images/localhost:5000/app@linux/amd64#2"),
        ("oci:/srv/images/app:v1", "images/oci:/srv/images/app@linux/amd64#2"),
        ("oci:/srv/images/app", "images/oci:/srv/images/app@linux/amd64#2"),
    ],
)
def test_versions_of_an_image_share_their_layers_sources(image, source):
    assert layer_source(image, "linux/amd64", 2) == source
    assert model_source("org/llama") == "models/org/llama"
