"""A software bill of materials: the packages of an image as an SPDX 2.3 document.

Sources: the SPDX specification 2.3, and the types deb and oci of package URLs.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from tools.image.archive import Image
from tools.image.packages import Package

_UNKNOWN = "NOASSERTION"
_LICENCES = {
    "apache-2.0": "Apache-2.0",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "expat": "MIT",
    "gpl-2": "GPL-2.0-only",
    "gpl-2+": "GPL-2.0-or-later",
    "gpl-3": "GPL-3.0-only",
    "gpl-3+": "GPL-3.0-or-later",
    "isc": "ISC",
    "lgpl-2+": "LGPL-2.0-or-later",
    "lgpl-2.1": "LGPL-2.1-only",
    "lgpl-2.1+": "LGPL-2.1-or-later",
    "lgpl-3+": "LGPL-3.0-or-later",
    "mit": "MIT",
    "mpl-2.0": "MPL-2.0",
    "zlib": "Zlib",
    "zpl-2.1": "ZPL-2.1",
}
"""Debian's names of licences in lower case, and SPDX's."""


def document(
    image: Image,
    version: str,
    created: str,
    packages: Mapping[str, Package],
    copyrights: Mapping[str, str],
    distro: str,
) -> dict[str, Any]:
    """Return the document for an image with these packages.

    `copyrights` are the packages' copyright files, `distro` is the distribution for package URLs, such as debian-12.
    """
    title, _, _ = image.name.rpartition(":")
    name = title.rpartition("/")[2]
    described = {
        **_package("SPDXRef-Image", name, version, f"pkg:oci/{name}@{quote(image.digest, safe='')}"),
        "primaryPackagePurpose": "CONTAINER",
        "licenseDeclared": _UNKNOWN,
        "supplier": _UNKNOWN,
    }
    contained = [_debian(package, copyrights[package.name], distro) for package in packages.values()]
    relations = [("SPDXRef-DOCUMENT", "DESCRIBES", described["SPDXID"])]
    relations += [(described["SPDXID"], "CONTAINS", each["SPDXID"]) for each in contained]
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{name}-{version}-{image.platform['architecture']}",
        # Of the digest, so that it differs for other images only.
        "documentNamespace": uuid.uuid5(uuid.NAMESPACE_OID, image.digest).urn,
        "creationInfo": {"created": created, "creators": ["Tool: ociregistry-tools.image"]},
        "packages": [described, *contained],
        "relationships": [
            {"spdxElementId": one, "relationshipType": how, "relatedSpdxElement": other}
            for one, how, other in relations
        ],
    }


def licence(terms: str) -> str:
    """Return the licence of a package's files as SPDX names it, by `terms`, its copyright file in Debian's format.

    That is the one of `Files: *`; NOASSERTION where it is missing, combined or unknown.
    """
    found = re.search(r"^Files:\s*\*\s*$(?:\n.+)*?\nLicense:[ \t]*(.+)$", terms, re.MULTILINE)
    return _LICENCES.get(found[1].strip().lower(), _UNKNOWN) if found else _UNKNOWN


def _debian(package: Package, terms: str, distro: str) -> dict[str, Any]:
    version = quote(package.version, safe="~.")
    url = f"pkg:deb/debian/{quote(package.name, safe='')}@{version}?arch={package.architecture}&distro={distro}"
    identifier = f"SPDXRef-Package-{re.sub('[^A-Za-z0-9.-]', '-', package.name)}"
    return {
        **_package(identifier, package.name, package.version, url),
        "licenseDeclared": licence(terms),
        "supplier": _organization(package.fields["Maintainer"]),
    }


def _package(identifier: str, name: str, version: str, url: str) -> dict[str, Any]:
    return {
        "SPDXID": identifier,
        "name": name,
        "versionInfo": version,
        "downloadLocation": _UNKNOWN,
        "filesAnalyzed": False,
        "licenseConcluded": _UNKNOWN,
        "copyrightText": _UNKNOWN,
        "externalRefs": [
            {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": url},
        ],
    }


def _organization(maintainer: str) -> str:
    """Return a maintainer, `NAME <ADDRESS>`, as SPDX writes suppliers."""
    name, _, address = maintainer.partition("<")
    return f"Organization: {name.strip()} ({address.rstrip('>')})"
