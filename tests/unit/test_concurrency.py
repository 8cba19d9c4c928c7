"""Event, SingleFlight and BackOff: waiters share one result and cannot affect each other; intervals grow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from threading import Thread, current_thread

import pytest
from twisted.internet.defer import CancelledError, Deferred, fail, gatherResults, succeed
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThreadPool
from twisted.logger import LogEvent, LogLevel
from twisted.python.failure import Failure

from ociregistry.concurrency import Backoff, DaemonThreadPool, Event, SingleFlight
from ociregistry.errors import Unavailable
from tests.unit.support.common import REACTOR, failed, fired, on_reactor, texts, until


class Work:
    """Work whose result the test decides."""

    def __init__(self) -> None:
        self.begun = 0
        self.result: Deferred[str] = Deferred()

    async def __call__(self) -> str:
        self.begun += 1
        return await self.result


def test_event_wakes_current_waiters() -> None:
    event = Event()
    first, second = event.wait(), event.wait()
    assert not first.called
    event.fire()
    assert first.called
    assert second.called
    later = event.wait()
    assert not later.called
    event.fire()
    assert later.called
    event.fire()


def test_cancelled_waiter_wakes_no_other() -> None:
    event = Event()
    first, second = event.wait(), event.wait()
    first.cancel()
    failed(first, CancelledError)
    assert not second.called
    event.fire()
    assert second.called


def test_waiting_again_in_callback_waits_for_next_fire() -> None:
    event = Event()
    again: list[Deferred[None]] = []
    event.wait().addCallback(lambda _: again.append(event.wait()))
    event.fire()
    assert not again[0].called
    event.fire()
    assert again[0].called


def test_woken_waiter_may_cancel_others() -> None:
    event = Event()
    waiting = [event.wait() for _ in range(3)]

    def woken(_: None) -> None:
        for other in waiting:
            other.cancel()

    for mine in waiting:
        mine.addCallback(woken)
        mine.addErrback(lambda failure: failure.trap(CancelledError))
    event.fire()
    assert all(mine.called for mine in waiting)


def test_work_runs_once_for_all_waiters() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    waiting = [single_flight.join("key", work) for _ in range(3)]
    assert work.begun == 1
    assert len(set(map(id, waiting))) == 3
    work.result.callback("done")
    assert [fired(mine) for mine in waiting] == ["done"] * 3


def test_each_key_has_its_own_work() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    one, other = Work(), Work()
    first, second = single_flight.join("one", one), single_flight.join("other", other)
    other.result.callback("other")
    assert fired(second) == "other"
    assert not first.called
    one.result.callback("one")
    assert fired(first) == "one"


def test_finished_work_is_started_anew() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    first = single_flight.join("key", work)
    work.result.callback("first")
    work.result = succeed("second")
    assert fired(single_flight.join("key", work)) == "second"
    assert fired(first) == "first"
    assert work.begun == 2


def test_cancelled_waiter_leaves_work_running() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    first, second = single_flight.join("key", work), single_flight.join("key", work)
    first.cancel()
    failed(first, CancelledError)
    assert not second.called
    work.result.callback("done")
    assert fired(second) == "done"


def test_timed_out_waiter_leaves_work_running(clock: Clock) -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    hasty = single_flight.join("key", work).addTimeout(25, clock)
    clock.advance(25)
    assert hasty.called
    hasty.addErrback(lambda _: None)
    patient = single_flight.join("key", work)
    assert work.begun == 1
    work.result.callback("done")
    assert fired(patient) == "done"


def test_failure_reaches_all_waiters() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    waiting = [single_flight.join("key", work) for _ in range(3)]
    work.result.errback(Unavailable("down"))
    assert [failed(mine, Unavailable).message for mine in waiting] == ["down"] * 3


def test_immediate_failure() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    work.result = fail(Unavailable("down"))
    failed(single_flight.join("key", work), Unavailable)
    work.result = succeed("up")
    assert fired(single_flight.join("key", work)) == "up"


def test_unawaited_upstream_failure_is_one_log_line(events: list[LogEvent]) -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    failed(cancelled(single_flight.join("key", work)), CancelledError)
    work.result.errback(Unavailable("docker.io: the connection was refused"))
    assert texts(events, LogLevel.error) == ["docker.io: the connection was refused"]
    assert len(events) == 1


@pytest.mark.expect_logged_failures
def test_unawaited_defect_is_logged_with_traceback(events: list[LogEvent]) -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    failed(cancelled(single_flight.join("key", work)), CancelledError)
    work.result.errback(ZeroDivisionError("a defect"))
    assert [event["log_failure"].type for event in events] == [ZeroDivisionError]


def test_awaited_failure_is_not_logged(events: list[LogEvent]) -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    mine = single_flight.join("key", work)
    work.result.errback(Unavailable("down"))
    failed(mine, Unavailable)
    assert events == []


def test_callback_may_join_again_and_cancel_another() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work, next_work = Work(), Work()
    first, second, third = (single_flight.join("key", work) for _ in range(3))
    joined: list[Deferred[str]] = []

    def served(result: str) -> str:
        second.cancel()
        joined.append(single_flight.join("key", next_work))
        return result

    first.addCallback(served)
    work.result.callback("done")
    assert fired(first) == fired(third) == "done"
    failed(second, CancelledError)
    assert (next_work.begun, joined[0].called) == (1, False)
    next_work.result.callback("next")
    assert fired(joined[0]) == "next"


def test_callback_error_does_not_reach_other_waiters() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    first, second = single_flight.join("key", work), single_flight.join("key", work)
    first.addCallback(lambda _: 1 / 0)
    work.result.callback("done")
    assert fired(second) == "done"
    failed(first, ZeroDivisionError)


def test_handled_failure_still_reaches_other_waiters() -> None:
    single_flight: SingleFlight[str, str] = SingleFlight()
    work = Work()
    first, second = single_flight.join("key", work), single_flight.join("key", work)
    first.addErrback(lambda failure: isinstance(failure, Failure))
    work.result.errback(Unavailable("down"))
    assert fired(first)
    failed(second, Unavailable)


def cancelled(waiting: Deferred[str]) -> Deferred[str]:
    """Return a Deferred that has been cancelled."""
    waiting.cancel()
    return waiting


def test_back_off_doubles_up_to_the_maximum() -> None:
    backoff = Backoff(first=0.5, longest=5.0)
    assert [backoff.interval(failures) for failures in range(8)] == [0, 0.5, 1, 2, 4, 5, 5, 5]


@pytest.mark.parametrize(("jitter", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_jitter_shortens_interval_by_up_to_half(jitter: float, share: float) -> None:
    backoff = Backoff(first=30.0, longest=300.0)
    assert [backoff.interval(failures, jitter) for failures in (0, 1, 9)] == [0, 30 * share, 300 * share]


def test_back_off_survives_many_failures() -> None:
    assert Backoff(first=0.5, longest=5.0).interval(1_000_000) == 5


class Threads:
    """The threads of pools, of which the system starts no more than `most`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.most = most
        self.refused = 0
        self._running: list[Thread] = []
        really_start = Thread.start

        def start(thread: Thread) -> None:
            if sum(one.is_alive() for one in self._running) >= self.most:
                self.refused += 1
                raise RuntimeError("can't start new thread")
            really_start(thread)
            self._running.append(thread)

        monkeypatch.setattr(Thread, "start", start)


