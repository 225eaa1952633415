"""A Hugging Face cache with a model in safetensors shards, of any size, and revisions of it.

`models--org--name/{blobs,refs,snapshots/<revision>}`, a snapshot's files being relative symlinks into blobs, as
huggingface_hub leaves it. What a tensor holds follows from its number and the model's seed, so nothing is kept in memory.
`load` has another process load shards: safetensors maps them and keeps the interpreter's lock while pages arrive, so a
store that is served, or counted, by the test's own process would wait for it for ever.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

SHAPE = (4096, 4096)
TENSOR_BYTES = SHAPE[0] * SHAPE[1] * 2


@dataclass(frozen=True)
class Weights:
    """`shards` files, each of `tensors` matrices of 32 MiB and one small vector."""

    shards: int = 3
    tensors: int = 11
    seed: int = 1

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for shard in range(self.shards) for _, array in self._shapes(shard))

    def shard_name(self, shard: int) -> str:
        return f"model-{shard + 1:05}-of-{self.shards:05}.safetensors"

    def weight_map(self) -> dict[str, str]:
        """Which file each tensor is in."""
        return {name: self.shard_name(shard) for shard in range(self.shards) for name, _ in self._shapes(shard)}

    def expected(self, shard: int) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor of a shard, one in memory at a time."""
        for number, (name, like) in enumerate(self._shapes(shard)):
            random = np.random.Generator(np.random.SFC64([self.seed, shard, number]))
            bits = np.frombuffer(random.bytes(like.nbytes), "<u2") & 0xBFFF  # neither infinite nor NaN
            yield name, bits.view(np.float16).reshape(like.shape)

    def _shapes(self, shard: int) -> Iterator[tuple[str, np.ndarray]]:
        like = np.broadcast_to(np.float16(0), SHAPE)
        for number in range(self.tensors):
            yield f"model.layers.{shard * self.tensors + number}.weight", like
        yield f"model.norm.{shard}.weight", like[0]

    def load(self, directory: Path, shard: int) -> set[str]:
        """Load a shard in another process; the names of its tensors that equal what they should be, and `-name` of
        those that are the negative of it. A tensor too many or with other values fails."""
        words = [sys.executable, "-m", "support.hfmodel", directory, shard, self.shards, self.tensors, self.seed]
        done = subprocess.run(
            [str(word) for word in words],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return set(json.loads(done.stdout))


class HuggingFaceModel:
    """A model of these weights in a cache of its own. `snapshot` is the directory to push."""

    def __init__(self, cache: Path, weights: Weights) -> None:
        self.folder = cache / "models--Acme--Weights-500M"
        self.weights = weights
        for name in ("blobs", "refs", "snapshots"):
            (self.folder / name).mkdir(parents=True)
        index = {"metadata": {"total_size": weights.total}, "weight_map": weights.weight_map()}
        small = {
            "config.json": {"model_type": "llama", "hidden_size": SHAPE[0]},
            "tokenizer.json": {"vocab": {f"token{number}": number for number in range(20_000)}},
            "model.safetensors.index.json": index,
        }
        blobs = {name: self._blob(json.dumps(value).encode()) for name, value in small.items()}
        self.blobs = blobs | {weights.shard_name(shard): self._shard(shard) for shard in range(weights.shards)}
        self.snapshot = self._snapshot(self.blobs)

    def changed(self, shard: int, name: str) -> Path:
        """A new revision's snapshot, in which one tensor has the opposite sign; all else is the same."""
        return self._snapshot({**self.blobs, self.weights.shard_name(shard): self._shard(shard, negative=name)})

    def _shard(self, shard: int, negative: str = "") -> str:
        content = {name: -array if name == negative else array for name, array in self.weights.expected(shard)}
        written = self.folder / "blobs" / "incomplete"
        save_file(content, str(written), metadata={"format": "pt"})
        with written.open("rb") as file:
            digest = file_digest(file, "sha256")
        written.rename(self.folder / "blobs" / digest)
        return digest

    def _blob(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / digest).write_bytes(data)
        return digest

    def _snapshot(self, blobs: Mapping[str, str]) -> Path:
        revision = hashlib.sha1(json.dumps(sorted(blobs.items())).encode()).hexdigest()
        folder = self.folder / "snapshots" / revision
        folder.mkdir()
        for name, blob in blobs.items():
            (folder / name).symlink_to(Path("../../blobs") / blob)
        (self.folder / "refs" / "main").write_text(revision)
        return folder


def file_digest(file, name: str) -> str:
    """The hex digest of an open file's content (Python 3.10 has no hashlib.file_digest)."""
    digest = hashlib.new(name)
    while data := file.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def _loaded(directory: Path, shard: int, weights: Weights) -> list[str]:
    found = []
    with safe_open(directory / weights.shard_name(shard), framework="np") as file:
        names = set(file.keys())
        for name, expected in weights.expected(shard):
            array = file.get_tensor(name)
            assert array.dtype == expected.dtype
            opposite = not np.array_equal(array, expected)
            assert not opposite or np.array_equal(array, -expected), name
            found.append(f"-{name}" if opposite else name)
    assert names == {name.lstrip("-") for name in found}
    return found


if __name__ == "__main__":
    print(json.dumps(_loaded(Path(sys.argv[1]), int(sys.argv[2]), Weights(*map(int, sys.argv[3:])))))
