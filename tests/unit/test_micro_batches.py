"""Hand-over: one body at a time, the least advanced first, and nothing left behind by a failure."""

import threading
from collections.abc import Callable
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


def test_boundary_outside_a_run_does_nothing() -> None:
    hand_over = HandOver(CPU)
    hand_over.boundary((0, 0))
    hand_over.run([lambda: None, lambda: None])
    hand_over.boundary((5, 0))


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
