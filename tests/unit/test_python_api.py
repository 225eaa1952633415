"""What `import floe` offers to type checkers and to `help`."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import floe

PUBLIC = sorted(floe._PLACES)


def test_the_stub_for_type_checkers_names_what_the_package_has():
    stub = ast.parse(Path(floe.__file__).with_suffix(".pyi").read_text())
    told = {alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == floe._PLACES
    assert Path(floe.__file__).with_name("py.typed").exists()
    assert set(PUBLIC) <= set(dir(floe))
    with pytest.raises(AttributeError):
        floe.nothing  # noqa: B018 - what is looked for


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_explained_and_typed(name):
    what = getattr(floe, name)
    assert inspect.getdoc(what)
    parts = {name: what} if inspect.isfunction(what) else dict(vars(what))
    for part, member in parts.items():
        function = inspect.unwrap(member.fget if isinstance(member, property) else member)
        if not inspect.isfunction(function) or part.startswith("_"):
            continue
        assert inspect.getdoc(function), part
        hints = function.__annotations__
        wanted = {*inspect.signature(function).parameters, "return"} - {"self", "cls"}
        assert wanted <= hints.keys(), part


PROGRAM = """
import io
import floe
from floe.client.files import ModelFile

def use(model: floe.Model, size: int) -> None:
    buffered: io.BufferedReader = model.open("config.json")
    raw: ModelFile = model.open("config.json", buffering=0)
    either: io.BufferedReader | ModelFile = model.open("config.json", buffering=size)
    with model.open("config.json") as file:
        file.peek(1)
"""


def test_what_open_gives_is_known_to_a_strict_type_checker(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    argv = [sys.executable, "-m", "mypy", "--strict", str(program)]
    done = subprocess.run(argv, cwd=Path(floe.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
