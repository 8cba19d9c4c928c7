"""Commands as processes: without `-n`, in any folder, as any user, and into any output."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ociregistry import __version__
from tests.disk_faults import fuse_disk
from tests.images import make_index
from tests.real.shells import (
    NOBODY_UID,
    Shell,
    as_nobody,
    assert_one_line,
    change_owner,
    files_in,
    need_root,
    open_folder,
    owners,
    run_process,
    shell_in,
    succeeded,
)
from tests.upstream import ScriptedRegistry

INDEX = make_index("commands")

# Command, typed after the common options, and a part of its output. LIST and TAR are files.
PRINTED = [
    ("list", "team/app:v1 list "),
    ("--list-cache", "team/app:v1 list "),
    ("load LIST", "0 loaded, 1 already there, 0 failed"),
    ("--load-images LIST", "0 loaded, 1 already there, 0 failed"),
    ("images LIST", "team/app:v1\n"),
    ("prune --pattern team/ --dry-run", "would prune "),
    ("--prune team/ --dry-run", "would prune "),
    ("--prune-before 2024-03-01T22:17:31 --dry-run", "0 image URLs, "),
    ("prune --pattern team/", "2 image URLs, 2 records and 3 blobs removed"),
    ("--prune team/", "2 image URLs, 2 records and 3 blobs removed"),
    ("prune --orphans", "0 orphans removed"),
    ("verify", "3 records and 4 blobs "),
    ("export --pattern team/ -o TAR", "2 images exported to "),
    ("check", "every other upstream"),
    ("version", f"ociregistry {__version__}\n"),
    ("--version", f"ociregistry {__version__}\n"),
    ("list --version", f"ociregistry {__version__}\n"),
]
COMMANDS = [command for command, _ in PRINTED if not command.startswith("--")]
_WITHOUT_STORE = re.compile("^check|^images|version")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with open_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def registry() -> Iterator[ScriptedRegistry]:
    """A registry with the images."""
    with ScriptedRegistry() as registry:
        registry.add("team/app", INDEX, "v1")
        yield registry


@pytest.fixture(scope="module")
def loaded(registry: ScriptedRegistry, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell on a store with one image, with the list beside it."""
    shell = shell_in(tmp_path_factory.mktemp("loaded"), [{"name": registry.host, "scheme": "http"}], arch="amd64")
    (shell.folder / "list").write_text(f"{registry.host}/team/app:v1\n")
    succeeded(shell.run("load", str(shell.folder / "list")))
    return shell


@pytest.fixture
def shell(loaded: Shell, public_folder: Path) -> Shell:
    """A copy of the shell and its store where every user may read."""
    shutil.copytree(loaded.folder, public_folder, dirs_exist_ok=True)
    public_folder.chmod(0o755)
    return Shell(public_folder, public_folder / loaded.store.name, public_folder / loaded.config.name)


@pytest.fixture
def unwritable_folder(public_folder: Path) -> Path:
    """A folder to run commands in, which only root may write."""
    unwritable_folder = public_folder / "unwritable"
    unwritable_folder.mkdir(mode=0o555)
    return unwritable_folder


def words(shell: Shell, command: str) -> list[str]:
    """Split the command into words, with the paths of its files."""
    files = {"LIST": "list", "TAR": "out/images.tar", "OTHER": "other"}
    return [str(shell.folder / files[word]) if word in files else word for word in command.split()]


def out_for(shell: Shell, user: int) -> None:
    """Return an export's path that the user may write."""
    out = shell.folder / "out"
    out.mkdir()
    os.chown(out, user, user)


@pytest.mark.parametrize(("command", "printed"), PRINTED)
def test_command_without_n_in_an_unwritable_folder(
    shell: Shell, unwritable_folder: Path, command: str, printed: str
) -> None:
    """The command creates neither pid file nor log file; the store belongs to the user."""
    need_root()
    out_for(shell, NOBODY_UID)
    change_owner(shell.store, NOBODY_UID)
    done = run_process(as_nobody(shell.argv(*words(shell, command), options=())), unwritable_folder)
    assert printed in succeeded(done)
    assert list(unwritable_folder.iterdir()) == []
    assert {path.name for path in shell.folder.iterdir()} == {
        "images",
        "list",
        "ociregistry.yaml",
        "out",
        "unwritable",
    }


