"""Flags that many commands share; each may stand before or after the command's name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from floe.cli import logs
from floe.cli import settings as settings_module
from floe.cli.exit import USAGE
from floe.cli.settings import HELP, KEYS, Settings, flag_name

# argparse has no public name for what add_subparsers returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001

SHARED = (
    *("store", "index", "cache_dir", "cache_dirs", "root", "run_dir", "cache_size", "cache_min_free"),
    *("store_timeout", "log_level", "log_format"),
)
SIGNING = ("signing_key", "trusted_keys")
PUSHING = ("spool_dir", "workers", *SIGNING)
MOUNTING = ("mounter", "loop")
TRUSTING = ("trusted_keys",)
READING = (
    *("readahead", "read_deadline", "fetch_memory", "busy_poll", "profiles"),
    *("completion", "completion_rate", "model_policy", "cache_bypass"),
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors look like all of Floe's, and whose flags are never guessed from a prefix."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and how the command is used; exit 2."""
        sys.stderr.write(f"floe: error: {message}\nfloe: hint: {self.format_usage().strip()}\n")
        sys.exit(USAGE)


def add_command(
    commands: Commands, name: str, text: str, run: Callable[[argparse.Namespace], int] | None = None
) -> argparse.ArgumentParser:
    """A command called `name`, described by `text`, that takes the shared flags; without `run` it has commands below."""
    parser = commands.add_parser(name, help=text[:1].lower() + text[1:].rstrip("."), description=text)
    add_shared(parser)
    parser.set_defaults(parser=parser, **({"run": run} if run else {}))
    return parser


def add_commands(parser: argparse.ArgumentParser, dest: str | None = None, *, shown: tuple[str, ...] = ()) -> Commands:
    """The commands below a noun, or below `floe` itself; before them stands any setting's flag, `shown` ones already."""
    for key in KEYS:
        if key not in (*SHARED, *shown):  # those are there already
            _add_setting(parser, key, help=argparse.SUPPRESS)
    return parser.add_subparsers(dest=dest or argparse.SUPPRESS, metavar="COMMAND", parser_class=Parser)


def add_settings(parser: argparse.ArgumentParser, *keys: str, aliases: tuple[str, ...] = ()) -> None:
    """A flag for each setting in `keys`. No default here: a flag not given leaves file and environment alone."""
    for key in keys:
        _add_setting(parser, key, *aliases)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The flags of every command."""
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"settings file, '' for none ({settings_module.DEFAULT_CONFIG})",
    )
    for key in SHARED:
        _add_setting(group, key)


def _add_setting(parser: argparse._ActionsContainer, key: str, *aliases: str, help: str | None = None) -> None:  # noqa: A002 - argparse's names
    parser.add_argument(
        f"--{flag_name(key)}",
        *aliases,
        dest=key,
        default=argparse.SUPPRESS,
        metavar=_metavar(key),
        help=help or HELP[key],
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def add_verify(parser: argparse.ArgumentParser) -> None:
    """--verify."""
    text = (
        "read what the store has of it, too, and heal packs that are damaged; those that nodes reported are in any case"
    )
    parser.add_argument("--verify", action="store_true", help=text)


def add_platform(
    parser: argparse.ArgumentParser, text: str = "of a multi-platform image", *, several: bool = False
) -> None:
    """--platform: one, None without it; or a list."""
    action = "append" if several else "store"
    parser.add_argument("--platform", action=action, default=None, metavar="OS/ARCH[/VARIANT]", help=text)


def add_plain_http(parser: argparse.ArgumentParser, *sides: str) -> None:
    """--plain-http; of a command that talks to a registry on each of two `sides`, also --SIDE-plain-http."""
    which = "both registries" if sides else "the registry"
    parser.add_argument("--plain-http", action="store_true", help=f"talk to {which} without TLS")
    for side in sides:
        text = f"talk to {side.upper()}'s registry without TLS"
        parser.add_argument(f"--{side}-plain-http", action="store_true", help=text)


def settings_of(args: argparse.Namespace, *, daemon: bool = False) -> Settings:
    """The settings in force for the parsed command line; logging is set up by them."""
    defaults = settings_module.defaults_for(os.geteuid(), os.environ)
    settings = settings_module.load(vars(args), os.environ, getattr(args, "config", None), defaults)
    logs.set_up(settings.log_level, settings.log_format, daemon=daemon)
    return settings


def _metavar(key: str) -> str:
    kinds = {"store": "URL", "index": "URL", "log_level": "LEVEL", "log_format": "FORMAT", "address": "SOCKET"}
    if key in kinds:
        return kinds[key]
    if key.endswith("_dir") or key == "root":
        return "DIR"
    if key.endswith("_metrics"):
        return "ADDRESS"
    if key.endswith(("_timeout", "_deadline")):
        return "SECONDS"
    return {
        "workers": "N",
        "on_store_error": "WHAT",
        "registry_config": "DIRS",
        "cache_dirs": "DIRS",
        "cache_bypass": "WHEN",
        "busy_poll": "WHEN",
        "mounter": "WHAT",
        "loop": "WHEN",
        "profiles": "WHAT",
        "completion": "WHEN",
        "model_policy": "TABLES",
        "csi_rules": "TABLES",
        "image_policy": "TABLES",
        "image_grace": "TIME",
        "seed": "WHICH",
        "containerd_socket": "SOCKET",
        "otlp_endpoint": "URL",
        "signing_key": "FILE",
        "trusted_keys": "KEYS",
        "node_name": "NAME",
        "node_labels": "LABELS",
        "heartbeat": "SECONDS",
    }.get(key, "SIZE")
