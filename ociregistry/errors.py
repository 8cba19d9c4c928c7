"""What can go wrong on the way of a request, in the words of the OCI Distribution specification.

Handlers raise a `RegistryError`; one place in `web` renders it as status, body and log line.
The codes are those of the specification (v1.1.1, "Error Codes"), with `UNAVAILABLE` for an upstream
that gives no answer, as registries in the field use it.
"""

from __future__ import annotations


class RegistryError(Exception):
    """A failure with its HTTP `status`, its OCI `code` and a `message` that says where and why."""

    status: int = 500
    code: str = "UNKNOWN"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def headers(self) -> dict[str, str]:
        """Headers that the answer carries beside the body."""
        return {}


class NameInvalid(RegistryError):
    """The name of a repository or of an upstream is malformed."""

    status = 400
    code = "NAME_INVALID"


class DigestInvalid(RegistryError):
    """A digest is malformed, or of an algorithm that is not supported."""

    status = 400
    code = "DIGEST_INVALID"


class PageInvalid(RegistryError):
    """The number of entries asked for is no number."""

    status = 400
    code = "PAGINATION_NUMBER_INVALID"


class NameUnknown(RegistryError):
    """The upstream has no such repository."""

    status = 404
    code = "NAME_UNKNOWN"


class ManifestUnknown(RegistryError):
    """Neither the cache nor the upstream has the manifest."""

    status = 404
    code = "MANIFEST_UNKNOWN"


class BlobUnknown(RegistryError):
    """Neither the cache nor the upstream has the blob."""

    status = 404
    code = "BLOB_UNKNOWN"


class NotFound(RegistryError):
    """There is nothing at that path."""

    status = 404
    code = "NOT_FOUND"


class Denied(RegistryError):
    """The operator does not allow this upstream."""

    status = 403
    code = "DENIED"


class LoopDetected(Denied):
    """A request that came back to a cache that had asked for it; `via` names those that it came through."""

    def __init__(self, message: str, via: str) -> None:
        super().__init__(message)
        self.via = via

    def headers(self) -> dict[str, str]:
        return {"Via": self.via}


class Unsupported(RegistryError):
    """An operation of the API that this server does not offer on purpose."""

    status = 404
    code = "UNSUPPORTED"


class MethodUnsupported(Unsupported):
    """A method other than GET and HEAD: this server is pull-only."""

    status = 405

    def headers(self) -> dict[str, str]:
        return {"Allow": "GET, HEAD"}


class RangeUnsatisfiable(RegistryError):
    """A range that lies outside the content, whose `size` in bytes the answer tells."""

    status = 416
    code = "SIZE_INVALID"

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size

    def headers(self) -> dict[str, str]:
        return {"Content-Range": f"bytes */{self.size}"}


class Unavailable(RegistryError):
    """The upstream, or our disk, cannot give it now; the client may ask again after `retry_after` seconds."""

    status = 503
    code = "UNAVAILABLE"

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}
