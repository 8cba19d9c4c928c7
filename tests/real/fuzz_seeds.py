"""Seeds of the fuzz tests: well-formed parts of requests, and well-known malformed ones, to be mutated."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from tests.images import digest_of
from tests.real.caches import plain_image

IMAGE = plain_image("fuzz", 2000)
LAYER = IMAGE.blobs[1]
HEX = LAYER.digest.removeprefix("sha256:").encode()
DIGESTS = (
    LAYER.digest.encode(),
    IMAGE.manifest.digest.encode(),
    b"sha256:" + b"0" * 64,
    b"sha512:" + b"0" * 128,
    digest_of(b"nobody has it").encode(),
)
TAGS = (b"1", b"latest", b"v1.29.1", b"A_b-c.d", b"sha256-" + HEX, b"1" * 128)
NAMES = (
    *(b"team/app", b"team/app/deep/er", b"app", b"a__b/c.d/e-f", b"library/nginx"),
    *(
        b"localhost/app",
        b"127.0.0.1:1/team/app",
        b"docker.io/library/nginx",
        b"registry.k8s.io/pause",
        b"[::1]:5000/x",
    ),
)
UPSTREAMS = (
    *(b"docker.io", b"index.docker.io", b"localhost", b"localhost:5000", b"127.0.0.1", b"127.0.0.1:1", b"[::1]:80"),
    *(b"169.254.169.254", b"metadata.google.internal", b"registry.k8s.io", b"user:password@host", b"http://host/x"),
    *(b"reg.io%3A5000", b"%5B::1%5D", b"0x7f000001", b"2130706433", b"xn--bcher-kva.example", b"host:65535"),
)
QUERIES = (b"", b"?n=10", b"?n=0&last=1", b"?n=999999999999", b"?last=1", b"?artifactType=a/b", b"?ns=", b"?a=%zz&&=")
RANGES = (
    *(b"bytes=0-", b"bytes=0-0", b"bytes=1999-", b"bytes=2000-", b"bytes=-1", b"bytes=-0", b"bytes=-99999"),
    *(
        b"bytes=5-4",
        b"bytes=0-1,3-4",
        b"bytes=, 0-1",
        b"Bytes = 7 - 9",
        b"bytes=0-18446744073709551616",
        b"lines=0-1",
    ),
    *(b"bytes=" + b"9" * 30 + b"-", b"bytes=--1", b"bytes", b"bytes=", b"", b"bytes=1e3-", b"bytes=0x10-"),
)
METHODS = st.sampled_from((b"GET", b"GET", b"GET", b"HEAD"))
FIELDS = (
    *(b"Accept", b"Accept-Encoding", b"Authorization", b"Connection", b"Cookie", b"Content-Type", b"Expect", b"Host"),
    *(b"If-Match", b"If-None-Match", b"If-Range", b"If-Modified-Since", b"Range", b"TE", b"Upgrade", b"User-Agent"),
    *(b"X-Forwarded-For", b"X-HTTP-Method-Override", b"Sec-WebSocket-Key", b"HTTP2-Settings", b"Origin", b"X"),
)
VALUES = (
    *(
        b"*/*",
        b"gzip",
        b"identity;q=0",
        b"Basic dTpw",
        b"Bearer x",
        b"close",
        b"keep-alive",
        b"upgrade, close",
        b"a=b",
    ),
    *(
        b"multipart/form-data; boundary=x",
        b"application/x-www-form-urlencoded",
        b"100-continue",
        b"h2c",
        b"websocket",
    ),
    *(
        b'"x"',
        b'W/"x"',
        b"*",
        b"Thu, 01 Jan 1970 00:00:00 GMT",
        b"trailers",
        b"DELETE",
        b"x" * 5000,
        b"",
        b"bytes=0-1",
    ),
)

TOKENS = (
    *(
        b"..",
        b"../",
        b"/",
        b"//",
        b"%2f",
        b"%2F",
        b"%5c",
        b"%2e%2e",
        b"%252f",
        b"%00",
        b"\0",
        b"%",
        b"%zz",
        b"%0d%0a",
    ),
    *(b".", b"-", b"_", b"__", b"@", b":", b"?", b"#", b"&", b"=", b";", b"+", b"*", b"[", b"]", b"\\", b'"', b"'"),
    *(b" ", b"\t", b"\n", b"\r", b"\xff", b"\xc3\xa9", b"%c3%a9", b"%ff", b"%c0%af", b"\xe2\x80\xae", b"A", b"0"),
    *(b"manifests", b"blobs", b"tags/list", b"sha256:", b"localhost", b"127.0.0.1:1", b"a" * 300, b"/etc/passwd"),
)


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes], most: int = 3) -> bytes:
    """Draw one of the seeds, with at most `most` mutations."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        token = draw(st.sampled_from(TOKENS) | st.binary(max_size=4))
        data = data[:at] + token + data[at + draw(st.integers(0, 3)) :]
    return data


@st.composite
def ranges(draw: st.DrawFn) -> bytes:
    """Draw ranges near the ends of the blob, where mistakes are likely."""
    places = st.sampled_from((0, 1, 2, 999, 1998, 1999, 2000, 2001, 2**31, 2**63, 2**64)) | st.integers(0, 4000)
    first, last = draw(st.none() | places), draw(st.none() | places)
    return b"bytes=%s-%s" % tuple(b"" if place is None else b"%d" % place for place in (first, last))
