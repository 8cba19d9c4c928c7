"""The names of all that lies in a store's folder: nothing else spells them.

<root>/blobs/<hex>, fat/<hex>, img/<hex>, and in pulls/<n>/ the work in progress of one process.
"""

from __future__ import annotations

import re
from pathlib import Path

from ociregistry.names import Digest

LISTS_FOLDER = "fat"
"""Records of indexes."""
IMAGES_FOLDER = "img"
"""Records of images."""
NOTE_SUFFIX = ".note"
"""What is known of a partial, beside it."""
STAGED_SUFFIX = ".staged"
"""A partial that is filled from an archive."""
PENDING_SUFFIX = ".wish"
"""An image that is to be completed."""
LOCK_NAME = "lock"
SOCKET_NAME = "socket"

_BLOBS = "blobs"
_PULLS = "pulls"
_BAD = "bad"
_NUMBER = re.compile("0|[1-9][0-9]{0,5}")


def blobs_folder(root: Path) -> Path:
    """Return the folder of whole blobs."""
    return root / _BLOBS


def blob_path(root: Path, digest: Digest) -> Path:
    """Return where a whole blob is kept."""
    return root / _BLOBS / digest.hex


def is_blob_path(path: Path) -> bool:
    """Tell whether a file of a store is a blob, not a record."""
    return path.parent.name == _BLOBS


def record_path(root: Path, digest: Digest, *, is_list: bool) -> Path:
    """Return where the record of a manifest is kept."""
    return root / (LISTS_FOLDER if is_list else IMAGES_FOLDER) / digest.hex


def digest_of(path: Path) -> Digest:
    """Return the digest that a blob's or record's file is called by."""
    digest = Digest.from_hex(path.name)
    assert digest is not None
    return digest


def pulls_folder(root: Path) -> Path:
    """Return the folder that holds the folders of the processes."""
    return root / _PULLS


def pulls_folders(root: Path) -> list[Path]:
    """Return all pulls/<n>/, by their numbers. Blocks. Raises: `OSError`."""
    try:
        folders = [path for path in pulls_folder(root).iterdir() if _NUMBER.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(folders, key=lambda path: int(path.name))


def store_lock(root: Path) -> Path:
    """Return the file whose lock is held while records are rewritten or removed."""
    return root / _PULLS / LOCK_NAME


def verified_stamp(root: Path) -> Path:
    """Return the file whose time tells when the store was verified last."""
    return root / _PULLS / "verified"


def rewritten_record(root: Path) -> Path:
    """Return the temporary file of a record that a prune rewrites."""
    return root / _PULLS / "record.new"


def bad_folder(folder: Path) -> Path:
    """Return where the process of a pulls/<n>/ puts damaged files aside."""
    return folder / _BAD


def record_temporary(folder: Path, path: Path) -> Path:
    """Return the temporary file, in a pulls/<n>/, of the record that is to be at `path`."""
    return folder / f"{path.name}.record"


def temporary(path: Path) -> Path:
    """Return the temporary file of a note or a pending image, beside it."""
    return path.with_name(f"{path.name}.new")


def note_path(partial: Path) -> Path:
    """Return where the note of a partial is."""
    return partial.with_name(partial.name + NOTE_SUFFIX)


def pending_path(folder: Path, image: Digest) -> Path:
    """Return where a process notes that an image is to be completed."""
    return folder / f"{image.hex}{PENDING_SUFFIX}"
