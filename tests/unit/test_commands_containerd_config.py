"""`containerd-config`: output and files are valid configurations of the clients."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from twisted.python import usage

from ociregistry.commands.containerd_config import ContainerdConfig
from ociregistry.commands.options import CommandFailed
from ociregistry.settings import Settings, load_settings

SETTINGS = load_settings({}, (), None)


def run(capsys: pytest.CaptureFixture[str], *words: str, settings: Settings = SETTINGS) -> str:
    command = ContainerdConfig()
    command.parseOptions(list(words))
    assert command.run(settings) == 0
    return capsys.readouterr().out


def section(printed: str, heading: str) -> str:
    """Return the text below the comment line that contains `heading`, up to the next heading."""
    after = printed[printed.index(heading) :].partition("\n")[2]
    return re.split(r"\n\n# (?!Written)", after)[0]


def hosts(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def test_default_hosts_toml_points_to_localhost(capsys: pytest.CaptureFixture[str]) -> None:
    document = tomllib.loads(section(run(capsys), "/etc/containerd/certs.d/_default/hosts.toml"))
    assert document == {"host": {"http://localhost:8080": {"capabilities": ["pull", "resolve"]}}}


def test_port_comes_from_settings(capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings({"port": "5001"}, (), None)
    assert '[host."http://localhost:5001"]' in run(capsys, settings=settings)


def test_several_daemons_keep_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = ["--url", "http://10.0.0.2:8080", "--url", "http://10.0.0.1:8080/"]
    run(capsys, *urls, "--dir", str(tmp_path), "--write")
    assert list(hosts(tmp_path / "_default" / "hosts.toml")["host"]) == [
        "http://10.0.0.2:8080",
        "http://10.0.0.1:8080",
    ]


def test_folders_that_override_the_default_are_warned_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, text in (
        ("docker.io", 'server = "https://mirror.example"\n'),
        ("ghcr.io", '[host."http://localhost:8080"]\n  capabilities = ["pull", "resolve"]\n'),
        ("quay.io", None),
    ):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "hosts.toml").write_text(text)
    (tmp_path / "README").write_text("a file")
    command = ContainerdConfig()
    command.parseOptions(["--dir", str(tmp_path), "--write"])
    assert command.run(SETTINGS) == 0
    warnings = capfd.readouterr().err.splitlines()
    for line, what, host in zip(
        warnings, (tmp_path / "docker.io" / "hosts.toml", tmp_path / "quay.io"), ("docker.io", "quay.io"), strict=True
    ):
        assert line.startswith(f"ociregistry: warning: {what}: for {host} containerd uses this in place of _default")
        assert line.endswith(f"--upstreams {host}")
    assert (tmp_path / "docker.io" / "hosts.toml").read_text() == 'server = "https://mirror.example"\n'


def test_hosts_toml_per_registry_names_its_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("- name: plain.internal:5000\n  scheme: http\n")
    settings = load_settings({}, (), config)
    names = "docker.io, quay.io,plain.internal:5000"
    run(capsys, "--upstreams", names, "--dir", str(tmp_path / "certs.d"), "--write", settings=settings)
    servers = {path.parent.name: hosts(path)["server"] for path in (tmp_path / "certs.d").glob("*/hosts.toml")}
    assert servers == {
        "docker.io": "https://registry-1.docker.io",
        "quay.io": "https://quay.io",
        "plain.internal:5000": "http://plain.internal:5000",
    }


def test_ca_is_named_with_https(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tls = ["--ca", "/etc/ca.crt", "--cert", "/etc/node.crt", "--key", "/etc/node.key"]
    run(capsys, "--url", "https://cache.internal", *tls, "--dir", str(tmp_path), "--write")
    host = hosts(tmp_path / "_default" / "hosts.toml")["host"]["https://cache.internal"]
    assert host["ca"] == "/etc/ca.crt"
    assert host["client"] == [["/etc/node.crt", "/etc/node.key"]]


def test_both_versions_of_config_toml_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "--dir", "/srv/certs.d")
    old = tomllib.loads(section(printed, "up to version 1.7"))
    new = tomllib.loads(section(printed, "from version 2.0 on"))
    assert old["plugins"]["io.containerd.grpc.v1.cri"]["registry"] == {"config_path": "/srv/certs.d"}
    assert new["plugins"]["io.containerd.cri.v1.images"]["registry"] == {"config_path": "/srv/certs.d"}


def test_other_clients_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "--url", "http://a:8080", "--url", "https://b", "--upstreams", "quay.io,reg:5000")
    (registry,) = tomllib.loads(section(printed, "registries.conf.d"))["registry"]
    assert registry["prefix"] == "quay.io"
    assert registry["mirror"] == [
        {"location": "a:8080/quay.io", "insecure": True},
        {"location": "b/quay.io", "insecure": False},
    ]
    k3s = yaml.safe_load(section(printed, "registries.yaml"))
    assert k3s == {"mirrors": {"*": {"endpoint": ["http://a:8080", "https://b"]}}}
    assert json.loads(section(printed, "daemon.json")) == {"registry-mirrors": ["http://a:8080", "https://b"]}


def test_own_files_are_rewritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--url", "http://a", "--dir", str(tmp_path), "--write")
    run(capsys, "--url", "http://b", "--dir", str(tmp_path), "--write")
    assert list(hosts(tmp_path / "_default" / "hosts.toml")["host"]) == ["http://b"]
    assert [path.name for path in (tmp_path / "_default").iterdir()] == ["hosts.toml"]


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    theirs = tmp_path / "_default" / "hosts.toml"
    theirs.parent.mkdir()
    theirs.write_text('server = "https://mine"\n')
    command = ContainerdConfig()
    command.parseOptions(["--dir", str(tmp_path), "--write"])
    with pytest.raises(CommandFailed, match="not written by this command"):
        command.run(SETTINGS)
    assert theirs.read_text() == 'server = "https://mine"\n'


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = ContainerdConfig()
    command.parseOptions(["--dir", str(tmp_path / "file"), "--write"])
    with pytest.raises(CommandFailed, match="cannot be written"):
        command.run(SETTINGS)


@pytest.mark.parametrize(
    "words",
    [
        ["--url", "localhost:8080"],
        ["--url", "http://a:1", "--url", "http://a/path"],
        ["--url", "ftp://a"],
        ["--url", "http://user@a"],
        ["--url", 'http://a"]'],
        ["--upstreams", "not a host"],
        ["--upstreams", "../etc"],
        ["--dir", "relative"],
        ["--ca", '/with"quote'],
        ["--cert", "/only.crt"],
    ],
)
def test_invalid_options_are_refused(words: list[str]) -> None:
    """The error names the option, and its value where there is one."""
    with pytest.raises(usage.UsageError) as error:
        ContainerdConfig().parseOptions(words)
    option, value = words[-2:]
    assert str(error.value).startswith(f"{option}")
    assert repr(value) in str(error.value) or option == "--cert"
