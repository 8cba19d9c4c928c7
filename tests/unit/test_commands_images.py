"""`images`: prints what `load` would take, and touches no store."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.images import make_image
from tests.kubernetes_objects import helm_template, kubectl_json, pod
from tests.unit.support.archives import named, write_tar
from tests.unit.support.command_lines import run, usage_error


def test_images_are_printed_once_in_their_order(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("redis:7\nquay.io/team/app # a comment\n")
    (tmp_path / "chart").write_text(helm_template(["nginx:1.25", "registry.example:5000/app:v1", "redis:7"]))
    (tmp_path / "pods").write_text(kubectl_json([pod("web", ["nginx:1.25", "nginx:1.26"])]))
    result = run(capfd, "images", *(tmp_path / name for name in ("plain", "chart", "pods")))
    assert (result.status, result.err) == (0, "")
    assert result.lines == [
        "docker.io/library/redis:7",
        "quay.io/team/app:latest",
        "docker.io/library/nginx:1.25",
        "registry.example:5000/app:v1",
        "docker.io/library/nginx:1.26",
    ]


def test_errors_are_printed_beside_the_images(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.write_text("containers: [{image: a:1}, {image: ''}]\n---\na: [\n")
    good.write_text("b:1\n")
    result = run(capfd, "images", bad, good)
    assert (result.status, result.lines) == (2, ["docker.io/library/a:1", "docker.io/library/b:1"])
    first, second = result.err.splitlines()
    assert first == f"ociregistry: {bad}:1: document 1: the image is empty"
    assert second.startswith(f"ociregistry: {bad}:3: document 2: is not YAML: ")


def test_any_image_field_option(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "prometheus.yaml"
    path.write_text(
        "kind: Prometheus\nmetadata: {name: k8s}\nspec: {image: 'quay.io/prometheus/prometheus:v2.54.1'}\n"
    )
    result = run(capfd, "images", path)
    assert (result.status, result.lines) == (2, [])
    assert "--any-image-field" in result.err
    result = run(capfd, "images", path, "--any-image-field")
    assert (result.status, result.lines, result.err) == (0, ["quay.io/prometheus/prometheus:v2.54.1"], "")


def test_what_is_no_image_list(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a.tar", named(make_image("images")))
    (tmp_path / "damaged").write_bytes(archive.read_bytes()[:1000])
    for name, why in {
        ".": "is no image list, but an archive or a folder",
        "a.tar": "is no image list, but an archive or a folder",
        "damaged": "it is cut off or damaged",
        "missing": "No such file or directory",
    }.items():
        result = run(capfd, "images", tmp_path / name)
        assert (result.status, result.out) == (1, "")
        (line,) = result.err.splitlines()
        assert line.startswith(f"ociregistry: {tmp_path / name}: ")
        assert why in line


def test_a_file_is_needed(capfd: pytest.CaptureFixture[str]) -> None:
    for argv in (("images",), ("images", "")):
        assert "images needs a FILE" in usage_error(capfd, *argv)


@pytest.mark.parametrize("option", [(), ("--any-image-field",)])
def test_load_takes_nothing_if_there_are_errors(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, option: tuple[str, ...]
) -> None:
    path = tmp_path / "objects"
    path.write_text("containers: [{image: localhost:1/a:1}, {image: A}]\n---\nimage: B\n---\na: [\n")
    result = run(capfd, "--image-path", tmp_path / "store", "load", path, *option)
    assert (result.status, result.out) == (2, "")
    lines = result.err.splitlines()
    assert [line.partition(": document ")[0] for line in lines] == [
        f"ociregistry: {path}:{number}" for number in ((1, 3, 5) if option else (1, 5))
    ]
    assert not (tmp_path / "store").exists()
