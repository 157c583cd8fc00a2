"""Hand-over: one body at a time, the least advanced first, and nothing left behind by a failure."""

import _thread
import contextvars
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from megatrain.model.micro_batches import HandOver

CPU = torch.device("cpu")


def walk(hand_over: HandOver, log: list[Any], name: Any, stops: list[tuple[int, int]]) -> Callable[[], Any]:
    def body() -> Any:
        for stop in stops:
            hand_over.boundary(stop)
            log.append((name, stop))
        return name

    return body


def test_all_pass_a_stop_before_any_goes_on() -> None:
    hand_over, log = HandOver(CPU), []
    stops = [(0, 0), (0, 1), (0, 2), (1, 0), (2, -1), (2, 0)]
    results = hand_over.run([walk(hand_over, log, n, stops) for n in range(4)])
    assert results == [0, 1, 2, 3]
    assert log == [(n, stop) for stop in stops for n in range(4)]


def test_different_numbers_of_stops() -> None:
    hand_over, log = HandOver(CPU), []
    ways = [[(0, 0), (0, 3), (1, 0)], [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)], [(1, 0)], []]
    assert hand_over.run([walk(hand_over, log, n, way) for n, way in enumerate(ways)]) == [0, 1, 2, 3]
    assert sorted(log) == sorted((n, stop) for n, way in enumerate(ways) for stop in way)
    assert [stop for _, stop in log] == sorted(stop for _, stop in log)


def test_exactly_one_runs_at_a_time() -> None:
    hand_over = HandOver(CPU)
    inside, most = 0, 0

    def body() -> None:
        nonlocal inside, most
        for stop in range(50):
            hand_over.boundary((0, stop))
            inside += 1
            most = max(most, inside)
            torch.ones(100).sum()
            inside -= 1

    hand_over.run([body] * 5)
    assert most == 1


def test_single_body_runs_in_the_callers_thread() -> None:
    hand_over = HandOver(CPU)
    assert hand_over.run([threading.get_ident]) == [threading.get_ident()]


def test_boundary_on_another_thread_returns_at_once_and_takes_no_turn() -> None:
    hand_over, log = HandOver(CPU), []

    def body(name: int) -> Callable[[], None]:
        def run() -> None:
            for stop in range(2):
                outsider = threading.Thread(target=hand_over.boundary, args=((9, 9),), daemon=True)
                outsider.start()
                outsider.join(5)
                hand_over.boundary((0, stop))
                log.append((name, stop, outsider.is_alive()))

        return run

    step = threading.Thread(target=hand_over.run, args=([body(0), body(1)],), daemon=True)
    step.start()
    step.join(30)
    assert not step.is_alive()
    assert log == [(name, stop, False) for stop in range(2) for name in range(2)]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), Stop()], ids=repr)
def test_first_exception_is_raised_and_the_others_unwind(failing: int, stop: int, error: BaseException) -> None:
    hand_over = HandOver(CPU)
    unwound: list[int] = []
    reached: list[tuple[int, int]] = []

    def body(number: int) -> Callable[[], None]:
        def run() -> None:
            try:
                for position in range(4):
                    hand_over.boundary((0, position))
                    reached.append((number, position))
                    if (number, position) == (failing, stop):
                        raise error
            finally:
                unwound.append(number)

        return run

    hand_over.run([lambda: None] * 3)
    before = threading.active_count()
    with pytest.raises(type(error)) as raised:
        hand_over.run([body(n) for n in range(3)])
    assert raised.value is error
    assert sorted(unwound) == [0, 1, 2]
    assert (failing, stop + 1) not in reached
    assert threading.active_count() == before
    log: list[Any] = []
    assert hand_over.run([walk(hand_over, log, n, [(0, 0), (0, 1)]) for n in range(3)]) == [0, 1, 2]
    assert log == [(n, (0, s)) for s in range(2) for n in range(3)]


def test_interrupt_of_the_caller_ends_all_bodies_first() -> None:
    """Ctrl-C reaches the thread that waits, not the ones that run the model."""
    hand_over, interrupted = HandOver(CPU), threading.Event()
    running = 0

    def body() -> None:
        nonlocal running
        running += 1
        try:
            if not interrupted.is_set():
                interrupted.set()
                _thread.interrupt_main()
            for stop in range(1000):
                hand_over.boundary((0, stop))
                time.sleep(0.01)
        finally:
            running -= 1

    with pytest.raises(KeyboardInterrupt):
        hand_over.run([body] * 3)
    assert running == 0
    assert hand_over.run([lambda: 1, lambda: 2]) == [1, 2]


