"""What an engine puts into a model, and takes out again when it is closed."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatrain.engine import setup
from megatrain.engine.compiled import compile_blocks
from megatrain.engine.gradients import GradientBook
from megatrain.engine.registry import note_engine, refuse_other_optimizers
from megatrain.engine.targets import labels_are_shifted
from megatrain.engine.weight_stream import WeightStream
from megatrain.memory.store import HostStore
from megatrain.model.block import install_units
from megatrain.model.blockwise_attention import BlockwiseAttention
from megatrain.model.fused_loss import liger_loss
from megatrain.model.head import ChunkedHead
from megatrain.model.hidden import HiddenParameters
from megatrain.model.root import RootForward, guard, report_device
from megatrain.model.sequence_chunks import ChunkedModules, ChunkTokens
from megatrain.model.stand_in import StandIn

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine


class Attachment:
    """Forwards of the units and of the whole model, hooks, guards, and the head run by itself.

    blocks:        stand in for the units' forwards.
    root:          stands in for the model's.
    hidden:        what stands in its modules meanwhile, on a device with memory of its own.
    shifts_labels: whether the model's loss pairs each token with the next one's label.
    """

    def __init__(
        self, engine: "Engine", compile: str, head_chunk_tokens: int | None, sequence_chunk_tokens: ChunkTokens
    ) -> None:
        self._undo = ExitStack()
        self.hidden: HiddenParameters | None = None
        try:
            # units stand around them, and go before they do
            chunked = ChunkedModules([unit.module for unit in engine.partition.units], sequence_chunk_tokens)
            self._undo.callback(chunked.remove)
            if compile == "off":  # a compiler takes tensors alone for masks
                self._undo.callback(BlockwiseAttention(engine.model, sequence_chunk_tokens).remove)
            self._attach(engine, compile, head_chunk_tokens)
        except BaseException:
            self.remove()
            raise

    def _attach(self, engine: "Engine", compile: str, head_chunk_tokens: int | None) -> None:
        model = engine.model
        self.blocks = install_units(engine.partition.units, engine.executor)
        for block in self.blocks:
            self._undo.callback(block.remove)
        if compile == "blocks":
            compile_blocks(self.blocks)
        engine.executor.hand_over.carried = [block.attributes.save for block in self.blocks]
        engine.executor.watched = [block.attributes for block in self.blocks]
        self.root = self._install_root(engine)
        self._hook_gradients(engine)
        self._hook_state(engine)
        for stand_in in guard(model, engine.device.torch_device):
            self._undo.callback(stand_in.remove)
        chunk_tokens = partial(setup.head_chunk_tokens, head_chunk_tokens, engine.device)
        self.head = ChunkedHead(model, self.root, engine.device.torch_device, engine.executor.direct, chunk_tokens)
        self._undo.callback(self.head.remove)
        if engine.kernels.name == "liger":
            self.head.fuse(liger_loss())
            engine.executor.abort_step()  # the probe was none
        engine.executor.forget_order()
        # a head that was shown to run in chunks of shifted labels does shift them
        self.shifts_labels = self.head.reason is None or labels_are_shifted(model)
        self._undo.callback(refuse_other_optimizers(engine))
        self._undo.callback(note_engine(engine))
        zero_grad = StandIn(model, "zero_grad", lambda set_to_none=True: engine.discard_gradients())
        self._undo.callback(zero_grad.remove)

    def _install_root(self, engine: "Engine") -> RootForward:
        model, device = engine.model, engine.device.torch_device
        flush: Callable[[], None] = engine.flush
        hiding: Callable[[], AbstractContextManager[None]] = nullcontext
        if isinstance(engine.weights, WeightStream):
            # what the model's own code may read is the stray parameters; units wait for theirs
            strays, take = engine.weights.strays, engine.gradients.add_from_leaf
            self.hidden = HiddenParameters(engine.partition, device, strays, take)
            flush, hiding = engine.refuse_early_writes, self.hidden.hiding
            self._undo.callback(setup.move_buffers, model, torch.device("cpu"))
            setup.move_buffers(model, device)
            self._undo.callback(report_device(model, device))
        if engine.store.book is not None:
            flush = partial(_before_forward, flush, engine.store)
        root = RootForward(model, flush, engine.executor.forward_pass, hiding, device)
        root.install()
        self._undo.callback(root.remove)
        return root

    def _hook_gradients(self, engine: "Engine") -> None:
        """A parameter that the model reads without its unit is a leaf of the caller's graph."""
        for index, entry in engine.store.slots.items():
            parameter = entry.slot.parameter
            if parameter.requires_grad:
                hide, take = _hide_gradient(engine.gradients, index), _take_gradient(engine.gradients, index)
                self._undo_hook(parameter.register_hook(hide))
                entry.own_hooks = 1
                self._undo_hook(parameter.register_post_accumulate_grad_hook(take))  # type: ignore[func-returns-value]

    def _hook_state(self, engine: "Engine") -> None:
        """Whoever reads or loads a state dict sees finished updates, and what was loaded is noticed."""
        for module in engine.model.modules():
            self._undo_hook(module.register_state_dict_pre_hook(lambda *_: engine.flush()))
            self._undo_hook(module.register_load_state_dict_pre_hook(lambda *_: engine.flush()))
            self._undo_hook(module.register_load_state_dict_post_hook(lambda *_: engine.notice_writes()))

    def _undo_hook(self, handle: Any) -> None:
        self._undo.callback(handle.remove)

    def remove(self) -> None:
        """Give the model its own forward back: all is undone from the last to the first."""
        self._undo.close()


def _before_forward(flush: Callable[[], None], store: HostStore) -> None:
    """What the caller has written into parameters since the last step are the weights of this forward."""
    flush()
    store.forget_written_checksums()


def _hide_gradient(book: GradientBook, index: int) -> Callable[[Tensor], None]:
    gradients = weakref.ref(book)  # the garbage collector does not see what a parameter's hook holds

    def hide(gradient: Tensor | None) -> None:
        found = gradients()
        if gradient is not None and found is not None:
            found.hide(index)

    return hide


def _take_gradient(book: GradientBook, index: int) -> Callable[[Tensor], None]:
    gradients = weakref.ref(book)

    def take(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        found = gradients()
        if gradient is not None and found is not None:
            found.add_from_leaf(index, gradient)

    return take
