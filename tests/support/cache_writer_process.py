"""A process that stores frames of a pack until it is killed. Arguments: cache folder, file of content, pack id.

Two more: how many frames, and a file that a thread looks up first.
"""

import sys
import threading
from pathlib import Path

from floe.store.cache import CacheWriter, NodeCache
from floe.store.frames import VerifiedFrame

cache = NodeCache(Path(sys.argv[1]))
content = Path(sys.argv[2]).read_bytes()
index = cache.index(sys.argv[3])
assert index is not None
writer = CacheWriter(cache)
frames = index.frames
if len(sys.argv) > 4:
    frames = frames[: int(sys.argv[4])]
    threading.Thread(target=Path(sys.argv[5]).exists, daemon=True).start()
for number, entry in enumerate(frames):
    start = number * index.frame_size
    assert writer.put(sys.argv[3], number, VerifiedFrame(content[start : start + index.frame_size], entry.digest))
    print(number, flush=True)
sys.stdin.read()
