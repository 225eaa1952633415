"""Object stores behind one interface: memory (tests), file, S3 and Google's. `open_store` picks one by its address."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from floe.store.errors import BadInputError
from floe.store.objects.base import ObjectInfo, ObjectStore

__all__ = ["ObjectInfo", "ObjectStore", "open_store"]

_EXAMPLES = "use file:///abs/path, s3://bucket/prefix?endpoint=URL&region=R or gs://bucket/prefix"


def open_store(url: str, *, retry: bool = True) -> ObjectStore:
    """The object store at `url`; nothing is read or created yet.

    `file:///abs/path`, `s3://bucket/prefix?endpoint=URL&region=R&path_style=true&ca=FILE&kms_key=KEY`,
    `gs://bucket/prefix?service_account=FILE&endpoint=URL&ca=FILE`, or `memory://` (empty, for tests).
    With `retry`, passing faults are tried again for up to a minute. Raises BadInputError for an address of another form.
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise BadInputError(f"store address {url!r} has no scheme", hint=_EXAMPLES)
    store: ObjectStore
    # Imports stay here: obstore and its runtime cost start-up time that a local store need not pay.
    if scheme == "file":
        from floe.store.objects.file import FileStore  # noqa: PLC0415 - lazy, as said above

        store = FileStore(_file_root(url))
    elif scheme == "s3":
        from floe.store.objects.s3 import S3Store  # noqa: PLC0415 - lazy, as said above

        store = S3Store(url)
    elif scheme == "gs":
        from floe.store.objects.gcs import GCSStore  # noqa: PLC0415 - lazy, as said above

        store = GCSStore(url)
    elif url == "memory://":
        from floe.store.objects.memory import MemoryStore  # noqa: PLC0415 - lazy, as said above

        store = MemoryStore()
    else:
        raise BadInputError(f"store address {url!r} is of an unknown kind", hint=_EXAMPLES)
    if not retry:
        return store
    from floe.store.objects.retry import RetryingStore  # noqa: PLC0415 - lazy, as said above

    return RetryingStore(store)


def _file_root(url: str) -> Path:
    parts = urlsplit(url)
    root = Path(unquote(parts.path))
    if parts.netloc or parts.query or parts.fragment or not root.is_absolute() or ".." in root.parts:
        raise BadInputError(f"store address {url!r} is not file:///abs/path", hint=_EXAMPLES)
    return root
