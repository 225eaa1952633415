"""A gRPC server on a unix socket, and handlers that answer errors by their status."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc

from floe.rpc.sockets import refuse_live_socket
from floe.rpc.status import status_of
from floe.store.cache.node_cache import disk_errors
from floe.store.errors import FloeError, UnavailableError
from floe.store.spans import TRACEPARENT

log = logging.getLogger(__name__)

# containerd's own limit (defaults.DefaultMaxRecvMsgSize).
MESSAGE_MAX = 16 << 20
# How long requests under way may take to end when the server stops, in seconds.
GRACE = 5.0

Q = TypeVar("Q")
A = TypeVar("A")


class Server:
    """A gRPC server with `threads` threads on a unix socket only its owner may use."""

    def __init__(self, address: Path, handlers: Iterable[grpc.GenericRpcHandler], *, threads: int) -> None:
        self.address = address
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="rpc")
        self._server = grpc.server(
            self._threads,
            options=[("grpc.max_receive_message_length", MESSAGE_MAX), ("grpc.max_send_message_length", MESSAGE_MAX)],
        )
        self._server.add_generic_rpc_handlers(tuple(handlers))

    def start(self) -> None:
        """Listen. BusyError when another process listens on the socket; UnavailableError when it cannot be made."""
        with disk_errors(f"socket {self.address}"):
            self.address.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # grpc would take its name away from under it.
        refuse_live_socket(self.address)
        # grpc makes the socket itself: only the umask can keep others out from its first moment.
        before = os.umask(0o177)
        try:
            bound = self._server.add_insecure_port(f"unix:{self.address}")
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {self.address}: {error}") from error
        finally:
            os.umask(before)
        if not bound:
            raise UnavailableError(f"cannot listen on {self.address}")
        self._server.start()

    def stop(self) -> None:
        """Refuse new requests, give those under way some time, then answer them as cancelled; back when all have ended.

        All of them must end by themselves: what takes long has a deadline, or looks whether its service winds down.
        """
        self._server.stop(GRACE).wait()
        self._threads.shutdown()


def unary(call: Callable[[Q], A], parse: Callable[[bytes], Q]) -> grpc.RpcMethodHandler:
    """A method that takes a message and answers with one; what `call` raises is its status."""

    def handle(request: Q, context: grpc.ServicerContext) -> A:
        named = dict(context.invocation_metadata() or ()).get("traceparent", "")
        TRACEPARENT.set(named if isinstance(named, str) else "")
        try:
            return call(request)
        except Exception as error:
            _abort(context, error)
            raise

    return grpc.unary_unary_rpc_method_handler(handle, parse, _serialize)


def streaming(call: Callable[[Q], Iterator[A]], parse: Callable[[bytes], Q]) -> grpc.RpcMethodHandler:
    """A method that takes a message and answers with a stream of them."""

    def handle(request: Q, context: grpc.ServicerContext) -> Iterator[A]:
        try:
            yield from call(request)
        except Exception as error:
            _abort(context, error)
            raise

    return grpc.unary_stream_rpc_method_handler(handle, parse, _serialize)


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    code, message = status_of(error)
    if isinstance(error, FloeError):
        log.debug("%s: %s", code.name, message)
    else:
        log.error("a request failed: %s", message, exc_info=error)
    context.abort(code, message)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
