"""Tensors of a .safetensors file, read one at a time into their own memory, from any file that can be read and sought.

Source of the format: https://github.com/huggingface/safetensors, README, "Format": eight bytes, the header's length (u64,
little endian); the header, JSON; then the tensors' bytes, to which `data_offsets` in the header are relative.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal, TypeAlias

from floe.store.errors import BadInputError, DamagedError, NotFoundError, UnsupportedError

Framework: TypeAlias = Literal["numpy", "torch"]
_HEADER_MAX = 100_000_000  # bytes; the format's own bound
# Name in the file -> bytes of an element, numpy's name, torch's name ("" where there is none).
_DTYPES: Mapping[str, tuple[int, str, str]] = {
    "BOOL": (1, "bool", "bool"),
    "U8": (1, "uint8", "uint8"),
    "I8": (1, "int8", "int8"),
    "F8_E5M2": (1, "", "float8_e5m2"),
    "F8_E4M3": (1, "", "float8_e4m3fn"),
    "U16": (2, "uint16", "uint16"),
    "I16": (2, "int16", "int16"),
    "F16": (2, "float16", "float16"),
    "BF16": (2, "", "bfloat16"),
    "U32": (4, "uint32", "uint32"),
    "I32": (4, "int32", "int32"),
    "F32": (4, "float32", "float32"),
    "U64": (8, "uint64", "uint64"),
    "I64": (8, "int64", "int64"),
    "F64": (8, "float64", "float64"),
}


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
        """A tensor that owns its memory: a numpy.ndarray or a torch.Tensor. NotFoundError; UnsupportedError: its type."""
        info = self.info(name)
        _, for_numpy, for_torch = _DTYPES[info.dtype]
        if framework == "numpy":
            import numpy  # noqa: ICN001, PLC0415 - optional

            if not for_numpy:
                raise UnsupportedError(
                    f"numpy has no {info.dtype}, which tensor {name!r} in {self._what} is of",
                    hint='use framework="torch", or read() for its bytes',
                )
            # Little endian, as the file has it, whatever this machine is.
            return numpy.frombuffer(self.read(name), numpy.dtype(for_numpy).newbyteorder("<")).reshape(info.shape)
        if framework != "torch":
            raise BadInputError(f"framework {framework!r} is neither numpy nor torch")
        import torch  # noqa: PLC0415 - optional

        dtype = getattr(torch, for_torch, None)
        if dtype is None:
            raise UnsupportedError(f"this torch has no {info.dtype}", hint="upgrade torch, or use read() for the bytes")
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
            found = {name: self._info(value, 8 + count, size) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._wrong(f"its header is wrong: {error}") from error
        ordered = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
        end = 8 + count
        for name, info in ordered.items():
            if info.start < end:
                raise self._wrong(f"tensor {name!r} lies over another")
            end = info.stop
        return ordered, {str(key): str(value) for key, value in metadata.items()}

    def _info(self, value: dict[str, Any], base: int, size: int) -> TensorInfo:
        """ValueError, KeyError, TypeError: it is not as the format says."""
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if dtype not in _DTYPES:
            raise UnsupportedError(f"{self._what} has tensors of type {dtype!r}", hint="upgrade Floe")
        numbers = (*shape, start, stop)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"shape or place is {numbers}")
        if stop - start != math.prod(shape) * _DTYPES[dtype][0] or base + stop > size:
            raise ValueError(f"{shape} of {dtype} in bytes {start} to {stop} of {size - base}")
        return TensorInfo(dtype, shape, base + start, base + stop)

    def _wrong(self, why: str) -> BadInputError:
        return BadInputError(f"{self._what} is no safetensors file: {why}")
