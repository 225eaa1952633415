"""A Bento's own Dockerfile, built without Docker's daemon: by buildah, or by buildctl where a buildkitd runs.

BentoML's Dockerfiles run commands (they install packages), so a builder is needed that runs them. Nothing in them is changed. The context is the
stored Bento, which has no models in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from floe.ingest.bento.find import HUB_MODELS, MODELS, Bento
from floe.store.errors import BadInputError, FloeError, NotFoundError, UnsupportedError

BUILDERS = ("buildah", "buildctl")
DOCKERFILE = Path("env/docker/Dockerfile")
_TAG = "built"


def find_builder(wanted: str | None = None) -> str:
    """The builder to use: `wanted`, or the first of BUILDERS that this machine has. UnsupportedError: none."""
    for name in (wanted,) if wanted else BUILDERS:
        if shutil.which(name):
            return name
    missing = f"{wanted} is not" if wanted else f"neither {' nor '.join(BUILDERS)} is"
    raise UnsupportedError(
        f"a Bento's Dockerfile runs commands, and {missing} on this machine's PATH",
        hint="install buildah, or buildctl with a buildkitd; or give --base IMAGE: an image that has Python and the Bento's packages",
    )


def check_buildable(bento: Bento, environ: Mapping[str, str]) -> dict[str, str]:
    """The secrets of a Bento's build, by their names: what the build needs is there.

    NotFoundError: a Bento without a Dockerfile. BadInputError: a secret that has no value.
    """
    if not (bento.path / DOCKERFILE).is_file():
        raise NotFoundError(
            f"Bento {bento} has no {DOCKERFILE}", hint="build the Bento again, or give --base IMAGE to build upon"
        )
    secrets = {name: environ.get(name) or value for name, value, stage in bento.info.envs if stage == "build"}
    for name, text in secrets.items():
        if not text:
            raise BadInputError(
                f"building Bento {bento} needs the variable {name}", hint=f"set {name} in the environment"
            )
    return secrets


def build(bento: Bento, builder: str, folder: Path, environ: Mapping[str, str], platform: str | None) -> str:
    """Build the Bento's image below the empty `folder`; returns its name, as `open_source` takes it.

    What `check_buildable` raises. FloeError: the builder failed; it said why on stderr.
    """
    secrets = _secrets(check_buildable(bento, environ), folder)
    context = folder / "context"
    shutil.copytree(bento.path, context, symlinks=True, ignore=_models_of(bento.path))
    if builder == "buildctl":
        archive = folder / "image.tar"
        _run(
            [
                *("buildctl", "build", "--frontend", "dockerfile.v0"),
                *("--local", f"context={context}", "--local", f"dockerfile={(context / DOCKERFILE).parent}"),
                *(("--opt", f"platform={platform}") if platform else ()),
                *(word for secret in secrets for word in ("--secret", secret)),
                *("--output", f"type=oci,dest={archive}"),
            ]
        )
        return f"oci-archive:{archive}"
    name = f"localhost/floe-bento:{uuid.uuid4().hex}"
    layout = folder / "layout"
    _run(
        [
            *("buildah", "build", "--file", str(context / DOCKERFILE), "--tag", name, "--format", "oci"),
            *(("--platform", platform) if platform else ()),
            *(word for secret in secrets for word in ("--secret", secret)),
            str(context),
        ]
    )
    try:
        _run(["buildah", "push", name, f"oci:{layout}:{_TAG}"])
    finally:
        subprocess.run(["buildah", "rmi", name], stdout=sys.stderr, check=False)
    return f"oci:{layout}:{_TAG}"


def _models_of(bento: Path):  # type: ignore[no-untyped-def] # noqa: ANN202 - as shutil.copytree has it
    def left_out(folder: str, names: Sequence[str]) -> set[str]:
        return {MODELS, HUB_MODELS} & set(names) if Path(folder) == bento else set()

    return left_out


def _secrets(texts: Mapping[str, str], folder: Path) -> list[str]:
    """`id=NAME,type=file,src=FILE` of each variable that is there during the build only.

    Without the type, buildah takes the file's name for a variable's wherever a variable NAME is set.
    """
    secrets = []
    for name, text in texts.items():
        path = folder / f"secret-{name}"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        secrets.append(f"id={name},type=file,src={path}")
    return secrets


def _run(command: list[str]) -> None:
    """Run a builder, with what it says on stderr: stdout is for Floe's own result."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    except OSError as error:
        raise FloeError(f"{command[0]} cannot be started: {error.strerror}", hint="check its installation") from error
    if done.returncode:
        raise FloeError(
            f"`{' '.join(command[:2])}` failed with status {done.returncode}", hint="what it said stands above"
        )
