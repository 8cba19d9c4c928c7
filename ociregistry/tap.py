"""The command line: what twistd is told becomes the settings, and a daemon or a command that ends the process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from twisted.application.service import Service
from twisted.python import usage

from ociregistry import __version__
from ociregistry.commands.check import report
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.daemon import Daemon, exit_with
from ociregistry.settings import OPTIONS, Settings, load_settings

_NOT_YET_OPTIONS = frozenset(
    {
        *("concurrent", "arch", "os", "preload-images"),
        *("load-images", "list-cache", "prune", "prune-before", "dry-run"),
    }
)
_NOT_YET_COMMANDS = ("load", "list", "prune", "verify", "export", "containerd-config", "version")


class _CommonOptions(usage.Options):
    """Options that are taken before and after the word `serve`."""

    optParameters = [
        *([option.name, None, None, f"{option.help} [{option.default}]"] for option in OPTIONS if not option.is_flag),
        ["config-path", None, None, "YAML file with upstreams and options."],
    ]
    optFlags = [
        *([option.name, None, option.help] for option in OPTIONS if option.is_flag),
        ["no-complete-images", None, "Leave it to clients which layers are fetched."],
    ]

    def __init__(self) -> None:
        super().__init__()
        self.listen: list[str] = []

    def opt_listen(self, endpoint: str) -> None:
        """Endpoint to listen on in place of --port, such as tcp:8080:interface=127.0.0.1. Repeatable."""
        self.listen.append(endpoint)

    def opt_version(self) -> NoReturn:
        """Print the version and exit."""
        print(f"ociregistry {__version__}")
        raise SystemExit(0)


class Serve(_CommonOptions):
    """The options of the daemon, with `serve` written out."""

    longdesc = "Runs the daemon."


class Check(_CommonOptions):
    """The options of `check`."""

    longdesc = "Prints each upstream of the configuration, and how it will be reached. Contacts nobody."


class _NotYet(usage.Options):
    def parseOptions(self, options: Sequence[str] | None = None) -> NoReturn:
        command = self.parent.subCommand if self.parent else ""
        raise usage.UsageError(f"{command} is not available in this version")


class Options(_CommonOptions):
    """The command line behind `twistd ociregistry`."""

    synopsis = "[options] [serve [options]]"
    longdesc = "A pull-only, pull-through, caching OCI registry server."
    subCommands = [
        ["serve", None, Serve, "run the daemon, which is also the default"],
        ["check", None, Check, "print how each upstream will be reached"],
        *([name, None, _NotYet, "not in this version"] for name in _NOT_YET_COMMANDS),
    ]

    settings: Settings
    load: Callable[[], Settings]
    """Makes the settings again, from the same options and the file as it is then; raises `ConfigInvalid`."""

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """As twistd calls it; a mistake ends the process with one line and exit status 2."""
        try:
            for argument in options or ():
                if argument.startswith("--") and argument[2:].partition("=")[0] in _NOT_YET_OPTIONS:
                    raise usage.UsageError(f"{argument} is not available in this version")
            super().parseOptions(options)
        except usage.UsageError as error:
            exit_with(f"{error} (--help lists the options)", 2)

    def postOptions(self) -> None:
        """Makes the settings, so that a mistake shows before anything starts."""
        given = [self, self.subOptions] if self.subCommand else [self]
        values = {
            option.key: "true" if option.is_flag else options[option.name]
            for options in given
            for option in OPTIONS
            if options[option.name] not in (None, 0)
        }
        if any(options["no-complete-images"] for options in given):
            if "complete_images" in values:
                exit_with("--complete-images and --no-complete-images exclude each other", 2)
            values["complete_images"] = "false"
        listen = tuple(endpoint for options in given for endpoint in options.listen)
        config_paths = [options["config-path"] for options in given if options["config-path"] is not None]
        # twistd may go to another folder.
        if "" in config_paths:
            exit_with("--config-path: the path of a file is expected", 2)
        config_path = Path(config_paths[-1]).absolute() if config_paths else None
        self.load = partial(load_settings, values, listen, config_path)
        try:
            self.settings = self.load()
        except ConfigInvalid as error:
            exit_with(str(error), 2)
        if self.subCommand == "check":
            self._check()

    def _check(self) -> NoReturn:
        lines = "".join(f"{line}\n" for line in report(self.settings))
        try:
            sys.stdout.buffer.write(lines.encode(sys.stdout.encoding, "backslashreplace"))
            sys.stdout.flush()
        except OSError as error:
            exit_with(f"cannot print: {error.strerror}", 1)
        for warning in self.settings.warnings:
            print(f"ociregistry: warning: {warning}", file=sys.__stderr__)
        raise SystemExit(0)


def makeService(options: Options, reactor: Any = None) -> Service:
    """The daemon that `options` describe."""
    if reactor is None:
        from twisted.internet import reactor
    assert options.parent is not None
    return Daemon(options.settings, options.load, reactor, options.parent)
