"""What redis-py raises, as the one kind of error that an index may have: UnavailableError, with what to do next."""

from __future__ import annotations

import re

import redis
import redis.exceptions as of_redis
from redis.sentinel import MasterNotFoundError

from floe.store.errors import DeadlineError, UnavailableError
from floe.store.index.redis.errors import lasting


def translate(error: BaseException, url: str) -> UnavailableError:
    """`error`, which an operation on the index at `url` ended with; not `retryable` when it will not pass by itself."""
    cause = error.__cause__
    if isinstance(error, UnavailableError):
        return error
    if isinstance(cause, UnavailableError):
        return cause
    text = _text(error)
    if _is(error, (redis.AuthenticationError, of_redis.AuthorizationError), "NOAUTH", "WRONGPASS"):
        return lasting(
            f"index {url} refused the user or the password: {text}", hint="check them in the index's address"
        )
    if _is_forbidden(error):
        return lasting(
            f"index {url} refused a command: {text}", hint="docs/OPERATIONS.md lists what the ACL user must be allowed"
        )
    if _is_read_only(error):
        return UnavailableError(
            f"index {url} is read-only: {text}",
            hint="give the address of the primary, or wait for the fail-over to end",
        )
    if _is_full(error):
        return lasting(f"index {url} is full: {text}", hint="raise maxmemory, or use a larger server")
    if isinstance(error, (redis.TimeoutError, TimeoutError)):
        return DeadlineError(f"index {url} does not answer in time: {text}", hint="check the server and the network")
    if "certificate verify failed" in text.lower():
        return lasting(
            f"index {url} shows a certificate that is not trusted: {text}",
            hint="give the CA's file with ca=; the certificate must name the host of every node",
        )
    if isinstance(error, MasterNotFoundError):
        return UnavailableError(
            f"index {url}: its Sentinels name no primary: {re.sub('<.*>', 'they', text)}",  # of connections, at length
            hint="check the Sentinels, the name in sentinel= and sentinel_password_file=",
        )
    if not isinstance(error, (redis.RedisError, of_redis.RedisClusterException, OSError)):
        text = f"{type(error).__name__}: {text}"
    return UnavailableError(
        f"index {url} cannot be used: {text}", hint="check the server; `floe status` shows its state"
    )


def refuses_to_write(error: UnavailableError) -> bool:
    """Whether `error`, raised from what the library raised, says that the server is there but takes no writes from us."""
    cause = error.__cause__
    return cause is not None and (_is_forbidden(cause) or _is_read_only(cause) or _is_full(cause))


def _is_forbidden(error: BaseException) -> bool:
    # What a script may not do is told without a code.
    in_script = isinstance(error, redis.ResponseError) and "user executing the script can't" in _text(error)
    return in_script or _is(error, of_redis.NoPermissionError, "NOPERM")


def _is_read_only(error: BaseException) -> bool:
    return _is(error, redis.ReadOnlyError, "READONLY")


def _is_full(error: BaseException) -> bool:
    return _is(error, of_redis.OutOfMemoryError, "OOM")


def _is(error: BaseException, kinds: type[Exception] | tuple[type[Exception], ...], *codes: str) -> bool:
    # By its beginning too: what a script met arrives as an ordinary ResponseError.
    return isinstance(error, kinds) or (isinstance(error, redis.ResponseError) and _text(error).startswith(codes))


def _text(error: BaseException) -> str:
    return str(error).rpartition("caused error: ")[2]  # a pipeline quotes its command, keys and values
