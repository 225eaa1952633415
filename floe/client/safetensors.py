"""Tensors of a .safetensors file, read one at a time into their own memory, from any file that can be read and sought.

Source of the format: https://github.com/huggingface/safetensors, README, "Format": eight bytes, the header's length (u64,
little endian); the header, JSON; then the tensors' bytes, to which `data_offsets` in the header are relative.
"""

from __future__ import annotations

import io
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal, TypeAlias, get_args

from floe.store.errors import BadInputError, DamagedError, NotFoundError, UnsupportedError

Framework: TypeAlias = Literal["numpy", "torch"]
_HEADER_MAX = 100_000_000  # bytes; the format's own bound
_DIMENSIONS_MAX = 64  # numpy's; numpy 1 has half of it
_BITS_MAX = 8 << 63  # what numpy and torch can count the bytes of
# Name in the file -> bits of an element, numpy's name, torch's name ("" where there is none, or it packs elements).
_DTYPES: Mapping[str, tuple[int, str, str]] = {
    "BOOL": (8, "bool", "bool"),
    "F4": (4, "", ""),
    "F6_E2M3": (6, "", ""),
    "F6_E3M2": (6, "", ""),
    "U8": (8, "uint8", "uint8"),
    "I8": (8, "int8", "int8"),
    "F8_E5M2": (8, "", "float8_e5m2"),
    "F8_E4M3": (8, "", "float8_e4m3fn"),
    "F8_E8M0": (8, "", "float8_e8m0fnu"),
    "F8_E5M2FNUZ": (8, "", "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (8, "", "float8_e4m3fnuz"),
    "U16": (16, "uint16", "uint16"),
    "I16": (16, "int16", "int16"),
    "F16": (16, "float16", "float16"),
    "BF16": (16, "", "bfloat16"),
    "U32": (32, "uint32", "uint32"),
    "I32": (32, "int32", "int32"),
    "F32": (32, "float32", "float32"),
    "C64": (64, "complex64", "complex64"),
    "U64": (64, "uint64", "uint64"),
    "I64": (64, "int64", "int64"),
    "F64": (64, "float64", "float64"),
}
# What an error quotes of a header: it may be hostile, and 100 MB.
_quoted = reprlib.Repr()
_quoted.maxstring, _quoted.maxtuple, _quoted.maxlevel = 200, 8, 2


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: `dtype` as the file writes it (`F32`, `BF16`), its `shape`, and bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafeTensors:
    """The tensors of `file`, open for reading bytes, or of the file at a path (of a mounted model, say). For one thread.

    Reads the header; closes `file` at the end of a `with` block or by `close`. `what` names it in errors.
    BadInputError: this is no such file.
    """

    def __init__(self, file: IO[bytes] | io.IOBase | str | os.PathLike[str], what: str = "") -> None:
        if isinstance(file, (str, os.PathLike)):
            what = what or os.fspath(file)
            # Unbuffered: tensors are read straight into their memory.
            file = open(file, "rb", buffering=0)  # noqa: PTH123, SIM115 - closed by close
        self._file: Any = file
        self._what = what or "the file"
        try:
            self._tensors, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafeTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def keys(self) -> list[str]:
        """Names, in the order of their places in the file: reading in that order is fastest."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor. NotFoundError."""
        try:
            return self._tensors[name]
        except KeyError:
            raise NotFoundError(f"there is no tensor {name!r} in {self._what}", hint="keys() lists them") from None

    def read(self, name: str) -> bytearray:
        """The bytes of a tensor, in the order of its elements, little endian."""
        info = self.info(name)
        data = bytearray(info.stop - info.start)
        self._fill(info.start, memoryview(data))
        return data

    def tensor(self, name: str, framework: Framework = "numpy") -> Any:
        """A tensor that owns its memory: a numpy.ndarray or a torch.Tensor. NotFoundError; UnsupportedError: its type, its shape."""
        info = self.info(name)
        if framework not in get_args(Framework):
            raise BadInputError(f"framework {framework!r} is neither numpy nor torch")
        of = f"tensor {_quoted.repr(name)} in {self._what} is of type {_quoted.repr(info.dtype)}"
        if info.dtype not in _DTYPES:
            raise UnsupportedError(f"{of}, which is not known", hint="use read() for its bytes, or upgrade Floe")
        _, for_numpy, for_torch = _DTYPES[info.dtype]
        if not (for_numpy if framework == "numpy" else for_torch):
            other = 'framework="torch", or ' if for_torch else ""
            raise UnsupportedError(
                f"{of}, of which no {framework} tensor is made", hint=f"use {other}read() for its bytes"
            )
        if framework == "numpy":
            import numpy  # noqa: ICN001, PLC0415 - optional

            # Little endian, as the file has it, whatever this machine is.
            data = numpy.frombuffer(self.read(name), numpy.dtype(for_numpy).newbyteorder("<"))
            try:
                return data.reshape(info.shape)
            except ValueError as error:
                raise UnsupportedError(
                    f"this numpy has no arrays of the shape of tensor {_quoted.repr(name)} in {self._what}: {error}",
                    hint="upgrade numpy, or use read() for its bytes",
                ) from error
        import torch  # noqa: PLC0415 - optional

        dtype = getattr(torch, for_torch, None)
        if dtype is None:
            raise UnsupportedError(
                f"{of}, which this torch does not have", hint="upgrade torch, or use read() for its bytes"
            )
        if info.start == info.stop:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(self.read(name), dtype=dtype).reshape(info.shape)

    def items(self, framework: Framework = "numpy") -> Iterator[tuple[str, Any]]:
        """All names and tensors, in the order of the file; one is in memory at a time unless you keep them."""
        for name in self._tensors:
            yield name, self.tensor(name, framework)

    def _fill(self, offset: int, view: memoryview) -> None:
        self._file.seek(offset)
        while view:
            done = self._file.readinto(view)
            if not done:
                raise DamagedError(f"{self._what} ends before byte {offset + len(view)}")
            view, offset = view[done:], offset + done

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        size = self._file.seek(0, os.SEEK_END)
        length = bytearray(8)
        if size < len(length):
            raise self._wrong(f"it has {size} bytes")
        self._fill(0, memoryview(length))
        count = int.from_bytes(length, "little")
        if count > min(_HEADER_MAX, size - 8):
            raise self._wrong(f"its header would have {count} bytes")
        data = bytearray(count)
        self._fill(8, memoryview(data))
        try:
            header = json.loads(data)
            metadata = dict(header.pop("__metadata__", {}))
            found = {name: _info(name, value, 8 + count, size) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._wrong(f"its header is wrong: {error}") from error
        ordered = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
        end = 8 + count
        for name, info in ordered.items():
            if info.start < end:
                raise self._wrong(f"tensor {_quoted.repr(name)} lies over another")
            end = info.stop
        return ordered, {str(key): str(value) for key, value in metadata.items()}

    def _wrong(self, why: str) -> BadInputError:
        return BadInputError(f"{self._what} is no safetensors file: {why}")


def _info(name: str, value: dict[str, Any], base: int, size: int) -> TensorInfo:
    """ValueError, KeyError, TypeError: it is not as the format says."""
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if type(dtype) is not str or any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        wrong = "is not as the format says"
    elif len(shape) > _DIMENSIONS_MAX:
        wrong = f"has {len(shape)} dimensions"
    elif start <= stop <= size - base and (dtype not in _DTYPES or _bits(shape, dtype) == (stop - start) * 8):
        return TensorInfo(dtype, shape, base + start, base + stop)
    else:
        wrong = "does not fit"
    of, place = f"{_quoted.repr(dtype)} of {_quoted.repr(shape)}", f"{_quoted.repr(start)} to {_quoted.repr(stop)}"
    raise ValueError(f"tensor {_quoted.repr(name)}, {of} in bytes {place} of {size - base}, {wrong}")


def _bits(shape: tuple[int, ...], dtype: str) -> int:
    """Of all elements; past _BITS_MAX any number beyond it, also where a size is 0: numpy and torch multiply the others."""
    bits = _DTYPES[dtype][0]
    for number in shape:
        bits *= number or 1
        if bits >= _BITS_MAX:
            return bits
    return 0 if 0 in shape else bits