@pytest.fixture
def pool() -> Iterator[DaemonThreadPool]:
    """A pool of up to eight threads, not started."""
    pool = DaemonThreadPool(8, "tested")
    yield pool
    if pool.started:
        pool.end()


@on_reactor
async def test_threads_that_run_do_the_work_where_no_further_one_starts(
    pool: DaemonThreadPool, monkeypatch: pytest.MonkeyPatch, events: list[LogEvent]
) -> None:
    system = Threads(monkeypatch, 2)
    release = threading.Event()
    pool.start()
    waiting = [deferToThreadPool(REACTOR, pool, release.wait, 30) for _ in range(2)]
    results = [deferToThreadPool(REACTOR, pool, str, number) for number in range(20)]
    await until(lambda: len(pool.working) == 2)
    assert (system.refused > 0, pool.workers, any(result.called for result in results)) == (True, 2, False)
    release.set()
    assert await gatherResults(results) == [str(number) for number in range(20)]
    assert await gatherResults(waiting) == [True, True]
    (line,) = texts(events, LogLevel.warn)
    assert line.startswith("no further thread can be started, 2 of up to 8 do the work of tested: can't start new ")
    # Those that could not be started are forgotten, and more are started as soon as that succeeds.
    assert len(pool.threads) == 2
    system.most = 5
    release.clear()
    waiting = [deferToThreadPool(REACTOR, pool, release.wait, 30) for _ in range(4)]
    await until(lambda: len(pool.working) == 4)
    release.set()
    await gatherResults(waiting)
    for thread in pool.end():
        thread.join(30)
        assert not thread.is_alive()


@on_reactor
async def test_work_from_before_the_start_is_done_by_a_single_thread(
    pool: DaemonThreadPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [deferToThreadPool(REACTOR, pool, str, number) for number in range(3)]
    Threads(monkeypatch, 1)
    pool.start()
    assert await gatherResults(results) == ["0", "1", "2"]


def test_pool_without_a_thread_is_not_started(pool: DaemonThreadPool, monkeypatch: pytest.MonkeyPatch) -> None:
    Threads(monkeypatch, 0)
    with pytest.raises(OSError, match="can't start new thread: the limit of processes is reached"):
        pool.start()


@on_reactor
async def test_threads_do_not_keep_the_process_alive(pool: DaemonThreadPool) -> None:
    pool.start()
    assert (await deferToThreadPool(REACTOR, pool, current_thread)).daemon
