"""Files of one owner in certs.d: written, kept up, and removed so that everything is as it was before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from twisted.python import usage

from ociregistry.commands.containerd_config import ContainerdConfig
from ociregistry.commands.hosts_files import HostsFiles
from ociregistry.commands.options import CommandFailed
from ociregistry.settings import load_settings
from ociregistry.store.files import Files, SharedFile
from tests.processes import ROOT, wait_until

TEXT = '\n[host."http://10.0.0.1:31080"]\n  capabilities = ["pull", "resolve"]\n'
THEIRS = 'server = "https://mine"\n'
PATHS = (
    "etc/containerd/certs.d",
    "var/lib/rancher/k3s/agent/etc/containerd/certs.d",
    "var/lib/rancher/rke2/agent/etc/containerd/certs.d",
)
_SOON = 30


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return the inode, mode and contents of everything below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_ino,
            path.lstat().st_mode,
            b"" if path.is_dir() else os.readlink(path).encode() if path.is_symlink() else path.read_bytes(),
        )
        for path in folder.rglob("*")
    }


@pytest.fixture(params=PATHS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a containerd, that of k3s or that of RKE2, with what others have in it."""
    folder = tmp_path / str(request.param)
    (folder / "ghcr.io").mkdir(parents=True)
    (folder / "ghcr.io" / "hosts.toml").write_text(THEIRS)
    return folder


@pytest.fixture
def one_folder(tmp_path: Path) -> Path:
    """The folder of a containerd, for tests with processes."""
    folder = tmp_path / "certs.d"
    folder.mkdir()
    return folder


@pytest.fixture
def theirs(folder: Path) -> Path:
    """A `_default/hosts.toml` of others."""
    path = folder / "_default" / "hosts.toml"
    path.parent.mkdir()
    path.write_text(THEIRS)
    path.chmod(0o640)
    return path


def test_everything_is_as_before(folder: Path) -> None:
    before = contents(folder)
    files = HostsFiles(folder, "apps/cache")
    path = folder / "_default" / "hosts.toml"
    assert files.write({"_default": TEXT}, replace=False) == [path]
    assert path.read_text().endswith(TEXT)
    assert path.read_text().startswith("# Written by ociregistry containerd-config for apps/cache, ")
    assert files.write({"_default": TEXT}, replace=False) == []
    assert files.write({"_default": "# other\n"}, replace=False) == [path]
    assert files.remove() == [path]
    assert contents(folder) == before
    assert files.remove() == []


def test_folder_of_others_stays(folder: Path) -> None:
    (folder / "_default").mkdir()
    before = contents(folder)
    files = HostsFiles(folder)
    files.write({"_default": TEXT}, replace=False)
    files.write({"_default": TEXT + "# newer\n"}, replace=False)
    files.remove()
    assert contents(folder) == before


def test_folder_that_others_use_since_stays(folder: Path) -> None:
    files = HostsFiles(folder)
    files.write({"_default": TEXT}, replace=False)
    (folder / "_default" / "ca.crt").write_text("theirs")
    files.remove()
    assert os.listdir(folder / "_default") == ["ca.crt"]


