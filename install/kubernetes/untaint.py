"""Takes the startup taint off this pod's node once Floe serves there, and again whenever the node comes back with it.

Runs without rights on the node, with a token that may read and patch nodes: install/kubernetes/base/rbac.yaml, and
admission.yaml, which leaves it nothing but this taint of its own node. Needs the standard library alone.

Variables: NODE_NAME; TAINT, the key; STATE, a file that is there while Floe serves. In it stands the runtime handler that
Floe is for on this node, if it is for one alone: the node must name that first, where kubelet says which there are. The
cluster's address and the token are where Kubernetes puts them. It never ends by itself; what fails is said once and tried
again.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_SOON, _LATER = 5.0, 60.0  # seconds between two looks, before and after the taint is gone
_TIMEOUT = 15.0
_ANSWER_MAX = 4 << 20  # bytes; a node with many images has some hundred KiB


class WaitingError(Exception):
    """Not yet; the text says for what."""


def patch_for(taints: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The JSON patch (RFC 6902) that removes all taints `key`; empty where there are none.

    Each removal tests first what stands there: when somebody else changes the list meanwhile, the patch fails.
    """
    patch: list[dict[str, Any]] = []
    for number in reversed(range(len(taints))):  # later ones first: the numbers of the others stay
        if taints[number]["key"] == key:
            path = f"/spec/taints/{number}"
            patch += [{"op": "test", "path": path, "value": taints[number]}, {"op": "remove", "path": path}]
    return patch


def check_handler(node: dict[str, Any], handler: str) -> None:
    """WaitingError unless kubelet has seen the runtime handler. Kubelets and runtimes that name none are believed."""
    known = [one.get("name", "") for one in node.get("status", {}).get("runtimeHandlers") or []]
    if handler and known and handler not in known:
        raise WaitingError(f"kubelet has not seen the runtime handler {handler} yet")


class Cluster:
    """The API server, as a pod sees it. `account`: where token and CA lie; both are read anew, since they rotate."""

    def __init__(self, url: str, account: Path = ACCOUNT) -> None:
        self._url = url
        self._account = account

    def node(self, name: str) -> dict[str, Any]:
        """One node. OSError (HTTPError among them), ValueError."""
        return self._ask("GET", name, None)

    def patch(self, name: str, patch: list[dict[str, Any]]) -> None:
        """Change it. The same errors."""
        self._ask("PATCH", name, patch)

    def _ask(self, method: str, name: str, patch: list[dict[str, Any]] | None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._url}/api/v1/nodes/{name}",
            data=None if patch is None else json.dumps(patch).encode(),
            method=method,
            headers={
                "Authorization": f"Bearer {(self._account / 'token').read_text().strip()}",
                "Accept": "application/json",
                "Content-Type": "application/json-patch+json",
            },
        )
        context = None
        if self._url.startswith("https://"):
            context = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
        with urllib.request.urlopen(request, timeout=_TIMEOUT, context=context) as answer:
            found: dict[str, Any] = json.loads(answer.read(_ANSWER_MAX))
        return found


def look(cluster: Cluster, node_name: str, taint: str, state: Path) -> str:
    """Remove the taint when it is there and may go: what was done, or empty. WaitingError, OSError, ValueError."""
    try:
        handler = state.read_text().strip()
    except FileNotFoundError:
        raise WaitingError("Floe does not serve on this node yet") from None
    node = cluster.node(node_name)
    patch = patch_for(node.get("spec", {}).get("taints") or [], taint)
    if not patch:
        return ""
    check_handler(node, handler)
    cluster.patch(node_name, patch)
    return f"removed the taint {taint} from {node_name}"


def main() -> None:
    """Look, for ever."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT_HTTPS"]
    cluster = Cluster(f"https://{f'[{host}]' if ':' in host else host}:{port}")
    node, taint, state = os.environ["NODE_NAME"], os.environ["TAINT"], Path(os.environ["STATE"])
    said = ""
    while True:
        try:
            done, pause = look(cluster, node, taint, state), _LATER
        except WaitingError as error:
            done, pause = str(error), _SOON
        except (OSError, ValueError) as error:
            done, pause = f"error: {_text(error)}", _SOON
        if done and done != said:
            sys.stderr.write(f"untaint: {done}\n")
        said = done
        time.sleep(pause)


def _text(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        # The API server says why: which right is missing, or which policy refuses.
        return f"{error} {error.read(2000).decode(errors='replace')}".strip()
    return str(error)


if __name__ == "__main__":
    main()
