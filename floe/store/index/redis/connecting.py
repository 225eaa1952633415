"""Connections: one seed tells whether it is a standalone server or a cluster; Sentinels name the primary.

Every connection, to the seed, to a discovered node or to a Sentinel, verifies certificate and host name under TLS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry
from redis.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)

from floe.store.errors import FloeError, UnavailableError
from floe.store.index.redis.address import RedisAddress
from floe.store.index.redis.credentials import REAUTH_SECONDS, FileCredentials, provider
from floe.store.index.redis.faults import translate

STANDALONE, CLUSTER, SENTINEL = "standalone", "cluster", "sentinel"
_CONNECT_TIMEOUT = 2.0  # seconds for a TCP or TLS connection to one address
_ANSWER_TIMEOUT = 5.0  # seconds for an answer; the largest, of a pipeline, takes some 50 ms of a server
_CLUSTER_RETRIES = 3  # after errors that a look at the cluster's new layout may mend


@dataclass(frozen=True)
class Server:
    """A connected index: `mode` of STANDALONE, CLUSTER, SENTINEL; `info` is the seed's INFO when it was connected."""

    client: Any
    mode: str
    info: Mapping[str, Any]

    def pipeline(self) -> Any:
        """A pipeline without MULTI, to one server or to each shard."""
        return self.client.pipeline(transaction=False)

    def infos(self) -> list[Mapping[str, Any]]:
        """INFO of every primary."""
        if self.mode != CLUSTER:
            return [self.client.info()]
        found = self.client.info(target_nodes=RedisCluster.PRIMARIES)
        return [found] if "redis_version" in found else list(found.values())

    def close(self) -> None:
        """Close all connections."""
        self.client.close()


class _Reauthenticating:
    """Mixed into a connection: it authenticates again before a command when its last AUTH is REAUTH_SECONDS ago.

    redis-py checks a connection's health before it sends a command or a whole pipeline, never in the middle of one: so an
    AUTH cannot fall between MULTI and EXEC, which the servers refuse (Floe sends no MULTI anyway).
    """

    clock: Callable[[], float] = time.monotonic

    def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - redis-py's signature
        try:
            super().on_connect_check_health(check_health=check_health)  # type: ignore[misc]
        except redis.RedisError:
            raise
        except Exception as error:
            # redis-py closes the socket only for its own errors; left open it would be used without AUTH.
            self.disconnect()  # type: ignore[attr-defined]
            raise redis.AuthenticationError(str(error)) from error
        self._authenticated = self.clock()

    def check_health(self) -> None:
        super().check_health()  # type: ignore[misc]
        credentials = self.credential_provider  # type: ignore[attr-defined]
        if credentials is None or self.clock() - self._authenticated < REAUTH_SECONDS:
            return
        try:
            self.send_command("AUTH", *credentials.get_credentials(), check_health=False)  # type: ignore[attr-defined]
            self.read_response()  # type: ignore[attr-defined]
        except BaseException as error:
            self.disconnect()  # type: ignore[attr-defined]
            if isinstance(error, FloeError):
                raise redis.AuthenticationError(str(error)) from error
            raise
        self._authenticated = self.clock()


class _Connection(_Reauthenticating, redis.Connection):
    pass


class _TLSConnection(_Reauthenticating, redis.SSLConnection):
    pass


class _SentinelConnection(_Reauthenticating, SentinelManagedConnection):
    pass


class _SentinelTLSConnection(_Reauthenticating, SentinelManagedSSLConnection):
    pass


def connect(address: RedisAddress) -> Server:
    """A connected Server, once one of the hosts has answered INFO. Raises UnavailableError."""
    common = _connection_options(address)
    if address.option("sentinel"):
        try:
            client = _through_sentinels(address, common)
            return Server(client, SENTINEL, client.info())
        except Exception as error:
            raise translate(error, address.shown) from error
    failure: Exception | None = None
    for host, port in address.hosts:
        seed = _standalone(address, host, port, common)
        try:
            info = seed.info()
            if not info.get("cluster_enabled"):
                return Server(seed, STANDALONE, info)
            return Server(_cluster(address, common), CLUSTER, info)
        except Exception as error:  # those about clusters have no base in common with the library's others
            seed.close()
            failure = error
    assert failure is not None
    raise translate(failure, address.shown) from failure


def _connection_options(address: RedisAddress) -> dict[str, Any]:
    options: dict[str, Any] = {
        "credential_provider": provider(address),
        "socket_connect_timeout": _CONNECT_TIMEOUT,
        "socket_timeout": _ANSWER_TIMEOUT,
        "socket_keepalive": True,
        "protocol": 2,
        "driver_info": None,  # no CLIENT SETINFO: one command and one permission less
    }
    if address.tls:
        options |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
        files = {"ssl_ca_certs": address.option("ca"), "ssl_certfile": address.option("cert")}
        files["ssl_keyfile"] = address.option("key")
        for name, file in files.items():
            if file is not None:
                _check_readable(file)
                options[name] = file
    return options


def _check_readable(file: str) -> None:
    try:
        with Path(file).open("rb"):
            pass
    except OSError as error:
        raise UnavailableError(
            f"cannot read {file}, named in the index's address: {error.strerror}", hint="check ca=, cert= and key="
        ) from error


def _standalone(address: RedisAddress, host: str, port: int, common: Mapping[str, Any]) -> Any:
    kind = _TLSConnection if address.tls else _Connection
    retry = Retry(NoBackoff(), 1)  # a connection that was closed while it was idle
    return redis.Redis.from_pool(
        redis.ConnectionPool(connection_class=kind, host=host, port=port, retry=retry, **common)
    )


def _cluster(address: RedisAddress, common: Mapping[str, Any]) -> Any:
    host, port = address.hosts[0]
    name = f"[{host}]" if ":" in host else host
    return RedisCluster(
        # By URL, since only then is connection_class used; redis:// here says nothing about TLS, the class does.
        url=f"redis://{name}:{port}",
        startup_nodes=[ClusterNode(*other) for other in address.hosts[1:]],  # type: ignore[no-untyped-call]
        connection_class=_TLSConnection if address.tls else _Connection,
        require_full_coverage=False,  # a missing shard fails its own slots only
        dynamic_startup_nodes=False,  # the seed's name outlives every node
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), _CLUSTER_RETRIES),
        **common,
    )


def _through_sentinels(address: RedisAddress, common: Mapping[str, Any]) -> Any:
    file = address.option("sentinel_password_file")
    own = {**common, "credential_provider": FileCredentials(None, Path(file)) if file else None}
    own["retry"] = Retry(NoBackoff(), 0)  # else ten times over, a refused password too
    if address.tls:
        own["ssl"] = True
    sentinel = Sentinel(list(address.hosts), sentinel_kwargs=own)  # type: ignore[no-untyped-call]
    kind = _SentinelTLSConnection if address.tls else _SentinelConnection
    pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
        address.option("sentinel"), sentinel, connection_class=kind, retry=Retry(NoBackoff(), 1), **common
    )
    return redis.Redis.from_pool(pool)
