"""A server on loopback that answers Redis commands by a table: errors that a real server gives only in rare moments."""

from __future__ import annotations

import socketserver
import threading

INFO = b"redis_version:7.0.0\r\ncluster_enabled:0\r\nmaxmemory_policy:noeviction\r\nrole:master\r\nrun_id:1\r\n"


class FakeRedis(socketserver.ThreadingTCPServer):
    """`answers`: raw RESP by command name in upper case; "*" for all others. INFO is answered as a healthy server does."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), _Session)
        self.answers = {"INFO": b"$%d\r\n%s\r\n" % (len(INFO), INFO), **answers}
        self.seen = []
        self._thread = threading.Thread(target=self.serve_forever, name="fake-redis", kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.server_address[1]}"

    def close(self):
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Session(socketserver.StreamRequestHandler):
    def handle(self):
        while line := self.rfile.readline():
            words = []
            for _ in range(int(line[1:])):
                length = int(self.rfile.readline()[1:])
                words.append(self.rfile.read(length + 2)[:-2])
            name = words[0].decode().upper()
            self.server.seen.append(name)
            self.wfile.write(self.server.answers.get(name) or self.server.answers["*"])
