"""A directory of an image made a model: its files leave the image's layers, and the model is attached in their place.

Every layer that has something in the directory is written anew without it, all other bytes of its tar as they are. What a container sees
is the same: the model's tree is the directory as all layers together show it, with owners, modes, times and attributes.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from floe.ingest.model import name_model
from floe.ingest.oci import carried, derived, media, places
from floe.ingest.oci.attach import AttachResult, attach_to
from floe.ingest.oci.compression import decompress
from floe.ingest.oci.gzipped import GzipWriter, file_pieces
from floe.ingest.oci.layers import LayerTree, read_layer
from floe.ingest.oci.media import Descriptor
from floe.ingest.oci.merging import merged_directory
from floe.ingest.oci.opening import open_both
from floe.ingest.oci.platforms import Platform
from floe.ingest.oci.source import Image, resolve
from floe.ingest.oci.tarheader import LINK, Entry
from floe.ingest.oci.tarstream import Content
from floe.ingest.publish import Ingest
from floe.store.catalog import Catalog
from floe.store.errors import BadInputError, NotFoundError, UnavailableError, UnsupportedError
from floe.store.ids import ModelRef, check_text
from floe.store.nodes import FileContent, Node, chunk_bits, walk
from floe.store.packindex import MODEL_FRAME
from floe.store.progress import Adding, Progress

# Annotations that describe one blob: eStargz, zstd:chunked, and lazy snapshotters'.
_OF_THE_BLOB = ("containerd.io/snapshot/", "io.containers.estargz.", "io.github.containers.zstd-chunked.")
_END = bytes(1024)  # two records of zeros end a tar


@dataclass(frozen=True)
class ExtractResult:
    """The image that was written; each model's digest; how many layers were written anew, and the bytes that left the image."""

    result: AttachResult
    digests: tuple[str, ...]
    new_layers: int
    saved_bytes: int
    new_bytes: int


@dataclass(frozen=True)
class _Cut:
    """A layer and what of its tar stays: (start, end) in bytes."""

    number: int
    kept: tuple[tuple[int, int], ...]


def extract(
    catalog: Catalog,
    source: str,
    target: str,
    directories: Sequence[tuple[ModelRef, str]],
    *,
    spool_dir: Path,
    platform: str | None = None,
    plain_http: bool = False,
    target_plain_http: bool | None = None,
    registry_config: Sequence[Path] = (),
    workers: int | None = None,
    progress: Progress | None = None,
) -> ExtractResult:
    """Write `target`: the image `source` of one platform, with each (model, path of a directory) made a model and attached there.

    BadInputError: a path that cannot be, no directory, or one that overlaps another or a carried model. NotFoundError: no such image,
    or nothing at a path. UnsupportedError: a hard link between inside and outside. The models are named before the image is.
    """
    if not directories:
        raise BadInputError("no directory to detach", hint="give --directory PATH=NAME[:TAG]")
    for name in (source, target):
        check_text(name, "image")
    for ref, _ in directories:
        if ref.digest is not None:
            raise BadInputError(f"cannot push to {ref}: a digest names what is stored already", hint="give NAME[:TAG]")
    wanted = [(ref, places.check_path(path)) for ref, path in directories]
    places.check_apart(path for _, path in wanted)
    with (
        open_both(
            source,
            target,
            plain_http=plain_http,
            target_plain_http=target_plain_http,
            registry_config=registry_config,
        ) as (found, written),
        contextlib.ExitStack() as stack,
    ):
        spool_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="detach-", dir=spool_dir))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        image = resolve(found, Platform.parse(platform) if platform else None)
        before = carried.carried_models(image)
        places.check_apart([*(one.marker.path for one in before), *(path for _, path in wanted)])
        moved_from = [catalog.find_model(ref) for ref, _ in wanted]
        told = Adding(progress)
        with Ingest(catalog, spool_dir=spool_dir, frame_size=MODEL_FRAME, workers=workers) as ingest:
            reading = _Reading(image, [path for _, path in wanted], {one.number for one in before}, ingest, told)
            reading.run()
            trees = [_directory(reading.trees, path, image.name) for _, path in wanted]
            digests = [
                name_model(
                    catalog, ingest, ref, tree, source=f"image:{image.name}:{path}", labels=None, moved_from=known
                )[0]
                for (ref, path), tree, known in zip(wanted, trees, moved_from, strict=True)
            ]
            stats = ingest.stats
        told.total(sum(image.manifest.layers[cut.number].size for cut in reading.cuts))
        edited = _edited(image, [_write(image, cut, folder, told) for cut in reading.cuts])
        result = attach_to(
            catalog,
            lambda: edited,
            written,
            wanted,
            digests={path: digest for (_, path), digest in zip(wanted, digests, strict=True)},
            progress=told,
        )
        saved = sum(layer.size for layer in image.manifest.layers) - sum(layer.size for layer in edited.manifest.layers)
        return ExtractResult(result, tuple(digests), len(reading.cuts), saved, stats.new_bytes)