@pytest.mark.parametrize(("command", "printed"), PRINTED)
def test_command_without_n_ignores_a_live_pid_file(shell: Shell, tmp_path: Path, command: str, printed: str) -> None:
    """The pid file of another process is left unchanged."""
    out_for(shell, os.geteuid())
    (tmp_path / "twistd.pid").write_text(str(os.getpid()))
    done = run_process(shell.argv(*words(shell, command), options=()), tmp_path)
    assert printed in succeeded(done)
    assert [path.name for path in tmp_path.iterdir()] == ["twistd.pid"]
    assert (tmp_path / "twistd.pid").read_text() == str(os.getpid())


def test_file_system_that_decides_who_owns_files(
    registry: ScriptedRegistry, shell: Shell, public_folder: Path
) -> None:
    """As NFS does with all_squash, SMB with a user for all, and FUSE: new files are not those of their maker."""
    need_root()
    owner = NOBODY_UID - 1
    registry.add("team/app", INDEX, "v2")
    (shell.folder / "list").write_text(f"{registry.host}/team/app:v1\n{registry.host}/team/app:v2\n")
    with fuse_disk(public_folder / "disk", f"--force-user={owner}", "--perms=a+rwX") as disk:
        on_disk = Shell(shell.folder, disk.path / "images", shell.config)
        for command, printed in (
            ("load LIST", "2 loaded, 0 already there, 0 failed"),
            ("load LIST", "0 loaded, 2 already there, 0 failed"),
            ("verify", "3 records and 4 blobs "),
            ("prune --pattern app:v2", "1 image URL, 0 records and 0 blobs removed"),
        ):
            done = run_process(as_nobody(on_disk.argv(*words(shell, command))), shell.folder)
            assert printed in succeeded(done)
        assert owners(on_disk.store) == {owner}


# Output that cannot be written


@pytest.mark.parametrize("command", COMMANDS)
def test_output_to_a_full_device_fails_with_one_line(shell: Shell, tmp_path: Path, command: str) -> None:
    out_for(shell, os.geteuid())
    argv = shell.argv(*words(shell, command), options=())
    done = run_process(["sh", "-c", 'exec "$@" >/dev/full', "sh", *argv], tmp_path)
    assert_one_line(done, 1, "No space left on device")


@pytest.mark.parametrize("command", COMMANDS)
def test_closed_output_fails_with_at_most_one_line(shell: Shell, tmp_path: Path, command: str) -> None:
    """The command has taken effect; there is no traceback, and no store file is mistaken for the output."""
    out_for(shell, os.geteuid())
    argv = shell.argv(*words(shell, command), options=())
    done = run_process(["sh", "-c", 'exec "$@" >&-', "sh", *argv], tmp_path)
    if done.returncode == 0:
        assert done.stderr == ""
    else:
        assert_one_line(done, 1)
    for path in (shell.store / "blobs").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_load_into_a_closed_pipe_is_silent(shell: Shell) -> None:
    done = shell.piped("load $PWD/list", "| true")
    assert (done.returncode, done.stderr) == (1, "")


# Ownership of the store


@pytest.mark.parametrize("command", [one for one in COMMANDS if not _WITHOUT_STORE.search(one)])
def test_unreadable_store_fails_with_one_line(shell: Shell, unwritable_folder: Path, command: str) -> None:
    need_root()
    out_for(shell, NOBODY_UID)
    shell.store.chmod(0o700)
    before = files_in(shell.store)
    done = run_process(as_nobody(shell.argv(*words(shell, command), options=())), unwritable_folder)
    assert_one_line(done, 1, str(shell.store), "Permission denied")
    assert done.stdout == ""
    assert files_in(shell.store) == before


@pytest.mark.parametrize("command", ["load LIST", "prune --pattern team/", "verify", "prune --orphans"])
def test_read_only_store_fails_with_one_line(shell: Shell, unwritable_folder: Path, command: str) -> None:
    need_root()
    before = files_in(shell.store)
    done = run_process(as_nobody(shell.argv(*words(shell, command), options=())), unwritable_folder)
    assert_one_line(done, 1, str(shell.store), "Permission denied")
    assert done.stdout == ""
    assert files_in(shell.store) == before


@pytest.mark.parametrize("command", ["list", "prune --pattern team/ --dry-run", "export --pattern team/ -o TAR"])
def test_reading_commands_work_without_write_permission(shell: Shell, unwritable_folder: Path, command: str) -> None:
    need_root()
    out_for(shell, NOBODY_UID)
    before = files_in(shell.store)
    succeeded(run_process(as_nobody(shell.argv(*words(shell, command), options=())), unwritable_folder))
    assert files_in(shell.store) == before


