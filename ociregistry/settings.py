"""Settings: from the command line and a YAML file to one frozen value, or a clear error.

The command line wins over the file, and the file over the defaults. `OPTIONS` is the one table of what may be
set; the command line's parser and the file's reader are both made from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ociregistry.config.file import Config, PruneSettings, VerifySettings, Window, parse_rate, read_config
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.config.registries import RegistrySettings
from ociregistry.config.tls import ServerTls
from ociregistry.config.values import Reserve, parse_reserve
from ociregistry.errors import NameInvalid
from ociregistry.names import DOCKER_HUB, Upstream
from ociregistry.platforms import Platform, machine_architecture, machine_os, parse_platforms

_USUAL_CONNECTIONS = 16

LOG_LEVELS = ("trace", "debug", "info", "warn", "error")


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the daemon is told."""

    image_path: Path
    port: int
    listen: tuple[str, ...]
    """Endpoint descriptions, in place of `port`."""
    reserve: Reserve
    """Room on the disk that downloads leave free."""
    log_level: str
    pull_timeout: float
    """Seconds that a client waits without progress."""
    concurrent: int
    """Images that are loaded at once."""
    max_connections: int
    arch: str
    os: str
    platform: tuple[Platform, ...]
    """What is loaded of manifest lists; empty for everything."""
    with_signatures: bool
    """Whether what refers to an image is loaded with it."""
    preload_images: Path | None
    """A file of image references that the daemon loads."""
    allow_upstreams: tuple[str, ...]
    """Globs; empty for all."""
    default_ns: Upstream
    registries: Mapping[Upstream, RegistrySettings]
    always_pull_latest: bool
    air_gapped: bool
    complete_images: bool
    complete_metadata: bool
    """Whether the manifests and configs of all platforms of an index are kept."""
    complete_platforms: tuple[Platform, ...]
    """The platforms that are always, and alone, completed; empty for those that clients ask for."""
    max_bandwidth: float | None
    """Bytes a second that all upstreams together may bring; None for no limit."""
    bandwidth: tuple[Window, ...]
    """Times of the day at which another limit holds."""
    prune: PruneSettings | None
    """What goes by itself; None for nothing."""
    verify: VerifySettings | None
    """When everything is hashed again; None for never."""
    tls: ServerTls | None
    """How clients are served over TLS; None for plain HTTP."""
    warnings: tuple[str, ...]
    """What can be used, but is hardly what was meant."""

    def entry(self, upstream: Upstream) -> RegistrySettings:
        """What is configured for `upstream`, be it nothing."""
        return self.registries.get(upstream, RegistrySettings(upstream))


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that may be set: `name` on the command line, with `_` for `-` in the file."""

    name: str
    default: str
    help: str
    parse: Callable[[str], object]
    """From the text of a value; raises `ValueError` with what is expected."""
    is_flag: bool = False
    """Whether it stands alone on the command line, and is true then."""
    is_path: bool = False
    """Whether it is a path, which is relative to the file when it stands there."""

    @property
    def key(self) -> str:
        """Its name in the file, and in `Settings`."""
        return self.name.replace("-", "_")


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError("a path is expected")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("there is no such user") from None


def _optional(parse: Callable[[str], object]) -> Callable[[str], object]:
    """As `parse`, but None for the empty string."""
    return lambda text: parse(text) if text else None


def _word(machine: Callable[[], str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch("[a-z0-9][a-z0-9_.-]{0,63}|", text):
            raise ValueError(f"a word such as {machine()} is expected")
        return text or machine()

    return parse


def _number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,12}", text) or not least <= int(text) <= most:
            raise ValueError(f"a number from {least} to {most} is expected")
        return int(text)

    return parse


def _milliseconds(text: str) -> float:
    return _number(1, 10**9)(text) / 1000


def _level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise ValueError(f"one of {', '.join(LOG_LEVELS)} is expected")
    return text


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false is expected")
    return text.lower() == "true"


def _globs(text: str) -> tuple[str, ...]:
    return tuple(glob.strip().lower() for glob in text.split(",") if glob.strip())


def _upstream(text: str) -> Upstream:
    try:
        return Upstream.parse(text)
    except NameInvalid as error:
        raise ValueError(error.message) from None


OPTIONS = (
    Option("image-path", "/var/lib/ociregistry", "Root of the store; created if missing.", _path, is_path=True),
    Option(
        "reserve",
        "",
        "Room on the disk that downloads leave free, such as 1GB or 5% (default: 5%, 2GB at most).",
        parse_reserve,
    ),
    Option("port", "8080", "TCP port to listen on.", _number(1, 65535)),
    Option("log-level", "error", "trace, debug, info, warn or error.", _level),
    Option("pull-timeout", "60000", "Milliseconds that a client waits without progress.", _milliseconds),
    Option("concurrent", "1", "Images that are loaded at once.", _number(1, 1000)),
    Option(
        "max-connections",
        "",
        "Connections to one upstream (default: 16, or twice --concurrent if that is more).",
        _optional(_number(1, 10_000)),
    ),
    Option("arch", "", "Architecture of the images to load (default: this machine's).", _word(machine_architecture)),
    Option("os", "", "Operating system of the images to load (default: this machine's).", _word(machine_os)),
    Option(
        "platform",
        "",
        "Platforms to load, such as linux/amd64,linux/arm/v7, or all (default: the one of --os and --arch).",
        _optional(parse_platforms),
    ),
    Option("with-signatures", "false", "Load signatures and all that refers to an image too.", _flag, is_flag=True),
    Option(
        "preload-images",
        "",
        "File of images that the daemon loads in the background, one a line.",
        _optional(_path),
        is_path=True,
    ),
    Option("allow-upstreams", "", "Globs of allowed upstreams, separated by commas (default: all).", _globs),
    Option("max-bandwidth", "", "What all upstreams together may bring, such as 2Mbit (default: all).", parse_rate),
    Option("always-pull-latest", "false", "Check the tag latest upstream at every pull.", _flag, is_flag=True),
    Option("air-gapped", "false", "Never contact an upstream.", _flag, is_flag=True),
    Option("complete-images", "true", "Fetch all layers of an image that is pulled.", _flag, is_flag=True),
    Option("default-ns", DOCKER_HUB, "Upstream of names that carry none.", _upstream),
)


def load_settings(given: Mapping[str, str], listen: tuple[str, ...], config_path: Path | None) -> Settings:
    """The settings that the options `given` on the command line (by `Option.key`) and the file make.

    Raises `ConfigInvalid`, which names the option, or the file with line and key.
    """
    config = read_config(config_path, {option.key for option in OPTIONS}) if config_path else Config(Path())
    values: dict[str, object] = {}
    for option in OPTIONS:
        if option.key in given:
            values[option.key] = _parsed(option, given[option.key], f"--{option.name}")
        elif option.key in config.values:
            text, where = config.values[option.key]
            values[option.key] = _parsed(option, text, where, config.path.absolute().parent)
        else:
            values[option.key] = option.parse(option.default)
    if values["max_connections"] is None:
        values["max_connections"] = max(_USUAL_CONNECTIONS, 2 * int(str(values["concurrent"])))
    if values["platform"] is None or ("platform" not in given and given.keys() & {"arch", "os"}):
        values["platform"] = (Platform(str(values["os"]), str(values["arch"])),)
    listen = listen or config.listen
    if config.tls is not None and any(endpoint.startswith("ssl:") for endpoint in listen):
        raise ConfigInvalid(f"{config.tls_at}: all that is listened on speaks TLS by it: tcp: in place of ssl:")
    return Settings(
        **values,  # type: ignore[arg-type]  # OPTIONS and the fields have the same names, a test compares them
        listen=listen,
        registries=config.registries,
        bandwidth=config.bandwidth,
        complete_metadata=config.complete_metadata,
        complete_platforms=config.complete_platforms,
        prune=config.prune,
        verify=config.verify,
        tls=config.tls,
        warnings=config.warnings,
    )


def _parsed(option: Option, text: str, where: str, folder: Path | None = None) -> object:
    """The value; a path in a file is relative to the file's `folder`."""
    relative = folder is not None and option.is_path and text and not text.startswith("~")
    try:
        return option.parse(str(folder / text) if folder and relative else text)
    except ValueError as error:
        raise ConfigInvalid(f"{where}: {text!r}: {error}") from None
