"""Names: upstreams, repositories, tags, digests and image references.

Each value is parsed once, where it enters the program, and is well-formed from then on: it can be compared, printed
and used in a file name without further checks. The grammars are those of the OCI Distribution specification v1.1.1
("Pulling manifests") and, for hosts, of the reference grammar that Docker and containerd share.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Self

from ociregistry.errors import DigestInvalid, ManifestUnknown, NameInvalid

if TYPE_CHECKING:
    from hashlib import _Hash

_LABEL = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_UPSTREAM = re.compile(rf"(?P<host>{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{{1,5}}))?")
_SCHEME = re.compile(r"(?P<name>https?|docker):(?://|$)")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}")
"""All of a text has to match it."""
_HEX = re.compile(r"[a-f0-9]{64}|[a-f0-9]{128}")
_LONGEST_NAME = 255

DOCKER_HUB = "docker.io"
_DOCKER_HUB_ALIASES = frozenset({"index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True, slots=True, order=True)
class Upstream:
    """A registry to pull from; its `name` is what users type: `host` or `host:port`."""

    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the name of an upstream.

        Aliases of Docker Hub become `docker.io`; IPv6 addresses get brackets.

        Raises:
            NameInvalid: the text is not a host with an optional port; a scheme, user or path is not allowed.
        """
        name = _canonical_host(text) if len(text) <= _LONGEST_NAME else ""
        if not name:
            scheme = _SCHEME.match(text)
            superfluous = f", without {scheme['name']}://" if scheme else ""
            raise NameInvalid(
                f"{text[:300]!r} is not the name of a registry: host or host:port is expected{superfluous}"
            )
        return cls(name)

    @property
    def host(self) -> str:
        """The host without the port; an IPv6 address has brackets."""
        return self.name if self.port is None else self.name.rpartition(":")[0]

    @property
    def port(self) -> int | None:
        """The port in the name, or None."""
        match = _UPSTREAM.fullmatch(self.name)
        return int(match["port"]) if match and match["port"] else None

    def __str__(self) -> str:
        return self.name


# All image URLs of a store have few upstreams. The length of `text` is bounded by the caller.
@lru_cache(maxsize=128)
def _canonical_host(text: str) -> str:
    """Return the name of the upstream that `text` is, or the empty string if it is none."""
    name = text.lower()
    if name.count(":") > 1 and is_host(f"[{name}]"):
        name = f"[{name}]"
    match = _UPSTREAM.fullmatch(name)
    sound = match is not None and is_host(match["host"]) and 0 < int(match["port"] or 443) < 65536
    if not sound or len(name) > _LONGEST_NAME:
        return ""
    return DOCKER_HUB if name in _DOCKER_HUB_ALIASES else name


def is_host(host: str) -> bool:
    """Tell whether `host` may be one in a URL: what is in brackets must be an IPv6 address."""
    if not host.startswith("["):
        return True
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True


def is_hex_of_digest(text: str) -> bool:
    """Tell whether `text` is the `hex` of a digest."""
    return _HEX.fullmatch(text) is not None


