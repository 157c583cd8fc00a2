"""The thread pool: coverage of the range, threads used, errors, closing, concurrent callers."""

import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from megatrain.optim.workers import INLINE_ELEMENTS, Workers, slices


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000, 65537, 1 << 20])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("align", [1, 64, 16384])
def test_slices_cover_the_range_once(length: int, parts: int, align: int) -> None:
    found = slices(length, parts, align)
    assert len(found) <= parts
    assert all(before[1] == after[0] for before, after in pairwise(found))
    assert sum(stop - start for start, stop in found) == length
    assert all(start % align == 0 and start < stop for start, stop in found)
    if found:
        assert found[0][0] == 0 and found[-1][1] == length
        sizes = [-(-(stop - start) // align) for start, stop in found]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_every_element_is_visited_once(threads: int) -> None:
    visits = np.zeros(INLINE_ELEMENTS + 777, np.int64)

    def visit(start: int, stop: int, step: int) -> None:
        visits[start:stop] += step

    with Workers(threads) as workers:
        workers.run(visit, visits.size, 1)
        workers.run(visit, visits.size, 10)
    assert (visits == 11).all()


def test_slices_run_at_the_same_time_and_the_first_on_the_caller() -> None:
    together = threading.Barrier(3, timeout=20)
    ran: dict[int, threading.Thread] = {}

    def meet(start: int, stop: int) -> None:
        ran[start] = threading.current_thread()
        together.wait()  # breaks unless all three slices are under way at once

    with Workers(3) as workers:
        workers.run(meet, 3 * INLINE_ELEMENTS)
        assert ran[0] is threading.current_thread()
        assert len(set(ran.values())) == 3
        assert all(thread.daemon for start, thread in ran.items() if start)


def test_small_work_stays_on_the_caller_in_one_slice() -> None:
    calls: list[tuple[int, int, threading.Thread]] = []
    with Workers(4) as workers:
        workers.run(lambda start, stop: calls.append((start, stop, threading.current_thread())), 1000)
        workers.run(lambda start, stop: calls.append((start, stop, threading.current_thread())), 0)
    assert calls == [(0, 1000, threading.current_thread())]


def test_the_error_of_the_lowest_slice_is_raised_after_all_slices_ended() -> None:
    finished: list[int] = []

    def fail(start: int, stop: int) -> None:
        if start == 0:
            finished.append(start)
            return
        time.sleep(0.05 if stop < 4 * INLINE_ELEMENTS else 0.2)
        finished.append(start)
        raise ValueError(f"slice at {start}")

    with Workers(4) as workers:
        with pytest.raises(ValueError, match=f"slice at {INLINE_ELEMENTS}$"):
            workers.run(fail, 4 * INLINE_ELEMENTS)
        assert len(finished) == 4
        # and the pool still works
        workers.run(lambda start, stop: finished.append(start), 4 * INLINE_ELEMENTS)
        assert len(finished) == 8


def test_an_error_on_the_caller_waits_for_the_other_slices() -> None:
    finished = threading.Event()

    def fail(start: int, stop: int) -> None:
        if start == 0:
            raise KeyboardInterrupt
        time.sleep(0.1)
        finished.set()

    with Workers(2) as workers, pytest.raises(KeyboardInterrupt):
        workers.run(fail, 2 * INLINE_ELEMENTS)
    assert finished.is_set()


def test_concurrent_callers_take_turns() -> None:
    active = 0
    most = 0
    lock = threading.Lock()

    def count(start: int, stop: int) -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.005)
        with lock:
            active -= 1

    with Workers(2) as workers:
        callers = [
            threading.Thread(target=lambda: [workers.run(count, 2 * INLINE_ELEMENTS) for _ in range(5)])
            for _ in range(4)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert most == 2  # the two slices of one run, never those of two


def test_close_ends_the_threads_and_is_final() -> None:
    before = threading.active_count()
    workers = Workers(3)
    assert threading.active_count() == before + 2
    workers.close()
    workers.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        workers.run(lambda start, stop: None, 1)


def test_forgotten_workers_end_their_threads() -> None:
    workers, ran = Workers(3), []
    workers.run(lambda start, stop: ran.append(threading.current_thread()), 3 * INLINE_ELEMENTS)
    kept = [thread for thread in ran if thread is not threading.current_thread()]
    del workers
    for thread in kept:
        thread.join(10)
    assert [thread.is_alive() for thread in kept] == [False, False]


def test_arguments_are_released_when_run_returns() -> None:
    """An array may be unmapped after run(): no worker may still hold it."""
    array = np.zeros(4 * INLINE_ELEMENTS, np.uint8)
    with Workers(4) as workers:
        before = sys.getrefcount(array)
        for _ in range(20):
            workers.run(lambda start, stop, held: None, array.size, array)
            assert sys.getrefcount(array) == before


def test_threads_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="threads=0"):
        Workers(0)