def test_files_written_by_root_belong_to_the_owner_of_the_store(shell: Shell, registry: ScriptedRegistry) -> None:
    """Check after each of load, prune, verify and a repair; the user can continue with all of it."""
    need_root()
    change_owner(shell.store, NOBODY_UID)
    for tag in ("v2", "v3"):
        registry.add("team/app", make_index(tag), tag)
    # A list that only root can read.
    secret = shell.folder / "secret"
    secret.write_text(f"{registry.host}/team/app:v2\n{registry.host}/team/app:v3\n")
    secret.chmod(0o600)
    assert "2 loaded" in succeeded(shell.run("load", str(secret)))
    assert owners(shell.store) == {NOBODY_UID}
    # One record is rewritten, and others are removed.
    registry.add("team/app", INDEX, "same")
    (shell.folder / "list").write_text(f"{registry.host}/team/app:same\n")
    succeeded(shell.run("load", str(shell.folder / "list")))
    assert "1 image URL, 0 records" in succeeded(shell.run("--prune", "team/app:v1$"))
    assert "2 image URLs, 2 records" in succeeded(shell.run("--prune", "team/app:v2$"))
    assert owners(shell.store) == {NOBODY_UID}
    succeeded(shell.run("verify"))
    assert owners(shell.store) == {NOBODY_UID}
    layer = INDEX.images[0].layers[0]
    file = shell.store / "blobs" / layer.digest.removeprefix("sha256:")
    file.write_bytes(bytes(len(layer.data)))
    assert f"\nrepaired: {file}\n" in succeeded(shell.run("verify", "--repair"))
    assert file.read_bytes() == layer.data
    assert owners(shell.store) == {NOBODY_UID}
    assert all(path.stat().st_mode & stat.S_IRUSR for path in shell.store.rglob("*"))
    run_process(as_nobody(shell.argv("verify")), shell.folder)


# Exit status

ENDINGS = [
    ("load LIST", 0),
    ("load MISSING", 1),  # the file does not exist
    ("load GONE", 1),  # the upstream does not have it
    ("load WRONG", 2),  # not a reference
    ("load", 2),
    ("--load-images", 2),
    ("list", 0),
    ("list --sort color", 2),
    ("list --pattern [", 2),
    ("--list-cache --prune x", 2),
    ("list --list-cache", 2),
    ("--list-cache more", 2),
    ("prune", 2),
    ("--prune [", 2),
    ("--prune team/ --dry-run", 0),
    ("--image-path nowhere prune --pattern x", 1),
    ("--image-path nowhere verify", 1),
    ("--image-path OTHER list", 1),
    ("--image-path OTHER prune --orphans", 1),
    ("--image-path OTHER prune --orphans --dry-run", 1),
    ("--image-path OTHER verify", 1),
    ("--image-path OTHER export --pattern . -o TAR", 1),
    ("--image-path OTHER status", 2),
    ("verify", 0),
    ("verify more", 2),
    ("export --pattern team/", 2),
    ("export --pattern no-such-image -o TAR", 1),
    ("check", 0),
    ("version more", 2),
    ("--frobnicate", 2),
]


@pytest.mark.parametrize(("command", "status"), ENDINGS)
def test_exit_status(shell: Shell, registry: ScriptedRegistry, tmp_path: Path, command: str, status: int) -> None:
    """0, 1 when something failed, 2 for invalid usage; an error has a line that says why."""
    for name, text in (("GONE", f"{registry.host}/team/other:v1\n"), ("WRONG", "UPPER/case\n")):
        (tmp_path / name).write_text(text)
    # Not a store.
    (shell.folder / "other").mkdir()
    before = files_in(shell.store)
    done = run_process(shell.argv(*words(shell, command), options=()), tmp_path)
    if status == 0:
        succeeded(done)
    else:
        assert_one_line(done, status)
    if command not in ("load GONE", "verify"):
        assert files_in(shell.store) == before
    assert not (tmp_path / "nowhere").exists()
    assert files_in(shell.folder / "other") == {}


def test_verify_tells_where_damaged_blobs_are_and_how_they_come_back(shell: Shell) -> None:
    layer = INDEX.images[0].layers[0]
    blob = shell.store / "blobs" / layer.digest.partition(":")[2]
    blob.write_bytes(b"damaged")
    done = shell.run("verify")
    damaged, lacked, _ = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (1, "")
    assert damaged.startswith(f"damaged: {blob}: its 7 bytes do not have the digest {layer.digest}; moved to ")
    kept = Path(damaged.partition("; moved to ")[2])
    assert (kept / blob.name).read_bytes() == b"damaged"
    assert lacked.endswith(f", missing: {len(layer.data)} bytes; verify --repair fetches them")
    assert "completed: " in succeeded(shell.run("verify", "--repair"))
    assert blob.read_bytes() == layer.data