class Digest(str):
    """A well-formed sha256 or sha512 digest, such as `sha256:9f86…`; a subclass of str to save memory."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a digest.

        Raises:
            DigestInvalid: it is malformed, or its algorithm is not supported.
        """
        if not DIGEST.fullmatch(text):
            raise DigestInvalid(f"{text[:200]!r} is not a digest: sha256:<64 hex> or sha512:<128 hex> is expected")
        return cls(text)

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Self:
        """Compute the digest of `data`."""
        return cls(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")

    @classmethod
    def from_hex(cls, text: str) -> Self | None:
        """Return the digest whose `hex` (the file name in the store) is `text`, or None if it is not one."""
        if not is_hex_of_digest(text):
            return None
        return cls(f"sha256:{text}" if len(text) == 64 else f"sha512:{text}")

    @property
    def algorithm(self) -> str:
        """`sha256` or `sha512`."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The hexadecimal part: a safe file name, whose length tells the algorithm."""
        return self.partition(":")[2]

    def hasher(self) -> _Hash:
        """Make a hash object for the algorithm of this digest."""
        return hashlib.new(self.algorithm)

    def matches(self, data: bytes) -> bool:
        """Tell whether `data` has this digest."""
        algorithm, _, expected = self.partition(":")
        return hashlib.new(algorithm, data).hexdigest() == expected


class Tag(str):
    """A well-formed tag, such as `v1.29.1`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a tag.

        Raises:
            ManifestUnknown: it is malformed; the specification's conformance suite expects a 404.
        """
        if not _TAG.fullmatch(text):
            raise ManifestUnknown(f"{text[:200]!r} is not a tag")
        return cls(text)


def referrers_tag(digest: Digest) -> Tag:
    """Return the tag for the referrers of a manifest (OCI Distribution specification, "Referrers Tag Schema")."""
    return Tag(f"{digest.algorithm}-{digest.hex[:64]}")


Reference = Tag | Digest


def parse_reference(text: str) -> Reference:
    """Parse a tag or a digest.

    Raises:
        ManifestUnknown: the tag is malformed.
        DigestInvalid: the digest is malformed, or its algorithm is not supported.
    """
    return Digest.parse(text) if ":" in text else Tag.parse(text)


@dataclass(frozen=True, slots=True, order=True)
class Repository:
    """A repository of an upstream, such as `docker.io/library/nginx`."""

    upstream: Upstream
    path: str

    @classmethod
    def at(cls, upstream: Upstream, path: str) -> Self:
        """Make the repository `path` of `upstream`; `library/` is put before a single component of docker.io.

        Raises:
            NameInvalid: the path is malformed.
        """
        if len(path) > _LONGEST_NAME or not _PATH.fullmatch(path):
            raise NameInvalid(f"{path[:300]!r} is not the name of a repository")
        if upstream.name == DOCKER_HUB and "/" not in path:
            path = f"library/{path}"
        return cls(upstream, path)

    @classmethod
    def parse(cls, name: str, default: Upstream) -> Self:
        """Parse the name of a repository, whose first component is the upstream if it looks like a host.

        A component with a `.` or a `:`, and `localhost`, look like a host; otherwise the upstream is `default`.

        Raises:
            NameInvalid: the upstream or the path is malformed.
        """
        first, slash, rest = name.partition("/")
        if slash and (first == "localhost" or "." in first or ":" in first):
            return cls.at(Upstream.parse(first), rest)
        return cls.at(default, name)

    def __str__(self) -> str:
        return f"{self.upstream}/{self.path}"


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A manifest in a repository, by tag or digest; its `str` is the image URL."""

    repository: Repository
    reference: Reference

    @classmethod
    def parse(cls, url: str, default: Upstream) -> Self:
        """Parse `repository:tag` or `repository@digest`; see `Repository.parse`.

        Raises:
            NameInvalid: the repository is malformed.
            ManifestUnknown: the tag is malformed.
            DigestInvalid: the digest is malformed, or its algorithm is not supported.
        """
        name, reference = _split(url)
        return cls(Repository.parse(name, default), reference)

    @classmethod
    def parse_whole(cls, url: str) -> Self:
        """Parse an image URL that this program wrote: its first component is always the upstream.

        Raises:
            NameInvalid: the upstream or the repository is malformed.
            ManifestUnknown: the tag is malformed.
            DigestInvalid: the digest is malformed, or its algorithm is not supported.
        """
        name, reference = _split(url)
        upstream, _, path = name.partition("/")
        return cls(Repository.at(Upstream.parse(upstream), path), reference)

    def __str__(self) -> str:
        mark = "@" if isinstance(self.reference, Digest) else ":"
        return f"{self.repository}{mark}{self.reference}"


def _split(url: str) -> tuple[str, Reference]:
    name, at, digest = url.partition("@")
    if at:
        return name, Digest.parse(digest)
    name, _, tag = url.rpartition(":")
    return name, Tag.parse(tag)


def repository_of(url: str) -> str:
    """Return the name of the repository in an image URL that this program wrote.

    With tens of thousands of image URLs, parsing each takes ten times as long.
    """
    name, at, _ = url.partition("@")
    return name if at else url.rpartition(":")[0]


def by_digest(url: str, digest: Digest) -> str:
    """Return the image URL of the manifest `digest` in the repository of an image URL that this program wrote."""
    return f"{repository_of(url)}@{digest}"
