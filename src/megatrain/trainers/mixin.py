"""One mixin for every trainer of transformers and TRL: `class Streamed(mt.StreamedTrainerMixin, SFTTrainer)`.

The trainer's loop stays what it is. What it asks of optimizer, accelerator and files is answered by the engine.
"""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatrain.device.base import streams
from megatrain.engine.engine import Engine
from megatrain.engine.registry import engine_of
from megatrain.errors import ConfigError
from megatrain.trainers import groups
from megatrain.trainers.callbacks import finished_updates
from megatrain.trainers.checkpoints import check_saving, exact_state, load_exact, save_exact, save_plain
from megatrain.trainers.checks import check_args, check_call, find_engine
from megatrain.trainers.direct_head import follow_direct_head, reads_head
from megatrain.trainers.references import references_on_host

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object
TRAINING_ARGS = "training_args.json"  # instead of transformers' own, which is pickled


class StreamedTrainerMixin(Trainer):
    """Put before a trainer's class: it then trains `engine.model`, as the same trainer would a resident one.

    `model` is an engine's model; `engine` may be left out. Learning rate, betas, epsilon, weight decay and clipping are
    those of the training arguments, and the optimizer begins without moments; with optimizers=(engine.optimizer, None)
    it is used as it is. Checkpoints hold the engine's exact state.

    Raises ConfigError for what a streamed model cannot follow.
    """

    optimizer: Any
    _saves_exactly = False

    def __init__(self, *args: Any, engine: Engine | None = None, **kwargs: Any) -> None:
        own = super().__init__
        if not hasattr(super(), "create_optimizer"):
            raise ConfigError(
                f"{type(self).__name__}: no trainer comes after StreamedTrainerMixin; it must be the first of two"
                " bases, class Streamed(mt.StreamedTrainerMixin, Trainer)"
            )
        given = inspect.signature(own).bind_partial(*args, **kwargs).arguments
        given = given | given.pop("kwargs", {})
        self.engine = find_engine(given.get("model"), engine)
        check_call(given, self.engine)
        if given.get("args") is not None:
            check_args(given["args"], self.engine)
        self._frozen: list[Engine] = []  # run models beside the one that is trained
        with references_on_host(type(self), given.get("args"), self.engine):
            own(*args, **kwargs)
        check_args(self.args, self.engine)  # those that the trainer has made where none were given
        follow_direct_head(self.engine)
        if getattr(self.args, "sync_ref_model", False):
            self.add_callback(finished_updates(self.engine))

    # -- what the trainer asks of accelerate ------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        prepare_model = accelerator.prepare_model

        def prepare(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            prepared: nn.Module = prepare_model(self._streamed(model), *args, **kwargs)
            return prepared

        accelerator.prepare_model = prepare
        accelerator.clip_grad_norm_ = self._clip

    def _clip(self, _parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """All clipping of trainers comes through here; where it is off, with inf."""
        if norm_type != 2:
            raise ConfigError(f"norm_type is {norm_type}; gradients are clipped by their L2 norm")
        return self.engine.clip_grad_norm_(max_norm)

    def _streamed(self, model: nn.Module) -> nn.Module:
        """A model beside the one that is trained (a reference, a judge) is streamed too, where there is a device that
        it might not fit into."""
        if engine_of(model) is not None or not streams(self.engine.device):
            return model
        fused = model.__dict__.get("forward")
        if reads_head(fused):
            del model.__dict__["forward"]
        device = self.engine.device
        same = device.torch_device if device.torch_device.type != "cpu" else device.name
        frozen = Engine.frozen(model, device=same, precision=self.engine.precision)
        self._frozen.append(frozen)
        if reads_head(fused):
            model.forward = fused  # type: ignore[assignment]
            follow_direct_head(frozen)
        return model

    # -- the optimizer ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups.as_stated(self.engine, self.args, set(self.get_decay_parameter_names(self.engine.model)))
            self.optimizer = self.engine.optimizer
        return self.engine.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.save_strategy != "no" and not self.args.save_only_model:
            check_saving(self.engine, scheduler.state_dict())  # and not when the first step is long over
        return scheduler

    # -- checkpoints ------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._saves_exactly = _internal_call and not self.args.save_only_model  # for a checkpoint, that is
        try:
            super().save_model(output_dir, _internal_call=_internal_call)
        finally:
            self._saves_exactly = False

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if self._saves_exactly:
            save_exact(self.engine, folder, tokenizer, self.lr_scheduler.state_dict())
        else:
            save_plain(self.engine, folder, tokenizer)
        (Path(folder) / TRAINING_ARGS).write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Both are in the exact state."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if exact_state(resume_from_checkpoint) is None:  # else it is read when the optimizer is there
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        exact = exact_state(checkpoint) if checkpoint is not None else None
        if checkpoint is None or exact is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_exact(self.engine, exact, self.lr_scheduler)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        exact = exact_state(best) if best is not None else None
        if exact is None:
            super()._load_best_model()
        else:
            load_exact(self.engine, exact, None)
