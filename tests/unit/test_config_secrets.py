"""Errors and printed configurations contain no passwords or tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociregistry.config.nodes import ConfigInvalid
from ociregistry.names import Upstream
from tests.unit.support.config_files import read, refusal

SECRET = "Xy7-s3cr3t"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "ociregistry.yaml"


@pytest.mark.parametrize(
    "lines",
    [
        [f"mirrors: ['https://operator:{SECRET}@mirror:8080']"],
        [f"mirrors: ['https://{SECRET}@mirror']"],
        [f"mirrors: ['ftp://operator:{SECRET}@mirror?x=1#y']"],
        [f"mirrors: ['https://[operator:{SECRET}@mirror']"],
        [f'auth: {{user: u, password: "{SECRET}\\n"}}'],
        [f"auth: {{password: {SECRET}}}"],
        [f"auth: {{user: u, password: {SECRET}, identity_token: {SECRET}}}"],
        [f"auth: {{user: u, password: {SECRET}, password_env: HOME}}"],
        [f"auth: {{user: u:v, password: {SECRET}}}"],
        [f'auth: {{identity_token: "{SECRET}\\t"}}'],
        pytest.param([f"auth: {{realm: 'https://u:{SECRET}@auth.example'}}"]),
    ],
)
def test_error_contains_no_secret(path: Path, lines: list[str]) -> None:
    assert SECRET not in refusal(path, "\n  ".join(["- name: a.b", *lines]))


@pytest.mark.parametrize("text", ["lines\n" + SECRET, SECRET + "\0"])
def test_error_about_a_file_contains_no_secret(path: Path, text: str) -> None:
    (path.parent / "secret").write_text(text)
    assert SECRET not in refusal(path, "- name: a.b\n  auth: {user: u, password_file: secret}")


def test_printed_entry_contains_no_secret(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REG_PASSWORD", SECRET)
    (path.parent / "secret").write_text(SECRET)
    for auth in (
        f"user: u, password: {SECRET}",
        "user: u, password_file: secret",
        "user: u, password_env: REG_PASSWORD",
        f"identity_token: {SECRET}",
    ):
        config = read(path, f"- name: a.b\n  auth: {{{auth}}}")
        assert SECRET not in repr(config)
        assert SECRET not in str(config.registries[Upstream("a.b")].login)


VALUES = st.text("ab:/@?#[]. ", max_size=8) | st.sampled_from(["http://m", "https://u:p@m", "x"])
AUTH = st.dictionaries(
    st.sampled_from(["user", "identity_token", "password_env", "password_file", "credential_helper", "realm"]),
    VALUES | st.just(None) | st.lists(VALUES, max_size=1),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(AUTH, st.sampled_from(["password", "identity_token"]), VALUES, st.lists(VALUES, max_size=3))
def test_any_entry_contains_no_secret(
    path: Path, auth: dict[str, object], key: str, around: str, mirrors: list[str]
) -> None:
    given = {"name": "a.b", "auth": {**auth, key: f"{around}{SECRET}{around}"}, "mirrors": mirrors}
    path.write_text(yaml.safe_dump([given], allow_unicode=True))
    try:
        printed = repr(read(path, path.read_text()))
    except ConfigInvalid as refused:
        printed = str(refused)
        assert printed.startswith(f"{path}:")
    assert SECRET not in printed
