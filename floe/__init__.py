"""Floe: containers and models that start before they have arrived.

`floe.open_store` is the way in for programs; docs/PYTHON.md shows it. Types are in the stub beside this file: daemons and
commands import this package, and need none of it.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_PLACES = {
    "Entry": "floe.client.tree",
    "FloeError": "floe.store.errors",
    "Model": "floe.client.store",
    "ModelInfo": "floe.client.store",
    "Mounted": "floe.client.store",
    "SafeTensors": "floe.client.safetensors",
    "Store": "floe.client.store",
    "open_store": "floe.client.store",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'floe' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
