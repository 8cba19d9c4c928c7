"""Image lists from Kubernetes objects: recognised by their content, with every error at its place."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociregistry.imagelists import documents, reading
from ociregistry.imagelists.reading import ImageList, parse_image, read_image_list
from tests.kubernetes_objects import helm_template, kubectl_json, pod

HEX = "ab" * 32
POD = "kind: Pod\nmetadata: {name: web}\nspec: {containers: [{image: nginx:1.25}]}\n"
NGINX = ["docker.io/library/nginx:1.25"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the list, whose name says nothing."""
    return tmp_path / "list"


def read(path: Path, text: str | bytes, *, any_image_field: bool = False) -> ImageList:
    """Return the parsed list."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_image_list(path, any_image_field=any_image_field)


def names(listed: ImageList) -> list[str]:
    """Return the images of a list without errors."""
    assert listed.errors == ()
    return [str(one) for one in listed.images]


def errors(path: Path, text: str | bytes, *, any_image_field: bool = False) -> list[str]:
    """Return the errors of a list, without the path that each begins with."""
    listed = read(path, text, any_image_field=any_image_field)
    assert all(line.startswith(f"{path}:") and line.isprintable() for line in listed.errors)
    return [line.removeprefix(f"{path}:") for line in listed.errors]


@pytest.mark.parametrize(
    "text",
    [
        POD,
        f"---\n{POD}",
        f"\n\n# Source: a/b.yaml\n  # c\n---\n{POD}",
        f"%YAML 1.2\n---\n{POD}",
        f"\ufeff{POD}",
        POD.replace("\n", "\r\n"),
        POD.replace("\n", "\r"),
        "--- " + POD.replace("\n", ", ").join(["{", "}"]).replace("}, }", "}}"),
        f'"kind": Pod\n{POD.partition(chr(10))[2]}',
        f"kind : Pod\n{POD.partition(chr(10))[2]}",
        "- kind: Pod\n  spec: {containers: [{image: nginx:1.25}]}\n",
        "-\n  spec: {containers: [{image: nginx:1.25}]}\n",
        "{kind: Pod, spec: {containers: [{image: nginx:1.25}]}}",
        json.dumps({"spec": {"containers": [{"image": "nginx:1.25"}]}}),
        json.dumps([{"spec": {"containers": [{"image": "nginx:1.25"}]}}], indent="\t"),
        "\ufeff\r\n " + kubectl_json([pod("web", ["nginx:1.25"])]).replace("\n", "\r\n"),
        "".join(json.dumps(pod(name, ["nginx:1.25"])) + "\n" for name in "ab"),
    ],
)
def test_objects_are_recognised_by_their_content(path: Path, text: str) -> None:
    assert names(read(path, text)) == NGINX


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Without a blank behind the colon it is the tag `tag` of the repository `image`, in YAML a word.
        ("image:tag\n", ["docker.io/library/image:tag"]),
        ("kind:pod # apiVersion: v1\n", ["docker.io/library/kind:pod"]),
        ("[::1]:5000/app:v1\n", ["[::1]:5000/app:v1"]),
        ("# kind: Pod\n# ---\nnginx:1.25\n", NGINX),
        ("nginx:1.25\n#---\n", NGINX),
        ("true\n", ["docker.io/library/true:latest"]),
        ("items\n", ["docker.io/library/items:latest"]),
    ],
)
def test_plain_list_stays_one(path: Path, text: str, expected: list[str]) -> None:
    assert names(read(path, text)) == expected


def test_plain_list_with_an_error_behind_its_first_line_stays_one(path: Path) -> None:
    assert [line.partition(" is not")[0] for line in errors(path, "nginx:1\nimage: redis:7\n- a\n---\n{}\n")] == [
        "2: 'image: redis:7'",
        "3: '- a'",
        "4: '---'",
        "5: '{}'",
    ]


REFERENCES = st.from_regex(
    r"([a-z0-9]{1,3}(:[0-9]{1,4})?/|\[::1\](:5)?/)?[a-z0-9]{1,5}(:[\w.-]{1,5})?", fullmatch=True
)


@given(st.lists(REFERENCES, min_size=1, max_size=3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_plain_list_is_taken_for_objects(tmp_path: Path, lines: list[str]) -> None:
    def valid(line: str) -> bool:
        try:
            parse_image(line)
        except Exception:
            return False
        return True

    lines = list(filter(valid, lines))
    listed = read(tmp_path / "any", "".join(f"{line} # a: b\n" for line in lines) or "a\n")
    assert listed.images == (tuple(dict.fromkeys(map(parse_image, lines))) or (parse_image("a"),))


def test_output_of_helm_template(path: Path) -> None:
    images = [f"registry.example/shop/part{number}:v1.{number}" for number in range(30)]
    text = helm_template([*images, "busybox"])
    assert text.count("\n---\n") > 30
    assert names(read(path, text)) == [*images, "docker.io/library/busybox:latest"]


def test_output_of_kubectl(path: Path) -> None:
    pods = [pod(f"web-{n}", [f"app{n % 3}:v1"], initContainers=[{"image": "init:1", "name": "i"}]) for n in range(9)]
    expected = ["app0:v1", "init:1", "app1:v1", "app2:v1"]
    assert names(read(path, kubectl_json(pods))) == [f"docker.io/library/{one}" for one in expected]
    as_yaml = yaml.safe_dump({"apiVersion": "v1", "items": pods, "kind": "List"}, sort_keys=False)
    assert names(read(path, as_yaml)) == [f"docker.io/library/{one}" for one in expected]


def test_references_are_as_in_plain_lists(path: Path) -> None:
    words = ["nginx", "team/app:v1", f"nginx:1@sha256:{HEX}", "index.docker.io/library/nginx", "localhost:5000/a"]
    text = json.dumps({"containers": [{"image": word} for word in words]})
    assert names(read(path, text)) == names(read(path, "\n".join(words)))


BAD_IMAGES = {
    '""': "the image is empty",
    "": "the image is empty",
    "null": "the image is empty",
    "Nginx:1": "'Nginx:1' is not an image reference: 'Nginx' is not the name of a repository",
    "'nginx '": "'nginx ' is not an image reference: 'nginx ' is not the name of a repository",
    "1.25": "the image is not a string",
    "true": "the image is not a string",
    "{a: b}": "the image is not a string",
    "[a]": "the image is not a string",
    '"{{ .Values.image }}"': "the image '{{ .Values.image }}' is a template that was not rendered: run helm template",
    '"a:{{ .tag }}"': "the image 'a:{{ .tag }}' is a template that was not rendered: run helm template",
}


@pytest.mark.parametrize("value", BAD_IMAGES)
def test_image_that_is_none_is_an_error(path: Path, value: str) -> None:
    text = f"""\
{POD}---
# Source: shop/templates/web.yaml
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
spec:
  template:
    spec:
      containers:
        - name: a
          image: {value}
        - image: redis:7
