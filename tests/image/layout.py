"""An OCI image layout in an archive, read without the code that wrote it."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any


class Layout:
    """The files of a layout, with digests checked when they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with tarfile.open(path, "r:") as archive:
            self.members = archive.getmembers()
            opened = ((member.name, archive.extractfile(member)) for member in self.members)
            self._contents = {name: file.read() for name, file in opened if file is not None}

    @property
    def names(self) -> list[str]:
        """The files' names, in the order of the archive."""
        return [member.name for member in self.members]

    @property
    def index(self) -> dict[str, Any]:
        """The index."""
        value: dict[str, Any] = json.loads(self._contents["index.json"])
        return value

    @property
    def manifest(self) -> dict[str, Any]:
        """The only manifest."""
        (descriptor,) = self.index["manifests"]
        value: dict[str, Any] = json.loads(self.blob(descriptor))
        return value

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the image."""
        value: dict[str, Any] = json.loads(self.blob(self.manifest["config"]))
        return value

    @property
    def digest(self) -> str:
        """The digest of the manifest."""
        (descriptor,) = self.index["manifests"]
        return str(descriptor["digest"])

    @property
    def layers(self) -> list[tarfile.TarFile]:
        """The layers, opened."""
        return [tarfile.open(fileobj=io.BytesIO(self.blob(each)), mode="r:gz") for each in self.manifest["layers"]]

    def unpack(self, folder: Path) -> None:
        """Write the files of the image into a folder, with their owners and modes."""
        for each in self.manifest["layers"]:
            unpack = ["tar", "-xz", "--same-owner", "--same-permissions", "--numeric-owner", "-C", str(folder)]
            subprocess.run(unpack, input=self.blob(each), check=True)

    def blob(self, descriptor: dict[str, Any]) -> bytes:
        """Return the content of a blob.

        Raises:
            ValueError: it is not what its descriptor says.
        """
        algorithm, _, hexadecimal = descriptor["digest"].partition(":")
        content = self._contents[f"blobs/{algorithm}/{hexadecimal}"]
        if hashlib.new(algorithm, content).hexdigest() != hexadecimal or len(content) != descriptor["size"]:
            raise ValueError(f"{descriptor['digest']} has other content")
        return content
