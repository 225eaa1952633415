"""A tree's inodes and content as answers to FUSE requests.

Stateless: a node id is the inode number of the image (but the root's, which FUSE wants to be 1), a file handle likewise,
so FORGET and RELEASE have nothing to undo. The tree never changes, so the kernel may keep what it was told.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, InodeT, ReaddirToken, RequestContext, XAttrNameT

from floe.fuse.reader import Reader, fill
from floe.store.erofs_inodes import Extent, Inode, Inodes
from floe.store.errors import FloeError
from floe.store.ids import Buffer
from floe.store.packindex import BLOCK

_log = logging.getLogger(__name__)
_FOREVER = 365 * 86400.0  # seconds that names and attributes may be kept
_SECTOR = 512  # bytes; what st_blocks counts
_INODES = 4096  # kept decoded, some 300 bytes each
_T = TypeVar("_T")


def _answering(operation: Callable[..., Awaitable[_T]]) -> Callable[..., Any]:
    """Make any failure of `operation` an EIO for the one who asked: another exception would end the whole mount."""

    @functools.wraps(operation)
    async def answer(self: TreeOperations, *arguments: Any) -> _T:
        try:
            return await operation(self, *arguments)
        except pyfuse3.FUSEError:
            raise
        except FloeError as error:
            _log.warning("%s failed: %s", operation.__name__, error)
        except Exception:
            _log.exception("%s failed", operation.__name__)
        raise pyfuse3.FUSEError(errno.EIO)

    return answer


class TreeOperations(pyfuse3.Operations):
    """Answers from `tree`, content by `reader`. Used by one event loop; the reader calls back from other threads."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True  # the kernel checks them, and asks for default_permissions with that

    def __init__(self, tree: Inodes, reader: Reader) -> None:
        super().__init__()
        self._tree = tree
        self._reader = reader
        self._root = tree.superblock.root_nid
        self.initialized = trio.Event()  # the kernel and libfuse agreed
        self._inode = functools.lru_cache(_INODES)(tree.inode)

    def init(self) -> None:
        """Called by pyfuse3 just before the kernel is told."""
        self.initialized.set()

    # names and attributes

    def _nid(self, node: int) -> int:
        return self._root if node == pyfuse3.ROOT_INODE else node

    def _attributes(self, inode: Inode) -> EntryAttributes:
        made = EntryAttributes()
        made.st_ino = inode.nid
        made.entry_timeout = made.attr_timeout = _FOREVER
        made.st_mode = inode.mode
        made.st_nlink = inode.links
        made.st_uid, made.st_gid = inode.uid, inode.gid
        made.st_rdev = inode.rdev
        made.st_size = inode.size
        made.st_blksize = BLOCK
        made.st_blocks = -(-inode.size // BLOCK) * (BLOCK // _SECTOR)
        made.st_mtime_ns = made.st_atime_ns = made.st_ctime_ns = inode.mtime * 10**9 + inode.mtime_ns
        return made

    @_answering
    async def getattr(self, inode: InodeT, _ctx: RequestContext) -> EntryAttributes:
        """What stat shows."""
        return self._attributes(self._inode(self._nid(inode)))

    @_answering
    async def lookup(self, parent_inode: InodeT, name: FileNameT, _ctx: RequestContext) -> EntryAttributes:
        """The inode of a name; that there is none may be remembered, too."""
        nid = self._tree.lookup(self._inode(self._nid(parent_inode)), name)
        if nid is None:
            missing = EntryAttributes()
            missing.entry_timeout = _FOREVER
            return missing  # st_ino 0
        return self._attributes(self._inode(nid))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Nothing was kept."""

    @_answering
    async def readlink(self, inode: InodeT, _ctx: RequestContext) -> FileNameT:
        """A symlink's target."""
        return self._tree.link(self._inode(self._nid(inode)))

    @_answering
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> list[XAttrNameT]:
        """Names of extended attributes; those of trusted.* to root only, as the kernel's file systems do."""
        names = self._tree.xattrs(self._inode(self._nid(inode)))
        return [name for name in names if not ctx.uid or not name.startswith(b"trusted.")]

    @_answering
    async def getxattr(self, inode: InodeT, name: XAttrNameT, _ctx: RequestContext) -> bytes:
        """One extended attribute."""
        try:
            return self._tree.xattrs(self._inode(self._nid(inode)))[name]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ENODATA) from None

    @_answering
    async def opendir(self, inode: InodeT, _ctx: RequestContext) -> FileHandleT:
        """A handle that is the inode number."""
        return self._nid(inode)

    @_answering
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """Entries from `start_id` on, with attributes, until the kernel's buffer is full."""
        for entry in self._tree.entries(self._inode(fh), start_id):
            name = entry.name
            if not pyfuse3.readdir_reply(token, name, self._attributes(self._tree.inode(entry.nid)), entry.next):
                return

    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing was kept."""

    @_answering
    async def statfs(self, _ctx: RequestContext) -> pyfuse3.StatvfsData:
        """The sizes of the image and its packs; nothing is free."""
        made = pyfuse3.StatvfsData()
        made.f_bsize = made.f_frsize = BLOCK
        made.f_blocks = self._tree.superblock.blocks + sum(blocks for _, blocks in self._tree.packs)
        made.f_bfree = made.f_bavail = made.f_ffree = made.f_favail = 0
        made.f_files = self._tree.superblock.inodes
        made.f_namemax = 255
        return made

    # content

    @_answering
    async def open(self, inode: InodeT, _flags: int, _ctx: RequestContext) -> FileInfo:
        """A handle that is the inode number; what the page cache holds of the file stays good."""
        return FileInfo(fh=inode, keep_cache=True)

    async def release(self, fh: FileHandleT) -> None:
        """Nothing was kept."""

    @_answering
    async def read(self, fh: FileHandleT, off: int, size: int) -> Buffer:
        """`size` bytes, fewer at the end of the file only: whole, or an error."""
        inode = self._inode(fh)
        if not stat.S_ISREG(inode.mode):
            raise pyfuse3.FUSEError(errno.EINVAL)
        extents = self._tree.extents(inode, off, size)
        content = bytearray(sum(extent.length for extent in extents))
        view, at, missing = memoryview(content), 0, []
        for extent in extents:
            part = view[at : at + extent.length]
            at += extent.length
            if extent.pack is not None and not self._cached(extent, part):
                missing.append((extent, part))
        if missing:
            await self._fetch(missing)
        return content

    def _cached(self, extent: Extent, part: memoryview) -> bool:
        assert extent.pack is not None
        pieces = self._reader.on_hand(extent.pack, extent.offset, len(part))
        if pieces is not None:
            fill(part, pieces)
            return True
        try:
            return self._reader.read_cached_into(extent.pack, extent.offset, part, wait=False)
        except BlockingIOError:
            return False

    async def _fetch(self, missing: list[tuple[Extent, memoryview]]) -> None:
        """Fill all parts; the first error when one of them cannot be had."""
        arrived = trio.Event()
        token = trio.lowlevel.current_trio_token()
        left = len(missing)
        errors: list[FloeError] = []

        def told() -> None:
            nonlocal left
            left -= 1
            if not left:
                arrived.set()

        def done(part: memoryview, result: Sequence[Buffer] | FloeError) -> None:
            try:
                if isinstance(result, FloeError):
                    errors.append(result)
                else:
                    fill(part, result)
            except Exception as error:  # a piece of another length than asked for
                errors.append(FloeError(f"a read gave what was not asked for: {error}"))
            finally:
                with contextlib.suppress(trio.RunFinishedError):  # unmounted meanwhile
                    token.run_sync_soon(told)

        for extent, part in missing:
            assert extent.pack is not None
            self._reader.submit(extent.pack, extent.offset, extent.length, functools.partial(done, part))
        await arrived.wait()
        if errors:
            raise errors[0]
