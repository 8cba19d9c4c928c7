"""Settings: parses the command line and the YAML file into one frozen value.

The command line overrides the file, and the file overrides the defaults. `OPTIONS` is the only table of options; the
parser of the command line and the reader of the file are both built from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from ociregistry.config.file import Config, PruneSettings, VerifySettings, Window, parse_rate, read_config
from ociregistry.config.files import ConfigFiles, Versions
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.config.proxy import ProxySettings, read_environment
from ociregistry.config.registries import RegistrySettings
from ociregistry.config.tls import ServerTls
from ociregistry.config.values import Reserve, parse_endpoint, parse_reserve
from ociregistry.errors import NameInvalid
from ociregistry.names import DOCKER_HUB, Upstream
from ociregistry.platforms import ALL, Platform, machine_architecture, machine_os, parse_platforms

_USUAL_CONNECTIONS = 16

DEFAULT_ADMIN_LISTEN = "tcp:8081:interface=127.0.0.1"

LOG_LEVELS = ("trace", "debug", "info", "warn", "error")
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, slots=True)
class AdminListen:
    """Where the daemon serves its metrics and its status."""

    endpoint: str = ""
    """A Twisted endpoint description; empty to serve them nowhere."""
    given: bool = False
    """Whether an operator chose it; the daemon does not start if it cannot listen there."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the daemon and of the commands."""

    image_path: Path
    port: int
    listen: tuple[str, ...]
    """Twisted endpoint descriptions to listen on instead of `port`; empty to use `port`."""
    admin_listen: AdminListen
    reserve: Reserve
    """Disk space that downloads leave free."""
    log_level: str
    log_format: str
    pull_timeout: float
    """Seconds that a request waits without progress."""
    concurrent: int
    """Number of images that are loaded at the same time."""
    max_connections: int
    """Number of connections to one upstream."""
    arch: str
    os: str
    os_version: str
    """Version of the operating system, or its beginning; empty for all."""
    platform: tuple[Platform, ...]
    """Platforms to load of an index; empty for all."""
    with_signatures: bool
    """Whether to load the referrers of an image, such as signatures, too."""
    preload_images: Path | None
    """File of image references that the daemon loads in the background."""
    allow_upstreams: tuple[str, ...]
    """Globs of allowed upstreams; empty for all."""
    default_ns: Upstream
    registries: Mapping[Upstream, RegistrySettings]
    proxy: ProxySettings
    always_pull_latest: bool
    air_gapped: bool
    complete_images: bool
    complete_metadata: bool
    """Whether to fetch the manifests and configs of all platforms of an index."""
    complete_platforms: tuple[Platform, ...]
    """The only platforms to complete, whether or not clients request them; empty for those that clients request."""
    max_bandwidth: float | None
    """Bytes per second of all upstreams together; None for no limit."""
    bandwidth: tuple[Window, ...]
    """Times of the day with another limit than `max_bandwidth`."""
    prune: PruneSettings | None
    """Settings of automatic pruning; None for none."""
    verify: VerifySettings | None
    """Settings of automatic verification; None for none."""
    tls: ServerTls | None
    """TLS towards clients; None for plain HTTP."""
    warnings: tuple[str, ...]
    """Messages about settings that are valid but probably a mistake."""
    files: Versions = field(compare=False)
    """The files that the settings were read from."""

    @property
    def machine(self) -> Platform:
        """The platform of `os` and `arch`."""
        return Platform.parse(f"{self.os}/{self.arch}")

    def entry(self, upstream: Upstream) -> RegistrySettings:
        """Return the settings of `upstream`, or the default ones if it has no entry."""
        return self.registries.get(upstream, RegistrySettings(upstream))


