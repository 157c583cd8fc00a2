"""What may not change about a model while an engine runs it."""

from torch import nn

from megatrain.errors import IntegrityError
from megatrain.model.partition import Partition


class Structure:
    """The model's parameters as they were taken over."""

    def __init__(self, model: nn.Module, part: Partition) -> None:
        self._model = model
        self._known = {id(slot.parameter) for slot in part.slots}  # which the partition keeps alive

    def check(self) -> None:
        """Raise IntegrityError where a trainable parameter has come since: the engine holds no state for it, and it
        would never be trained. One that is frozen is a constant, as in plain PyTorch."""
        modules = self._model.modules()
        if any(self._is_new(p) for module in modules for p in module._parameters.values() if p is not None):
            name = next(n for n, p in self._model.named_parameters() if self._is_new(p))
            raise IntegrityError(
                f"parameter {name} came after the engine had taken the model over, and would not be trained; call"
                " engine.close(), change the model, and make a new Engine"
            )

    def _is_new(self, parameter: nn.Parameter) -> bool:
        return parameter.requires_grad and id(parameter) not in self._known
