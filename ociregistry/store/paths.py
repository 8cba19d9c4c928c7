"""The names of everything in a store's folder; no other module spells them.

<root>/blobs/<hex>, fat/<hex> and img/<hex>, and in pulls/<n>/ the work in progress of one process.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from ociregistry.names import Digest

LISTS_FOLDER = "fat"
"""Records of indexes."""
IMAGES_FOLDER = "img"
"""Records of images."""
BLOBS_FOLDER = "blobs"
"""Whole blobs."""
NOTE_SUFFIX = ".note"
"""The note of a partial, beside it."""
STAGED_SUFFIX = ".staged"
"""A partial that is filled from an archive."""
PENDING_SUFFIX = ".wish"
"""A pending image."""
PRUNED_SUFFIX = ".pruned"
"""The record of an index that a prune has taken out of fat/, beside the pulls/<n>/."""
LOCK_NAME = "lock"
SOCKET_NAME = "socket"

_PULLS = "pulls"
_BAD = "bad"
_NUMBER = re.compile("0|[1-9][0-9]{0,5}")


def store_folders(root: Path) -> tuple[Path, Path, Path]:
    """Return the folders of blobs and records."""
    return root / BLOBS_FOLDER, root / LISTS_FOLDER, root / IMAGES_FOLDER


def blobs_folder(root: Path) -> Path:
    """Return the folder of whole blobs."""
    return root / BLOBS_FOLDER


def blob_path(root: Path, digest: Digest) -> Path:
    """Return where a whole blob is kept."""
    return root / BLOBS_FOLDER / digest.hex


def is_blob_path(path: Path) -> bool:
    """Tell whether a file of a store is a blob, not a record."""
    return path.parent.name == BLOBS_FOLDER


def record_path(root: Path, digest: Digest, *, is_list: bool) -> Path:
    """Return where the record of a manifest is kept."""
    return root / (LISTS_FOLDER if is_list else IMAGES_FOLDER) / digest.hex


def digest_of(path: Path | str) -> Digest:
    """Return the digest after which the file of a blob or record is named."""
    digest = Digest.from_hex(os.path.basename(path))
    assert digest is not None
    return digest


def pulls_folder(root: Path) -> Path:
    """Return the folder that contains the pulls/<n>/ of all processes."""
    return root / _PULLS


def is_store(root: Path) -> bool:
    """Tell whether a folder of a store is in the folder `root`, which may have lost the others. Blocks.

    Raises:
        OSError: `root` is missing, is no folder, or cannot be examined.
    """
    root.stat()
    for folder in (*store_folders(root), pulls_folder(root)):
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(folder.stat().st_mode):
                return True
    return False


def pulls_folders(root: Path) -> list[Path]:
    """Return all pulls/<n>/, sorted by number. Blocks.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        folders = [path for path in pulls_folder(root).iterdir() if _NUMBER.fullmatch(path.name) and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(folders, key=lambda path: int(path.name))


def store_lock(root: Path) -> Path:
    """Return the file whose lock is held while records are rewritten or removed."""
    return root / _PULLS / LOCK_NAME


def verified_stamp(root: Path) -> Path:
    """Return the file whose mtime says when the store was verified last."""
    return root / _PULLS / "verified"


def rewritten_record(root: Path) -> Path:
    """Return the temporary file of a record that a prune rewrites."""
    return root / _PULLS / "record.new"


def pruned_path(root: Path, digest: Digest) -> Path:
    """Return where a prune keeps the record of an index while it removes what goes with the index."""
    return root / _PULLS / f"{digest.hex}{PRUNED_SUFFIX}"


def bad_folder(folder: Path) -> Path:
    """Return the quarantine folder in a pulls/<n>/."""
    return folder / _BAD


def record_temporary(folder: Path, path: Path) -> Path:
    """Return the temporary file, in the pulls/<n>/ `folder`, for the record at `path`."""
    return folder / f"{path.name}.record"


def blob_temporary(folder: Path, path: Path) -> Path:
    """Return the temporary file, in the pulls/<n>/ `folder`, for the blob at `path`."""
    return folder / f"{path.name}.blob"


def temporary(path: Path) -> Path:
    """Return the temporary file for a note or pending image, beside it."""
    return path.with_name(f"{path.name}.new")


def note_path(partial: Path) -> Path:
    """Return the path of the note of a partial."""
    return partial.with_name(partial.name + NOTE_SUFFIX)


def pending_path(folder: Path, image: Digest) -> Path:
    """Return the file of a pending image in the pulls/<n>/ `folder`."""
    return folder / f"{image.hex}{PENDING_SUFFIX}"
