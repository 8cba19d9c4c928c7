"""`load` and `--preload-images` take Kubernetes objects: what helm and kubectl print, from files and a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import fetch
from tests.images import make_image
from tests.kubernetes_objects import helm_template, kubectl_json, pod
from tests.processes import Daemon, wait_until
from tests.real.shells import Ended, Shell, blobs_in, digests, run_process, shell_in, succeeded
from tests.upstream import ScriptedRegistry

IMAGES = {f"v1.{number}": make_image(f"objects/{number}") for number in range(30)}
SIDECAR, INIT, DATA = (make_image(f"objects/{name}") for name in ("sidecar", "init", "data"))
PATIENCE = 120.0


@pytest.fixture
def shell(upstream: ScriptedRegistry, tmp_path: Path) -> Shell:
    """An empty store, and an upstream with all images."""
    for tag, image in IMAGES.items():
        upstream.add(f"shop/part{tag[3:]}", image, tag)
    for name, image in {"sidecar": SIDECAR, "init": INIT, "data": DATA}.items():
        upstream.add(f"shop/{name}", image, "latest")
    return shell_in(tmp_path, [{"name": upstream.host, "scheme": "http"}])


def urls(upstream: ScriptedRegistry) -> list[str]:
    """Return the images with numbered tags."""
    return [f"{upstream.host}/shop/part{tag[3:]}:{tag}" for tag in IMAGES]


def piped(shell: Shell, text: str, *arguments: str) -> Ended:
    """Run a command with `text` in a pipe as its standard input."""
    return run_process(shell.argv(*arguments), shell.folder, text=text)


def test_output_of_helm_template_is_loaded(upstream: ScriptedRegistry, shell: Shell) -> None:
    (shell.folder / "rendered").write_text(helm_template([*urls(upstream), f"{upstream.host}/shop/sidecar"]))
    done = succeeded(shell.run("load", "rendered", "--concurrent", "8"))
    assert done.splitlines()[-1] == "31 loaded, 0 already there, 0 failed"
    assert blobs_in(shell.store) == digests(*IMAGES.values(), SIDECAR)


def test_output_of_kubectl_is_loaded_from_a_pipe(upstream: ScriptedRegistry, shell: Shell) -> None:
    first, *others = urls(upstream)[:5]
    volume = {"name": "data", "image": {"reference": f"{upstream.host}/shop/data"}}
    init = {"name": "init", "image": f"{upstream.host}/shop/init@{INIT.manifest.digest}"}
    pods = [
        pod("first", [first], initContainers=[init], volumes=[volume]),
        *(pod(f"web-{number}", [url, f"{upstream.host}/shop/sidecar"]) for number, url in enumerate(others)),
    ]
    done = succeeded(piped(shell, kubectl_json(pods), "load", "-"))
    assert done.splitlines()[-1] == "8 loaded, 0 already there, 0 failed"
    assert blobs_in(shell.store) == digests(*list(IMAGES.values())[:5], SIDECAR, INIT, DATA)


def test_images_prints_what_load_takes(upstream: ScriptedRegistry, shell: Shell) -> None:
    text = helm_template([*urls(upstream)[:3], f"{upstream.host}/shop/sidecar"])
    printed = succeeded(piped(shell, text, "images", "-"))
    assert printed.splitlines() == [*urls(upstream)[:3], f"{upstream.host}/shop/sidecar:latest"]
    assert not shell.store.exists()
    done = succeeded(piped(shell, printed, "load", "-"))
    assert done.splitlines()[-1] == "4 loaded, 0 already there, 0 failed"


def test_bad_yaml_names_line_and_document_and_nothing_is_loaded(upstream: ScriptedRegistry, shell: Shell) -> None:
    text = helm_template(urls(upstream)[:3])
    line = text[: text.index(urls(upstream)[1])].count("\n") + 1
    (shell.folder / "bad.yaml").write_text(text.replace(f'"{urls(upstream)[1]}"', "{{ .Values.image }}"))
    done = shell.run("load", "bad.yaml")
    where = f"{shell.folder}/bad.yaml:{line}: document 2 (shop/charts/part1/templates/statefulset.yaml): "
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ociregistry: {where}is a template that was not rendered: run helm template")
    assert len(done.stderr.splitlines()) == 1
    assert upstream.requests == ()
    assert not shell.store.exists()


def test_daemon_preloads_from_objects(
    upstream: ScriptedRegistry, shell: Shell, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    rendered = tmp_path / "rendered"
    text = helm_template([*urls(upstream)[:4], f"{upstream.host}/shop/sidecar"])
    rendered.write_text(text.replace("automountServiceAccountToken: true", "a: ["))
    daemon = start_daemon({upstream.host: "http"}, "--preload-images", str(rendered), "--concurrent", "4")

    def loaded() -> bool:
        return bool(json.loads(fetch(f"{daemon.url}/health").body)["preload"]["loaded"] == 5)

    wait_until(loaded, PATIENCE, "all images are loaded")
    at = text[: text.index("automountServiceAccountToken")].count("\n") + 1
    # As with a plain list, an error in the file is a line of the log, and all other images are loaded.
    where = f"{rendered}:{at}: document 5 (shop/templates/serviceaccount.yaml): is not YAML"
    wait_until(lambda: f"not preloaded: {where}" in daemon.log, PATIENCE, "the error is logged")
