"""Make the image and its bill of materials: `python -m tools.image --help`."""

from __future__ import annotations

import argparse
import json
import tarfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ociregistry import __version__
from tools.image import archive, spdx
from tools.image.files import STATUS, STORE, File, Root, dated, divided, status
from tools.image.packages import installed, required

OURS = "ociregistry"
USER = 65532
"""The user and the group that the daemon runs as."""
PACKAGES = (OURS, "base-files", "ca-certificates", "tzdata")
"""What the image is made for: beside the daemon, certificates of public authorities and time zones."""
INSTALLERS = frozenset({"debconf", "dpkg", "mawk", "systemd-standalone-sysusers"})
"""What packages depend on for their installation, not when a program runs."""
DESCRIPTION = "A pull-through caching registry for container images on bad links"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the files of a Debian, and write the image and its bill of materials beside each other."""
    options = _options(arguments)
    created = datetime.fromtimestamp(options.date, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with tarfile.open(options.root, "r:") as tar:
        root = Root(tar)
        packages = required(installed(root.text(STATUS)), PACKAGES, INSTALLERS)
        files = root.kept(packages)
        own = root.owned(packages[OURS])
        copyrights = {name: root.copyright(package) for name, package in packages.items()}
        debian = root.text("etc/debian_version").partition(".")[0]
    files[STATUS] = File(STATUS, tarfile.REGTYPE, 0o644, 0, 0, content=status(packages))
    files[STORE] = File(STORE, tarfile.DIRTYPE, 0o750, USER, USER)
    ours, others = divided(files, own)
    image = archive.image(
        f"localhost/ociregistry:{__version__}",
        options.architecture,
        created,
        {
            "User": f"{USER}:{USER}",
            "ExposedPorts": {"8080/tcp": {}, "8081/tcp": {}},
            "Env": ["PATH=/usr/bin"],
            "Entrypoint": ["/usr/bin/ociregistry"],
            "Volumes": {f"/{STORE}": {}},
            "WorkingDir": "/",
            "StopSignal": "SIGTERM",
        },
        # The second one changes with each of our versions, the first with Debian's only: it is fetched once.
        [
            archive.layer(dated(others), f"Debian {debian}: what ociregistry needs"),
            archive.layer(dated(ours), f"ociregistry {__version__}"),
        ],
        _labels(created, options.revision),
    )
    path = options.folder / f"ociregistry-{__version__}-{options.architecture}"
    archive.write(image, path.with_name(f"{path.name}.oci.tar"), options.date)
    bill = spdx.document(image, __version__, created, packages, copyrights, f"debian-{debian}")
    path.with_name(f"{path.name}.spdx.json").write_text(json.dumps(bill, indent=2) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.image", description=main.__doc__)
    parser.add_argument("root", type=Path, help="the files of the Debian as a tar archive")
    parser.add_argument("folder", type=Path, help="where to write the image and its bill of materials")
    parser.add_argument("--architecture", choices=("amd64", "arm64"), required=True)
    parser.add_argument("--date", type=int, required=True, help="of the image, in seconds since 1970")
    parser.add_argument("--revision", default="", help="the commit that it is built from, if known")
    return parser.parse_args(arguments)


def _labels(created: str, revision: str) -> dict[str, str]:
    """Return the labels and annotations, by annotations.md of the OCI image specification."""
    labels = {
        "created": created,
        "description": DESCRIPTION,
        "licenses": "Apache-2.0",
        "revision": revision,
        "title": OURS,
        "version": __version__,
    }
    return {f"org.opencontainers.image.{name}": value for name, value in labels.items() if value}


if __name__ == "__main__":
    main()
