"""Shells for commands: how a command ends, what it prints, and what it leaves in the store."""

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
    """A shell in `folder`, for commands on `store` with the configuration file `config`."""

    folder: Path
    store: Path
    config: Path

    def argv(self, *arguments: str, options: Sequence[str] = ("-n",)) -> list[str]:
        """Return the command line for these arguments on the store; `options` are those of twistd."""
        common = ["--image-path", str(self.store), "--config-path", str(self.config)]
        return twistd(*common, *arguments, options=options)

    def run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> Ended:
        """Run `twistd -n ociregistry` with these arguments to its end."""
        return run_process(self.argv(*arguments), self.folder, environment)

    def piped(self, arguments: str, pipe: str = "", environment: Mapping[str, str] | None = None) -> Ended:
        """Run it in a shell that expands the arguments and sends the output into `pipe`."""
        script = f'set -o pipefail; ociregistry() {{ "${{command[@]}}" "$@"; }}; ociregistry {arguments} {pipe}'
        return run_process(
            ["bash", "-c", f'command=("$@"); {script}', "bash", *self.argv()], self.folder, environment
        )

    def listed(self, environment: Mapping[str, str] | None = None) -> dict[str, tuple[str, str]]:
        """Return the rows of `list`: image URL -> kind and time."""
        rows = [line.split(" ") for line in succeeded(self.run("list", environment=environment)).splitlines()]
        return {url: (kind, created) for url, kind, created in rows}


def shell_in(folder: Path, registries: Iterable[Mapping[str, object]] = (), **settings: object) -> Shell:
    """Make a shell in `folder`, with a store there that does not exist yet."""
    config = folder / "ociregistry.yaml"
    config.write_text(yaml.safe_dump({"registries": list(registries), **settings}))
    return Shell(folder, folder / "images", config)


def run_process(
    argv: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, text: str | None = None
) -> Ended:
    """Run a process in `folder` to its end, with `text` in a pipe as its standard input, or none."""
    return subprocess.run(
        argv,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        **({"stdin": subprocess.DEVNULL} if text is None else {"input": text}),
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )


def succeeded(done: Ended) -> str:
    """Return the output of a command, which must have succeeded without an error message."""
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def assert_one_line(done: Ended, status: int, *words: str) -> None:
    """Assert that a command ended with this status and one line of explanation that contains these words."""
    assert done.returncode == status, done
    assert re.fullmatch("ociregistry: [^\n]+\n", done.stderr), done
    for word in words:
        assert word in done.stderr


def files_in(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return mode, owner and bytes of each path below the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_uid, data)
    return found


def owners(folder: Path) -> set[int]:
    """Return the owners of the folder and everything below."""
    return {folder.stat().st_uid} | {path.lstat().st_uid for path in folder.rglob("*")}


def blobs_in(store: Path) -> set[str]:
    """Return the digests of the blobs in a store."""
    return {f"sha256:{path.name}" for path in (store / "blobs").iterdir()}


def records_in(store: Path) -> set[str]:
    """Return the digests of the records in a store."""
    return {f"sha256:{path.name}" for folder in ("fat", "img") for path in (store / folder).iterdir()}


def digests(*blobs_of: Image | Index) -> set[str]:
    """Return the digests of these blobs."""
    return {blob.digest for what in blobs_of for blob in what.blobs}


def metadata(images: Iterable[Image | Index], *platforms: str) -> tuple[set[str], set[str]]:
    """Return the digests of manifests and configs that a store has for the other platforms of an index."""
    others = [one for what in images if isinstance(what, Index) for one in what.without(*platforms)]
    return {one.manifest.digest for one in others}, {one.config.digest for one in others}


def need_root() -> None:
    """Fail where a test cannot become another user: a skipped test would prove nothing."""
    if os.geteuid() != 0:
        pytest.fail("becoming another user needs root", pytrace=False)


def as_nobody(argv: Sequence[str]) -> list[str]:
    """Return the command line that runs `argv` as a user without rights."""
    return ["setpriv", f"--reuid={NOBODY_UID}", f"--regid={NOBODY_UID}", "--clear-groups", *argv]


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a folder that every user may enter, unlike pytest's, until the block ends."""
    with tempfile.TemporaryDirectory(prefix="ociregistry-") as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path


def change_owner(folder: Path, user: int) -> None:
    """Give the folder, with everything below, to this user and group."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)
