"""Answers to a request for the referrers of a manifest, of registries with the referrers API and without it.

The specification reserves a tag for the index of the referrers where a registry has no such API (OCI Distribution
specification, "Unavailable Referrers API"). That a registry has neither shows that there are no referrers, but only
if both answers are the registry's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from ociregistry.errors import ManifestUnknown, NameUnknown, RegistryError, Unavailable
from ociregistry.manifests import OCI_INDEX, Manifest, ManifestInvalid, canonical_media_type
from ociregistry.strictjson import parse_json
from ociregistry.upstream.http import Response

NO_API = frozenset({400, 404, 405, 501})
"""Statuses with which registries answer for a part of the API that they do not have."""
_UNKNOWN = frozenset({ManifestUnknown.code, NameUnknown.code})
"""Codes of errors that say that a manifest is unknown, not that a part of the API is."""
_NONE = Manifest.parse(json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode(), OCI_INDEX)


def is_index(response: Response, data: bytes) -> bool:
    """Tell whether an answer is an index, or claims to be one; some registries send one as `text/plain`."""
    if response.status != 200:
        return False
    if canonical_media_type(response.header("content-type")) == OCI_INDEX:
        return True
    try:
        Manifest.parse(data, OCI_INDEX)
    except ManifestInvalid:
        return False
    return True


def parse_index(data: bytes, what: str) -> Manifest:
    """Parse an index of referrers, whatever its Content-Type is.

    Raises:
        Unavailable: it is malformed.
    """
    try:
        return Manifest.parse(data, OCI_INDEX)
    except ManifestInvalid as error:
        raise Unavailable(f"{what}: the upstream sent no valid index: {error}") from None


def joined(pages: Sequence[Manifest], what: str) -> Manifest:
    """Join the pages of an index into one.

    Raises:
        Unavailable: the index is too large.
    """
    documents = [parse_json(page.data) for page in pages]
    entries = [entry for document in documents for entry in document["manifests"] or ()]
    return parse_index(json.dumps({**documents[0], "manifests": entries}).encode(), what)


def no_referrers(response: Response, data: bytes, unknown: Callable[[str], RegistryError]) -> Manifest:
    """Return the empty index if an answer shows that the upstream has no referrers API.

    ghcr.io redirects to a page of HTML, and registry.k8s.io to that of a login.

    Raises:
        The error that `unknown` makes of the reason: the answer does not show it.
    """
    html = "html" in canonical_media_type(response.header("content-type")) or data.lstrip()[:1] == b"<"
    if (response.status == 200 and not html) or _error_codes(data) & _UNKNOWN:
        raise unknown(f"the upstream answered {response.status} without an index")
    return _NONE


def says_absent(data: bytes) -> bool:
    """Tell whether the body of a 404 says that a repository lacks a manifest.

    It then has the code of an error, which a proxy that answers 404 for everything does not send.
    """
    return bool(_error_codes(data) - {NameUnknown.code})


def _error_codes(data: bytes) -> set[str]:
    """Return the codes in the body of an error (OCI Distribution specification, "Error Codes")."""
    try:
        return {str(error["code"]) for error in parse_json(data)["errors"]}
    except (ValueError, LookupError, TypeError):
        return set()
