"""The interfaces behind which compute devices differ.

Every device runs units (`ComputeDevice`). On the host weights are bound where they lie; a device with memory of its
own is a `StreamingDevice`: copies to and from it go through two streams of its own, ordered by events. No wait is made
but by `name`, so that a test can leave out one at a time and see what breaks (`WAITS`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from megatrain.device.trace import Mark, Trace
from megatrain.device.waits import Waits

WAITS = {
    "update": "a fetch waits until the host has updated the unit's weights",
    "slot_free": "a fetch waits until the computation that reads the slot's last content is done",
    "weights_arrived": "computation waits for the unit's weights",
    "weights_read": "the host changes weights only when no copy reads them any more",
    "staging_free": "a gradient is packed only when the last one has left the staging buffer",
    "gradient_packed": "a gradient leaves the device only when it is packed",
    "gradient_landed": "the host reads a gradient only when it has arrived",
    "squares_summed": "the host reads the norm of gradients that stay on the device only when they are written there",
    "checks_made": "the host reads what checks in the device's memory have found only when they are done",
    "state_updated": "the host reads state in the device's memory only when its update there is done",
    "inputs_saved": "saved inputs leave the device's memory only when the host has them",
    "inputs_restored": "recomputation waits for the inputs",
    "computed": "a copy waits for the computation before it, which writes what leaves or still uses its target",
}


class Event(Protocol):
    """Something that will have happened on the device."""

    def wait(self) -> None:
        """Block the calling host thread until it has."""


After = Sequence[tuple[str, Event]]  # (name of the wait, event)


class Stream(Protocol):
    """A queue of copies, carried out one after the other, beside computation."""

    def copy(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: After, *, computed: bool = False, label: str = ""
    ) -> Event:
        """(target, source) of equal dtype and shape, once `after` has happened, and with `computed` everything that
        computation has been given so far. Returns at once. `label` names it in a trace."""


class ComputeDevice(Protocol):
    """Where units run. `torch_device` is where their inputs and activations live."""

    name: str
    torch_device: torch.device
    trace: Trace | None  # set while a trace is taken

    def mark(self) -> Mark:
        """Now, in the order of computation."""

    def seconds(self, mark: Mark) -> float:
        """A mark on the clock of time.perf_counter. Computation up to it is over."""

    def computing(self) -> AbstractContextManager[Any]:
        """Entered around every run of a unit and every backward."""

    def same_order(self) -> AbstractContextManager[Any]:
        """Made by one thread and entered by another, once: that one's computation, between units too, then comes in
        the first one's order and not in one of its own."""

    def native_bf16(self) -> bool:
        """Whether the device computes bf16 natively; decides what `precision="auto"` means."""

    def peak_bytes(self) -> int:
        """Largest number of bytes the device has held since the start of the step (0 where it has no memory of its
        own)."""

    @property
    def h2d_bytes(self) -> int:
        """Bytes copied to the device so far."""

    @property
    def d2h_bytes(self) -> int:
        """Bytes copied from the device so far."""


class StreamingDevice(ComputeDevice, Protocol):
    """A device with memory of its own."""

    memory_bytes: int | None  # that may be used; None: all there is
    up: Stream
    down: Stream
    waits: Waits  # of computation, for copies
    pools_host_memory: bool  # what `host_memory` has given stays with the process while passes go on asking for it

    def allocate(self, n_bytes: int, what: str) -> Tensor:
        """Device memory for good, uint8. Raises CapacityError, naming `what` and the missing bytes."""

    def hold(self, n_bytes: int) -> None:
        """Count tensors that computation has left on the device (negative: that are gone). Raises CapacityError."""

    def compute(self, run: Callable[[], None], after: After, label: str = "") -> Event:
        """`run` in the order of computation, once `after` has happened; returns what tells when it is done. `label`
        names it in a trace."""

    def release(self, buffer: Tensor) -> Event:
        """What has been issued so far reads this memory, nothing later does; returns what tells when it is free."""

    def wait(self, name: str, event: Event) -> None:
        """Let computation that is issued from here on wait for `event`."""

    def host_wait(self, name: str, wait: Callable[[], None]) -> None:
        """A wait of a host thread."""

    def host_memory(self, like: Tensor) -> Tensor:
        """Host memory to copy `like` to: its shape, strides and dtype."""

    def host_memory_bytes(self, n_bytes: int) -> int:
        """What `host_memory` takes for a tensor of so many bytes."""

    def memory_for(self, host: Tensor) -> Tensor:
        """Device memory to copy `host` to: its shape, strides and dtype. Computation given so far may still use it."""

    def let_go(self, tensor: Tensor, copied: Event) -> None:
        """The memory of a tensor that computation made may be used again once it has been `copied`."""

    def pin(self, buffer: Tensor) -> None:
        """Make host memory fast to copy from and to: page-locked. The device holds it until `unpin` or `close`."""

    def unpin(self, buffer: Tensor) -> None:
        """Undo `pin`, before memory is dropped. No copy from or to it is under way."""

    @property
    def pinned_bytes(self) -> int:
        """Of host memory that `pin` was given."""

    def start_step(self) -> None:
        """Peak memory counts from here."""

    def drain(self) -> None:
        """Return when every copy and computation is done; an error of one is raised here."""

    def close(self) -> None: ...


def streams(device: ComputeDevice) -> TypeGuard[StreamingDevice]:
    """Whether weights have to be copied to the device."""
    return hasattr(device, "up")
