from floe.client.safetensors import SafeTensors as SafeTensors
from floe.client.store import Model as Model
from floe.client.store import ModelInfo as ModelInfo
from floe.client.store import Mounted as Mounted
from floe.client.store import Store as Store
from floe.client.store import open_store as open_store
from floe.client.tree import Entry as Entry
from floe.store.errors import FloeError as FloeError

__version__: str
