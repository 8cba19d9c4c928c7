"""The configuration file: accepted forms, and errors with file, line and key."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociregistry.config.file import Config, VerifySettings, read_config
from ociregistry.config.files import ConfigFiles
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.config.registries import RegistrySettings
from ociregistry.config.tls import SYSTEM_TRUST
from ociregistry.names import Upstream
from tests.unit.support.config_files import OPTIONS, read, refusal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "ociregistry.yaml"


@pytest.mark.parametrize(
    "text", ["", "\n", "# only\n# comments\n", "---\n", "null", "~", "--- # nothing\n...\n", "{}", "[]"]
)
def test_empty_file_sets_nothing(path: Path, text: str) -> None:
    assert read(path, text) == Config(path)


def test_mapping_sets_options(path: Path) -> None:
    config = read(path, "port: 5000\n# a comment\nlog_level: 'debug'\n\nimage_path: images\n")
    assert dict(config.values) == {
        "port": ("5000", f"{path}:1: port"),
        "log_level": ("debug", f"{path}:3: log_level"),
        "image_path": ("images", f"{path}:5: image_path"),
    }
    assert config.listen == ()
    assert config.registries == {}


def test_key_without_value_sets_nothing(path: Path) -> None:
    assert read(path, "port:\nlog_level: null\nlisten: ~\nregistries:\n") == Config(path)


def test_listen_is_a_list(path: Path) -> None:
    text = r"listen: ['tcp:8080', tcp:8081:interface=\:\:1]"
    assert read(path, text).listen == ("tcp:8080", r"tcp:8081:interface=\:\:1")


QUAY = Upstream("quay.io")
REGISTRIES = """\
- name: My-Upstream:5000
  description: free text
  scheme: http
- name: docker.io
- name: quay.io
  scheme: https
  description:
