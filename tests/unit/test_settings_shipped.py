"""The shipped configuration file shows every key and sets none."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest

from ociregistry.config.file import VerifySettings
from ociregistry.config.proxy import NO_PROXIES
from ociregistry.config.values import Reserve
from ociregistry.names import Upstream
from ociregistry.platforms import Platform
from ociregistry.settings import Settings, load_settings
from tests.certificates import Authority

SHIPPED = Path(__file__).resolve().parents[2] / "etc" / "ociregistry.yaml"


def test_shipped_file_sets_nothing() -> None:
    assert load_settings({}, (), SHIPPED) == load_settings({}, (), None)


def uncommented() -> str:
    """Return the shipped file with the `#` in front of every key removed; comments have a space after it."""
    return re.sub(r"^#(?! [^ ])", "", SHIPPED.read_text(), flags=re.MULTILINE)


@pytest.fixture
def example(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the shipped file with every key, and the files that it names."""
    certificate, key = authority.issue("example")
    secret = key.with_name("secret")
    secret.write_text("password\n")
    helper = key.with_name("docker-credential-x")
    helper.write_text("#!/bin/sh\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(helper.parent))
    monkeypatch.setenv("SECRET", "password")
    text = uncommented()
    for name, value in {
        "cert": certificate,
        "key": key,
        "(?:client_)?ca": authority.ca,
        "password_file": secret,
        "password_env": "SECRET",
        "credential_helper": "x",
    }.items():
        text = re.sub(rf"\b({name}): *[^\s,}}]+", rf"\1: {value}", text)
    return text


def test_shipped_file_shows_every_default(tmp_path: Path, example: str) -> None:
    path = tmp_path / "ociregistry.yaml"
    path.write_text(example)
    settings, defaults = load_settings({}, (), path), load_settings({}, (), None)
    assert settings.registries[Upstream("my-upstream:5000")].scheme == "http"
    assert settings.registries[Upstream("my-upstream:5000")].proxy == NO_PROXIES
    assert str(settings.proxy.proxies.https) == "http://proxy.example:3128"
    assert settings.max_bandwidth == 250_000
    assert settings.reserve == Reserve(1.0, 5 * 10**9)
    assert [str(window.begin) for window in settings.bandwidth] == ["08:00:00"]
    assert settings.preload_images == path.parent / "images.txt"
    version = "10.0.17763"
    assert settings.os_version == version
    assert settings.platform == (Platform("linux", "amd64", "", version), Platform("linux", "arm", "v7", version))
    assert settings.prune is not None
    assert (settings.prune.unused_for, settings.prune.max_size) == (timedelta(days=30), 50 * 10**9)
    assert settings.prune.keep.match("docker.io/library/nginx:1.25")
    assert not settings.prune.keep.match("quay.io/library/nginx:1.25")
    assert settings.prune.every == timedelta(hours=1)
    assert settings.verify == VerifySettings(timedelta(days=7), 20 * 10**6)
    assert settings.admin_listen == replace(defaults.admin_listen, given=True)
    # Some keys have no default to show: `*` differs from no value, the others are examples.
    assert settings.allow_upstreams == ("*",)
    examples = {"allow_upstreams", "registries", "bandwidth", "max_bandwidth", "tls", "preload_images", "reserve"}
    examples |= {
        "arch",
        "os",
        "os_version",
        "platform",
        "complete_platforms",
        "prune",
        "verify",
        "proxy",
        "admin_listen",
    }
    for field in fields(Settings):
        if field.compare and field.name not in examples:
            assert getattr(settings, field.name) == getattr(defaults, field.name), field.name


def test_shipped_file_shows_every_key() -> None:
    shown = re.findall(r"^([a-z_]+):", uncommented(), re.MULTILINE)
    assert sorted(shown) == sorted({field.name for field in fields(Settings)} - {"warnings", "files"})
