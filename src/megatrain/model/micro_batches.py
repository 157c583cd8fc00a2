"""Hand-over: one thread per micro-batch, exactly one running, changing places at unit boundaries.

Each thread runs the model's own forward and backward. Before a unit runs, the thread says how far it has come and
the one that is least far (then the lowest number) goes on. So all micro-batches pass a unit while its weights are
there, whatever their shapes, and a later phase begins only when every thread has reached it.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch

from megatrain.model.side_effects import AutocastState, RandomState
from megatrain.threads import KeptThread

T = TypeVar("T")
Progress = tuple[int, int]  # (phase, position in it): compared, the smaller goes first


class Abandoned(BaseException):
    """Unwinds the other micro-batches after one has failed; not an Exception, so that models do not catch it."""


class HandOver:
    """Runs bodies in turns. `device` is the compute device, whose random generator each thread has to itself.

    Threads are started when they are first needed and end with this object.
    `same_order`: called by the caller's thread for each body; the body's thread enters what it returns.
    `carried`: further state that belongs to a micro-batch; each entry saves it and returns what puts it back.
    """

    def __init__(
        self,
        device: torch.device,
        same_order: Callable[[], AbstractContextManager[Any]] = nullcontext,
        carried: Sequence[Callable[[], Callable[[], None]]] = (),
    ) -> None:
        self._device = device
        self._same_order = same_order
        self.carried = carried
        self._turn = threading.Condition()
        self._progress: dict[int, Progress] = {}
        self._running = 0
        self._failure: BaseException | None = None
        self._local = threading.local()
        self._threads: list[KeptThread] = []  # by number of the micro-batch

    def run(self, bodies: Sequence[Callable[[], T]]) -> list[T]:
        """Run `bodies` to their ends and return their results in order; the first exception is raised again."""
        if len(bodies) == 1:
            return [bodies[0]()]  # nobody to hand over to
        self._failure, self._running = None, 0
        self._progress = {number: (-1, 0) for number in range(len(bodies))}
        results: list[Any] = [None] * len(bodies)
        autocast = AutocastState(self._device)
        compute_threads, gradients_on = torch.get_num_threads(), torch.is_grad_enabled()
        orders = [self._same_order() for _ in bodies]

        def body(number: int) -> None:
            self._local.number = number
            torch.set_num_threads(compute_threads)  # OpenMP keeps the number per thread, and sums depend on it
            self._wait_for_turn(number)
            with orders[number], autocast.entered(), torch.set_grad_enabled(gradients_on):
                results[number] = bodies[number]()

        outside = RandomState(self._device)
        while len(self._threads) < len(bodies):
            self._threads.append(KeptThread(f"micro-batch-{len(self._threads)}"))
        self._start_and_wait(body)
        outside.restore()
        if self._failure is not None:
            for thread in self._threads:
                thread.settle()  # errors hold frames, and these graphs, which no thread may free while the process ends
            failure, self._failure = self._failure, None
            raise failure
        return results

    def close(self) -> None:
        """End the threads."""
        while self._threads:
            self._threads.pop().close()

    def boundary(self, progress: Progress) -> None:
        """Say how far this thread is and let the least advanced one run; returns when it is this one's turn again."""
        number = self.number
        if number is None:
            return  # a single micro-batch, or a call from outside a step
        with self._turn:
            if self._failure is not None:
                raise Abandoned
            self._progress[number] = progress
            chosen = self._least_advanced()
            if chosen == number:
                return
            random = RandomState(self._device)
            restores = [save() for save in self.carried]
            self._pass_on(chosen)
            self._wait_for_turn(number)
        random.restore()
        for restore in restores:
            restore()

    def takes_turns(self) -> bool:
        """Whether the calling thread is one of several micro-batches."""
        return len(self._progress) > 1 and self.number is not None

    @property
    def number(self) -> int | None:
        """Of the calling thread's micro-batch; None where it is not one of several."""
        return getattr(self._local, "number", None)

    def _least_advanced(self) -> int:
        return min(self._progress, key=lambda n: (self._progress[n], n))

    def _pass_on(self, number: int) -> None:
        self._running = number
        self._turn.notify_all()

    def _wait_for_turn(self, number: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._running == number or self._failure is not None)
            if self._failure is not None:
                raise Abandoned

    def _leave(self, number: int, error: BaseException | None) -> None:
        with self._turn:
            if not isinstance(error, Abandoned):
                self._failure = self._failure or error
            self._progress.pop(number, None)  # an interrupt can start a body twice: the second is abandoned
            if self._progress:
                self._pass_on(self._least_advanced())
            self._turn.notify_all()

    def _start_and_wait(self, body: Callable[[int], None]) -> None:
        """Run `body` for each micro-batch. An interrupt (Ctrl-C) ends all at their next boundary and waits for them."""
        to_start = list(self._progress)
        while to_start or self._progress:
            try:
                while to_start:
                    number = to_start[0]
                    self._threads[number].start(partial(body, number), partial(self._leave, number))
                    del to_start[0]
                with self._turn:
                    self._turn.wait_for(lambda: not self._progress)
            except KeyboardInterrupt as interrupt:
                self._failure = self._failure or interrupt
