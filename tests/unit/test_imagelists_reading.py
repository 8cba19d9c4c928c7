"""Image lists: accepted references, and errors with line numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ociregistry.errors import RegistryError
from ociregistry.imagelists.reading import ImageList, parse_image, read_image_list
from ociregistry.names import Digest, ImageReference

HEX = "ab" * 32
SHA512 = "cd" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of the list."""
    return tmp_path / "images.txt"


def read(path: Path, text: str | bytes) -> ImageList:
    """Return the parsed list."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_image_list(path)


def names(listed: ImageList) -> list[str]:
    """Return the images of a list without errors."""
    assert listed.errors == ()
    return [str(one) for one in listed.images]


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("nginx", "docker.io/library/nginx:latest"),
        ("nginx:1.25", "docker.io/library/nginx:1.25"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/nginx:1.25", "docker.io/library/nginx:1.25"),
        ("index.docker.io/library/nginx:1.25", "docker.io/library/nginx:1.25"),
        ("quay.io/coreos/etcd:v3.5.12", "quay.io/coreos/etcd:v3.5.12"),
        ("quay.io/coreos/etcd", "quay.io/coreos/etcd:latest"),
        ("registry.example:5000/team/app", "registry.example:5000/team/app:latest"),
        ("registry.example:5000/app:v1", "registry.example:5000/app:v1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a/b/c/d:v1", "127.0.0.1:5000/a/b/c/d:v1"),
        ("[::1]:5000/app:v1", "[::1]:5000/app:v1"),
        # A single component is a repository, even if it looks like a host.
        ("localhost:5000", "docker.io/library/localhost:5000"),
        (f"nginx@sha256:{HEX}", f"docker.io/library/nginx@sha256:{HEX}"),
        (f"nginx:1.25@sha256:{HEX}", f"docker.io/library/nginx@sha256:{HEX}"),
        (f"reg.example:5000/app@sha256:{HEX}", f"reg.example:5000/app@sha256:{HEX}"),
        (f"reg.example:5000/app:v1@sha256:{HEX}", f"reg.example:5000/app@sha256:{HEX}"),
        (f"reg.example/app@sha512:{SHA512}", f"reg.example/app@sha512:{SHA512}"),
    ],
)
def test_references(path: Path, text: str, url: str) -> None:
    assert str(parse_image(text)) == url
    assert names(read(path, f"{text}\n")) == [url]


@pytest.mark.parametrize(
    "text",
    [
        "a:1\nb:2\nc:3\n",
        "a:1\nb:2\nc:3",
        "a:1\r\nb:2\r\nc:3\r\n",
        "a:1\rb:2\rc:3",
        "\ufeffa:1\nb:2\nc:3\n",
        "# a list\n\n  a:1  \n\t\nb:2 # the second\n#b:4\nc:3# the third\n   # the end\n",
        # Duplicates are dropped, also when spelled differently; the first position counts.
        "a:1\nb:2\na:1\nlibrary/b:2\ndocker.io/library/c:3\nc:3\nindex.docker.io/a:1\n",
    ],
)
def test_comments_blank_lines_and_duplicates(path: Path, text: str) -> None:
    assert names(read(path, text)) == [
        "docker.io/library/a:1",
        "docker.io/library/b:2",
        "docker.io/library/c:3",
    ]


def test_two_tags_with_the_same_digest_are_one_image(path: Path) -> None:
    assert names(read(path, f"a:1@sha256:{HEX}\na:2@sha256:{HEX}\n")) == [f"docker.io/library/a@sha256:{HEX}"]


BAD = {
    "nginx redis": "not the name of a repository",
    "nginx:1.25 x": "not a tag",
    "Nginx:1.25": "not the name of a repository",
    "nginx:": "not a tag",
    ":1.25": "not the name of a repository",
    "nginx:-1": "not a tag",
    "nginx:1:2": "not a tag",
    f"nginx:{'x' * 129}": "not a tag",
    "nginx@": "not a digest",
    "nginx@sha256:abc": "not a digest",
    f"nginx@md5:{HEX[:32]}": "not a digest",
    f"nginx@sha256:{HEX}@sha256:{HEX}": "not a digest",
    f"nginx:-@sha256:{HEX}": "not a tag",
    f"nginx:@sha256:{HEX}": "not a tag",
    f"@sha256:{HEX}": "not the name of a repository",
    "reg.example/": "not the name of a repository",
    "/nginx": "not the name of a repository",
    "reg.example//nginx": "not the name of a repository",
    "../nginx": "not the name of a registry",
    "reg.example/../../etc/passwd:1": "not the name of a repository",
    "https://reg.example/nginx:1": "not the name of a registry: host or host:port is expected, without https://",
    "docker://nginx:1": "not the name of a registry: host or host:port is expected, without docker://",
    "user@reg.example/nginx:1": "not a digest",
    "reg.example:99999/nginx:1": "not the name of a registry",
    f"reg.example/{'x' * 300}:1": "not the name of a repository",
    "nginx:1\x00": "not a tag",
    "nginx;rm": "not the name of a repository",
}


@pytest.mark.parametrize("text", BAD)
def test_malformed_reference_is_an_error(path: Path, text: str) -> None:
    listed = read(path, f"# first\nnginx:1\n\n{text}\nredis:7\n")
    (line,) = listed.errors
    assert line.startswith(f"{path}:4: {text[:100]!r} is not an image reference: ")
    assert BAD[text] in line
    assert "\n" not in line
    assert "\0" not in line
    assert [str(one) for one in listed.images] == ["docker.io/library/nginx:1", "docker.io/library/redis:7"]


def test_errors_have_line_numbers(path: Path) -> None:
    listed = read(path, "\ufeffA\r\n# a comment\r\n\r\nB\r\nnginx:1\r\nC # c\r\n")
    assert [line.partition(" is not an ")[0] for line in listed.errors] == [
        f"{path}:1: 'A'",
        f"{path}:4: 'B'",
        f"{path}:6: 'C'",
    ]


def test_long_line_is_shortened_in_error(path: Path) -> None:
    (line,) = read(path, "X" * 1_000_000).errors
    assert len(line) < len(str(path)) + 600


@pytest.mark.parametrize("text", ["", "\n", "\ufeff", "# nginx:1\n\n", " \t \r\n"])
def test_list_without_images(path: Path, text: str) -> None:
    assert read(path, text) == ImageList((), (f"{path}: names no image",))


@pytest.mark.parametrize(
    "data", [b"\x7fELF\xff\xfe", b"nginx:1\n\xff\n", "nginx:1\n".encode("utf-16"), b"\x1f\x8b\x08"]
)
def test_undecodable_file_is_an_error(path: Path, data: bytes) -> None:
    assert read(path, data) == ImageList((), (f"{path}: is neither a text file nor an image archive",))


def test_missing_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image_list(path)


_PIECES = [
    "docker.io/",
    "reg.example:5000/",
    "team/",
    "nginx",
    ":1.25",
    "@",
    f"@sha256:{HEX}",
    *"aZ0.-_/: #\t\u00e9\x00[]",
]
WORDS = st.lists(st.sampled_from(_PIECES), max_size=8).map("".join)


@given(st.lists(WORDS | st.text(), max_size=8), st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_line_is_an_image_or_an_error(tmp_path: Path, lines: list[str], ending: str) -> None:
    path = tmp_path / "any.txt"
    text = ending.join(lines)
    listed = read(path, text.encode("utf-8", "surrogatepass"))
    assert listed.images or listed.errors
    assert len(set(listed.images)) == len(listed.images)
    for line in listed.errors:
        assert line.startswith(f"{path}:")
        assert len(line.splitlines()) == 1
    for one in listed.images:
        # The printed image URL parses to the same image.
        assert parse_image(str(one)) == one


@given(WORDS | st.text())
@settings(deadline=None)
def test_parsed_images_are_well_formed(text: str) -> None:
    try:
        parsed = parse_image(text)
    except RegistryError:
        return
    assert ImageReference.parse_whole(str(parsed)) == parsed
    if "@" in text:
        assert isinstance(parsed.reference, Digest)
