"""An HTTP proxy on loopback that leads host names of the tests' choice to their own servers: CONNECT, nothing else."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler

from support.loopback import Loopback


class ConnectProxy(Loopback):
    """`routes` maps `HOST:PORT` to a port on loopback; anything else is refused. `asked` holds what was asked for."""

    def __init__(self, routes: Mapping[str, int]) -> None:
        super().__init__(_Handler)
        self.routes = dict(routes)
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    server: ConnectProxy

    def log_message(self, *_: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.server.asked.append(self.path)
        port = self.server.routes.get(self.path)
        if port is None:
            self.send_error(403)
            return
        with socket.create_connection(("127.0.0.1", port), timeout=30) as server:
            self.send_response(200)
            self.end_headers()
            self._pass(self.connection, server)

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        self.close_connection = True
        with selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in ready.select():
                    data = key.fileobj.recv(65536)
                    if not data:
                        return
                    key.data.sendall(data)
