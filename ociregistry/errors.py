"""The errors of a request, with the codes of the OCI Distribution specification.

Handlers raise a `RegistryError`; `web/resource.py` renders it as status, body and log line. The codes are those of
the specification (v1.1.1, "Error Codes"), and `UNAVAILABLE`, which other registries use too, for an upstream that
does not answer.
"""

from __future__ import annotations

import errno


class RegistryError(Exception):
    """An error with its HTTP `status`, its OCI `code` and a `message` that says where and why."""

    status: int = 500
    code: str = "UNKNOWN"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def headers(self) -> dict[str, str]:
        """Return the headers to add to the response."""
        return {}


class NameInvalid(RegistryError):
    """The name of a repository or of an upstream is malformed."""

    status = 400
    code = "NAME_INVALID"


class DigestInvalid(RegistryError):
    """A digest is malformed, or its algorithm is not supported."""

    status = 400
    code = "DIGEST_INVALID"


class PageInvalid(RegistryError):
    """A page of a list is requested by something that is not a page: a number `n`, or the query of a Link."""

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
    """The path is not one of the API."""

    status = 404
    code = "NOT_FOUND"


class Denied(RegistryError):
    """The operator does not allow this upstream."""

    status = 403
    code = "DENIED"


class LoopDetected(Denied):
    """A request reached a cache that it had passed before; `via` is the `Via` header that shows the loop."""

    def __init__(self, message: str, via: str) -> None:
        super().__init__(message)
        self.via = via

    def headers(self) -> dict[str, str]:
        return {"Via": self.via}


class AirGapped(RegistryError):
    """The content is not in the cache, and no upstream may be asked; `code` is the one for unknown content."""

    status = 404

    def __init__(self, message: str, code: str = RegistryError.code) -> None:
        super().__init__(message)
        self.code = code


class Unsupported(RegistryError):
    """An operation of the API that this server deliberately does not offer."""

    status = 404
    code = "UNSUPPORTED"


class MethodUnsupported(Unsupported):
    """A method other than GET and HEAD: this server is pull-only."""

    status = 405

    def headers(self) -> dict[str, str]:
        return {"Allow": "GET, HEAD"}


class RangeUnsatisfiable(RegistryError):
    """A range lies outside the content; the response tells the `size` of the content in bytes."""

    status = 416
    code = "SIZE_INVALID"

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size

    def headers(self) -> dict[str, str]:
        return {"Content-Range": f"bytes */{self.size}"}


class TooManyRequests(RegistryError):
    """Clients ask for more at once than this server does for them."""

    status = 429
    code = "TOOMANYREQUESTS"

    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class Unavailable(RegistryError):
    """The upstream or the local disk cannot serve the content now; retry after `retry_after` seconds."""

    status = 503
    code = "UNAVAILABLE"

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)}


class OutOfDescriptors(Unavailable):
    """This process, or the machine, cannot open another file or socket."""


_NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})


def is_out_of_descriptors(error: BaseException) -> bool:
    """Return whether `error` says that this process, or the machine, cannot open another file or socket."""
    # Twisted's errors of connections have the number as `osError`.
    number = error.errno if isinstance(error, OSError) else None
    return number in _NO_DESCRIPTOR or getattr(error, "osError", None) in _NO_DESCRIPTOR


def cannot_store(what: object, error: OSError) -> Unavailable:
    """Return the error for content `what` that cannot be written to the disk."""
    kind = OutOfDescriptors if is_out_of_descriptors(error) else Unavailable
    return kind(f"{what}: cannot be stored: {error.strerror or error}")
