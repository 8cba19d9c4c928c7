"""Settings: precedence of command line, file and defaults, and error texts."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest

from ociregistry.config.file import PruneSettings, VerifySettings
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.config.proxy import NO_PROXIES, NoProxy, ProxySettings
from ociregistry.config.registries import RegistrySettings
from ociregistry.config.tls import ServerTls
from ociregistry.config.values import USUAL_RESERVE
from ociregistry.names import Upstream
from ociregistry.openssl import Certificates
from ociregistry.platforms import ALL, Platform, machine_architecture, machine_os
from ociregistry.settings import LOG_LEVELS, OPTIONS, AdminListen, Settings, load_settings
from tests.certificates import Authority

DEFAULTS = Settings(
    image_path=Path("/var/lib/ociregistry"),
    port=8080,
    listen=(),
    admin_listen=AdminListen("tcp:8081:interface=127.0.0.1", given=False),
    reserve=USUAL_RESERVE,
    log_level="error",
    log_format="text",
    pull_timeout=60.0,
    concurrent=1,
    max_connections=16,
    arch=machine_architecture(),
    os=machine_os(),
    os_version="",
    platform=(Platform(machine_os(), machine_architecture()),),
    with_signatures=False,
    preload_images=None,
    allow_upstreams=(),
    default_ns=Upstream("docker.io"),
    registries={},
    proxy=ProxySettings(NO_PROXIES, NoProxy()),
    always_pull_latest=False,
    air_gapped=False,
    complete_images=True,
    complete_metadata=True,
    complete_platforms=(),
    max_bandwidth=None,
    bandwidth=(),
    prune=None,
    verify=None,
    tls=None,
    warnings=(),
    files={},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "ociregistry.yaml"


def load(path: Path, text: str, *listen: str, **given: str) -> Settings:
    """Return the settings made from a file with this text and the given options."""
    path.write_text(text)
    return load_settings(given, listen, path)


def test_defaults() -> None:
    assert load_settings({}, (), None) == DEFAULTS


def test_admin_address_is_given_by_either(path: Path) -> None:
    """Also the default address: where it was given, the daemon must not start without it."""
    default = DEFAULTS.admin_listen.endpoint
    for endpoint in ("", "unix:/run/admin.sock", default):
        assert load(path, "", admin_listen=endpoint).admin_listen == AdminListen(endpoint, given=True)
        assert load(path, f"admin_listen: '{endpoint}'").admin_listen == AdminListen(endpoint, given=True)
    assert load(path, "admin_listen: tcp:1", admin_listen="tcp:2").admin_listen.endpoint == "tcp:2"


ENDPOINT = r"an endpoint such as tcp:8080:interface=127.0.0.1 is expected, with \: for each colon of an IPv6 address"


@pytest.mark.parametrize(
    "text",
    ["8080", ":8080", "tcp", "tcp:http", "htp:8080", "127.0.0.1:8080", "tcp:80:iface=::1", "tcp:80:interface=::1"],
)
def test_malformed_endpoint_is_refused_before_anything_starts(path: Path, text: str) -> None:
    """Python's own errors for them, such as "invalid literal for int()", would tell an operator nothing."""

    def refusal(config: str, *listen: str, **given: str) -> str:
        with pytest.raises(ConfigInvalid) as error:
            load(path, config, *listen, **given)
        return str(error.value)

    said = f"{text!r}: {ENDPOINT}"
    assert refusal(f"listen:\n- tcp:1\n- '{text}'\n") == f"{path}:3: listen: {said}"
    assert refusal(f"port: 1\nadmin_listen: '{text}'\n") == f"{path}:2: admin_listen: {said}"
    assert refusal("", admin_listen=text) == f"--admin-listen: {said}"
    assert refusal("", "tcp:1", text) == f"--listen: {said}"


@pytest.mark.parametrize(
    "text",
    ["systemd:domain=INET6:index=0", "ssl:8443:certKey=/nowhere:privateKey=/nowhere", r"tcp6:1:interface=\:\:1"],
)
def test_endpoint_that_cannot_be_used_here_is_accepted(path: Path, text: str) -> None:
    """`check` has no sockets of systemd, and its user may be unable to read the key."""
    assert load(path, f"listen: ['{text}']").listen == (text,)


