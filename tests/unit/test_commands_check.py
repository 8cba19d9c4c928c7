"""`check`: reports how each upstream is reached, without secrets and without network access."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ociregistry.commands.check import report
from ociregistry.settings import load_settings
from ociregistry.tap import Options
from tests.certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
SYSTEM = "certificate verified by the operating system's trust store"
OTHERS = [
    "every other upstream",
    f"  https, {SYSTEM}",
    "  http where a name with a port, or with private addresses alone, does not speak TLS",
    "  anonymous",
]
SECRET = "Xy7-s3cr3t"
OR_HTTP = "or http if it does not speak TLS"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "ociregistry.yaml"


def lines(path: Path, text: str, *listen: str, **given: str) -> list[str]:
    """Return the report for a file with this text and these options."""
    path.write_text(text)
    return list(report(load_settings(given, listen, path)))


def upstreams(path: Path, text: str, **given: str) -> list[str]:
    """Return the report about upstreams for a file with this text."""
    expected = lines(path, text, **given)
    assert expected[:2] == ["clients, at port 8080", "  http"]
    first = [line.startswith("every other upstream") for line in expected].index(True)
    return expected[2:first]


def test_without_configuration() -> None:
    assert list(report(load_settings({}, (), None))) == [
        "clients, at port 8080",
        "  http",
        *OTHERS,
        "the store, at /var/lib/ociregistry",
    ]


def test_air_gapped_daemon_contacts_no_upstream(path: Path) -> None:
    assert lines(
        path,
        "air_gapped: true\nimage_path: /srv/images\n"
        "registries:\n  - name: reg.example\n    auth: {user: u, password: p}\n",
    ) == [
        "clients, at port 8080",
        "  http",
        "every upstream",
        "  never contacted: the daemon is air-gapped",
        "the store, at /srv/images",
    ]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("", [f"https://reg.example, {SYSTEM}, {OR_HTTP} and has private addresses alone", "anonymous"]),
        ("scheme: https", [f"https://reg.example, {SYSTEM}", "anonymous"]),
        ("scheme: http", ["http://reg.example", "anonymous"]),
        ("auth: {user: u, password: p}", [f"https://reg.example, {SYSTEM}", "as the user u, by password"]),
        ("auth: {identity_token: t}", [f"https://reg.example, {SYSTEM}", "by an identity token"]),
        (
            "scheme: http\n  auth: {identity_token: t, realm: https://auth.example:5001/token}",
            ["http://reg.example", "by an identity token, also to the token service auth.example:5001"],
        ),
        ("tls: {insecure_skip_verify: true}", ["https://reg.example, certificate NOT VERIFIED", "anonymous"]),
    ],
)
def test_upstream_settings_are_reported(path: Path, entry: str, expected: list[str]) -> None:
    assert upstreams(path, f"- name: reg.example\n  {entry}\n") == [
        "reg.example",
        *(f"  {line}" for line in expected),
    ]


def test_every_login_method_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / "secret").write_text(SECRET)
    monkeypatch.setenv("REG_PASSWORD", SECRET)
    program = path.parent / "docker-credential-x"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))
    for auth, expected in (
        (f"user: u, password: {SECRET}", "as the user u, by password"),
        ("user: u, password_file: secret", "as the user u, by password_file"),
        ("user: u, password_env: REG_PASSWORD", "as the user u, by password_env"),
        (f"identity_token: {SECRET}", "by an identity token"),
        ("credential_helper: x", "as docker-credential-x says"),
        (f"user: u, password: {SECRET}, realm: a.b", "as the user u, by password, also to the token service a.b"),
    ):
        reported = upstreams(path, f"- name: reg.example\n  auth: {{{auth}}}\n")
        assert reported[-1] == f"  {expected}"
        assert not any(SECRET in line for line in reported)


def test_report_has_proxy_of_each_upstream_without_password(path: Path) -> None:
    text = f"""\
proxy: http://u{SECRET}:{SECRET}@proxy:3128
registries:
- name: a.example
- name: b.example:5000
- name: c.example
  scheme: http
  proxy: none
- name: d.example
  scheme: https
  proxy: https://u:{SECRET}@other