def test_missing_folder_is_made_and_nothing_to_remove(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "certs.d"
    assert HostsFiles(folder).remove() == []
    assert not folder.exists()
    HostsFiles(folder).write({"_default": TEXT}, replace=False)
    assert HostsFiles(folder).remove() == [folder / "_default" / "hosts.toml"]


def test_file_of_others_is_kept(folder: Path, theirs: Path) -> None:
    before = contents(folder)
    with pytest.raises(CommandFailed, match=r"_default/hosts\.toml: exists, .*: move it away, or .* --replace"):
        HostsFiles(folder).write({"_default": TEXT}, replace=False)
    assert HostsFiles(folder).remove() == []
    assert contents(folder) == before


def test_replaced_file_is_restored(folder: Path, theirs: Path) -> None:
    before = contents(folder)
    files = HostsFiles(folder, "apps/cache")
    for text in (TEXT, TEXT + "# newer\n"):
        assert files.write({"_default": text}, replace=True) == [theirs]
        assert theirs.read_text().endswith(text)
    assert files.remove() == [theirs]
    assert contents(folder) == before


def test_what_others_wrote_last_is_restored(folder: Path, theirs: Path) -> None:
    files = HostsFiles(folder)
    files.write({"_default": TEXT}, replace=True)
    theirs.unlink()
    theirs.write_text("# newer\n")
    files.write({"_default": TEXT}, replace=True)
    files.remove()
    assert theirs.read_text() == "# newer\n"
    files.write({"_default": TEXT}, replace=True)
    theirs.unlink()
    theirs.write_text("# newest\n")
    files.remove()
    assert os.listdir(theirs.parent) == ["hosts.toml"]
    assert theirs.read_text() == "# newest\n"


def test_symbolic_link_of_others(folder: Path) -> None:
    """Such as that of a configuration management, whose target the container does not see."""
    (folder / "_default").mkdir()
    (folder / "_default" / "hosts.toml").symlink_to("/nowhere/hosts.toml")
    before = contents(folder)
    files = HostsFiles(folder)
    with pytest.raises(CommandFailed, match="exists"):
        files.write({"_default": TEXT}, replace=False)
    files.write({"_default": TEXT}, replace=True)
    files.remove()
    assert contents(folder) == before


def test_owners_do_not_touch_each_other(folder: Path) -> None:
    HostsFiles(folder, "apps/cache").write({"_default": TEXT}, replace=False)
    before = contents(folder)
    for other in ("", "apps/cache2", "apps"):
        assert HostsFiles(folder, other).remove() == []
        with pytest.raises(CommandFailed, match="not written by this command"):
            HostsFiles(folder, other).write({"_default": TEXT}, replace=False)
    assert contents(folder) == before


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise `Killed` in place of the step after so many that change files."""
    left = steps

    def wrap(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*words: object, **named: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*words, **named)

        patch.setattr(module, name, call)

    with monkeypatch.context() as patch:
        for name in ("link", "rename", "unlink", "mkdir", "rmdir"):
            wrap(os, name)
        for name in ("create", "write", "sync", "sync_folder"):
            wrap(Files, name)
        yield


def finished(steps: int, monkeypatch: pytest.MonkeyPatch, files: HostsFiles, replace: bool, remove: bool) -> bool:
    """Write or remove, killed after so many steps; tell whether it came to its end."""
    try:
        with killed_after(steps, monkeypatch):
            if remove:
                files.remove()
            else:
                files.write({"_default": TEXT}, replace=replace)
    except Killed:
        return False
    return True


@pytest.mark.parametrize("remove", [False, True], ids=["write", "remove"])
@pytest.mark.parametrize("found", ["nothing", "folder", "file"])
def test_kill_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str, remove: bool) -> None:
    """containerd sees what was before or what comes after; written and removed again, everything is as before."""
    for steps in range(20):
        folder = tmp_path / str(steps)
        folder.mkdir()
        path = folder / "_default" / "hosts.toml"
        if found != "nothing":
            path.parent.mkdir()
        if found == "file":
            path.write_text(THEIRS)
        before = contents(folder)
        files = HostsFiles(folder, "apps/cache")
        if remove:
            files.write({"_default": TEXT}, replace=True)
        ended = finished(steps, monkeypatch, files, found == "file", remove)
        if path.exists():
            assert path.read_text() == THEIRS or path.read_text().endswith(TEXT)
        else:
            assert found != "file"
            assert found == "folder" or not path.parent.exists()
        again = HostsFiles(folder, "apps/cache")
        again.write({"_default": TEXT}, replace=found == "file")
        assert path.read_text().endswith(TEXT)
        again.remove()
        assert contents(folder) == before
        if ended:
            assert steps > 0
            return
    pytest.fail("it did not come to its end")


class Recorded(Files):
    """Notes what was synced and renamed, in its order."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def sync(self, file: SharedFile) -> None:
        self.steps.append(f"sync {file.size()} bytes")
        super().sync(file)

    def rename(self, path: Path, target: Path) -> None:
        self.steps.append(f"rename to {target.name}")
        super().rename(path, target)

    def sync_folder(self, folder: Path) -> None:
        self.steps.append(f"sync {folder.name}/")
        super().sync_folder(folder)


@pytest.mark.parametrize("is_new", [True, False], ids=["new folder", "old folder"])
def test_power_cut_leaves_no_empty_file(one_folder: Path, is_new: bool) -> None:
    """An empty file would be taken for one of others, for which containerd does not ask the daemon."""
    path = one_folder / "_default" / "hosts.toml"
    if not is_new:
        path.parent.mkdir()
    files = Recorded()
    HostsFiles(one_folder, "apps/cache", files).write({"_default": TEXT}, replace=False)
    written = [f"sync {path.stat().st_size} bytes", "rename to hosts.toml"]
    last = ["sync .ociregistry-apps_cache/", f"sync {one_folder.name}/"] if is_new else ["sync _default/"]
    assert files.steps == [*written, *last]


def test_saved_file_is_not_written_to(theirs: Path) -> None:
    """A kill while a file is saved leaves a third name of it, which is that of the file to write next."""
    files = HostsFiles(theirs.parent.parent)
    files.write({"_default": TEXT}, replace=True)
    saved = theirs.with_name("hosts.toml.saved")
    os.link(saved, theirs.with_name(".hosts.toml.new"))
    files.write({"_default": TEXT + "# newer\n"}, replace=True)
    assert saved.read_text() == THEIRS


def command(*words: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()", "--nodaemon", "--pidfile="]
    argv += ["ociregistry", "containerd-config", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


WRITES = ("--url", "http://10.0.0.1:31080", "--owner", "apps/cache", "--write")


def test_files_are_kept_up_until_the_process_is_told_to_end(one_folder: Path) -> None:
    path = one_folder / "_default" / "hosts.toml"
    process = command("--dir", str(one_folder), *WRITES, "--stay", "always")
    try:
        wait_until(path.exists, _SOON, "the file")
        path.unlink()
        wait_until(path.exists, _SOON, "the file again")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=_SOON)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert out.splitlines() == [f"wrote {path}"] * 2
    # Only an uninstall removes it: a pod also ends when its node restarts.
    assert path.read_text().endswith(TEXT)


def test_file_of_others_ends_the_process(one_folder: Path) -> None:
    path = one_folder / "_default" / "hosts.toml"
    process = command("--dir", str(one_folder), *WRITES, "--stay", "always")
    try:
        wait_until(path.exists, _SOON, "the file")
        new = path.with_name("new")
        new.write_text(THEIRS)
        new.rename(path)
        _, err = process.communicate(timeout=_SOON)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith(f"ociregistry: {path}: exists, and was not written by this command")
    assert path.read_text() == THEIRS


def test_removal_waits_for_the_process_that_writes(one_folder: Path) -> None:
    path = one_folder / "_default" / "hosts.toml"
    before = contents(one_folder)
    writes = command("--dir", str(one_folder), *WRITES, "--stay", "always")
    removes: subprocess.Popen[str] | None = None
    try:
        wait_until(path.exists, _SOON, "the file")
        removes = command("--dir", str(one_folder), "--owner", "apps/cache", "--remove", "--stay", "1s")
        # It ends without its turn, and the file is not touched.
        assert removes.communicate(timeout=_SOON)[0] == ""
        assert path.exists()
        removes = command("--dir", str(one_folder), "--owner", "apps/cache", "--remove", "--stay", "60s")
        writes.terminate()
        writes.communicate(timeout=_SOON)
        wait_until(lambda: not path.exists(), _SOON, "the removal")
        removes.terminate()
        out, _ = removes.communicate(timeout=_SOON)
    finally:
        for process in filter(None, (writes, removes)):
            process.kill()
            process.wait()
    assert out.splitlines() == [f"removed {path}"]
    assert contents(one_folder) == before


def test_removal_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "_default" / "hosts.toml"
    before = contents(folder)
    for option, said in (("--write", f"wrote {path}"), ("--remove", f"removed {path}")):
        words = ContainerdConfig()
        words.parseOptions(["--dir", str(folder), option])
        assert words.run(load_settings({}, (), None)) == 0
        assert capsys.readouterr().out.splitlines()[0] == said
    assert contents(folder) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--write", "--remove"],
        ["--replace"],
        ["--remove", "--replace"],
        ["--stay", "60s"],
        ["--write", "--stay", "soon"],
        ["--write", "--stay", "0s"],
        ["--write", "--owner", "two words"],
        ["--write", "--owner", ""],
    ],
)
def test_contradicting_options_are_refused(words: list[str]) -> None:
    with pytest.raises(usage.UsageError):
        ContainerdConfig().parseOptions(words)
