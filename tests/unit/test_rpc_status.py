"""Every error has a gRPC status of its own."""

import grpc

from floe.rpc.status import CODES, status_of
from floe.store.errors import BadInputError, FloeError


def classes(base):
    for kind in base.__subclasses__():
        if kind.__module__.startswith("floe."):
            yield kind
            yield from classes(kind)


def test_every_error_is_mapped():
    missing = [
        kind.__name__ for kind in classes(FloeError) if kind.__module__ == "floe.store.errors" and kind not in CODES
    ]
    assert missing == []
    for kind in classes(FloeError):
        assert status_of(kind("x"))[0] is not grpc.StatusCode.OK


def test_messages_carry_the_hint():
    assert status_of(BadInputError("bad", hint="do this")) == (grpc.StatusCode.INVALID_ARGUMENT, "bad (do this)")
    assert status_of(BadInputError("bad")) == (grpc.StatusCode.INVALID_ARGUMENT, "bad")


def test_what_is_no_error_of_ours_is_internal():
    assert status_of(ValueError("x")) == (grpc.StatusCode.INTERNAL, "floe: ValueError: x")
