"""The entries of `registries`: logins, realms and mirrors."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociregistry.config.file import read_config
from ociregistry.config.files import ConfigFiles
from ociregistry.config.nodes import ConfigInvalid
from ociregistry.config.registries import Helper, IdentityToken, Login, Mirror, Password, RegistrySettings
from ociregistry.config.tls import UpstreamTls
from ociregistry.names import Upstream
from tests.unit.support.config_files import read, refusal

REG = Upstream("reg.example")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "ociregistry.yaml"


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the program of the credential helper `pass-word.1`, the only one in PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "docker-credential-pass-word.1"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    return program


def entry(*lines: str) -> str:
    """Return a file with these lines in the entry of `REG`, from the second line on."""
    return "\n  ".join([f"- name: {REG}", *lines]) + "\n"


def configured(path: Path, *lines: str) -> RegistrySettings:
    """Return the settings of `REG` made from these lines."""
    return read(path, entry(*lines)).registries[REG]


def login(path: Path, *lines: str) -> Login | None:
    """Return the login made from these lines of `auth`."""
    return configured(path, "auth:", *(f"  {line}" for line in lines)).login


@pytest.mark.parametrize("password", ["p", "tr0ub4dor: &3", " a b ", "0123", "no", "~", "ünïcode", "'", "#"])
def test_password_is_taken_literally(path: Path, password: str) -> None:
    quoted = password.replace("'", "''")
    assert login(path, "user: operator", f"password: '{quoted}'") == Password("operator", password, "password")


def test_numeric_password_stays_text(path: Path) -> None:
    assert login(path, "user: 007", "password: 1.50") == Password("007", "1.50")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_password_file_is_relative_to_the_config(path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / "secrets").mkdir()
    (path.parent / "secrets" / "reg").write_bytes(f" a pass wörd {end}".encode())
    monkeypatch.chdir("/")
    for where in ("secrets/reg", path.parent / "secrets/reg"):
        assert login(path, "user: u", f"password_file: {where}") == Password("u", " a pass wörd ", "password_file")


def test_password_from_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REG_PASSWORD", "from: there")
    assert login(path, "user: u", "password_env: REG_PASSWORD") == Password("u", "from: there", "password_env")


def test_identity_token(path: Path) -> None:
    assert login(path, "identity_token: eyJ.abc=") == IdentityToken("eyJ.abc=")


def test_credential_helper(path: Path, helper: Path) -> None:
    found = login(path, "credential_helper: pass-word.1")
    assert found == Helper("pass-word.1")
    assert found.program == helper.name


def test_helper_that_is_not_executable_is_refused(path: Path, helper: Path) -> None:
    helper.chmod(0o644)
    assert "there is no program docker-credential-pass-word.1 in PATH" in refusal(
        path, entry("auth: {credential_helper: pass-word.1}")
    )


@pytest.mark.parametrize(
    ("realm", "host"),
    [
        ("auth.example", "auth.example"),
        ("AUTH.example:5001", "auth.example:5001"),
        ("https://auth.example/token", "auth.example"),
        ("http://auth.example:5001", "auth.example:5001"),
        ("https://auth.example:5001/a/b?c", "auth.example:5001"),
        ("'[::1]:5001'", "[::1]:5001"),
        ("'https://[::1]/token'", "[::1]"),
        ("::1", "[::1]"),
    ],
)
def test_realm_is_host_or_url(path: Path, realm: str, host: str) -> None:
    found = configured(path, "auth:", "  user: u", "  password: p", f"  realm: {realm}")
    assert (found.realm, found.login) == (Upstream(host), Password("u", "p"))
    alone = configured(path, "auth:", f"  realm: {realm}")
    assert (alone.realm, alone.login) == (Upstream(host), None)


@pytest.mark.parametrize("auth", ["user: u, password: p", "identity_token: t", "credential_helper: pass-word.1"])
def test_realm_with_every_login(path: Path, helper: Path, auth: str) -> None:
    found = configured(path, f"auth: {{{auth}, realm: auth.example}}")
    assert found.login is not None
    assert found.realm == Upstream("auth.example")


@pytest.mark.parametrize(
    ("url", "mirror"),
    [
        ("http://mirror", Mirror("http", Upstream("mirror"))),
        ("https://Mirror.Example:8080", Mirror("https", Upstream("mirror.example:8080"))),
        ("https://mirror/", Mirror("https", Upstream("mirror"))),
        ("https://mirror/cache/v/", Mirror("https", Upstream("mirror"), "/cache/v")),
        ("HTTP://10.0.0.1:5000/x", Mirror("http", Upstream("10.0.0.1:5000"), "/x")),
        ("https://[::1]:5000", Mirror("https", Upstream("[::1]:5000"))),
    ],
)
def test_mirror_is_a_url(path: Path, url: str, mirror: Mirror) -> None:
    assert configured(path, f"mirrors: ['{url}']").mirrors == (mirror,)
    assert configured(path, f"mirrors: ['{mirror}']").mirrors == (mirror,)


def test_mirrors_keep_their_order(path: Path) -> None:
    found = configured(path, "mirrors:", "- http://b", "- https://a/x", "- http://c:1").mirrors
    assert [str(mirror) for mirror in found] == ["http://b", "https://a/x", "http://c:1"]


def test_mirrors_only(path: Path) -> None:
    assert not configured(path, "mirrors: [http://a]").mirrors_only
    assert configured(path, "mirrors: [http://a]", "mirrors_only: true").mirrors_only
    assert not configured(path, "mirrors: [http://a]", "mirrors_only: false").mirrors_only
    assert not configured(path, "mirrors_only: false").mirrors_only


def test_login_or_tls_requires_https() -> None:
    assert not RegistrySettings(REG, realm=REG, mirrors=(Mirror("http", REG),)).must_be_secure
    for known in (Password("u", "p"), IdentityToken("t"), Helper("h")):
        assert RegistrySettings(REG, login=known).must_be_secure
    assert RegistrySettings(REG, tls=UpstreamTls(verify=False)).must_be_secure


@pytest.mark.parametrize(
    ("lines", "line", "key", "why"),
    [
        (["auth: {user: u}"], 2, "auth.user", "one of password, password_file, password_env is missing"),
        (["auth: {password: p}"], 2, "auth.password", "has no effect without user"),
        (["auth:", "  password_file: p"], 3, "auth.password_file", "has no effect without user"),
        (["auth: {password_env: P}"], 2, "auth.password_env", "has no effect without user"),
        (["auth:", "  identity_token: t", "  password: p"], 4, "auth.password", "has no effect without user"),
        (["auth:", "  user: a:b", "  password: p"], 3, "auth.user", "must not contain a colon"),
        (["auth: {user: '', password: p}"], 2, "auth.user", "printable characters"),
        (["auth: {user: u, password: ''}"], 2, "auth.password", "printable characters"),
        (["auth: {user: u, password: [p]}"], 2, "auth.password", "a single value"),
        (['auth: {user: "u\\n", password: p}'], 2, "auth.user", "printable characters"),
        (['auth: {user: u, password: "p\\0"}'], 2, "auth.password", "printable characters"),
        (['auth: {identity_token: "t\\r\\n"}'], 2, "auth.identity_token", "printable characters"),
        (["auth:", "  user: u", "  password: p", "  password_file: f"], 5, "auth.password_file", "with password:"),
        (
            ["auth:", "  password_env: E", "  user: u", "  password_file: f"],
            3,
            "auth.password_env",
            "with password_f",
        ),
        (["auth:", "  user: u", "  password: p", "  identity_token: t"], 5, "auth.identity_token", "with user:"),
        (["auth:", "  credential_helper: h", "  identity_token: t"], 3, "auth.credential_helper", "with identity_"),
        (
            ["auth: {user: u, password_file: nowhere}"],
            2,
            "auth.password_file",
            "nowhere cannot be read: No such",
        ),
        (["auth: {user: u, password_file: .}"], 2, "auth.password_file", "cannot be read: Is a directory"),
        (["auth: {user: u, password_file: empty}"], 2, "auth.password_file", "empty holds no password"),
        (["auth: {user: u, password_file: lines}"], 2, "auth.password_file", "lines holds no password"),
        (
            ["auth: {user: u, password_file: bytes}"],
            2,
            "auth.password_file",
            "bytes holds no password",
        ),
        (["auth: {user: u, password_env: UNSET}"], 2, "auth.password_env", "variable UNSET is not set"),
        (["auth: {user: u, password_env: EMPTY}"], 2, "auth.password_env", "variable EMPTY holds no password"),
        (
            ["auth:", "  credential_helper: nobody"],
            3,
            "auth.credential_helper",
            "no program docker-credential-n",
        ),
        (["auth: {credential_helper: ../bin/x}"], 2, "auth.credential_helper", "is not the NAME of a"),
        (["auth: {credential_helper: -x}"], 2, "auth.credential_helper", "is not the NAME of a"),
        (["auth: {realm: https://auth.example:0/}"], 2, "auth.realm", "not the name of a registry"),
        (["auth: {realm: ''}"], 2, "auth.realm", "printable characters"),
        (["auth: {realm: auth.example/token}"], 2, "auth.realm", "not the name of a registry"),
        (["auth:", "  user: u", "  passwort: p"], 4, "auth.passwort", "unknown key"),
        (["auth:", "  user: u", "  user: u"], 4, "auth.user", "duplicate key"),
        (["mirrors: ['https://mirror?x=1']"], 2, "mirrors", "a URL such as https://mirror:8080 is expected"),
        (["mirrors: ['https://mirror/a b']"], 2, "mirrors", "a URL such as https://mirror:8080 is expected"),
        (["mirrors: ['https://mirror#x']"], 2, "mirrors", "a URL such as"),
        (["mirrors: ['https://mirror/ü']"], 2, "mirrors", "a URL such as"),
        (["mirrors:", "- http://mirror", "- ftp://mirror"], 4, "mirrors", "a URL such as"),
        (["mirrors: [mirror:8080]"], 2, "mirrors", "a URL such as"),
        (["mirrors: [//mirror]"], 2, "mirrors", "a URL such as"),
        (['description: "\\e[31m"'], 2, "description", "printable"),
        (['description: "\\ud800"'], 2, "description", "printable"),
        (["mirrors: ['https:///x']"], 2, "mirrors", "a URL such as"),
        (["mirrors: ['https://mirror:0']"], 2, "mirrors", "not the name of a registry"),
        (["mirrors: ['https://[::1']"], 2, "mirrors", "is not a URL"),
        (["mirrors: ['']"], 2, "mirrors", "printable characters"),
        (["mirrors: [[http://a]]"], 2, "mirrors", "a single value"),
        (["mirrors_only: true"], 2, "mirrors_only", "needs mirrors"),
        (["mirrors: []", "mirrors_only: true"], 3, "mirrors_only", "needs mirrors"),
        (["mirrors: [http://a]", "mirrors_only: 'yes'"], 3, "mirrors_only", "true or false is expected"),
    ],
)
def test_error_names_file_line_and_key(
    path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], line: int, key: str, why: str
) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    (path.parent / "empty").write_text("\n")
    (path.parent / "lines").write_text("two\nlines\n")
    (path.parent / "bytes").write_bytes(b"\xff\xfe\n")
    refused = refusal(path, entry(*lines))
    assert refused.startswith(f"{path}:{line}: {key}: ")
    assert why in refused


@pytest.mark.parametrize("password", ["two\nlines", "p\udcff"])
def test_unprintable_password_in_environment_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("REG_PASSWORD", password)
    refused = refusal(path, entry("auth: {user: u, password_env: REG_PASSWORD}"))
    assert refused.startswith(f"{path}:2: auth.password_env: ")
    assert password not in refused


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["http", "https", "ftp"]), st.text("ab1:/[].%-~\\@?#", max_size=12) | st.text(max_size=8))
def test_accepted_mirror_url_is_used_unchanged(path: Path, scheme: str, rest: str) -> None:
    path.write_text(yaml.safe_dump([{"name": "a.b", "mirrors": [f"{scheme}://{rest}"]}]))
    try:
        (mirror,) = read(path, path.read_text()).registries[Upstream("a.b")].mirrors
    except ConfigInvalid:
        return
    parts = urlsplit(f"{mirror}/v2/")
    assert (parts.scheme, parts.netloc, parts.path) == (mirror.scheme, mirror.host.name, f"{mirror.path}/v2/")
    assert (parts.username, parts.password, parts.query, parts.fragment) == (None, None, "", "")


@pytest.mark.parametrize(
    ("behind", "why"),
    [
        ("auth: {user: u, password: p}", "needs scheme: http"),
        ("tls: {insecure_skip_verify: true}", "needs scheme: http"),
        ("scheme: https", "is for https"),
    ],
)
def test_http_mirror_of_secured_upstream_is_refused(path: Path, behind: str, why: str) -> None:
    text = "- name: reg.example\n  mirrors: ['http://mirror:5000']\n- name: mirror:5000\n"
    path.write_text(f"{text}  {behind}\n")
    with pytest.raises(ConfigInvalid, match=f"^{path}:2: mirrors: http://mirror:5000: .*{why}"):
        read_config(path, set(), ConfigFiles())
    path.write_text(f"{text}  scheme: http\n  auth: {{user: u, password: p}}\n")
    assert len(read_config(path, set(), ConfigFiles()).registries) == 2
