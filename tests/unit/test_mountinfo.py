"""/proc/self/mountinfo, parsed."""

from __future__ import annotations

import pytest

from floe.mount.mountinfo import mount_at, read_mounts
from floe.store import mounttable

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


@pytest.mark.parametrize("odd", list("\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"))
def test_a_name_with_what_python_takes_for_a_line_end_is_one_name(odd):
    text = TEXT.replace("/run/floe/packs", f"/run/a{odd}b")
    assert [entry.target for entry in read_mounts(text)][:2] == ["/", f"/run/a{odd}b"]
    assert [mount.target for mount in mounttable.parse(text)][:2] == ["/", f"/run/a{odd}b"]


@pytest.mark.parametrize("line", ["", "30 22", "30 22 x / / rw - ext4", "a b c d e f - g h i"])
def test_a_line_that_is_none_hides_no_other(line):
    text = f"{line}\n{TEXT}"
    assert read_mounts(text) == read_mounts(TEXT)
    assert mounttable.parse(text) == mounttable.parse(TEXT)
