"""A webhook of indexers, and who tells it something."""

import contextlib
import http.client
import json

from support import images

from floe.indexer.webhook import Webhook, parse_listen

SECRET = "0123456789abcdef0123456789abcdef"


@contextlib.contextmanager
def webhook(queue, folder, **options):
    file = folder / "secret"
    file.write_text(SECRET + "\n")
    hook = Webhook(parse_listen("127.0.0.1:0"), file, queue, **options)
    try:
        yield hook
    finally:
        hook.close()


def post(hook, body, *, secret=SECRET, method="POST", path="/", **headers):
    connection = http.client.HTTPConnection(*hook.address, timeout=60)
    given = {"Authorization": f"Bearer {secret}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    with contextlib.closing(connection):
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), given)
        with connection.getresponse() as answer:
            return answer.status


def event(host, repository, tag, **more):
    target = {
        "mediaType": images.MANIFEST,
        "repository": repository,
        "tag": tag,
        "digest": "sha256:" + "a" * 64,
        **more,
    }
    return {"events": [{"action": "push", "target": target, "request": {"host": host}}]}
