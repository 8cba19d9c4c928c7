"""The command line: parses the options of `twistd ociregistry`, then makes the daemon or runs a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from twisted.application.service import Service
from twisted.python import usage

from ociregistry.commands.options import Command, CommandFailed, CommonOptions
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.process import exit_with, unusable_store, use_monotonic_clock
from ociregistry.settings import OPTIONS, Settings, load_settings


class Serve(CommonOptions):
    """The options of the subcommand `serve`."""

    longdesc = "Runs the daemon."
    examples = ("serve --port 8080", "serve --preload-images imagelist")


class Options(CommonOptions):
    """The command line behind `twistd ociregistry`."""

    synopsis = "[options] [COMMAND [options]]"
    examples = ("--port 8080 --image-path ./images", "list --long")
    longdesc = "A pull-only, pull-through, caching OCI registry server."
    # Aliases of commands, for compatibility with the Go server of the same name.
    optParameters = [
        ["load-images", None, None, "The same as: load FILE"],
        ["prune", None, None, "The same as: prune --pattern EXPR"],
        ["prune-before", None, None, "The same as: prune --before TIME"],
    ]
    optFlags = [
        ["list-cache", None, "The same as: list"],
        ["dry-run", None, "With --prune or --prune-before: print what would be removed, and change nothing."],
    ]
    # Each is imported when it runs, and the daemon when it is made: imports are most of the time of a start.
    subCommands = [
        ["serve", None, Serve, "run the daemon, which is also the default"],
        ["load", None, lambda: import_module("ociregistry.commands.load").Load(), "load images into the store"],
        ["list", None, lambda: import_module("ociregistry.commands.list").List(), "print the images in the store"],
        [
            "images",
            None,
            lambda: import_module("ociregistry.commands.images").Images(),
            "print the images that lists and Kubernetes objects name",
        ],
        ["prune", None, lambda: import_module("ociregistry.commands.prune").Prune(), "remove images from the store"],
        [
            "verify",
            None,
            lambda: import_module("ociregistry.commands.verify").Verify(),
            "hash every blob and record in the store",
        ],
        [
            "export",
            None,
            lambda: import_module("ociregistry.commands.export").Export(),
            "write images into an archive",
        ],
        [
            "check",
            None,
            lambda: import_module("ociregistry.commands.check").Check(),
            "print how each upstream will be reached",
        ],
        [
            "status",
            None,
            lambda: import_module("ociregistry.commands.status").Status(),
            "print what the daemon does, and whether it is well",
        ],
        ["version", None, lambda: import_module("ociregistry.commands.version").Version(), "print the version"],
        [
            "containerd-config",
            None,
            lambda: import_module("ociregistry.commands.containerd_config").ContainerdConfig(),
            "print or write the configuration of containerd and other clients",
        ],
    ]

    settings: Settings
    load: Callable[[], Settings]
    """Builds the settings again from the same options and the current file; raises `ConfigInvalid`."""

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse the options; on a usage error, exit with one line and status 2."""
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            from ociregistry.commands.help import did_you_mean

            listed = "commands" if str(error).startswith("Unknown command") else "options"
            exit_with(f"{error}{did_you_mean(str(error), self)} (--help lists the {listed})", 2)

    def postOptions(self) -> None:
        """Build the settings, so that an error shows before anything starts, then run the command, if any."""
        command = self._command()
        self._make_settings()
        if command is not None:
            self._run(command)

    def _command(self) -> Command | None:
        """Return the command to run, or None to run the daemon.

        Raises:
            usage.UsageError: several commands are given, or an option does not fit the command.
        """
        spelled = list(self._spelled())
        if self.subCommand and isinstance(self.subOptions, Command):
            spelled.append(self.subOptions)
        if len(spelled) > 1 or (spelled and self.subCommand == "serve"):
            raise usage.UsageError("one thing at a time: these options are commands of their own")
        command = spelled[0] if spelled else None
        if self["dry-run"]:
            if command is None or "dry-run" not in command:
                raise usage.UsageError("--dry-run goes with prune")
            command["dry-run"] = 1
        return command

    def _spelled(self) -> Iterator[Command]:
        """Yield the commands that are given as options (the aliases)."""
        if self["load-images"] is not None:
            yield self._parsed("load", ["--", self["load-images"]])
        if self["list-cache"]:
            yield self._parsed("list", [])
        pruned = [("--pattern", self["prune"]), ("--before", self["prune-before"])]
        given = [word for option, value in pruned if value is not None for word in (option, value)]
        if given:
            yield self._parsed("prune", given)

    def _parsed(self, name: str, words: Sequence[str]) -> Command:
        commands: Sequence[Any] = self.subCommands
        (command,) = (make() for known, _, make, _ in commands if known == name)
        assert isinstance(command, Command)
        command.parent = self
        command.parseOptions(words)
        return command

    def _make_settings(self) -> None:
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
        if "" in config_paths:
            exit_with("--config-path: the path of a file is expected", 2)
        # Absolute, because twistd may change the working directory.
        config_path = Path(config_paths[-1]).absolute() if config_paths else None
        self.load = partial(load_settings, values, listen, config_path)
        try:
            self.settings = self.load()
        except ConfigInvalid as error:
            exit_with(str(error), 2)

    def _run(self, command: Command) -> NoReturn:
        try:
            status = command.run(self.settings)
        except CommandFailed as error:
            exit_with(str(error), error.status)
        except KeyboardInterrupt:
            exit_with("interrupted", 1)
        except OSError as error:
            exit_with(unusable_store(self.settings.image_path, error), 1)
        raise SystemExit(status)


def makeService(options: Options, reactor: Any = None) -> Service:
    """Make the daemon, as the twistd plugin requires; `reactor` is for tests, None for the installed one."""
    if reactor is None:
        from twisted.internet import reactor

        use_monotonic_clock(reactor)
    from ociregistry.daemon import Daemon

    assert options.parent is not None
    elsewhere = [f"--{name}" for name in ("syslog", "logger") if options.parent.get(name)]
    if options.settings.log_format != "text" and elsewhere:
        where = f"not with twistd's {elsewhere[0]}, only in a file or on the standard output"
        exit_with(f"--log-format {options.settings.log_format}: {where}", 2)
    return Daemon(options.settings, options.load, reactor, options.parent)
