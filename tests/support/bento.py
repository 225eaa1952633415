"""BentoML's store on disk, as BentoML itself writes it: Bentos, models, `latest` files; and Hugging Face's cache.

`tests/containerd/test_bento_real.py` compares it with what the real package writes.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from support.images import add

DATA = Path(__file__).parent / "bentos"
SPECS = {1: "bento-1.1.11.yaml", 2: "bento-1.4.40.yaml"}
TAGS = {1: "old_svc:v1", 2: "front:v1"}
MODELS = {1: ("oldie:7",), 2: ("own:b2", "shared:1")}
USER = 1034
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_MODEL_YAML = """\
name: {name}
version: {version!r}
module: ''
labels: {{}}
options: {{}}
metadata: {{}}
context:
  framework_name: ''
  framework_versions: {{}}
  bentoml_version: 1.4.40
  python_version: 3.11.7
signatures: {{}}
api_version: v1
creation_time: '{created}'
"""
ENTRYPOINT = '#!/bin/sh\nexec "$@"\n'
_ENTRY = """
- tag: {tag}
  creation_time: '2026-01-01T00:00:00+00:00'
  registry: huggingface
  metadata:
    model_id: {model_id}
    revision: {revision}
    endpoint: https://huggingface.co
    include: null
    exclude: null
"""


class BentoStore:
    """`$BENTOML_HOME` at `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def model(self, tag: str, content: Mapping[str, bytes], *, created: str = "2026-01-01T00:00:00+00:00") -> Path:
        """Save a model."""
        name, _, version = tag.partition(":")
        path = self.home / "models" / name / version
        _write(
            path, {**content, "model.yaml": _MODEL_YAML.format(name=name, version=version, created=created).encode()}
        )
        (path.parent / "latest").write_text(version)
        path.chmod(0o700)  # BentoML makes it as a temporary directory
        return path

    def bento(self, spec: int, *, tag: str | None = None, yaml: str | None = None, models: bool = True) -> Path:
        """Save the Bento of that spec, under its own `tag` or another one; `models`: those it names, too."""
        text = yaml if yaml is not None else (DATA / SPECS[spec]).read_text()
        name, _, version = (tag or TAGS[spec]).partition(":")
        own = TAGS[spec].partition(":")
        text = text.replace(f"name: {own[0]}\n", f"name: {name}\n", 1).replace(
            f"version: {own[2]}\n", f"version: {version}\n", 1
        )
        path = self.home / "bentos" / name / version
        files = {
            "bento.yaml": text,
            "README.md": f"# {name}",
            "apis/openapi.yaml": "openapi: 3.0.2\n",
            "src/service.py": "import bentoml\n",
            "src/data/ünïcode name": "x",
            "env/python/requirements.txt": "bentoml\n",
            "env/docker/Dockerfile": "FROM base\nRUN true\n",
            "env/docker/entrypoint.sh": ENTRYPOINT,
        }
        _write(path, {name: data.encode() for name, data in files.items()})
        (path.parent / "latest").write_text(version)
        for number, model in enumerate(MODELS[spec] if models else ()):
            if not (self.home / "models" / model.replace(":", "/")).exists():
                self.model(model, {"weights.bin": f"{model} {number}".encode() * 5000, "sub/config.json": b"{}"})
        return path

    def export(self, bento: Path, archive: Path, models: Sequence[str]) -> Path:
        """`bentoml export`: a tar of the Bento with its models in it, compressed with xz."""
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(bento, ".")
            folder = tarfile.TarInfo("./models")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
            for tag in models:
                name, _, version = tag.partition(":")
                tar.add(self.home / "models" / name / version, f"./models/{name}/{version}")
                tar.add(self.home / "models" / name / "latest", f"./models/{name}/latest")
        return archive


def hub_model(
    cache: Path, hub_id: str, content: Mapping[str, bytes], *, commit: str = COMMIT, ref: str = "main"
) -> Path:
    """A model in Hugging Face's cache: blobs, a snapshot of symlinks, a ref."""
    top = cache / ("models--" + hub_id.replace("/", "--"))
    for name, data in content.items():
        blob = top / "blobs" / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = top / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(top).parts) - 1)) / "blobs" / blob.name)
    (top / "refs").mkdir(exist_ok=True)
    (top / "refs" / ref).write_text(commit)
    return top


def hub_entry(hub_id: str, *, revision: str = COMMIT) -> str:
    """A model of the hub as bento.yaml's `models` lists it."""
    tag = f"{hub_id.lower().replace('/', '--')}:{hashlib.md5(f'{hub_id} {revision}'.encode()).hexdigest()}"
    return _ENTRY.format(tag=tag, model_id=hub_id.lower(), revision=revision)


def with_models(spec: int, entries: str) -> str:
    """The bento.yaml of that spec, naming these models too."""
    text = (DATA / SPECS[spec]).read_text()
    return text.replace("models: []\n", f"models:{entries}", 1)


def remove(path: Path) -> None:
    """Take a folder away."""
    shutil.rmtree(path)


def _write(folder: Path, content: Mapping[str, bytes]) -> None:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def stock_layer(context: Path) -> Callable[[tarfile.TarFile], None]:
    """The layer that `COPY --chown=bentoml:bentoml . ./` of BentoML's Dockerfile makes of the context that it gives a builder."""

    def owned(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = USER
        info.uname = info.gname = ""
        return info

    def fill(tar: tarfile.TarFile) -> None:
        for name, uid in (("home", 0), ("home/bentoml", USER)):
            add(tar, name, kind=tarfile.DIRTYPE, mode=0o755, uid=uid, gid=uid)
        tar.add(context, "home/bentoml/bento", filter=owned)

    return fill
