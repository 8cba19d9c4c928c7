"""The files of the configuration: which were read, and when a change of them is told."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThreadPool
from twisted.logger import LogEvent

from ociregistry.concurrency import DaemonThreadPool
from ociregistry.config.files import ConfigFiles, FileWatcher, Version, Versions
from tests.unit.support.common import REACTOR, on_reactor, texts, turn, until


def renew(path: Path, text: str) -> None:
    """Replace a file by another one, as editors and rsync do."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


class Mounted:
    """A folder in which files are exchanged as Kubernetes does it: all at once, by one rename of a link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._folders = iter(range(100))
        folder.mkdir()

    def put(self, **files: str) -> None:
        """Exchange all files."""
        new = self.folder / f"..{next(self._folders)}"
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text)
            os.utime(new / name, (1, 1))
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        (self.folder / "..data_tmp").symlink_to(new.name)
        (self.folder / "..data_tmp").replace(self.folder / "..data")


class Looks:
    """A watcher, and the test's side of it: how often it told of a change."""

    def __init__(self, *paths: Path) -> None:
        self.clock = Clock()
        self.paths = list(paths)
        self.told = 0
        self.reads = True
        """Whether a change that is told leads to new versions."""
        self._asked = 0
        self._versions = self._now()
        self.threads = DaemonThreadPool(1, "looks")
        self.threads.start()
        in_thread = partial(deferToThreadPool, REACTOR, self.threads)
        self.watcher = FileWatcher(self._read, self._changed, in_thread, self.clock)
        self.watcher.startService()

    def _now(self) -> Versions:
        return {path: Version.of(path) for path in self.paths}

    def _read(self) -> Versions:
        self._asked += 1
        return self._versions

    def _changed(self) -> Deferred[None]:
        self.told += 1
        if self.reads:
            self._versions = self._now()
        return succeed(None)

    def reread(self) -> None:
        """Read the files for another reason, such as a signal."""
        self._versions = self._now()

    async def look(self, times: int = 1) -> int:
        """Let it look so often; return how often it has told of a change since the last call."""
        before = self.told
        for _ in range(times):
            asked = self._asked + 2
            self.clock.advance(5)
            await until(lambda asked=asked: self._asked >= asked)  # type: ignore[misc]  # bound in this iteration
            await turn()
        return self.told - before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file."""
    path = tmp_path / "file"
    path.write_text("one")
    return path


@pytest.fixture
def watch() -> Iterator[Callable[..., Looks]]:
    """Watch files until the test ends."""
    made: list[Looks] = []

    def watch(*paths: Path) -> Looks:
        made.append(Looks(*paths))
        return made[-1]

    yield watch
    for looks in made:
        if looks.watcher.running:
            looks.watcher.stopService()
        looks.threads.end()


def test_files_that_were_read_are_noted(path: Path, tmp_path: Path) -> None:
    """Also those that could not be read; and with the version before they were read first."""
    files = ConfigFiles()
    assert files.versions == {}
    assert files.read(path) == b"one"
    first = Version.of(path)
    renew(path, "other")
    assert files.read(path) == b"other"
    gone, fifo = tmp_path / "gone", tmp_path / "fifo"
    os.mkfifo(fifo)
    for unreadable in (gone, tmp_path, fifo):
        with pytest.raises(OSError, match=r"No such file|Is a directory|not a regular file"):
            files.read(unreadable)
    assert files.versions == {path: first, gone: None, tmp_path: Version.of(tmp_path), fifo: Version.of(fifo)}
    assert first != Version.of(path)
    assert Version.of(Path("a\0b")) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_text("other"),
        lambda path: renew(path, "two"),
        lambda path: path.chmod(0o400),
        lambda path: os.utime(path, (1, 1)),
    ],
)
@on_reactor
async def test_change_is_told_when_it_has_lasted_for_a_look(
    watch: Callable[..., Looks], path: Path, events: list[LogEvent], change: Callable[[Path], object]
) -> None:
    looks = watch(path)
    assert await looks.look(3) == 0
    change(path)
    assert await looks.look() == 0
    assert await looks.look() == 1
    assert await looks.look(3) == 0
    assert texts(events) == [f"changed: {path}"]


@on_reactor
async def test_file_that_is_being_written_is_not_told_of(watch: Callable[..., Looks], path: Path) -> None:
    looks = watch(path)
    for length in range(5):
        path.write_text("x" * length)
        assert await looks.look() == 0
    assert await looks.look() == 1


@on_reactor
async def test_file_that_never_rests_delays_other_changes_by_a_minute(
    watch: Callable[..., Looks], path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_text("")
    looks = watch(path, other)
    other.write_text("changed")
    for minute in range(2):
        for look in range(1, 13):
            os.utime(path, (1, 100 * minute + look))
            assert await looks.look() == (look == 12), look
    # At rest again.
    assert await looks.look(3) == 0


@on_reactor
async def test_files_of_a_volume_are_exchanged_at_once(
    watch: Callable[..., Looks], tmp_path: Path, events: list[LogEvent]
) -> None:
    """The paths lead through a link; the files behind it have the size and the date of those before."""
    mounted = Mounted(tmp_path / "volume")
    mounted.put(key="abc", certificate="one")
    looks = watch(*(mounted.folder / name for name in ("key", "certificate")))
    mounted.put(key="xyz", certificate="two")
    assert await looks.look(2) == 1
    assert texts(events) == [f"changed: {mounted.folder}/key, {mounted.folder}/certificate"]


@on_reactor
async def test_missing_file_alone_is_no_news(watch: Callable[..., Looks], path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("")
    looks = watch(path, other)
    path.rename(tmp_path / "away")
    assert await looks.look(3) == 0
    (tmp_path / "away").rename(path)
    assert await looks.look(3) == 0, "it is the same file again"
    path.unlink()
    assert await looks.look() == 0
    path.write_text("new")
    assert await looks.look(2) == 1
    # Another file has changed as well, and may name it no more.
    path.unlink()
    other.write_text("changed")
    assert await looks.look(2) == 1


@on_reactor
async def test_file_that_was_missing_when_it_was_read_is_told_of(watch: Callable[..., Looks], tmp_path: Path) -> None:
    looks = watch(tmp_path / "missing")
    assert await looks.look(2) == 0
    (tmp_path / "missing").write_text("")
    assert await looks.look(2) == 1


@on_reactor
async def test_change_back_before_it_was_told_is_no_change(watch: Callable[..., Looks], path: Path) -> None:
    looks = watch(path)
    path.rename(path.with_name("kept"))
    path.write_text("other")
    assert await looks.look() == 0
    path.with_name("kept").replace(path)
    assert await looks.look(3) == 0


@on_reactor
async def test_change_back_after_it_was_told_is_told(watch: Callable[..., Looks], path: Path) -> None:
    looks = watch(path)
    for _ in range(2):
        os.link(path, path.with_name("kept"))
        renew(path, "other")
        assert await looks.look(2) == 1
        path.with_name("kept").replace(path)
        assert await looks.look(2) == 1


@on_reactor
async def test_change_that_a_signal_had_read_is_not_told(watch: Callable[..., Looks], path: Path) -> None:
    looks = watch(path)
    path.write_text("other")
    assert await looks.look() == 0
    looks.reread()
    assert await looks.look(3) == 0


@on_reactor
async def test_file_that_is_not_named_any_more_is_not_told_of(
    watch: Callable[..., Looks], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may come during a look."""
    looks = watch(path, tmp_path / "other")
    path.write_text("other")
    assert await looks.look() == 0
    real = Version.of

    def of(path: Path) -> Version | None:
        del looks.paths[:1]
        monkeypatch.undo()
        looks.reread()
        return real(path)

    monkeypatch.setattr(Version, "of", of)
    assert await looks.look(3) == 0


