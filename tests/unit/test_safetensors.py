"""Headers of .safetensors files: types that are not known, and what is hostile."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save

import floe
from floe.client import safetensors
from floe.client.safetensors import _DTYPES
from floe.store.errors import BadInputError, UnsupportedError


def made(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def opened(header, data=b""):
    return floe.SafeTensors(io.BytesIO(made(header, data)), "it")


def tensor(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_a_tensor_of_an_unknown_type_keeps_nobody_from_the_others():
    file = opened(
        {
            "w": tensor("F32", [2], 0, 8),
            "rope": tensor("C64", [1], 8, 16),
            "new": tensor("NEW1", [3, 5], 16, 21),
            "long": tensor("N" * 5000, [], 21, 21),
        },
        np.array([1, 2], "<f4").tobytes() + np.array([3 + 4j], "<c8").tobytes() + b"later",
    )
    assert file.keys() == ["w", "rope", "new", "long"]
    assert file.tensor("w").tolist() == [1, 2]
    assert (file.tensor("rope").dtype, file.tensor("rope").tolist()) == (np.complex64, [3 + 4j])
    assert (file.info("new").dtype, file.info("new").shape, bytes(file.read("new"))) == ("NEW1", (3, 5), b"later")
    for framework in ("numpy", "torch"):
        with pytest.raises(UnsupportedError, match="'new' in it is of type 'NEW1'") as refused:
            file.tensor("new", framework)
        assert "read()" in refused.value.hint
    with pytest.raises(UnsupportedError) as refused:
        file.tensor("long")
    assert len(str(refused.value)) < 1000


def test_what_the_library_writes_is_read():
    tensors = {"w": np.ones(3, "float32"), "rope": np.array([[1j, 2], [3, 4 - 1j]], "complex64")}
    file = floe.SafeTensors(io.BytesIO(save(tensors)))
    assert {name: value.tolist() for name, value in file.items()} == {n: t.tolist() for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", _DTYPES)
def test_every_type_has_the_size_that_the_library_gives_it(dtype):
    taken = []
    for size in range(1, 65):
        data = made({"a": tensor(dtype, [2, 4], 0, size)}, bytes(size))
        try:
            deserialize(data)
        except Exception:
            with pytest.raises(BadInputError):
                floe.SafeTensors(io.BytesIO(data))
            continue
        assert floe.SafeTensors(io.BytesIO(data)).read("a") == bytes(size)
        taken.append(size)
    assert taken == [_DTYPES[dtype][0]]  # eight elements


@pytest.mark.parametrize(("dtype", "count"), [("F4", 3), ("F6_E2M3", 2), ("F6_E3M2", 5)])
def test_elements_that_end_within_a_byte_are_refused(dtype, count):
    for size in range(5):
        with pytest.raises(BadInputError):
            opened({"a": tensor(dtype, [count], 0, size)}, bytes(size))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_elements_that_share_bytes_are_read_as_bytes(dtype):
    size = _DTYPES[dtype][0]
    file = opened({"a": tensor(dtype, [8], 0, size)}, bytes(range(size)))
    assert file.read("a") == bytes(range(size))
    for framework in ("numpy", "torch"):
        with pytest.raises(UnsupportedError, match=dtype) as refused:
            file.tensor("a", framework)
        assert refused.value.hint == "use read() for its bytes"


HOSTILE = {
    "shapes as long as the header": tensor("U8", [2**62 + 1] * 160_000, 0, 1),
    "as many zeros": tensor("U8", [0] * 65, 0, 0),
    "of an unknown type": tensor("NEW1", [1] * 65, 0, 1),
    "numbers as long as Python reads": tensor("U8", [int("9" * 4000)] * 64, 0, 1),
    "what wraps in 64 bits": tensor("U8", [2**32, 2**32, 2], 0, 0),
    "nothing, beside a size that no array has": tensor("U8", [0, 2**70], 0, 0),
    "nothing, of sizes that no array has together": tensor("F64", [2**31, 0, 2**31], 0, 0),
    "a place of long numbers": tensor("U8", [1], int("9" * 4000), int("9" * 4000) + 1),
    "a place of an unknown type beyond the file": tensor("NEW1", [1], 0, 9),
    "a place of an unknown type backwards": tensor("NEW1", [1], 1, 0),
    "no numbers": tensor("U8", ["1" * 5000] * 100, 0, 1),
    "numbers in lists of lists": tensor("U8", [[[["1" * 5000] * 9] * 9] * 9] * 9, 0, 1),
    "no name of a type": tensor(["U8"] * 5000, [1], 0, 1),
}


@pytest.mark.parametrize("why", HOSTILE)
def test_hostile_headers_are_refused_in_few_words(why, monkeypatch):
    """And with little work: no more than 64 numbers are multiplied."""
    bits, multiplied = safetensors._bits, []
    monkeypatch.setattr(safetensors, "_bits", lambda shape, dtype: multiplied.append(len(shape)) or bits(shape, dtype))
    with pytest.raises(BadInputError, match=r"it is no safetensors file.*tensor '(T|.{199})") as refused:
        opened({"T" * 5000: HOSTILE[why]}, b"x")
    assert len(str(refused.value)) < 3000
    assert max(multiplied, default=0) <= 64


def test_names_that_lie_over_each_other_are_cut():
    with pytest.raises(BadInputError, match="lies over another") as refused:
        opened({"a": tensor("U8", [2], 0, 2), "T" * 5000: tensor("U8", [2], 1, 3)}, b"xyz")
    assert len(str(refused.value)) < 1000


def test_as_many_dimensions_as_numpy_has():
    assert opened({"a": tensor("F32", [1] * 32, 0, 4)}, bytes(4)).tensor("a").shape == (1,) * 32
    assert opened({"a": tensor("U8", [0, 2**63 - 1], 0, 0)}).tensor("a").shape == (0, 2**63 - 1)


def test_a_numpy_that_has_fewer_dimensions_is_refused_in_our_words(monkeypatch):
    """numpy 1 has 32."""

    def reshape(shape):
        raise ValueError("maximum supported dimension for an ndarray is 32, found 64")

    fake = SimpleNamespace(frombuffer=lambda data, dtype: SimpleNamespace(reshape=reshape), dtype=np.dtype)
    file = opened({"a": tensor("F32", [1] * 64, 0, 4)}, bytes(4))
    monkeypatch.setitem(sys.modules, "numpy", fake)
    with pytest.raises(UnsupportedError, match="tensor 'a' in it: maximum supported dimension") as refused:
        file.tensor("a")
    assert "read()" in refused.value.hint
    assert file.read("a") == bytes(4)
