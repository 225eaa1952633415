"""A read-only registry in this process: serves OCI layouts over plain HTTP and remembers every request."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.images import BuiltImage


class BlobHost:
    """`add(image, name)` serves an image as HOST:PORT/name:tag; `blobs` and `manifests` are the digests asked for.

    `held`: blobs that are sent only once their event is set.
    """

    def __init__(self) -> None:
        self.images: dict[str, BuiltImage] = {}
        self.blobs: list[str] = []
        self.manifests: list[str] = []
        self.held: dict[str, threading.Event] = {}
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def _answer(self, *, body: bool) -> None:
                status, kind, data, digest = host.find(self.path, body)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                if digest:
                    self.send_header("Docker-Content-Digest", digest)
                self.end_headers()
                if body:
                    if digest in host.held:
                        host.held[digest].wait(60)
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that were killed half-way
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def add(self, image: BuiltImage, name: str) -> str:
        """Serve `image`; its reference."""
        self.images[name] = image
        return f"{self.address}/{name}:{image.tag}"

    def add_layout(self, directory: Path, tag: str, name: str) -> str:
        """Serve an image of an OCI layout that somebody else wrote; its reference."""
        index = json.loads((directory / "index.json").read_text())
        tags = [entry.get("annotations", {}).get("org.opencontainers.image.ref.name") for entry in index["manifests"]]
        digest = index["manifests"][tags.index(tag)]["digest"]
        manifest = json.loads((directory / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_text())
        layers = tuple(manifest["layers"])
        return self.add(BuiltImage(directory, tag, digest, manifest["config"]["digest"], (), layers), name)

    def find(self, path: str, body: bool) -> tuple[int, str, bytes, str]:
        """Status, media type, content and digest of what lies at an HTTP path."""
        if path.rstrip("/") == "/v2":
            return 200, "application/json", b"{}", ""
        name, _, rest = path.removeprefix("/v2/").partition("/manifests/")
        if rest and name in self.images:
            image = self.images[name]
            digest = image.manifest_digest if rest == image.tag else rest
            self.manifests.append(digest)
        else:
            name, _, digest = path.removeprefix("/v2/").partition("/blobs/")
            if body:
                self.blobs.append(digest)
        image = self.images.get(name)
        file = image.directory / "blobs" / "sha256" / digest.removeprefix("sha256:") if image else None
        if file is None or not file.is_file():
            return 404, "application/json", json.dumps({"errors": [{"code": "NOT_FOUND"}]}).encode(), ""
        data = file.read_bytes()
        kind = json.loads(data).get("mediaType", "") if rest else "application/octet-stream"
        return 200, kind, data, digest

    def layers_fetched(self) -> int:
        """How many layer blobs were asked for."""
        layers = {layer["digest"] for image in self.images.values() for layer in image.layers}
        return sum(digest in layers for digest in self.blobs)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