@on_reactor
async def test_change_is_told_once_even_if_it_is_not_read(watch: Callable[..., Looks], path: Path) -> None:
    """A defect in reading must not be logged every five seconds."""
    looks = watch(path)
    looks.reads = False
    path.write_text("other")
    assert await looks.look(5) == 1
    path.write_text("third")
    assert await looks.look(5) == 1


@on_reactor
async def test_file_system_that_does_not_answer_holds_nothing_up(
    watch: Callable[..., Looks], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = watch(path)
    path.write_text("other")
    answers, looking, real = threading.Event(), [0], Version.of

    def of(path: Path) -> Version | None:
        looking[0] += 1
        answers.wait()
        return real(path)

    monkeypatch.setattr(Version, "of", of)
    try:
        looks.clock.pump([5] * 20)
        await until(lambda: looking[0])
        assert looking == [1], "one look at a time"
    finally:
        monkeypatch.undo()
        answers.set()
    await until(lambda: not looks.threads.working)
    await turn()
    assert await looks.look() == 1, "the look that took long was the first"


@on_reactor
async def test_nothing_is_told_after_the_end(watch: Callable[..., Looks], path: Path) -> None:
    looks = watch(path)
    path.write_text("other")
    await looks.look()
    looks.clock.advance(5)
    looks.watcher.stopService()
    await until(lambda: not looks.threads.working)
    await turn()
    assert (looks.told, looks.clock.getDelayedCalls()) == (0, [])