def test_every_field_has_an_option() -> None:
    daemon_client = {
        "listen",
        "registries",
        "proxy",
        "bandwidth",
        "complete_metadata",
        "complete_platforms",
        "prune",
        "verify",
        "tls",
        "warnings",
        "files",
    }
    assert {option.key for option in OPTIONS} == {field.name for field in fields(Settings)} - daemon_client
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        assert option.help.endswith((".", ")."))
        # The defaults of these two depend on other options.
        if option.key in ("max_connections", "platform"):
            assert option.parse(option.default) is None
        else:
            assert option.parse(option.default) == getattr(DEFAULTS, option.key)


def test_precedence_of_command_line_file_and_defaults(path: Path) -> None:
    text = "port: 1\nlog_level: info\nmax_connections: 3\n"
    settings = load(path, text, port="2", pull_timeout="1500")
    assert (settings.port, settings.log_level, settings.max_connections) == (2, "info", 3)
    assert settings.pull_timeout == 1.5
    assert settings.image_path == DEFAULTS.image_path


@pytest.mark.parametrize(
    ("given", "connections"),
    [
        ({"concurrent": "8"}, 16),
        ({"concurrent": "9"}, 18),
        ({"concurrent": "50"}, 100),
        ({"concurrent": "50", "max_connections": "3"}, 3),
    ],
)
def test_default_max_connections_is_twice_concurrent(path: Path, given: dict[str, str], connections: int) -> None:
    assert load_settings(given, (), None).max_connections == connections
    assert load(path, "".join(f"{key}: {value}\n" for key, value in given.items())).max_connections == connections
    assert load(path, "max_connections: 3\n", concurrent="50").max_connections == 3


def test_platform_from_arch_and_os_unless_platforms_is_set(path: Path) -> None:
    here = Platform(machine_os(), machine_architecture())
    assert load_settings({"arch": "s390x"}, (), None).platform == (replace(here, architecture="s390x"),)
    assert load_settings({"os": "plan9"}, (), None).platform == (replace(here, os="plan9"),)
    assert load_settings({"arch": "arm64", "os": "windows"}, (), None).platform == (Platform("windows", "arm64"),)
    assert load_settings({"arch": "arm64", "platform": "all"}, (), None).platform == ALL
    assert load(path, "os: windows\n", arch="arm64").platform == (Platform("windows", "arm64"),)
    assert load(path, "arch: s390x\n", arch="arm64").platform == (replace(here, architecture="arm64"),)


@pytest.mark.parametrize(
    ("arch", "platform"),
    [
        ("x86_64", Platform("linux", "amd64")),
        ("AArch64", Platform("linux", "arm64")),
        ("armel", Platform("linux", "arm", "v6")),
    ],
)
def test_platforms_are_normalized(path: Path, arch: str, platform: Platform) -> None:
    for settings in (
        load_settings({"arch": arch, "os": "Linux"}, (), None),
        load_settings({"platform": f"Linux/{arch}"}, (), None),
        load(path, f"arch: {arch}\nos: linux\n"),
        load(path, f"platform: linux/{arch}\n"),
    ):
        assert settings.platform == (platform,)
    assert load(path, f"arch: {arch}\nos: linux\n").machine == platform
    assert load(path, f"complete_platforms: [linux/{arch}]\n").complete_platforms == (platform,)


def test_arch_option_overrides_platforms_in_file(path: Path) -> None:
    assert load(path, "platform: linux/s390x\n", arch="arm64", os="linux").platform == (Platform("linux", "arm64"),)


def test_os_version_applies_to_all_platforms(path: Path) -> None:
    windows, linux = Platform("windows", "amd64", "", "10.0.17763"), Platform("linux", "arm", "v7", "10.0.17763")
    given = {"os": "windows", "arch": "amd64", "os_version": "10.0.17763"}
    assert load_settings(given, (), None).platform == (windows,)
    assert load(path, "os_version: 10.0.17763\n", platform="windows/amd64,linux/arm/v7").platform == (windows, linux)
    with pytest.raises(ConfigInvalid, match=r"^--os-version: '10\.0': has no effect with all platforms$"):
        load_settings({"platform": "all", "os_version": "10.0"}, (), None)
    with pytest.raises(ConfigInvalid, match=rf"^{path}:1: os_version: '10\.0': has no effect with all platforms$"):
        load(path, "os_version: '10.0'\nplatform: all\n")


