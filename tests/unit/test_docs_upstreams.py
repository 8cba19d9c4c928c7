"""docs/upstreams.md: every example is a valid configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ociregistry.commands.check import report
from ociregistry.settings import Settings, load_settings
from tests.certificates import Authority

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "upstreams.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority) -> Path:
    """Create the files, the helper and the environment variable that the examples name."""
    for name in ("client", "server"):
        certificate, key = authority.issue(f"{name}.internal")
        certificate.rename(tmp_path / f"{name}.crt")
        key.rename(tmp_path / f"{name}.key")
    for name in ("internal-ca.crt", "clients-ca.crt"):
        (tmp_path / name).write_bytes(authority.ca.read_bytes())
    (tmp_path / "docker.password").write_text("secret\n")
    helper = tmp_path / "docker-credential-ecr-login"
    helper.write_text("#!/bin/sh\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GHCR_TOKEN", "secret")
    return tmp_path


def load(folder: Path, text: str) -> Settings:
    """Return the settings made from an example."""
    path = folder / "ociregistry.yaml"
    path.write_text(text)
    return load_settings({}, (), path)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_has_an_effect(folder: Path, example: str) -> None:
    settings = load(folder, example)
    assert settings != load(folder, "")
    assert settings.warnings == ()
    assert not any("secret" in line for line in report(settings))


@pytest.mark.parametrize(
    ("product", "api"),
    [
        ("harbor", "/v2/dockerhub"),
        ("artifactory", "/artifactory/api/docker/docker-remote/v2"),
        ("gitlab", "/v2/mygroup/dependency_proxy/containers"),
        ("ecr", "/v2/docker-hub"),
    ],
)
def test_mirror_of_other_product_has_its_path(folder: Path, product: str, api: str) -> None:
    settings = [load(folder, example) for example in EXAMPLES]
    mirrors = {mirror for one in settings for entry in one.registries.values() for mirror in entry.mirrors}
    assert api in {mirror.api for mirror in mirrors if product in str(mirror.host)}


def test_every_registry_key_has_an_example() -> None:
    keys = {match[1] for example in EXAMPLES for match in re.finditer(r"^[ -]*(\w+):", example, re.MULTILINE)}
    assert keys >= {"name", "description", "scheme", "auth", "tls", "mirrors", "proxy"}
    assert keys >= {
        "user",
        "password",
        "password_file",
        "password_env",
        "identity_token",
        "credential_helper",
        "realm",
    }
    assert keys >= {"ca", "cert", "key", "insecure_skip_verify", "client_ca", "allow_upstreams"}
