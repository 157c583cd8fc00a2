"""bf16: the engine against plain PyTorch in bf16 with fp32 masters, to the last bit.

The reference computes with bf16 weights, sums each parameter's bf16 gradients over micro-batches in fp32, rounds the
sum to bf16 once, and updates fp32 masters with torch's fused AdamW. The engine keeps no masters, only 16 bits more
per weight, and must hold the same fp32 numbers.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
import zoo
from compare import HYPER, LENGTHS, SEED, quiet
from reference import MasterTrainer, gradient_differences, plain_norm, weight_differences

import megatrain as mt

TYPES = ["llama", "gemma3_text", "qwen3_moe", "gpt2", "llava"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model_type", TYPES)
def test_gradients_weights_and_masters_are_equal(model_type: str) -> None:
    plain, mine = zoo.build(model_type, dropout=True), zoo.build(model_type, dropout=True)
    with quiet():
        engine = mt.Engine(mine, mt.AdamW(**HYPER), precision="bf16", clip_norm=0.5, seed=SEED, threads=1)
    trainer = MasterTrainer(
        plain,
        keeps_fp32=lambda name: False,  # none of these types keeps a part of itself in fp32
        **HYPER,
        clip_norm=0.5,
        seed=SEED,
        whole_loss=engine.head.reason is not None,
    )
    slots = {slot.name: slot.index for slot in engine.partition.slots}
    for step in range(4):
        batches = [
            zoo.make_batch(plain, model_type, seed=100 * step + n, length=length, padded=n == 1)
            for n, length in enumerate(LENGTHS)
        ]
        loss = trainer.backward([copy.deepcopy(b) for b in batches], engine.shifts_labels)
        stats = engine.train_step(batches)
        assert stats.loss == loss
        assert gradient_differences(plain, engine) == []
        assert stats.grad_norm == pytest.approx(plain_norm(plain), rel=1e-12)
        trainer.update(stats.grad_norm)
        assert weight_differences(plain, engine) == []
        different = [n for n, m in trainer.masters.items() if not torch.equal(m, engine.store.read_master(slots[n]))]
        assert different == []
    assert {p.dtype for p in mine.parameters()} == {torch.bfloat16}
    engine.close()


def test_masters_move_where_bf16_weights_cannot() -> None:
    """An update far below a bf16 weight's spacing is kept, and shows once enough of them have come together."""
    model = zoo.build("llama")
    with quiet():
        engine = mt.Engine(model, mt.AdamW(lr=1e-6, weight_decay=0.0), precision="bf16", threads=1)
    slot = engine.partition.slots[0].index
    weight = engine.partition.slots[0].parameter
    batches = [zoo.make_batch(model, "llama", seed=0)]
    before, master = weight.detach().clone(), engine.store.read_master(slot)
    engine.train_step(batches)
    engine.flush()
    moved = (engine.store.read_master(slot) != master).float().mean()
    changed = (weight != before).float().mean()
    assert moved > 0.5  # rows of tokens that did not occur stay
    assert changed < 0.1
    engine.close()
