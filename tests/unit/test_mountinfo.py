"""/proc/self/mountinfo, parsed."""

from __future__ import annotations

from floe.mount.mountinfo import mount_at, read_mounts

TEXT = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
30 22 0:40 / /run/floe/packs ro,nosuid - fuse floe-packs ro,user_id=0
31 22 0:41 / /a\\040b\\134c\\012d ro,relatime shared:7 master:3 - erofs /var/x\\040y ro,directio
32 22 0:41 /sub /a\\040b\\134c\\012d rw - erofs /z rw
"""


def test_fields():
    mounts = read_mounts(TEXT)
    packs = mounts[1]
    assert (packs.mount_id, packs.device, packs.root, packs.target) == (30, "0:40", "/", "/run/floe/packs")
    assert packs.options == {"ro", "nosuid"}
    assert (packs.fstype, packs.source, packs.super_options) == ("fuse", "floe-packs", {"ro", "user_id=0"})
    assert not packs.shared
    assert mounts[2].shared


def test_escapes_and_what_is_on_top():
    mounts = read_mounts(TEXT)
    assert mounts[2].source == "/var/x y"
    there = mount_at("/a b\\c\nd", mounts)
    assert there is mounts[3]
    assert there.root == "/sub"
    assert mount_at("/a", mounts) is None


def test_names_that_are_no_utf_8_come_back_as_they_are():
    raw = b"31 22 0:41 / /\xff\xc3\xa4\\040 ro - erofs /x ro\n"
    (entry,) = read_mounts(raw.decode("utf-8", "surrogateescape"))
    assert entry.target.encode("utf-8", "surrogateescape") == b"/\xff\xc3\xa4 "
