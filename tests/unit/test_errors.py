"""Every error has an HTTP status, an error code of the specification, and headers."""

from __future__ import annotations

import pytest

from ociregistry import errors
from ociregistry.errors import LoopDetected, RangeUnsatisfiable, RegistryError, Unavailable

STATUSES = {
    "NameInvalid": (400, "NAME_INVALID"),
    "DigestInvalid": (400, "DIGEST_INVALID"),
    "PageInvalid": (400, "PAGINATION_NUMBER_INVALID"),
    "NameUnknown": (404, "NAME_UNKNOWN"),
    "ManifestUnknown": (404, "MANIFEST_UNKNOWN"),
    "BlobUnknown": (404, "BLOB_UNKNOWN"),
    "NotFound": (404, "NOT_FOUND"),
    "Denied": (403, "DENIED"),
    "LoopDetected": (403, "DENIED"),
    "AirGapped": (404, "UNKNOWN"),
    "Unsupported": (404, "UNSUPPORTED"),
    "MethodUnsupported": (405, "UNSUPPORTED"),
    "RangeUnsatisfiable": (416, "SIZE_INVALID"),
    "TooManyRequests": (429, "TOOMANYREQUESTS"),
    "Unavailable": (503, "UNAVAILABLE"),
    "OutOfDescriptors": (503, "UNAVAILABLE"),
}


def test_status_and_code() -> None:
    found = {
        name: (kind.status, kind.code)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, RegistryError) and kind is not RegistryError
    }
    assert found == STATUSES


@pytest.mark.parametrize("kind", [errors.NameInvalid, errors.BlobUnknown, errors.Denied, errors.MethodUnsupported])
def test_message_is_the_text_of_the_error(kind: type[RegistryError]) -> None:
    error = kind("docker.io: why")
    assert error.message == str(error) == "docker.io: why"


def test_error_headers() -> None:
    assert errors.MethodUnsupported("PUT").headers() == {"Allow": "GET, HEAD"}
    assert RangeUnsatisfiable("outside", 2048).headers() == {"Content-Range": "bytes */2048"}
    assert errors.TooManyRequests("pages").headers() == {"Retry-After": "1"}
    assert Unavailable("down").headers() == {"Retry-After": "5"}
    assert Unavailable("down", 120).headers() == {"Retry-After": "120"}
    assert LoopDetected("again", "1.1 a, 1.1 b").headers() == {"Via": "1.1 a, 1.1 b"}
    assert errors.NameInvalid("no").headers() == {}