def test_maintenance_settings_come_from_the_file(path: Path) -> None:
    settings = load(path, "prune: {max_size: 1kB}\nverify: {every: 1d}\n")
    assert isinstance(settings.prune, PruneSettings)
    assert settings.prune.max_size == 1000
    assert settings.verify == VerifySettings(timedelta(days=1), None)


def test_listen_option_overrides_the_file(path: Path) -> None:
    text = "listen: ['tcp:1']\nport: 5\n"
    assert load(path, text).listen == ("tcp:1",)
    assert load(path, text, "tcp:2", "tcp:3").listen == ("tcp:2", "tcp:3")
    assert load_settings({}, ("tcp:4",), None).listen == ("tcp:4",)


def test_top_level_list_sets_registries(path: Path) -> None:
    settings = load(path, "- name: my-upstream:5000\n  scheme: http\n", port="1")
    upstream = Upstream("my-upstream:5000")
    assert settings.registries == {upstream: RegistrySettings(upstream, "http")}
    assert settings.port == 1


def test_unconfigured_upstream_has_default_entry(path: Path) -> None:
    settings = load(path, "- name: my-upstream:5000\n  scheme: http\n")
    assert settings.entry(Upstream("my-upstream:5000")).scheme == "http"
    assert settings.entry(Upstream("quay.io")) == RegistrySettings(Upstream("quay.io"))


def test_tls_settings_come_from_the_file(path: Path, authority: Authority) -> None:
    certificate, key = authority.issue("server")
    settings = load(
        path, "tls: {cert: server.crt, key: server.key}\nlisten: ['tcp:1', 'systemd:domain=INET:index=0']\n"
    )
    assert isinstance(settings.tls, ServerTls)
    assert settings.tls.identity.certificates == Certificates(certificate, (certificate.read_bytes(),))
    assert settings.tls.identity.key == key.read_bytes()


def test_tls_with_tls_endpoint_is_refused(path: Path, authority: Authority) -> None:
    authority.issue("server")
    tls = "tls: {cert: server.crt, key: server.key}\n"
    for text, listen in (
        (f"{tls}listen: ['tcp:1', 'ssl:2']\n", ()),
        (tls, ("ssl:2:privateKey=server.key",)),
        (f"{tls}listen: ['tcp:1']\n", ("tcp:1", "ssl:2")),
    ):
        with pytest.raises(ConfigInvalid, match=rf"^{path}:1: tls: .* tcp: in place of ssl:"):
            load(path, text, *listen)
    assert load(path, f"{tls}listen: ['ssl:2']\n", "tcp:1").listen == ("tcp:1",)
    assert load(path, "listen: ['ssl:2']\n").listen == ("ssl:2",)


def test_warnings_come_from_the_file(path: Path, authority: Authority) -> None:
    text = f"- name: a.b\n  tls: {{ca: {authority.ca}, insecure_skip_verify: true}}\n"
    (warning,) = load(path, text).warnings
    assert warning.startswith(f"{path}:2: tls.ca: ")


def test_paths_in_file_are_relative_to_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(path, "image_path: images").image_path == path.parent / "images"
    assert load(path, "image_path: /images").image_path == Path("/images")
    assert load(path, "image_path: ~/images").image_path == Path("/home/somebody/images")
    assert load(path, "preload_images: list").preload_images == path.parent / "list"
    assert load(path, "preload_images: ''").preload_images is None
    monkeypatch.chdir(path.parent)
    (path.parent / "etc").mkdir()
    Path("etc/it.yaml").write_text("image_path: images")
    assert load_settings({}, (), Path("etc/it.yaml")).image_path == path.parent / "etc/images"


def test_paths_on_command_line_are_relative_to_working_directory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(path, "", image_path="images").image_path == Path("/usr/images")
    assert load_settings({"image_path": "~/images"}, (), None).image_path == Path("/home/somebody/images")
    assert load(path, "", preload_images="list").preload_images == Path("/usr/list")