def test_threads_are_kept_and_end_with_their_owner() -> None:
    hand_over = HandOver(CPU)
    first = hand_over.run([threading.current_thread] * 3)
    assert hand_over.run([threading.current_thread] * 2) == first[:2]
    assert len(set(first)) == 3 and all(thread.daemon for thread in first)
    del hand_over
    for thread in first:
        thread.join(10)
    assert not any(thread.is_alive() for thread in first)


def test_nobody_wakes_kept_threads_while_python_ends() -> None:
    program = (
        "import atexit; from megatrain.threads import KeptThread\n"
        "kept = KeptThread('kept'); thread = kept._thread\n"
        "atexit._run_exitfuncs(); thread.join(0.5); print(thread.is_alive())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-1] == "True", done.stderr


def test_kept_threads_begin_as_new_ones() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")

    def look() -> tuple[str, bool, bool]:
        return variable.get(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def leave_everything_changed() -> None:
        variable.set("something")
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)

    hand_over = HandOver(CPU)
    hand_over.run([leave_everything_changed] * 2)
    assert hand_over.run([look] * 2) == [("nothing", True, False)] * 2


def test_nothing_of_a_run_is_held_after_it() -> None:
    class Batch:
        def use(self) -> None:
            pass

    hand_over, batches = HandOver(CPU), [Batch(), Batch()]
    held = [weakref.ref(batch) for batch in batches]
    hand_over.run([batch.use for batch in batches])
    batches.clear()
    assert [ref() for ref in held] == [None, None]


def test_failure_before_the_others_began() -> None:
    hand_over = HandOver(CPU)
    began: list[int] = []

    def bad() -> None:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        hand_over.run([bad, lambda: began.append(1), lambda: began.append(2)])


def test_a_models_own_except_clause_does_not_swallow_the_unwinding() -> None:
    hand_over = HandOver(CPU)

    def stubborn() -> None:
        for stop in range(3):
            try:
                hand_over.boundary((0, stop))
            except Exception:
                pytest.fail("the unwinding is not for models to catch")

    def bad() -> None:
        hand_over.boundary((0, 1))
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        hand_over.run([stubborn, bad])


def test_random_streams_are_each_bodys_own() -> None:
    """As if each had run alone, from its own seed to its end."""
    hand_over = HandOver(CPU)

    def body(number: int, stops: int) -> Callable[[], list[float]]:
        def run() -> list[float]:
            torch.manual_seed(number)
            drawn = []
            for stop in range(stops):
                hand_over.boundary((0, stop))
                drawn.append(torch.rand(()).item())
            return drawn

        return run

    torch.manual_seed(99)
    expected_after = torch.get_rng_state()
    together = hand_over.run([body(n, 5) for n in range(3)])
    assert torch.equal(torch.get_rng_state(), expected_after)
    alone = [body(n, 5)() for n in range(3)]
    assert together == alone


def test_autocast_and_thread_count_of_the_caller_hold_in_every_body() -> None:
    hand_over = HandOver(CPU)

    def look() -> tuple[bool, torch.dtype, int]:
        hand_over.boundary((0, 0))
        return torch.is_autocast_enabled("cpu"), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype, torch.get_num_threads()

    threads = torch.get_num_threads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert hand_over.run([look] * 3) == [(True, torch.bfloat16, threads)] * 3
    assert hand_over.run([look] * 3) == [(False, torch.float32, threads)] * 3


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_mode_of_the_caller_holds_in_every_body(grad: bool) -> None:
    hand_over = HandOver(CPU)
    with torch.set_grad_enabled(grad):
        assert hand_over.run([torch.is_grad_enabled] * 3) == [grad] * 3


def test_default_dtype_and_results_keep_their_order() -> None:
    hand_over = HandOver(CPU)

    def last_first(number: int) -> Callable[[], int]:
        def run() -> int:
            hand_over.boundary((0, 10 - number))
            return number

        return run

    assert hand_over.run([last_first(n) for n in range(5)]) == [0, 1, 2, 3, 4]


def test_each_body_enters_what_the_caller_made_for_it() -> None:
    made, entered = [], []

    @contextmanager
    def entering(number: int) -> Iterator[None]:
        entered.append((number, threading.get_ident()))
        yield
        entered.append((number, threading.get_ident()))

    def make() -> AbstractContextManager[None]:
        made.append(threading.get_ident())
        return entering(len(made) - 1)

    hand_over = HandOver(CPU, make)
    threads = hand_over.run([threading.get_ident] * 3)
    assert made == [threading.get_ident()] * 3
    assert entered == [(number, thread) for number, thread in enumerate(threads) for _ in range(2)]
