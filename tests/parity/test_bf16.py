"""bf16: the engine against plain PyTorch in bf16 with fp32 masters, to the last bit.

The reference computes with bf16 weights, sums each parameter's bf16 gradients over micro-batches in fp32, rounds the
sum to bf16 once, and updates fp32 masters with torch's fused AdamW. The engine keeps no masters, only 16 bits more
per weight, and must hold the same fp32 numbers.
"""

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import zoo
from comparison import HYPER, LENGTHS, SEED, quiet
from reference import MasterTrainer, gradient_differences, kept_gradients, placed, plain_norm, weight_differences

import megatrain as mt

TYPES = ["llama", "gemma3_text", "qwen3_moe", "gpt2", "llava"]
BOUND = 0.05  # error of the whole gradient, relative to its norm; found: 0.6% to 2.1%


class Pair:
    """A model twice: in plain PyTorch with masters on the host, and taken over by the engine."""

    def __init__(self, model_type: str, dropout: bool, device: Any = "cpu") -> None:
        self.model_type = model_type
        self.plain = zoo.build(model_type, dropout=dropout)
        with quiet():
            self.engine = mt.Engine(
                zoo.build(model_type, dropout=dropout),
                mt.AdamW(**HYPER),
                device=device,
                precision="bf16",
                clip_norm=0.5,
                seed=SEED,
                threads=1,
                kernels="torch",
            )
        self.trainer = MasterTrainer(
            self.plain,
            keeps_fp32=lambda name: False,  # none of these types keeps a part of itself in fp32
            **HYPER,
            clip_norm=0.5,
            seed=SEED,
            whole_loss=self.engine.head.reason is not None,
        )
        self.plain.to(self.engine.device.torch_device)

    def backward(self, step: int, arithmetic: AbstractContextManager[Any]) -> tuple[float, Any]:
        """Both ways; the reference computes under `arithmetic`. Returns its loss and the engine's results."""
        batches = [
            zoo.make_batch(self.plain, self.model_type, seed=100 * step + n, length=length, padded=n == 1)
            for n, length in enumerate(LENGTHS)
        ]
        theirs = placed([copy.deepcopy(b) for b in batches], self.engine.device.torch_device)
        with arithmetic:
            loss = self.trainer.backward(theirs, self.engine.shifts_labels)
        return loss, self.engine.train_step(batches)


@pytest.mark.parametrize("model_type", TYPES)
def test_gradients_weights_and_masters_are_equal(model_type: str) -> None:
    assert_equal_bits(Pair(model_type, dropout=True))


def assert_equal_bits(pair: Pair) -> None:
    """Over four steps: loss, gradients, norm, weights and masters."""
    engine = pair.engine
    slots = {slot.name: slot.index for slot in engine.partition.slots}
    for step in range(4):
        loss, stats = pair.backward(step, engine.device.computing())
        assert stats.loss == loss
        assert gradient_differences(pair.plain, engine) == []
        assert stats.grad_norm == pytest.approx(plain_norm(pair.plain), rel=1e-12)
        pair.trainer.update(stats.grad_norm)
        assert weight_differences(pair.plain, engine) == []
        masters = pair.trainer.masters.items()
        assert [n for n, m in masters if not torch.equal(m, engine.store.read_master(slots[n]))] == []
    assert {p.dtype for p in engine.model.parameters()} == {torch.bfloat16}
    engine.close()


@pytest.mark.parametrize("model_type", TYPES)
def test_torchs_own_bf16_products_are_as_far_as_bf16_is_coarse(model_type: str) -> None:
    """Where the CPU has no bf16 arithmetic the engine computes bf16 products in fp32, and rounds them once; PyTorch's
    own add up in another order. A product's last bit may then differ (2**-8 of it), and what follows from it."""
    pair = Pair(model_type, dropout=False)
    loss, stats = pair.backward(0, nullcontext())
    assert stats.loss == pytest.approx(loss, rel=2e-3)
    kept = kept_gradients(pair.engine)
    pairs = [(p.grad.double(), kept[n].double()) for n, p in pair.plain.named_parameters() if n in kept]
    error = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    assert error < BOUND * plain_norm(pair.plain)
    pair.engine.close()


def test_masters_move_where_bf16_weights_cannot() -> None:
    """An update far below a bf16 weight's spacing is kept in the master."""
    model = zoo.build("llama")
    with quiet():
        engine = mt.Engine(model, mt.AdamW(lr=1e-6, weight_decay=0.0), precision="bf16", threads=1)
    chosen = next(s for s in engine.partition.slots if s.name.endswith("q_proj.weight"))
    slot, weight = chosen.index, chosen.parameter
    batches = [zoo.make_batch(model, "llama", seed=0)]
    before, master = weight.detach().clone(), engine.store.read_master(slot)
    engine.train_step(batches)
    engine.flush()
    moved = (engine.store.read_master(slot) != master).float().mean()
    changed = (weight != before).float().mean()
    assert moved > 0.9
    assert changed < 0.1
    engine.close()
