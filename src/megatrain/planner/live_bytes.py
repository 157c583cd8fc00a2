"""How much memory a piece of computation takes at once, on the meta device."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.model.token_wise import Run


def differentiation_bytes(run: Run, like: Tensor, weights: list[Tensor]) -> int:
    """The most that is alive while `run` is run on an input like `like` and differentiated, beside weights and input:
    graph, result, gradients."""
    given = torch.empty_like(like).requires_grad_()
    wanted = [given, *(w for w in weights if w.requires_grad)]
    with torch.enable_grad(), _Alive() as alive:
        result = run(given)
        torch.autograd.grad(result, wanted, torch.empty_like(result), allow_unused=True)
    n_bytes: int = alive.most_bytes
    return n_bytes


class _Alive(TorchDispatchMode):
    """Adds up the memory that operations have made and that somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes: int = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        if not func.is_view:
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most_bytes = max(self.most_bytes, sum(n for _, n in self._made.values()))
        return result