@dataclass
class _Reading:
    """Reads all layers once, bottom first: content of the directories into `ingest`, of everything else nowhere."""

    image: Image
    paths: Sequence[str]
    stubs: set[int]
    ingest: Ingest
    told: Adding
    trees: list[LayerTree] = field(default_factory=list)
    cuts: list[_Cut] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prefixes = [
            [part.encode("utf-8", "surrogateescape") for part in p.split("/") if part] for p in self.paths
        ]
        self._inside = False
        self._entries: list[tuple[int, bool]] = []  # where each begins, and whether it goes

    def run(self) -> None:
        layers = [(n, layer) for n, layer in enumerate(self.image.manifest.layers) if n not in self.stubs]
        self.told.total(sum(layer.size for _, layer in layers))
        for number, descriptor in layers:
            self._entries = []
            what = self.image.layer_name(number)
            pieces = decompress(self.told.passing(self.image.source.open_blob(descriptor)), what)
            tree = read_layer(pieces, self, what, seen=partial(self._see, what))
            self.trees.append(tree)
            if any(goes for _, goes in self._entries):
                self.cuts.append(_Cut(number, _kept(self._entries, tree.end)))

    def add_stream(self, readable: Content, size: int) -> FileContent:
        """See ContentSink."""
        if self._inside:
            return self.ingest.add_stream(readable, size)
        return FileContent(size, chunk_bits(size), ())

    def _see(self, what: str, start: int, entry: Entry) -> None:
        self._inside = self._is_inside(entry.name)
        if entry.type == LINK and self._inside != self._is_inside(entry.link):
            raise UnsupportedError(
                f"{what}: {entry.name.decode('utf-8', 'backslashreplace')!r} is a hard link across the border of what is detached",
                hint="detach a directory that holds both names, or build the image without the link",
            )
        self._entries.append((start, self._inside))

    def _is_inside(self, name: bytes) -> bool:
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        return any(len(parts) > len(prefix) and parts[: len(prefix)] == prefix for prefix in self._prefixes)


def _kept(entries: Sequence[tuple[int, bool]], end: int) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    starts = [start for start, _ in entries]
    for (start, goes), stop in zip(entries, [*starts[1:], end], strict=True):
        if goes:
            continue
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return tuple(ranges)


def _directory(trees: Sequence[LayerTree], path: str, name: str) -> Node:
    places.look_up([path], reversed(trees), name)  # what leads through a symlink is refused by name
    tree = merged_directory(trees, path)
    if tree is None:
        raise NotFoundError(
            f"{name} has no directory {path}", hint="give the path of a directory, as a container sees it"
        )
    files = [node for _, node in walk(tree) if node.is_file]
    if not files:
        raise BadInputError(f"{path} of {name} holds no file: there is no model to make of it", hint="check the path")
    if any(node.content is not None and node.content.size and not node.content.chunks for node in files):
        raise UnsupportedError(
            f"{path} of {name} has files that its layers reach through a symlink",
            hint="give the path behind the symlink",
        )
    return tree


@dataclass(frozen=True)
class _Written:
    number: int
    descriptor: Descriptor
    diff_id: str
    path: Path


def _write(image: Image, cut: _Cut, folder: Path, told: Adding) -> _Written:
    """The layer's tar without what goes, gzipped, in a file."""
    path = folder / f"layer-{cut.number}.tar.gz"
    what = image.layer_name(cut.number)
    pieces = decompress(told.passing(image.source.open_blob(image.manifest.layers[cut.number])), what)
    try:
        with path.open("xb") as file:
            out = GzipWriter(file)
            for piece in _ranges(pieces, cut.kept):
                out.write(piece)
            out.write(_END)
            out.finish()
    except OSError as error:
        raise UnavailableError(
            f"{path} cannot be written: {error.strerror}", hint="give another --spool-dir"
        ) from error
    return _Written(cut.number, Descriptor(derived.layer_type(image), out.digest, out.size), out.diff_id, path)


def _ranges(pieces: Iterator[bytes], kept: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    offset = 0
    ranges = iter(kept)
    start, stop = next(ranges, (0, 0))
    for piece in pieces:
        while start < stop and start < offset + len(piece):
            yield piece[max(0, start - offset) : stop - offset]
            if stop > offset + len(piece):
                break
            start, stop = next(ranges, (0, 0))
        offset += len(piece)


def _edited(image: Image, written: Sequence[_Written]) -> Image:
    """The image with some of its layers replaced, as if it had been built so; nothing is written yet."""
    if not written:
        return image
    by_number = {one.number: one for one in written}
    diff_ids = {one.number: one.diff_id for one in written}
    config = derived.derive_config(image, diff_ids=diff_ids)
    descriptor = Descriptor(image.manifest.config.media_type, media.sha256_digest(config), len(config))
    layers = [
        {**by_number[number].descriptor.to_json(), "annotations": _still_true(layer.get("annotations") or {})}
        if number in by_number
        else layer
        for number, layer in enumerate(derived.raw_layers(image))
    ]
    raw = derived.derive_manifest(image, descriptor, layers, {})
    manifest = media.parse_manifest(raw, image.manifest.media_type, f"the manifest of {image.name}")
    assert isinstance(manifest, media.ImageManifest)
    blobs = {one.descriptor.digest: partial(file_pieces, one.path) for one in written}
    source = derived.Edited(image.source, image.manifest.digest, blobs)
    return Image(source, manifest, media.parse_config(config, f"the config of {image.name}"), image.platform)


def _still_true(annotations: Mapping[str, str]) -> dict[str, str]:
    """Without what other lazy pullers say of the blob that was: where its table of contents lies, how large it unpacks."""
    return {key: value for key, value in annotations.items() if not key.startswith(_OF_THE_BLOB)}
