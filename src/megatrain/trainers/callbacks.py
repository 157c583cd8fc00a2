"""What a trainer calls between its steps."""

from typing import Any

from megatrain.engine.engine import Engine


def finished_updates(engine: Engine) -> Any:
    """A callback that waits for each step's updates, for callbacks after it that read weights: TRL's reference model
    that follows the one that is trained does so past everything that would wait."""
    from transformers import TrainerCallback

    class FinishedUpdates(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine.flush()

    return FinishedUpdates()
