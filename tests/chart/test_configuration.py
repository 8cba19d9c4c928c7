"""The daemon accepts the configuration that the chart renders, and understands what the values say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ociregistry.config.registries import Password
from ociregistry.daemon import _AT_NEXT_START
from ociregistry.names import Upstream
from ociregistry.script import CONFIG
from ociregistry.settings import Settings, load_settings
from tests.chart.rendering import Rendered, render
from tests.chart.values import CASES, EVERY_SETTING, PASSWORD, SECRET_PASSWORD, SECRETS, pems
from tests.processes import ROOT

ENVIRONMENT = {"GHCR_TOKEN": "of the environment"}


def mounted(rendered: Rendered, folder: Path) -> Path:
    """Write the files of the volume with the configuration; return the path of the file."""
    for name, text in rendered.volume(SECRETS).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "ociregistry.yaml"


def settings(name: str, folder: Path) -> Settings:
    return load_settings({}, (), mounted(render(CASES[name].values), folder))


def test_it_is_read_without_a_warning(rendered: Rendered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert load_settings({}, (), mounted(rendered, tmp_path)).warnings == ()


@pytest.mark.parametrize("name", ["defaults", "every setting", "existing secrets", "tls in the values"])
def test_check_accepts_it(name: str, tmp_path: Path) -> None:
    path = mounted(render(CASES[name].values), tmp_path)
    argv = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()", "--nodaemon", "--pidfile="]
    argv += ["ociregistry", "--config-path", str(path), "check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_path_of_the_file_is_given() -> None:
    (container,) = render({}).pod["spec"]["containers"]
    (folder,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config")
    assert container["args"] == ["--config-path", f"{folder}/ociregistry.yaml"]
    # The same for the commands that are run in the pod.
    assert container["args"][1] == str(CONFIG)


def test_every_setting_arrives(tmp_path: Path) -> None:
    found = settings("every setting", tmp_path)
    usual = settings("defaults", tmp_path / "usual")
    same = {key for key in EVERY_SETTING if key not in ("proxy", "air_gapped", "complete_images")}
    assert [key for key in same if getattr(found, key) == getattr(usual, key)] == []
    assert found.pull_timeout == 1000
    assert found.proxy.proxies.http is not None


def test_passwords_arrive(tmp_path: Path) -> None:
    entries = settings("passwords in the values", tmp_path / "a").registries
    for name, password in (
        ("registry.internal:5000", PASSWORD),
        ("[2001:db8::1]:5000", PASSWORD),
        ("number.internal", "12345678"),
    ):
        assert entries[Upstream.parse(name)].login == Password("puller", password, "password_file")
    assert entries[Upstream.parse("mtls.internal")].tls.client is not None
    entries = settings("existing secrets", tmp_path / "b").registries
    for name, user, password in (
        ("harbor.internal", "puller", SECRET_PASSWORD),
        ("harbor.internal:8443", "r", "another"),
        ("again.internal", "puller", SECRET_PASSWORD),
    ):
        assert entries[Upstream.parse(name)].login == Password(user, password, "password_file")
    tls = entries[Upstream.parse("harbor.internal")].tls
    assert (tls.ca is None, tls.client is None) == (False, False)


@pytest.mark.parametrize(
    ("name", "clients"),
    [
        ("tls by a secret", False),
        ("tls by a secret with client certificates", True),
        ("tls in the values", True),
    ],
)
def test_tls_arrives(name: str, clients: bool, tmp_path: Path) -> None:
    tls = settings(name, tmp_path).tls
    assert tls is not None
    assert (tls.client_ca is not None) == clients


def test_preload_list_arrives(tmp_path: Path) -> None:
    path = settings("preload", tmp_path).preload_images
    assert path is not None
    assert path.read_text().split() == CASES["preload"].values["preload"]


def test_admin_port_is_on_all_addresses(tmp_path: Path) -> None:
    assert settings("defaults", tmp_path).admin_listen.endpoint == "tcp:8081"
    assert settings("everything else", tmp_path).admin_listen.endpoint == "tcp6:9091"


LATE: dict[str, dict[str, object]] = {
    "admin_listen": {"adminListen": "tcp:8082"},
    "preload_images": {"preload": ["registry.k8s.io/pause:3.10"]},
    "tls": {"tls": {"secret": "server-tls"}},
    **{
        key: {"config": {key: EVERY_SETTING.get(key, "riscv64" if key == "arch" else "windows")}}
        for key in (*_AT_NEXT_START, "arch", "os", "os_version")
        if key not in ("image_path", "port", "listen", "admin_listen", "preload_images")
    },
}


def late(rendered: Rendered) -> str:
    checksum: str = rendered.pod["metadata"]["annotations"]["checksum/next-start"]
    return checksum


@pytest.mark.parametrize("key", LATE)
def test_setting_of_the_next_start_makes_a_new_pod(key: str) -> None:
    assert late(render(LATE[key])) != late(render({}))


def test_other_settings_leave_the_pod() -> None:
    """The daemon reads its files again when they change."""
    before = render({"registries": [{"name": "quay.io"}]})
    now = {key: value for key, value in EVERY_SETTING.items() if key not in LATE}
    assert len(now) > 6
    after = render({"registries": [{"name": "quay.io", "mirrors": ["http://region:8080"]}], "config": now})
    assert before.one("ConfigMap") != after.one("ConfigMap")
    assert [one for one in after.objects if one not in before.objects] == [after.one("ConfigMap")]


def test_another_password_leaves_the_pod() -> None:
    def values(password: str) -> dict[str, object]:
        return {"registries": [{"name": "quay.io", "auth": {"user": "u", "password": password}}]}

    before, after = render(values("first")), render(values("second"))
    assert [one for one in after.objects if one not in before.objects] == [after.one("Secret")]


def test_first_password_leaves_the_pod() -> None:
    registry = {"name": "quay.io"}
    before = render({"registries": [registry]})
    after = render(
        {"registries": [{**registry, "auth": {"user": "u", "password": "p"}, "tls": {"ca": pems()["ca.crt"]}}]}
    )
    assert sorted(one["kind"] for one in after.objects if one not in before.objects) == ["ConfigMap", "Secret"]


def test_another_list_to_preload_makes_a_new_pod() -> None:
    before, after = render({"preload": ["quay.io/a/b:1"]}), render({"preload": ["quay.io/a/b:2"]})
    changed = [one for one in after.objects if one not in before.objects]
    assert [one["kind"] for one in changed] == ["ConfigMap", "Deployment"]
