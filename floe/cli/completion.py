"""`floe completion`: scripts for bash, zsh and fish, made from the command line's own parser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from floe.cli.options import Commands, add_command


@dataclass(frozen=True)
class Word:
    """What may come next: a flag or a command's name, its one-line help, and whether it takes a value."""

    text: str
    help: str
    takes_value: bool = False


Tree = Mapping[str, tuple[Word, ...]]
"""By the commands given so far ("model push"; "" at the start): the words that may follow."""


def add_parser(commands: Commands) -> None:
    """Add `floe completion`."""
    parser = add_command(commands, "completion", "Print a shell completion script.", run)
    parser.add_argument("shell", choices=sorted(_SHELLS), help="source the output in this shell")


def run(args: argparse.Namespace) -> int:
    """Print the script for the shell asked for."""
    from floe.cli.main import build_parser  # noqa: PLC0415 - main imports this module

    sys.stdout.write(_SHELLS[args.shell](words_of(build_parser())))
    return 0


def words_of(parser: argparse.ArgumentParser) -> Tree:
    """The words of a parser and of all the commands below it; what its help hides is left out."""
    return dict(_walk(parser, ""))


def _walk(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, tuple[Word, ...]]]:
    words: list[Word] = []
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to list them
        if action.help == argparse.SUPPRESS:
            continue
        text = (action.help or "").replace("%%", "%")
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - likewise
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001 - likewise
            for name, below in action.choices.items():
                words.append(Word(name, helps.get(name, "")))
                yield from _walk(below, f"{path} {name}".strip())
        elif action.option_strings:
            takes = action.nargs != 0
            words.extend(Word(flag, text, takes) for flag in action.option_strings if flag.startswith("--"))
        elif action.choices:
            words.extend(Word(str(choice), "") for choice in action.choices)
    yield path, tuple(words)


def _bash(tree: Tree) -> str:
    cases = "\n".join(
        f"    '{path}') words='{' '.join(word.text for word in words)}' ;;" for path, words in tree.items()
    )
    return f"""# floe completion for bash: source this file
_floe() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} path='' words='' skip='' word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    if [[ -n $skip ]]; then skip=''; continue; fi
    case $word in
    {_values(tree)}) skip=1 ;;
    -*) ;;
    *) case "${{path:+$path }}$word" in
       {"|".join(_quoted(path) for path in tree if path)}) path="${{path:+$path }}$word" ;;
       esac ;;
    esac
  done
  case $previous in
  {_values(tree)}) compopt -o default; COMPREPLY=(); return ;;
  esac
  case $path in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if [[ ${{#COMPREPLY[@]}} -eq 0 ]]; then compopt -o default; fi
}}
complete -F _floe floe
"""


def _zsh(tree: Tree) -> str:
    cases = "\n".join(
        f"    '{path}') words_=({' '.join(_zsh_word(word) for word in words)}) ;;" for path, words in tree.items()
    )
    return f"""#compdef floe
# floe completion for zsh: put this file into a directory of $fpath as _floe
_floe() {{
  local path_='' skip='' word
  local -a words_
  for word in ${{words[2,CURRENT-1]}}; do
    if [[ -n $skip ]]; then skip=''; continue; fi
    case $word in
    {_values(tree)}) skip=1 ;;
    -*) ;;
    *) case "${{path_:+$path_ }}$word" in
       ({"|".join(_quoted(path) for path in tree if path)}) path_="${{path_:+$path_ }}$word" ;;
       esac ;;
    esac
  done
  if [[ -n $skip ]]; then _files; return; fi
  case $path_ in
{cases}
  esac
  _describe 'floe' words_
  _files
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _floe "$@"; else compdef _floe floe; fi
"""


def _fish(tree: Tree) -> str:
    lines = [
        "# floe completion for fish: put this file into ~/.config/fish/completions/floe.fish",
        "function __floe_path",
        "  set -l path; set -l skip 0",
        "  for word in (commandline -opc)[2..-1]",
        "    if test $skip = 1; set skip 0; continue; end",
        f"    if contains -- $word {_values(tree).replace('|', ' ')}; set skip 1; continue; end",
        "    if string match -q -- '-*' $word; continue; end",
        f"    if contains -- (string join ' ' $path $word) {' '.join(_quoted(path) for path in tree if path)}",
        "      set -a path $word",
        "    end",
        "  end",
        "  string join ' ' $path",
        "end",
    ]
    for path, words in tree.items():
        condition = f"-n 'test (__floe_path) = \"{path}\"'"
        for word in words:
            what = (
                f"-l {word.text[2:]}" + (" -r" if word.takes_value else "")
                if word.text[:2] == "--"
                else "-a " + word.text
            )
            lines.append(f"complete -c floe {condition} {what} -d {_quoted(word.help)}")
    return "\n".join(lines) + "\n"


def _values(tree: Tree) -> str:
    """The flags that a value follows, as a shell pattern."""
    return "|".join(sorted({word.text for words in tree.values() for word in words if word.takes_value}))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_word(word: Word) -> str:
    return _quoted(word.text.replace(":", "\\:") + (f":{word.help}" if word.help else ""))


_SHELLS: Mapping[str, Callable[[Tree], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
