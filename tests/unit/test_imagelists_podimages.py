"""Which fields of Kubernetes objects name images."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from ociregistry.imagelists.documents import Part, read_documents
from ociregistry.imagelists.podimages import ImageField, image_fields


def fields(text: str, *, any_image_field: bool = False) -> list[ImageField]:
    """Return the fields of all documents of a YAML text."""
    parts = [part for part in read_documents(text) if isinstance(part, Part)]
    return [one for part in parts for one in image_fields(part.value, any_image_field=any_image_field)]


def found(text: str, *, any_image_field: bool = False) -> list[Any]:
    """Return what the fields hold; there must be no error."""
    listed = fields(text, any_image_field=any_image_field)
    assert [one.why_not for one in listed] == [""] * len(listed)
    return [one.value for one in listed]


POD = """
      initContainers: [{name: i, image: init:1}]
      containers:
        - {name: a, image: main:1, env: [{name: image, value: no}]}
        - {name: b}
      ephemeralContainers: [{name: d, image: debug:1}]
      volumes:
        - {name: v, image: {reference: data:1, pullPolicy: Always}}
        - {name: w, image: {pullPolicy: Always}}
        - {name: r, rbd: {image: device, pool: p}}
"""
IMAGES = ["init:1", "main:1", "debug:1", "data:1"]


@pytest.mark.parametrize(
    "before",
    [
        "spec:\n    x:",
        "spec:\n  template:\n    spec:",
        "spec:\n  jobTemplate:\n    x: {}\n    spec:\n     template:\n      metadata: {}\n      spec:\n       x:",
        "items:\n- kind: List\n  items:\n  - spec:\n     x:",
        # A custom resource may have templates of pods anywhere.
        "spec:\n  parts:\n  - role: worker\n    podTemplate:",
    ],
)
def test_images_of_pods_are_found_in_every_object(before: str) -> None:
    for any_image_field in (False, True):
        assert found(f"kind: Any\n{before}{POD}", any_image_field=any_image_field) == IMAGES


def test_other_fields_named_image_are_left_out() -> None:
    text = "image: a:1\nspec: {image: b:1, containers: {image: c:1}, volumes: {image: {reference: d:1}}}\n"
    assert found(text) == []


def test_status_and_metadata_are_not_looked_at() -> None:
    text = """
kind: Pod
metadata: {name: x, containers: [{image: no:1}], image: no:2}
spec: {containers: [{image: yes:1}]}
status: {containers: [{image: no:3}], image: no:4}
"""
    for any_image_field in (False, True):
        assert found(text, any_image_field=any_image_field) == ["yes:1"]


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("{kind: Pod, metadata: {name: web}, spec: {containers: [{image: a}]}}", "Pod/web"),
        ("{kind: Pod, metadata: {generateName: web-}, spec: {containers: [{image: a}]}}", "Pod/web-"),
        ("{kind: Pod, metadata: {}, spec: {containers: [{image: a}]}}", "Pod"),
        ("{metadata: {name: web}, spec: {containers: [{image: a}]}}", "web"),
        ("{kind: [], metadata: {name: {}}, spec: {containers: [{image: a}]}}", ""),
        ("{kind: Pod, spec: {containers: [{image: a}]}}", ""),
        ("{kind: List, metadata: {}, items: [{kind: Pod, metadata: {name: b}, containers: [{image: a}]}]}", "Pod/b"),
        ("{kind: Job, metadata: {name: j}, ref: {kind: Other, name: o}, containers: [{image: a}]}", "Job/j"),
    ],
)
def test_fields_know_kind_and_name(text: str, owner: str) -> None:
    (one,) = fields(text)
    assert one.owner == owner


def test_containers_may_share_by_anchors_and_merges() -> None:
    text = """
common: &common {image: shared:1, env: []}
again: &again {<<: *common, image: other:1}
spec:
  containers:
    - <<: *common
      name: a
    - {<<: *again, name: b}
    - &c {image: third:1}
  initContainers:
    - *c
