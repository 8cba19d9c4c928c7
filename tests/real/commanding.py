"""Commands as an operator gives them: processes of their own, what they say, and what they leave."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.images import Image, Index
from tests.processes import ROOT, twistd

NOBODY_UID = 65534
"""The user and the group without rights that every Debian has."""

_PATIENCE = 120

Ended = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Shell:
    """Where commands are given: in `folder`, on `store`, with the configuration file `config`."""

    folder: Path
    store: Path
    config: Path

    def argv(self, *arguments: str, options: Sequence[str] = ("-n",)) -> list[str]:
        """The command line that gives these arguments on the store; `options` are twistd's own."""
        common = ["--image-path", str(self.store), "--config-path", str(self.config)]
        return twistd(*common, *arguments, options=options)

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Ended:
        """What becomes of `twistd -n ociregistry` with these arguments."""
        return ended(self.argv(*arguments), self.folder, environment)

    def piped(self, arguments: str, pipe: str = "", environment: Mapping[str, str] | None = None) -> Ended:
        """What becomes of it in a shell that reads the arguments, and sends what comes out into `pipe`."""
        script = f'set -o pipefail; ociregistry() {{ "${{command[@]}}" "$@"; }}; ociregistry {arguments} {pipe}'
        return ended(["bash", "-c", f'command=("$@"); {script}', "bash", *self.argv()], self.folder, environment)

    def listed(self, environment: Mapping[str, str] | None = None) -> dict[str, tuple[str, str]]:
        """Image URL -> kind and time, as `list` prints them."""
        rows = [line.split(" ") for line in succeeded(self.run("list", environment=environment)).splitlines()]
        return {url: (kind, created) for url, kind, created in rows}


def shell_in(folder: Path, registries: Iterable[Mapping[str, object]] = (), **settings: object) -> Shell:
    """A shell in `folder`, with a store there that is yet to be made."""
    config = folder / "ociregistry.yaml"
    config.write_text(yaml.safe_dump({"registries": list(registries), **settings}))
    return Shell(folder, folder / "images", config)


def ended(argv: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Ended:
    """What becomes of a process that is started in `folder`."""
    return subprocess.run(
        argv,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )


def succeeded(done: Ended) -> str:
    """What a command printed, which must have had nothing to complain about."""
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def assert_one_line(done: Ended, status: int, *words: str) -> None:
    """It must have ended with this status and one line that tells why, with these words in it."""
    assert done.returncode == status, done
    assert re.fullmatch("ociregistry: [^\n]+\n", done.stderr), done
    for word in words:
        assert word in done.stderr


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that is below `folder`: mode, owner and bytes of each path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_uid, data)
    return found


def owners(folder: Path) -> set[int]:
    """The users to whom the folder, and what is below it, belongs."""
    return {folder.stat().st_uid} | {path.lstat().st_uid for path in folder.rglob("*")}


def blobs_in(store: Path) -> set[str]:
    """The digests of the blobs in a store."""
    return {f"sha256:{path.name}" for path in (store / "blobs").iterdir()}


def records_in(store: Path) -> set[str]:
    """The digests of the records in a store."""
    return {f"sha256:{path.name}" for folder in ("fat", "img") for path in (store / folder).iterdir()}


def digests(*blobs_of: Image | Index) -> set[str]:
    """The digests of their blobs."""
    return {blob.digest for what in blobs_of for blob in what.blobs}


def metadata(images: Iterable[Image | Index], *platforms: str) -> tuple[set[str], set[str]]:
    """The digests of the manifests and of the configs that a store has of an index's other platforms."""
    others = [one for what in images if isinstance(what, Index) for one in what.without(*platforms)]
    return {one.manifest.digest for one in others}, {one.config.digest for one in others}


def need_root() -> None:
    """Fail where a test cannot become another user: one that did not run shows nothing."""
    if os.geteuid() != 0:
        pytest.fail("becoming another user needs root", pytrace=False)


def as_nobody(argv: Sequence[str]) -> list[str]:
    """The command line that runs `argv` as a user without rights."""
    return ["setpriv", f"--reuid={NOBODY_UID}", f"--regid={NOBODY_UID}", "--clear-groups", *argv]


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's are not, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="ociregistry-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


def give(folder: Path, user: int) -> None:
    """The folder, with all that is below it, belongs to this user and its group from now on."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)
