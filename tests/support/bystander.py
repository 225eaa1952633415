"""A machine whose commands must fail, and on which another model is mounted that must not notice."""

import os
import re
import subprocess
import sys

from support import fleet, seaweed
from support.floe_node import Node
from support.heldobjects import BucketObjects, FolderObjects

from floe.store.layout import DAMAGE

MIB = 1 << 20
PIECES = 64


class World(Node):
    """A machine on which a model called `other` is mounted; `fails` runs a command that must not get through.

    `index`: one of fleet.INDEXES, and with it a bucket; None: a folder and SQLite. `objects`: what the store holds.
    """

    def __init__(self, home, index=None):
        super().__init__(home)
        self.objects = FolderObjects(self.store)
        if index is not None:
            bucket = seaweed.running().bucket()
            self.environ |= fleet.environment(index, bucket)
            self.objects = BucketObjects(bucket, "fleet")
        # Nothing is fetched before it is read, and nothing written to the store behind a command's back.
        self.environ |= {"FLOE_READAHEAD": "0", "FLOE_READ_DEADLINE": "5", "FLOE_PROFILES": "off"}
        self.source, self.other = home / "source", home / "other"
        self.source.mkdir()
        for number in range(PIECES):
            (self.source / f"{number:02}").write_bytes(os.urandom(MIB // 2))
        self.floe("model", "push", self.source, "other")
        self.floe("model", "mount", "other", self.other)
        self._pieces = iter(sorted(self.source.iterdir()))

    def reads_on(self):
        piece = next(self._pieces)
        assert (self.other / piece.name).read_bytes() == piece.read_bytes()

    def published(self):
        """What each object is, by its key, without what nodes report of their own accord, at any time."""
        return {key: held for key, held in self.objects.fingerprints().items() if not key.startswith(f"{DAMAGE}/")}

    def command(self, *argv, environ=None, prefix=()):
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "floe", *map(str, argv)],
            env={**self.environ, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fails(self, *argv, code, names, hint, meanwhile=None, **options):
        """Run a command that fails with `code`; its line names all of `names`, its hint holds `hint`."""
        before, mounts = self.published(), self.mounts()
        with self.command(*argv, **options) as process:
            if meanwhile is not None:
                meanwhile(process)
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, ""), err
        said, *more = err.splitlines()
        assert said.startswith("floe: error: ")
        for name in names:
            assert str(name) in said
        assert not re.search(r"Traceback|Error\(|Errno|errno|<class|b'", err)
        assert len(more) == 1, err
        assert more[0].startswith("floe: hint: ")
        assert hint in more[0]
        after = self.published()
        assert before.items() <= after.items()
        assert not [key for key in after.keys() - before.keys() if key.startswith("refs/")]
        assert self.mounts() == mounts
        spool = self.cache / "spool"
        assert not spool.exists() or list(spool.iterdir()) == []
