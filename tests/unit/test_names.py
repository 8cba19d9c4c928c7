"""Parsing of upstreams, repositories, tags, digests and image URLs."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ociregistry.errors import DigestInvalid, ManifestUnknown, NameInvalid, RegistryError
from ociregistry.names import (
    DOCKER_HUB,
    Digest,
    ImageReference,
    Repository,
    Tag,
    Upstream,
    by_digest,
    parse_reference,
    repository_of,
)

HUB = Upstream(DOCKER_HUB)
HEX = "0123456789abcdef" * 4
SHA256 = f"sha256:{HEX}"
SHA512 = f"sha512:{HEX * 2}"

WORDS = st.text("abz019", min_size=1, max_size=4)
MARKS = st.sampled_from([".", "_", "__", "-", "---"])
COMPONENTS = st.builds(
    lambda first, rest: first + "".join(rest), WORDS, st.lists(st.builds(str.__add__, MARKS, WORDS))
)
PATHS = st.lists(COMPONENTS, min_size=1, max_size=4).map("/".join).filter(lambda path: len(path) <= 200)
TAGS = st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}", fullmatch=True)
DIGESTS = st.from_regex(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}", fullmatch=True)
DOMAINS = st.lists(WORDS, min_size=2, max_size=4).map(".".join) | st.sampled_from(["localhost", "[::1]", "docker.io"])
HOSTS = DOMAINS | st.builds("{}:{}".format, DOMAINS, st.integers(1, 65535))

# Hostile or mistaken input in place of a name.
HOSTILE = [
    "",
    ".",
    "..",
    "/",
    "../../etc/passwd",
    "a/../b",
    "a//b",
    "/a",
    "a/",
    "a\x00b",
    "a\nb",
    "a\r\nX-Injected: 1",
    "a b",
    "a%2fb",
    "a\\b",
    "ünïcode",
    "a?b",
    "a#b",
    "user:password@host",
    "http://host",
    "-a",
    "a" * 256,
    "\ud800",
]


@pytest.mark.parametrize(
    ("text", "name", "host", "port"),
    [
        ("docker.io", "docker.io", "docker.io", None),
        ("index.docker.io", "docker.io", "docker.io", None),
        ("registry-1.docker.io", "docker.io", "docker.io", None),
        ("Registry.K8s.IO", "registry.k8s.io", "registry.k8s.io", None),
        ("my-upstream:5000", "my-upstream:5000", "my-upstream", 5000),
        ("localhost", "localhost", "localhost", None),
        ("10.0.0.1:65535", "10.0.0.1:65535", "10.0.0.1", 65535),
        ("[::1]:5000", "[::1]:5000", "[::1]", 5000),
        ("[FE80::1]", "[fe80::1]", "[fe80::1]", None),
        # Written with brackets, so that no part can be taken for a port.
        ("::1", "[::1]", "[::1]", None),
        ("FE80::1:5000", "[fe80::1:5000]", "[fe80::1:5000]", None),
        ("::ffff:127.0.0.1", "[::ffff:127.0.0.1]", "[::ffff:127.0.0.1]", None),
    ],
)
def test_upstream_is_host_with_optional_port(text: str, name: str, host: str, port: int | None) -> None:
    upstream = Upstream.parse(text)
    assert (upstream.name, upstream.host, upstream.port) == (name, host, port)
    assert str(upstream) == name


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE,
        "a-",
        "_a",
        "host:",
        "host:0",
        "host:65536",
        "host:123456",
        "host:5000/path",
        ":5000",
        "host:port",
        "a..b",
        ".a",
    ],
)
def test_malformed_upstream_is_refused(text: str) -> None:
    with pytest.raises(NameInvalid):
        Upstream.parse(text)


# A naive pattern accepts `[.]` as an address; urllib and OpenSSL raise ValueError for these.
@pytest.mark.parametrize(
    "text",
    ["[.]", "[]", "[:]", "[::::]", "[1.2.3.4]", "[::1", "::1]", "::g", "::1%eth0", "[::1]x", "[::1]:", "[g::1]"],
)
def test_brackets_must_hold_an_ipv6_address(text: str) -> None:
    with pytest.raises(NameInvalid):
        Upstream.parse(text)


@given(st.text() | st.text("[]:.-%0az", max_size=12))
def test_accepted_upstream_is_valid_in_a_url(text: str) -> None:
    with suppress(NameInvalid):
        upstream = Upstream.parse(text)
        assert re.fullmatch(r"[a-z0-9.:\[\]-]+", upstream.name)
        assert urlsplit(f"https://{upstream}/v2/").netloc == upstream.name
        assert Upstream.parse(upstream.name) == upstream


@pytest.mark.parametrize("text", [SHA256, SHA512])
def test_digest(text: str) -> None:
    digest = Digest.parse(text)
    assert digest == text
    assert f"{digest.algorithm}:{digest.hex}" == text
    assert Digest.from_hex(digest.hex) == digest


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE,
        "sha256:",
        SHA256[:-1],
        SHA256 + "0",
        SHA256.upper(),
        SHA256 + "\n",
        f"sha1:{HEX[:40]}",
        f"md5:{HEX[:32]}",
        f"sha256:../../{HEX[:58]}",
        f"sha256:{'٣' * 64}",
        "sha256:totallywrong",
    ],
)
def test_malformed_digest_is_refused(text: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(text)
    assert Digest.from_hex(text.rpartition(":")[2]) is None


@pytest.mark.parametrize("text", [HEX, f"sha512:{HEX}", f"sha256:{HEX * 2}"])
def test_digest_length_must_match_algorithm(text: str) -> None:
    with pytest.raises(DigestInvalid):
        Digest.parse(text)


@given(st.binary(), st.sampled_from(["sha256", "sha512"]))
def test_digest_of_bytes(data: bytes, algorithm: str) -> None:
    digest = Digest.of(data, algorithm)
    assert digest == f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}" == Digest.parse(digest)
    assert digest.matches(data)
    assert not digest.matches(data + b"\0")
    hasher = digest.hasher()
    hasher.update(data)
    assert hasher.hexdigest() == digest.hex


@given(TAGS)
def test_tag(text: str) -> None:
    assert Tag.parse(text) == parse_reference(text) == text


@pytest.mark.parametrize("text", [*HOSTILE, ".INVALID_MANIFEST_NAME", "-", "a:b", "v1\n", "a" * 129])
def test_malformed_tag_is_refused(text: str) -> None:
    with pytest.raises(ManifestUnknown):
        Tag.parse(text)


def test_reference_with_colon_is_a_digest() -> None:
    assert isinstance(parse_reference(SHA256), Digest)
    assert isinstance(parse_reference("sha256-abc"), Tag)
    with pytest.raises(DigestInvalid):
        parse_reference("sha256:totallywrong")


@given(HOSTS, PATHS)
def test_repository_path_is_kept(host: str, path: str) -> None:
    upstream = Upstream.parse(host)
    repository = Repository.at(upstream, path)
    official = upstream == HUB and "/" not in path
    assert (repository.upstream, repository.path) == (upstream, f"library/{path}" if official else path)


@pytest.mark.parametrize("path", [*HOSTILE, "a-", "_a", "Upper", "a.", "a..b", "a___b", "a/-b", "a:b", "a@b"])
def test_malformed_repository_is_refused(path: str) -> None:
    for upstream in (HUB, Upstream("quay.io")):
        with pytest.raises(NameInvalid):
            Repository.at(upstream, path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nginx", "docker.io/library/nginx"),
        ("library/nginx", "docker.io/library/nginx"),
        ("team/app", "docker.io/team/app"),
        ("docker.io/nginx", "docker.io/library/nginx"),
        ("index.docker.io/nginx", "docker.io/library/nginx"),
        ("registry-1.docker.io/team/app", "docker.io/team/app"),
        ("quay.io/nginx", "quay.io/nginx"),
        ("localhost/nginx", "localhost/nginx"),
        ("localhost:5000/nginx", "localhost:5000/nginx"),
        ("registry:5000/a/b/c/d/e/f", "registry:5000/a/b/c/d/e/f"),
        ("[::1]:5000/nginx", "[::1]:5000/nginx"),
        ("::1/nginx", "[::1]/nginx"),
        ("localhosts/nginx", "docker.io/localhosts/nginx"),
        ("registry/nginx", "docker.io/registry/nginx"),
        ("quay.io", "docker.io/library/quay.io"),
        ("localhost", "docker.io/library/localhost"),
    ],
)
def test_first_component_may_be_the_upstream(name: str, expected: str) -> None:
    repository = Repository.parse(name, HUB)
    assert str(repository) == expected
    assert Repository.parse(str(repository), Upstream("quay.io")) == repository


def test_default_upstream_may_be_changed() -> None:
    assert str(Repository.parse("nginx", Upstream("quay.io"))) == "quay.io/nginx"
    assert str(Repository.at(Upstream("quay.io"), "docker.io/nginx")) == "quay.io/docker.io/nginx"


@pytest.mark.parametrize("name", ["../a", "user:password@host/a", "host:0/a", "[::1/a", "a.b/", "a.b//c", "./a"])
def test_malformed_host_in_path_is_refused(name: str) -> None:
    with pytest.raises(NameInvalid):
        Repository.parse(name, HUB)


@given(HOSTS, PATHS, TAGS | DIGESTS)
def test_image_urls_round_trip(host: str, path: str, text: str) -> None:
    image = ImageReference(Repository.at(Upstream.parse(host), path), parse_reference(text))
    again = ImageReference.parse(str(image), Upstream("another.example"))
    assert again == image
    assert type(again.reference) is type(image.reference)
    assert str(again) == str(image)


@given(HOSTS, PATHS, TAGS | DIGESTS)
def test_repository_is_found_in_an_image_url(host: str, path: str, text: str) -> None:
    image = ImageReference(Repository.at(Upstream.parse(host), path), parse_reference(text))
    digest = Digest.parse(SHA256)
    assert repository_of(str(image)) == str(image.repository)
    assert by_digest(str(image), digest) == str(ImageReference(image.repository, digest))


def test_image_url_is_normalized() -> None:
    assert str(ImageReference.parse("nginx:1.25", HUB)) == "docker.io/library/nginx:1.25"
    assert str(ImageReference.parse(f"quay.io/a@{SHA512}", HUB)) == f"quay.io/a@{SHA512}"


@pytest.mark.parametrize(
    "url", ["nginx", "quay.io:5000/a", f"a:1@{SHA256}", "a@sha256:0", "a:", "@", ":", "a@", "a:1:2"]
)
def test_image_url_without_valid_reference_is_refused(url: str) -> None:
    with pytest.raises(RegistryError):
        ImageReference.parse(url, HUB)


@given(st.text() | st.text("a.:/@%[]0\n", max_size=20))
def test_any_text_is_parsed_or_a_registry_error(text: str) -> None:
    for parse in (Upstream.parse, Digest.parse, Tag.parse, parse_reference):
        with suppress(RegistryError):
            assert "\n" not in str(parse(text))
    for parse_name in (Repository.parse, ImageReference.parse):
        with suppress(RegistryError):
            assert ".." not in str(parse_name(text, HUB)).split("/")
