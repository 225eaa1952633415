"""Every error has an errno of its own choosing; nothing falls through by accident."""

import errno

import pytest

from floe.fuse.errno_map import ERRNO, errno_of
from floe.store import errors


def _subclasses(cls):
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def test_every_error_class_is_mapped():
    classes = {errors.FloeError, *_subclasses(errors.FloeError)}
    product = {cls for cls in classes if cls.__module__.startswith("floe.")}
    assert product - set(ERRNO) == set()


def test_all_errors_live_where_the_table_looks():
    named = {value for value in vars(errors).values() if isinstance(value, type)}
    assert set(ERRNO) == {cls for cls in named if issubclass(cls, errors.FloeError)}


@pytest.mark.parametrize("cls", sorted(ERRNO, key=lambda cls: cls.__name__))
def test_mapped_numbers_are_ones_the_kernel_takes(cls):
    assert 0 < ERRNO[cls] < 512
    assert errno_of(cls("x")) == ERRNO[cls]


def test_a_test_s_own_subclass_inherits_its_parent_s():
    class LocalError(errors.DeadlineError):
        pass

    assert errno_of(LocalError("x")) == errno.ETIMEDOUT


def test_other_exceptions():
    assert errno_of(OSError(errno.ENOSPC, "full")) == errno.ENOSPC
    assert errno_of(ValueError("bug")) == errno.EIO
