"""What the graph of a unit's first run would save, and is not kept for backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatrain.errors import UnsupportedModelError


class SavedTensors:
    """Lets go of each tensor that a run saves: at once, or with `hold` when the run is over.

    A unit that differentiates inside its forward (forces, as the gradient of an energy) needs them until then. Whether
    one does is learnt in the first step, which holds them; `noticed` is called where it does.
    """

    def __init__(self, where: str, meter: Callable[[Tensor], None], hold: bool, noticed: Callable[[], None]) -> None:
        self._where = where
        self._meter = meter
        self._hold = hold
        self._noticed = noticed
        self._held: list[list[Tensor]] = []
        self._over = False

    @contextmanager
    def during_run(self) -> Iterator[None]:
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._over = True
            for box in self._held:
                box.clear()
            # the graph holds this object; what this one holds may hold the graph, which no garbage collector sees
            del self._meter, self._noticed

    def _pack(self, tensor: Tensor) -> Any:
        self._meter(tensor)
        if not self._hold:
            return None
        self._held.append([tensor])
        return self._held[-1]

    def _unpack(self, box: list[Tensor] | None) -> Tensor:
        if self._over:
            raise UnsupportedModelError(
                f"{self._where}: what its forward has computed is differentiated past it; return the tensor from it"
            )
        self._noticed()
        if box is None:
            raise UnsupportedModelError(
                f"{self._where}: it differentiates inside its forward (torch.autograd.grad), which it did not do in the"
                " first step; run the step again, the engine is ready for it"
            )
        return box[0]