@pytest.mark.parametrize("value", ["", "~nobody-has-this-name/images"])
def test_invalid_path_is_refused(path: Path, value: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"^--image-path: "):
        load_settings({"image_path": value}, (), None)
    with pytest.raises(ConfigInvalid, match=f"^{path}:1: image_path: "):
        load(path, f"image_path: '{value}'")


@pytest.mark.parametrize(
    ("name", "good", "value"),
    [
        ("port", "1", 1),
        ("port", "65535", 65535),
        ("log_level", "trace", "trace"),
        ("log_format", "json", "json"),
        ("pull_timeout", "1", 0.001),
        ("pull_timeout", "600000", 600.0),
        ("concurrent", "1000", 1000),
        ("max_connections", "1", 1),
        ("max_connections", "", 16),
        ("arch", "loong64", "loong64"),
        ("arch", "", machine_architecture()),
        ("os", "", machine_os()),
        ("platform", "linux/arm/v7, windows/amd64", (Platform("linux", "arm", "v7"), Platform("windows", "amd64"))),
        ("platform", "all", ALL),
        ("os_version", "10.0.17763", "10.0.17763"),
        ("with_signatures", "true", True),
        ("preload_images", "/etc/images", Path("/etc/images")),
        ("allow_upstreams", "Docker.io, *.example ,,", ("docker.io", "*.example")),
        ("allow_upstreams", " ", ()),
        ("default_ns", "Quay.IO", Upstream("quay.io")),
        ("default_ns", "index.docker.io", Upstream("docker.io")),
        ("default_ns", "registry:5000", Upstream("registry:5000")),
    ],
)
def test_value_is_parsed(path: Path, name: str, good: str, value: object) -> None:
    assert getattr(load_settings({name: good}, (), None), name) == value
    assert getattr(load(path, f"{name}: '{good}'"), name) == value


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("port", "0"),
        ("port", "65536"),
        ("port", "-1"),
        ("port", "+1"),
        ("port", "1.0"),
        ("port", " 1"),
        ("port", "0x10"),
        ("port", "٣"),
        ("port", "1" * 5000),
        ("port", "http"),
        ("port", ""),
        ("log_level", "verbose"),
        ("log_level", "INFO"),
        ("log_level", ""),
        ("log_format", "JSON"),
        ("log_format", ""),
        ("pull_timeout", "0"),
        ("pull_timeout", "60s"),
        ("pull_timeout", "nan"),
        ("concurrent", "0"),
        ("concurrent", "1001"),
        ("concurrent", ""),
        ("concurrent", "all"),
        ("max_connections", "0"),
        ("max_connections", "10001"),
        ("arch", "amd 64"),
        ("arch", "arm/v7"),
        ("arch", "amd64,arm64"),
        ("arch", "a" * 65),
        ("os", "linux/amd64"),
        ("os", " "),
        ("os_version", "10.0 17763"),
        ("os_version", "10.0(1)"),
        ("os_version", ".1"),
        ("os_version", "1" * 65),
        ("platform", "amd64"),
        ("platform", "linux"),
        ("platform", "linux/amd64,"),
        ("platform", "linux/amd64,all"),
        ("platform", "linux/arm/v7/neon"),
        ("with_signatures", "yes"),
        ("with_signatures", ""),
        ("default_ns", ""),
        ("default_ns", "https://docker.io"),
        ("default_ns", "docker.io/library"),
    ],
)
def test_invalid_value_error_names_its_place(path: Path, name: str, bad: str) -> None:
    option = name.replace("_", "-")
    with pytest.raises(ConfigInvalid) as refused:
        load_settings({name: bad}, (), None)
    assert str(refused.value).startswith(f"--{option}: ")
    assert "expected" in str(refused.value)
    with pytest.raises(ConfigInvalid) as refused:
        load(path, f"\n{name}: '{bad}'\n")
    assert str(refused.value).startswith(f"{path}:2: {name}: ")


def test_overridden_invalid_value_is_ignored(path: Path) -> None:
    assert load(path, "port: http", port="80").port == 80


def test_missing_file_is_an_error(path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        load_settings({"port": "1"}, (), path)


@pytest.mark.parametrize("level", LOG_LEVELS)
def test_log_levels(level: str) -> None:
    assert load_settings({"log_level": level}, (), None).log_level == level
