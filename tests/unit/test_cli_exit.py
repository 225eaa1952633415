from pathlib import Path

import pytest

from floe.cli import exit as cli_exit
from floe.store import errors
from floe.store.errors import BadInputError, FloeError, UnavailableError


def classes(base=FloeError):
    return {base}.union(*(classes(below) for below in base.__subclasses__() if below.__module__ == errors.__name__))


def test_every_error_class_is_mapped():
    assert set(cli_exit.EXIT_CODES) == classes()


@pytest.mark.parametrize("kind", sorted(classes(), key=lambda kind: kind.__name__))
def test_an_error_is_a_line_a_hint_and_a_code(kind, capsys):
    def fail():
        raise kind("the thing failed", hint="do this")

    assert cli_exit.guard(fail) == (2 if kind is BadInputError else 1)
    captured = capsys.readouterr()
    assert captured.err == "floe: error: the thing failed\nfloe: hint: do this\n"
    assert captured.out == ""


def test_a_class_of_another_module_goes_by_its_base():
    class OddError(BadInputError):
        pass

    class FlakyError(UnavailableError):
        pass

    assert cli_exit.exit_code(OddError("x")) == 2
    assert cli_exit.exit_code(FlakyError("x")) == 1


def test_no_hint_no_second_line(capsys):
    assert cli_exit.report(FloeError("plain")) == 1
    assert capsys.readouterr().err == "floe: error: plain\n"


def test_interrupted(capsys):
    def fail():
        raise KeyboardInterrupt

    assert cli_exit.guard(fail) == 130
    assert capsys.readouterr().err == "floe: interrupted\n"


def test_an_operating_system_error_names_its_file(capsys):
    assert cli_exit.guard(lambda: Path("/nonexistent/file").stat().st_size) == 1
    assert capsys.readouterr().err == "floe: error: /nonexistent/file: No such file or directory\n"


def test_a_mistake_in_floe_keeps_its_traceback():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli_exit.guard(fail)


def test_the_code_of_the_command_is_passed_on():
    assert cli_exit.guard(lambda: 0) == 0
    assert cli_exit.guard(lambda: 1) == 1