- name: e.example
  auth: {{user: u, password: {SECRET}}}
  mirrors: [https://d.example, http://c.example]
"""
    path.write_text(text)
    told = list(report(load_settings({}, (), path, {"NO_PROXY": "e.example,10.0.0.0/8"})))
    assert told[2:] == [
        "a.example",
        f"  https://a.example, {SYSTEM}",
        "  anonymous",
        "  through the proxy http://proxy:3128",
        "b.example:5000",
        f"  https://b.example:5000, {SYSTEM}, {OR_HTTP}",
        "  anonymous",
        "  through the proxy http://proxy:3128",
        "c.example",
        "  http://c.example",
        "  anonymous",
        "  without a proxy",
        "d.example",
        f"  https://d.example, {SYSTEM}",
        "  anonymous",
        "  through the proxy https://other:443",
        "e.example",
        f"  first https://d.example/v2, {SYSTEM}, anonymous, through the proxy https://other:443",
        "  first http://c.example/v2, anonymous, without a proxy",
        f"  then https://e.example, {SYSTEM}",
        "  as the user u, by password",
        "  without a proxy",
        "every other upstream",
        f"  https, {SYSTEM}",
        "  http where a name with a port does not speak TLS",
        "  anonymous",
        "  through the proxy http://proxy:3128",
        "  without a proxy where it is in NO_PROXY (e.example,10.0.0.0/8) or on this machine",
        "the store, at /var/lib/ociregistry",
    ]
    assert not any(SECRET in line for line in told)


def test_report_of_proxy_for_one_scheme(path: Path) -> None:
    path.write_text("- name: a.example:5000\n- name: b.example\n  scheme: http\n")
    told = list(report(load_settings({}, (), path, {"HTTP_PROXY": "proxy:3128"})))
    assert told[2:] == [
        "a.example:5000",
        f"  https://a.example:5000, {SYSTEM}, {OR_HTTP}",
        "  anonymous",
        "  https without a proxy, http through the proxy http://proxy:3128",
        "b.example",
        "  http://b.example",
        "  anonymous",
        "  through the proxy http://proxy:3128",
        *OTHERS,
        "  https without a proxy, http through the proxy http://proxy:3128",
        "  without a proxy where it is on this machine",
        "the store, at /var/lib/ociregistry",
    ]


def test_registry_that_is_never_asked(path: Path) -> None:
    text = "- name: docker.io\n  mirrors: [http://one:5000]\n  mirrors_only: true\n  auth: {user: u, password: p}\n"
    assert upstreams(path, text) == [
        "docker.io",
        "  first http://one:5000/v2, anonymous",
        "  never registry-1.docker.io itself: mirrors_only",
    ]


def test_mirrors_are_listed_first_with_their_own_settings(path: Path, authority: Authority) -> None:
    authority.issue("client")
    text = f"""\
- name: reg.example
  mirrors: ["https://one:5000/cache", "https://two", https://three]
  auth: {{user: u, password: {SECRET}}}
- name: one:5000
  auth: {{identity_token: {SECRET}}}
  tls: {{ca: test-authority.crt, cert: client.crt, key: client.key}}
- name: two
  tls: {{insecure_skip_verify: true}}
"""
    ca = f"certificate verified by {authority.ca}"
    ours = "our certificate CN=client until 2119-12-08"
    assert upstreams(path, text) == [
        "reg.example",
        f"  first https://one:5000/v2/cache, {ca}, {ours}, by an identity token",
        "  first https://two/v2, certificate NOT VERIFIED, anonymous",
        f"  first https://three/v2, {SYSTEM}, anonymous",
        f"  then https://reg.example, {SYSTEM}",
        "  as the user u, by password",
        "one:5000",
        f"  https://one:5000, {ca}, {ours}",
        "  by an identity token",
        "two",
        "  https://two, certificate NOT VERIFIED",
        "  anonymous",
    ]


def test_expired_certificate_is_marked(path: Path, authority: Authority) -> None:
    authority.issue("client", expired=True)
    expected = upstreams(path, "- name: reg.example\n  tls: {cert: client.crt, key: client.key}\n")
    assert expected[1] == f"  https://reg.example, {SYSTEM}, our certificate CN=client until 2020-12-31"


def test_docker_hub_is_shown_at_its_api_host(path: Path) -> None:
    expected = upstreams(
        path, "- name: index.docker.io\n  scheme: https\n- name: a.b\n  mirrors: [https://docker.io]\n"
    )
    assert expected[:2] == ["docker.io", f"  https://registry-1.docker.io, {SYSTEM}"]
    assert expected[4] == f"  first https://docker.io/v2, {SYSTEM}, anonymous"


def test_disallowed_upstream_is_marked(path: Path) -> None:
    text = "- name: quay.io\n  description: theirs\n- name: a.example\n- name: docker.io\n"
    expected = lines(path, text, allow_upstreams="*.example,docker.io")
    headings = [line for line in expected if not line.startswith(" ")]
    assert headings == [
        "clients, at port 8080",
        "quay.io (theirs): NOT ALLOWED by allow_upstreams",
        "a.example",
        "docker.io",
        "every other upstream, if it is one of *.example, docker.io",
        "the store, at /var/lib/ociregistry",
    ]
    assert not any("NOT ALLOWED" in line for line in lines(path, text))


def test_listeners_are_reported(path: Path, authority: Authority) -> None:
    assert lines(path, "port: 5000")[:2] == ["clients, at port 5000", "  http"]
    assert lines(path, "", "tcp:1", "systemd:domain=INET:index=0")[:2] == [
        "clients, at tcp:1, systemd:domain=INET:index=0",
        "  http",
    ]
    assert lines(path, "", "ssl:1", "ssl:2")[1] == "  https"
    authority.issue("server")
    pair = "cert: server.crt, key: server.key"
    served = "  https, our certificate CN=server until 2119-12-08"
    assert lines(path, f"tls: {{{pair}}}")[:2] == ["clients, at port 8080", served]
    assert lines(path, f"tls: {{{pair}, client_ca: test-authority.crt}}", "tcp:1")[:3] == [
        "clients, at tcp:1",
        served,
        f"  only with a certificate of {authority.ca}",
    ]


@pytest.mark.parametrize("description", ["|\n    free\n    text", '"a\\nb"'])
def test_description_is_printed_on_one_line(path: Path, description: str) -> None:
    for line in lines(path, f"- name: reg.example\n  description: {description}\n"):
        assert line.isprintable()


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str, str]:
    """Run a command line; return its exit status and its output."""
    with pytest.raises(SystemExit) as ended:
        Options().parseOptions(argv)
    return (ended.value.code, *capfd.readouterr())


def test_config_path_before_or_after_command(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = "".join(f"{line}\n" for line in lines(path, "port: 5\nregistries:\n- name: quay.io\n"))
    assert "quay.io" in expected
    for argv in (("check", "--config-path", str(path)), ("--config-path", str(path), "check")):
        assert run(capfd, *argv) == (0, expected, "")
    assert run(capfd, "check", "--config-path", str(path), "--port", "7")[1].startswith("clients, at port 7\n")
    assert run(capfd, "check")[1] == "".join(f"{line}\n" for line in report(load_settings({}, (), None)))


def test_warnings_go_to_stderr(path: Path, authority: Authority, capfd: pytest.CaptureFixture[str]) -> None:
    text = "- name: a.b\n  tls: {ca: test-authority.crt, insecure_skip_verify: true}\n"
    expected = lines(path, text)
    status, out, err = run(capfd, "check", "--config-path", str(path))
    assert (status, out.splitlines()) == (0, expected)
    (line,) = err.splitlines()
    assert line.startswith(f"ociregistry: warning: {path}:2: tls.ca: has no effect with insecure_skip_verify")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, ": cannot be read: No such file or directory"),
        ("nginx:1\nnot an image\n", ":2: "),
        ("nginx:1\n", None),
    ],
)
def test_image_list_to_preload_is_read(
    path: Path, content: str | None, why: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    listed = path.with_name("imagelist")
    if content is not None:
        listed.write_text(content)
    expected = lines(path, "preload_images: imagelist\n")
    status, out, err = run(capfd, "check", "--config-path", str(path))
    assert (status, out.splitlines()) == (0, expected)
    assert err.startswith("" if why is None else f"ociregistry: warning: {listed}{why}")
    assert err.count("\n") == (why is not None)


def test_pipe_to_preload_is_left_to_the_daemon(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(path.with_name("imagelist"))
    expected = lines(path, "preload_images: imagelist\n")
    assert run(capfd, "check", "--config-path", str(path)) == (0, "".join(f"{line}\n" for line in expected), "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- name: a.b\n  auth: {user: u}\n", ":2: auth.user: one of password,"),
        ("- name: a.b\n  tls: {ca: nowhere}\n", ":2: tls.ca: "),
        ("port: http\n", ":1: port: 'http': a number"),
        ("- name: [\n", ":2: is not YAML: "),
    ],
)
def test_invalid_file_is_reported_in_one_line(
    path: Path, capfd: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    path.write_text(text)
    for argv in (("check", "--config-path", str(path)), ("--config-path", str(path), "check")):
        status, out, err = run(capfd, *argv)
        assert (status, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith(f"ociregistry: {path}{why}")


@pytest.mark.parametrize(
    "argv", [["check", "--nonsense"], ["check", "serve"], ["check", "--config-path", "/nowhere"]]
)
def test_usage_error_is_one_line(capfd: pytest.CaptureFixture[str], argv: list[str]) -> None:
    status, out, err = run(capfd, *argv)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_check_does_not_daemonize_or_leave_files(path: Path, authority: Authority) -> None:
    certificate, key = authority.issue("client")
    auth, tls = f"{{user: u, password: {SECRET}}}", "{cert: client.crt, key: client.key}"
    expected = lines(path, f"- name: quay.io\n  auth: {auth}\n  tls: {tls}\n")
    before = {path, certificate, key, authority.ca}
    twistd = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
    ran = subprocess.run(
        [*twistd, "ociregistry", "--config-path", path.name, "check"],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.splitlines(), ran.stderr) == (0, expected, "")
    assert set(path.parent.iterdir()) == before