@dataclass(frozen=True, slots=True)
class Option:
    """An option: `--name` on the command line; in the file its `key`."""

    name: str
    default: str
    help: str
    parse: Callable[[str], object]
    """Parses the text of a value; raises `ValueError` with a message that says what is expected."""
    is_flag: bool = False
    """Whether the option takes no value on the command line and means true."""
    is_path: bool = False
    """Whether the value is a path; in the file, a relative path starts at the folder of the file."""

    @property
    def key(self) -> str:
        """Name in the file and in `Settings`: `name` with `_` for `-`."""
        return self.name.replace("-", "_")


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError("a path is expected")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError("unknown user") from None


def _optional(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Extend `parse` to return None for the empty string."""
    return lambda text: parse(text) if text else None


def _word(machine: Callable[[], str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch("[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}|", text):
            raise ValueError(f"a word such as {machine()} is expected")
        return text.lower() or machine()

    return parse


def _version(text: str) -> str:
    if not re.fullmatch("[0-9A-Za-z][0-9A-Za-z._-]{0,63}|", text):
        raise ValueError("a version such as 10.0.17763 is expected")
    return text


def _number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,12}", text) or not least <= int(text) <= most:
            raise ValueError(f"a number from {least} to {most} is expected")
        return int(text)

    return parse


def _milliseconds(text: str) -> float:
    return _number(1, 10**9)(text) / 1000


def _one_of(words: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)} is expected")
        return text

    return parse


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false is expected")
    return text.lower() == "true"


def _admin_listen(text: str) -> AdminListen:
    # The default is not parsed, which would take every command a while.
    return AdminListen(text if text in ("", DEFAULT_ADMIN_LISTEN) else parse_endpoint(text))


def _globs(text: str) -> tuple[str, ...]:
    return tuple(glob.strip().lower() for glob in text.split(",") if glob.strip())


def _upstream(text: str) -> Upstream:
    try:
        return Upstream.parse(text)
    except NameInvalid:
        raise ValueError("host or host:port is expected") from None


OPTIONS = (
    Option("image-path", "/var/lib/ociregistry", "Root of the store; created if missing.", _path, is_path=True),
    Option(
        "reserve",
        "",
        "Disk space that downloads leave free, such as 1GB or 5% (default: 5%, 2GB at most).",
        parse_reserve,
    ),
    Option("port", "8080", "TCP port to listen on, by IPv4 and IPv6.", _number(1, 65535)),
    Option(
        "admin-listen",
        DEFAULT_ADMIN_LISTEN,
        "Endpoint of /metrics and /status, such as unix:/run/ociregistry.sock; empty for none.",
        _admin_listen,
    ),
    Option("log-level", "error", "trace, debug, info, warn or error.", _one_of(LOG_LEVELS)),
    Option("log-format", "text", "text, or json: one object a line, for log collectors.", _one_of(LOG_FORMATS)),
    Option("pull-timeout", "60000", "Milliseconds that a client waits for progress.", _milliseconds),
    Option("concurrent", "1", "Number of images loaded at the same time.", _number(1, 1000)),
    Option(
        "max-connections",
        "",
        "Connections to one upstream (default: 16, or twice --concurrent if that is more).",
        _optional(_number(1, 10_000)),
    ),
    Option("arch", "", "Architecture of the images to load (default: this machine's).", _word(machine_architecture)),
    Option("os", "", "Operating system of the images to load (default: this machine's).", _word(machine_os)),
    Option(
        "os-version",
        "",
        "Version of the operating system of the images to load, or its beginning, such as 10.0.17763 (default: all).",
        _version,
    ),
    Option(
        "platform",
        "",
        "Platforms to load, such as linux/amd64,linux/arm/v7, or all (default: that of --os and --arch).",
        _optional(parse_platforms),
    ),
    Option("with-signatures", "false", "Also load signatures and other referrers of an image.", _flag, is_flag=True),
    Option(
        "preload-images",
        "",
        "File of images, one per line, or of Kubernetes objects, that the daemon loads in the background.",
        _optional(_path),
        is_path=True,
    ),
    Option("allow-upstreams", "", "Globs of allowed upstreams, separated by commas (default: all).", _globs),
    Option("max-bandwidth", "", "Limit for all upstreams together, such as 2Mbit (default: none).", parse_rate),
    Option("always-pull-latest", "false", "Check the tag latest at the upstream at every pull.", _flag, is_flag=True),
    Option("air-gapped", "false", "Never contact an upstream.", _flag, is_flag=True),
    Option("complete-images", "true", "Fetch all layers of a pulled image.", _flag, is_flag=True),
    Option("default-ns", DOCKER_HUB, "Upstream of names without one.", _upstream),
)


def load_settings(
    given: Mapping[str, str],
    listen: tuple[str, ...],
    config_path: Path | None,
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """Build the settings from the command line, the configuration file, the environment and the defaults.

    `given` maps `Option.key` to the text given on the command line; `listen` are the endpoints given there.

    Raises:
        ConfigInvalid: a value is invalid; the message names the option, the file with line and key, or the variable.
    """
    files = ConfigFiles()
    try:
        return _settings(given, listen, config_path, environment, files)
    except ConfigInvalid as error:
        raise ConfigInvalid(str(error), files.versions) from None


def _settings(
    given: Mapping[str, str],
    listen: tuple[str, ...],
    config_path: Path | None,
    environment: Mapping[str, str],
    files: ConfigFiles,
) -> Settings:
    config = read_config(config_path, {option.key for option in OPTIONS}, files) if config_path else Config(Path())
    values: dict[str, object] = {}
    for option in OPTIONS:
        if option.key in given:
            values[option.key] = _parsed(option, given[option.key], f"--{option.name}")
        elif option.key in config.values:
            text, where = config.values[option.key]
            values[option.key] = _parsed(option, text, where, config.path.absolute().parent)
        else:
            values[option.key] = option.parse(option.default)
    if "admin_listen" in given or "admin_listen" in config.values:
        values["admin_listen"] = replace(cast(AdminListen, values["admin_listen"]), given=True)
    if values["max_connections"] is None:
        values["max_connections"] = max(_USUAL_CONNECTIONS, 2 * int(str(values["concurrent"])))
    if values["platform"] is None or ("platform" not in given and given.keys() & {"arch", "os"}):
        values["platform"] = (Platform.parse(f"{values['os']}/{values['arch']}"),)
    os_version = str(values["os_version"])
    if os_version and values["platform"] == ALL:
        where = "--os-version" if "os_version" in given else config.values["os_version"][1]
        raise ConfigInvalid(f"{where}: {os_version!r}: has no effect with all platforms")
    values["platform"] = tuple(
        replace(platform, os_version=os_version) for platform in cast("tuple[Platform, ...]", values["platform"])
    )
    listen = tuple(_endpoint(text) for text in listen) or config.listen
    if config.tls is not None and any(endpoint.startswith("ssl:") for endpoint in listen):
        raise ConfigInvalid(f"{config.tls_at}: it enables TLS on every endpoint: use tcp: in place of ssl:")
    proxy, warnings = read_environment(config.proxy, environment)
    return Settings(
        **values,  # type: ignore[arg-type]  # OPTIONS and the fields have the same names, a test compares them
        listen=listen,
        registries=config.registries,
        proxy=proxy,
        bandwidth=config.bandwidth,
        complete_metadata=config.complete_metadata,
        complete_platforms=config.complete_platforms,
        prune=config.prune,
        verify=config.verify,
        tls=config.tls,
        warnings=config.warnings + warnings,
        files=files.versions,
    )


def _endpoint(text: str) -> str:
    try:
        return parse_endpoint(text)
    except ValueError as error:
        raise ConfigInvalid(f"--listen: {text!r}: {error}") from None


def _parsed(option: Option, text: str, where: str, folder: Path | None = None) -> object:
    """Parse the value of an option; `folder` is where a relative path starts, None for the working directory."""
    relative = folder is not None and option.is_path and text and not text.startswith("~")
    try:
        return option.parse(str(folder / text) if folder and relative else text)
    except ValueError as error:
        raise ConfigInvalid(f"{where}: {text!r}: {error}") from None