"""
    (line,) = errors(path, text)
    at = 14 if value == "[a]" else 15
    assert line.startswith(f"{at}: document 2 (shop/templates/web.yaml): Deployment/web: {BAD_IMAGES[value]}")
    assert names(ImageList(read(path, text).images, ())) == [*NGINX, "docker.io/library/redis:7"]


def test_error_in_json_has_its_line(path: Path) -> None:
    pods = [pod("good", ["nginx:1.25"]), pod("bad", ["redis:7", "", "A"]), pod("other", ["redis:8"])]
    pods[2]["spec"]["initContainers"] = [{"name": "i", "image": None}, {"name": "j", "image": 5}]
    text = kubectl_json(pods)
    lines = [
        number for number, line in enumerate(text.splitlines(), 1) if '"image": ' in line and "sha256" not in line
    ]
    empty, upper, absent, number = (lines[index] for index in (2, 3, 5, 6))
    assert errors(path, text) == [
        f"{empty}: document 1: Pod/bad: the image is empty",
        f"{upper}: document 1: Pod/bad: 'A' is not an image reference: 'A' is not the name of a repository",
        f"{absent}: document 1: Pod/other: the image is empty",
        f"{number}: document 1: Pod/other: the image is not a string",
    ]
    assert [str(one) for one in read(path, text).images] == [*NGINX, *(f"docker.io/library/redis:{n}" for n in "78")]


def test_bad_document_hides_no_other_error_and_no_image(path: Path) -> None:
    good, bad = POD.replace("nginx", "redis"), POD.replace("nginx:1.25", "A")
    text = "---\n".join([POD, "a: [\n", bad, good, "kind: {{ .k }}\n"])
    assert [line.partition(" is ")[0] for line in errors(path, text)] == [
        "5: document 2:",
        "9: document 3: Pod/web: 'A'",
        "15: document 5:",
    ]
    assert [str(one) for one in read(path, text).images] == [*NGINX, "docker.io/library/redis:1.25"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("--- just words\n", "1: document 1: is not a Kubernetes object, but a word or a number"),
        (f"{POD}---\n3\n", "5: document 2: is not a Kubernetes object, but a word or a number"),
        ("- nginx\n- redis\n", "1: document 1: is not a Kubernetes object, but a word or a number"),
        ('["nginx"]', "1: document 1: is not a Kubernetes object, but a word or a number"),
    ],
)
def test_words_are_no_objects(path: Path, text: str, why: str) -> None:
    assert errors(path, text)[0] == why


def test_objects_without_images_are_an_error(path: Path) -> None:
    text = "apiVersion: v1\nkind: Service\nspec: {image: nginx:1.25}\n"
    for one in (text, "---\n", "{}", "kind:\n", "image: nginx\n"):
        (line,) = read(path, one).errors
        assert line.startswith(f"{path}: is YAML or JSON that names no image of a container; ")
        assert "--any-image-field" in line
    assert names(read(path, text, any_image_field=True)) == NGINX
    (line,) = read(path, "kind: Service\n", any_image_field=True).errors
    assert line == f"{path}: is YAML or JSON that names no image of a container"


def test_encodings(path: Path) -> None:
    assert errors(path, POD.encode() + b"---\na: \xff\n") == ["5: is not UTF-8"]
    utf_16 = f"\ufeff{POD}".encode("utf-16-le")
    assert read(path, utf_16).errors == (f"{path}: is neither a text file nor an image archive",)


def test_size_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_LARGEST", 2 * 1024 * 1024)
    monkeypatch.setattr(reading, "_LARGEST_PLAIN", 1024 * 1024)
    filler = "# " + "x" * 1024 * 1024 + "\n"
    assert names(read(path, POD + filler)) == NGINX
    assert read(path, POD + 2 * filler).errors == (f"{path}: is larger than 2 MiB: give it in parts",)
    assert read(path, "nginx:1.25\n" + filler).errors == (f"{path}: is neither a text file nor an image archive",)


def test_objects_are_read_from_a_pipe(path: Path) -> None:
    os.mkfifo(path)
    text = kubectl_json([pod(f"web-{number}", [f"app:v{number}"]) for number in range(1000)])
    writer = threading.Thread(target=path.write_text, args=(text,))
    writer.start()
    assert len(names(read_image_list(path))) == 1000
    writer.join()


def test_names_in_errors_are_short_and_printable(path: Path) -> None:
    text = json.dumps(
        {"kind": "A\n\u2028\x1b[31m", "metadata": {"name": "x" * 10_000}, "containers": [{"image": ""}]}
    )
    (line,) = errors(path, text)
    assert "A\\n\\u2028\\x1b[31m/xxx" in line
    assert len(line) < 600


_PIECES = [
    *("kind: Pod\n", "metadata:\n  name: x\n", "spec:\n  containers:\n  - image: ", "nginx:1\n", "    image: a\n"),
    *("---\n", "...\n", "# Source: a/b.yaml\n", "{{ .x }}", "{{- if }}\n", "&a ", "*a", "<<: ", "? ", "- ", "  "),
    *('{"items": [', '"image": ', '"containers": [{', "}", "]", ",", '"a"', "null", "|\n", "!!binary ", "!x "),
    *("%YAML 1.1\n", "\ufeff", "\r", "\x00", "\x85", "\u2028", "\U0001f600", "'", '"', "\\", "\\ud800", "\n"),
    *("\\U00110000", "\t", "~", "1.5", "@", "`", ":", "- &x [*x]\n"),
]
TEXTS = st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), max_size=25).map("".join)
_KEYS = [
    *("kind", "metadata", "name", "image", "containers", "initContainers", "volumes", "reference", "items"),
    *("repository", "tag", "registry", "digest", "status", "version", "rbd", "<<"),
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["nginx", "a:1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(_KEYS) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


def assert_sound(path: Path, listed: ImageList) -> None:
    """Assert that a list has images or errors, each error a line with its place."""
    assert listed.images or listed.errors
    assert len(set(listed.images)) == len(listed.images)
    for line in listed.errors:
        assert line.startswith(f"{path}:")
        assert line.isprintable()
    for one in listed.images:
        assert parse_image(str(one)) == one


@given(TEXTS, st.booleans(), st.booleans(), st.sampled_from([yaml.CSafeLoader, yaml.SafeLoader]))
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_text_crashes_it(tmp_path: Path, text: str, begun: bool, any_image_field: bool, loader: object) -> None:
    path = tmp_path / "any"
    data = (f"---\n{text}" if begun else text).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_LOADER", loader)
        assert_sound(path, read(path, data, any_image_field=any_image_field))


@given(VALUES, st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_yaml_and_json_of_any_value_name_the_same_images(
    tmp_path: Path, value: object, any_image_field: bool
) -> None:
    path = tmp_path / "any"
    as_json = read(path, "{}" + json.dumps(value), any_image_field=any_image_field)
    assert_sound(path, as_json)
    as_yaml = read(path, "---\n" + yaml.safe_dump(value, sort_keys=False), any_image_field=any_image_field)
    assert_sound(path, as_yaml)
    if not as_json.errors and not as_yaml.errors:
        assert as_json.images == as_yaml.images