"""
    assert found(text) == ["shared:1", "other:1", "third:1"]


def test_value_that_contains_itself_is_read_once() -> None:
    assert found("a: &a {b: *a, containers: [*a, {image: x:1}]}\n") == ["x:1"]


def test_aliases_do_not_multiply_the_work() -> None:
    bomb = "a0: &a0 {containers: [{image: x:1}]}\n"
    bomb += "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 500))
    assert found(bomb) == ["x:1"]
    assert found(bomb.replace("a1:", "a2:"), any_image_field=True) == ["x:1"]


def test_deep_nesting_overflows_nothing() -> None:
    value: Any = {"containers": [{"image": "x:1"}]}
    for _ in range(100_000):
        value = {"a": [value]}
    assert [one.value for one in image_fields(value, any_image_field=True)] == ["x:1"]
    twice = "{a: " * 900 + "{containers: [{image: x:1}]}" + ", a: 1}" * 900
    (one,) = fields(twice)
    assert "'a' occurs twice" in one.why_not


def test_key_that_occurs_twice_loses_no_image_silently() -> None:
    text = """
kind: Pod
metadata: {name: web, labels: {a: b, a: c}}
spec:
  containers:
    - {image: a:1, image: a:2}
    - {image: b:1, image: b:1}
    - {image: c:1, resources: {}, resources: {}}
spec:
  containers:
    - image: d:1
"""
    listed = fields(text)
    assert [one.value for one in listed if not one.why_not] == ["d:1"]
    lost = [one.value for one in listed if "is lost, as the key 'spec' occurs twice" in one.why_not]
    assert lost == ["a:2", "a:1", "b:1", "c:1"]
    (kept, other) = fields("containers: [{image: a:1, image: a:2}]")
    assert (kept.value, kept.why_not, other.value) == ("a:2", "", "a:1")
    assert found("{containers: [{image: a:1, image: a:1}], resources: {a: 1}, resources: {}}") == ["a:1"]


HEX = "ab" * 32


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("spec: {image: prom/prometheus:v2}", "prom/prometheus:v2"),
        ("spec: {steps: [{image: a:1}]}", "a:1"),
        ("containers: [{image: {repository: team/app, tag: v1}}]", "team/app:v1"),
        ("image: {repository: team/app, tag: v1}", "team/app:v1"),
        ("image: {registry: quay.io, repository: team/app, tag: v1}", "quay.io/team/app:v1"),
        ("image: {registry: '', repository: team/app, tag: v1, digest: ''}", "team/app:v1"),
        ("image: {repository: team/app, tag: 1.10}", "team/app:1.10"),
        (f"image: {{repository: team/app, digest: sha256:{HEX}}}", f"team/app@sha256:{HEX}"),
        (f"image: {{repository: team/app, tag: v1, digest: sha256:{HEX}}}", f"team/app:v1@sha256:{HEX}"),
        # NVIDIA's operators.
        ("driver: {repository: nvcr.io/nvidia, image: driver, version: '5'}", "nvcr.io/nvidia/driver:5"),
        (f"driver: {{repository: r.io/n, image: d, version: sha256:{HEX}}}", f"r.io/n/d@sha256:{HEX}"),
    ],
)
def test_any_image_field(text: str, image: str) -> None:
    assert found(text) == []
    assert found(text, any_image_field=True) == [image]


@pytest.mark.parametrize(
    "text",
    [
        "image: ''",
        "image:",
        "image: [a]",
        "image: {url: https://example.com/a.png}",
        "image: {repository: ''}",
        "repository: {repository: a, tag: b}",
        "volumes: [{rbd: {image: device, pool: p}}]",
        "imagePullPolicy: Always",
        "kind: CustomResourceDefinition\nmetadata: {name: x}\nspec: {default: {image: a:1}}",
    ],
)
def test_what_no_image_field_is(text: str) -> None:
    assert found(text, any_image_field=True) == []


@pytest.mark.parametrize(
    "text",
    [
        "image: {registry: quay.io, repository: team/app}",
        "image: {registry: quay.io, repository: team/app, tag: ''}",
        "image: {registry: quay.io, repository: team/app, tag: null}",
        "x: {repository: quay.io/team, image: app}",
    ],
)
def test_repository_without_a_version_is_an_error(text: str) -> None:
    (one,) = fields(text, any_image_field=True)
    assert one.why_not == "the image 'quay.io/team/app' has neither a tag nor a digest beside its repository"


def test_json_is_read_as_yaml_is() -> None:
    value = yaml.safe_load(f"kind: Any\nspec:\n  template:\n    spec:{POD}")
    assert [one.value for one in image_fields(value, any_image_field=True)] == IMAGES
    with_numbers = {"image": {"repository": "a", "tag": 5}, "other": {"image": {"repository": True}}}
    assert [one.value for one in image_fields(with_numbers, any_image_field=True)] == ["a:5"]
