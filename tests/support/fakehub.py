"""A stand-in for Hugging Face's hub: the commits of one model, for the real huggingface_hub to download."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def running_hub(hub_id: str, commits: Mapping[str, Mapping[str, bytes]], refs: Mapping[str, str]) -> Iterator[str]:
    """Serve the content of each of the `commits` as the model `hub_id`, whatever capitals it is asked by; yields the address.

    `refs`: which commit `main`, another branch or a tag means.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._answer(body=True)

        def do_HEAD(self):
            self._answer(body=False)

        def _answer(self, *, body):
            path = self.path.partition("?")[0].lower()
            prefix, files = f"/api/models/{hub_id.lower()}", f"/{hub_id.lower()}/resolve/"
            headers = {}
            data = None
            if path.startswith((f"{prefix}/revision/", f"{prefix}/tree/")):
                revision = path.removeprefix(prefix).split("/")[2]
            else:
                revision = path.removeprefix(files).partition("/")[0] if path.startswith(files) else "main"
            commit = refs.get(revision, revision)
            content = commits.get(commit)
            if content is None:
                pass
            elif path == prefix or path.startswith(f"{prefix}/revision/"):
                listed = [{"rfilename": name, "size": len(item)} for name, item in content.items()]
                data = json.dumps({"id": hub_id, "modelId": hub_id, "sha": commit, "siblings": listed}).encode()
                headers["Content-Type"] = "application/json"
            elif path.startswith(f"{prefix}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(item), "oid": hashlib.sha1(item).hexdigest()}
                    for name, item in content.items()
                ]
                data = json.dumps(entries).encode()
                headers["Content-Type"] = "application/json"
            elif path.startswith(files):
                _, _, name = path.removeprefix(files).partition("/")
                data = content.get(name)
                if data is not None:
                    headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit}
            self.send_response(404 if data is None else 200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if body and data:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