"""
EXPECTED = {
    Upstream("my-upstream:5000"): RegistrySettings(Upstream("my-upstream:5000"), "http", "free text"),
    Upstream("docker.io"): RegistrySettings(Upstream("docker.io")),
    QUAY: RegistrySettings(QUAY, "https"),
}


def test_registries_as_top_level_list_or_under_key(path: Path) -> None:
    assert read(path, REGISTRIES) == Config(path, registries=EXPECTED)
    indented = "".join(f"  {line}\n" for line in REGISTRIES.splitlines())
    assert read(path, f"registries:\n{indented}").registries == EXPECTED
    assert read(path, f"registries:\n{REGISTRIES}port: 1\n").registries == EXPECTED


@pytest.mark.parametrize("empty", ["", "null", "~"])
def test_empty_key_of_an_entry_is_ignored(path: Path, empty: str) -> None:
    keys = "".join(f"  {key}: {empty}\n" for key in ("description", "scheme", "auth", "tls", "mirrors"))
    assert read(path, f"- name: quay.io\n{keys}").registries == {QUAY: RegistrySettings(QUAY)}


def test_sections_may_be_empty(path: Path) -> None:
    entry = read(path, "- name: quay.io\n  auth: {}\n  tls: {}\n  mirrors: []\n").registries[QUAY]
    assert (entry.login, entry.realm, entry.tls, entry.mirrors) == (None, None, SYSTEM_TRUST, ())
    assert read(path, "registries: []\nlisten: []\ntls: {}\nbandwidth: {}\nprune: {}\nverify: {}\n") == Config(path)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("concurrently: 5", 1, "concurrently"),
        ("port: 1\nload_images: list", 2, "load_images"),
        ("prune: {before: 1d}", 1, "prune.before"),
        ("verify:\n  every: 1d\n  repair: true\n", 3, "verify.repair"),
    ],
)
def test_unknown_key_is_refused(path: Path, text: str, line: int, key: str) -> None:
    assert refusal(path, text) == f"{path}:{line}: {key}: unknown key"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("registeries: []", "registries"),
        ("log-level: info", "log_level"),
        ("logLevel: info", "log_level"),
        ("prune: {unused-for: 1d}", "unused_for"),
        ("- nam: quay.io", "name"),
        ("- {name: quay.io, auth: {user: u, passwordFromEnv: P}}", "password_env"),
        ("tls: {certs: server.crt}", "cert"),
    ],
)
def test_nearest_key_is_named(path: Path, text: str, near: str) -> None:
    assert refusal(path, text).endswith(f": unknown key: did you mean {near}?")


def test_list_and_mapping_are_shown_where_they_are_expected(path: Path) -> None:
    assert refusal(path, "listen: 0.0.0.0:8080").endswith(': listen: a list is expected, such as ["tcp:8080"]')
    named = refusal(path, "registries: {docker.io: {scheme: https}}")
    assert named.endswith(": registries: a list is expected, such as - name: docker.io")
    assert refusal(path, "complete_platforms: linux/amd64").endswith(": a list is expected, such as [VALUE, VALUE]")
    assert refusal(path, "- quay.io").endswith(": a mapping is expected, such as {KEY: VALUE}")


def test_tab_is_named(path: Path) -> None:
    assert refusal(path, "\tport: 1\n").endswith(":1: is not YAML: found a tab that cannot start any token")


def test_maintenance_sections_are_read(path: Path) -> None:
    config = read(path, "verify: {every: 1d}\nprune: {unused_for: 1d}\nbandwidth: []\n")
    assert config.prune is not None
    assert config.prune.unused_for == timedelta(days=1)
    assert config.verify == VerifySettings(timedelta(days=1), None)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("\nports: 5\n", 2, "ports"),
        ("port: 1\nlog-level: info\n", 2, "log-level"),
        ("port: 1\n\nport: 2\n", 3, "port"),
        ("registries: []\nregistries: []\n", 2, "registries"),
        ("port: [1]", 1, "port"),
        ("port:\n  nested: 1\n", 2, "port"),
        ("listen: tcp:8080", 1, "listen"),
        ("listen:\n- tcp:8080\n- [tcp:8081]\n", 3, "listen"),
        ("registries: quay.io", 1, "registries"),
        ("registries: {}", 1, "registries"),
        ("registries:\n- quay.io\n", 2, "registries"),
        ("listen: {}", 1, "listen"),
        ("tls: yes", 1, "tls"),
        ("registries:\n- name: quay.io\n  port: 5\n", 3, "port"),
        ("- name: quay.io\n  schema: http\n", 2, "schema"),
        ("- name: quay.io\n- description: no name\n", 2, "name"),
        ("- name:\n", 1, "name"),
        ("- name: quay.io\n  name: docker.io\n", 2, "name"),
        ("- name: quay.io\n- name: docker.io\n- name: QUAY.io\n", 3, "name"),
        ("- name: docker.io\n- name: index.docker.io\n", 2, "name"),
        ("- name: https://quay.io\n", 1, "name"),
        ("- name: quay.io/team\n", 1, "name"),
        ("- name: [quay.io]\n", 1, "name"),
        ("- name: quay.io\n  scheme: ftp\n", 2, "scheme"),
        ("- name: quay.io\n  scheme: HTTP\n", 2, "scheme"),
        ("- name: quay.io\n  scheme: ''\n", 2, "scheme"),
        ("- name: quay.io\n  description: [a]\n", 2, "description"),
        ("- name: quay.io\n  auth: []\n", 2, "auth"),
        ("- name: quay.io\n  auth: secret\n", 2, "auth"),
        ("- name: quay.io\n  tls: []\n", 2, "tls"),
        ("- name: quay.io\n  mirrors: {}\n", 2, "mirrors"),
        ("- name: quay.io\n  mirrors: http://a\n", 2, "mirrors"),
    ],
)
def test_error_names_file_line_and_key(path: Path, text: str, line: int, key: str) -> None:
    assert refusal(path, text).startswith(f"{path}:{line}: {key}: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("just text", 1),
        ("5", 1),
        ("\n- quay.io\n", 2),
        ("- []\n", 1),
        ("[a]: b\n", 1),
        ("? {a: b}\n: c\n", 1),
        ("port: 1\n  bad: indent\n", 2),
        ("port: [\n", 2),
        ("a: *nothing", 1),
        ("port: 1\n---\nport: 2\n", 2),
        ("\tport: 1\n", 1),
        ("port: 'unfinished\n", 2),
    ],
)
def test_invalid_yaml_is_refused_with_its_line(path: Path, text: str, line: int) -> None:
    assert refusal(path, text).startswith(f"{path}:{line}: ")


def test_unreadable_file_is_named(path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=f"^{path}: cannot be read: No such file"):
        read_config(path, OPTIONS, ConfigFiles())
    with pytest.raises(ConfigInvalid, match=f"^{path.parent}: cannot be read: Is a directory"):
        read_config(path.parent, OPTIONS, ConfigFiles())


def test_undecodable_file_is_refused(path: Path) -> None:
    path.write_bytes(b"port: \xff\n")
    with pytest.raises(ConfigInvalid, match="is not UTF-8"):
        read_config(path, OPTIONS, ConfigFiles())
    assert "is not YAML" in refusal(path, "port: \x00\n")


def test_yaml_tags_and_aliases_are_not_evaluated(path: Path) -> None:
    assert refusal(path, "port: &a [*a]\n").startswith(f"{path}:1: port: ")
    assert dict(read(path, "port: !!python/object/apply:os.getcwd ''\n").values) == {"port": ("", f"{path}:1: port")}


def test_missing_key_is_reported_at_its_entry(path: Path) -> None:
    assert refusal(path, "\n- description: x\n") == f"{path}:2: name: is missing: every entry of registries needs one"


TEXTS = st.text("abmnrt:_-[]{}'\"\n #&*!|>%@,0.", max_size=40) | st.text(max_size=20)
ENTRY = "- name: a.b\n  "
PLACES = (
    *("", "registries:\n- name: ", "listen: ", "tls: ", "tls: {cert: ", "tls:\n  client_ca: "),
    *("prune: ", "prune: {max_size: ", "prune: {unused_for: ", "prune: {max_size: 1kB, keep: [", "prune: {every: "),
    *("verify: ", "verify: {every: ", "verify:\n  every: 1d\n  max_rate: "),
    *(ENTRY, f"{ENTRY}auth: ", f"{ENTRY}tls: ", f"{ENTRY}tls:\n    ca: ", f"{ENTRY}mirrors: "),
    *(f"{ENTRY}auth: {{user: u, password: ", f"{ENTRY}auth: {{user: ", f"{ENTRY}auth: {{user: u, password_file: "),
    *(f"{ENTRY}auth: {{user: u, password_env: ", f"{ENTRY}auth: {{identity_token: ", f"{ENTRY}auth: {{realm: "),
    *(f"{ENTRY}auth: {{credential_helper: ", f"{ENTRY}mirrors: [http://", f"{ENTRY}mirrors:\n  - "),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PLACES), TEXTS, st.sampled_from(["", "}", "]", "\n"]))
def test_any_text_is_read_or_refused(path: Path, place: str, text: str, end: str) -> None:
    path.write_text(place + text + end, "utf-8", errors="replace")
    try:
        config = read_config(path, OPTIONS, ConfigFiles())
    except ConfigInvalid as refused:
        why = str(refused)
    else:
        why = f"{path}: nothing"
        assert set(config.values) <= OPTIONS
        assert all(entry.upstream == upstream for upstream, entry in config.registries.items())
    assert why.startswith(f"{path}:")
    assert "\n" not in why
