"""precision='bf16': exact fp32 masters behind bf16 weights."""

from typing import Any

import pytest
import torch
from test_engine_random import tiny_llama
from test_engine_toys import Block, Net, batches_of, make_batch, make_engine
from torch import Tensor, nn

import megatrain as mt


def half_away(master: Tensor) -> Tensor:
    """fp32 rounded to bf16, ties away from zero."""
    bits = master.detach().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return (((bits + 0x8000) >> 16) & 0xFFFF).to(torch.uint16).view(torch.bfloat16)


def masters(engine: mt.Engine) -> dict[str, Tensor]:
    engine.flush()
    return {entry.slot.name: engine.store.read_master(index) for index, entry in engine.store.slots.items()}


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_fp32_model_keeps_its_weights_as_masters() -> None:
    model, plain = Net(), Net()
    with torch.no_grad():  # zeros of both signs, ties, subnormals and large values beside the usual ones
        for one in (model, plain):
            special = torch.tensor([0.0, -0.0, 1 + 2**-8, -(1 + 2**-8), 1e-40, -3e38, 1 + 3 * 2**-8, 2**-126])
            one.embed.weight[0] = special
    engine = make_engine(model, precision="bf16")
    found = masters(engine)
    for name, source in plain.named_parameters():
        assert equal_bits(found[name], source.detach()), name
        weight = dict(model.named_parameters())[name]
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.view(torch.uint16), half_away(source).view(torch.uint16)), name
    assert weight.is_leaf and weight.requires_grad


def test_bf16_model_has_zero_remainders() -> None:
    model, plain = Net().to(torch.bfloat16), Net().to(torch.bfloat16)
    engine = make_engine(model, precision="bf16")
    for state in engine.store.units.values():
        for slab in state.slabs:
            assert slab.state.remainder is not None and not slab.state.remainder.any()
    for name, source in plain.named_parameters():
        assert equal_bits(masters(engine)[name], source.detach().float())
        assert torch.equal(dict(model.named_parameters())[name], source)


def test_fp16_model_becomes_exact_masters() -> None:
    plain = Net().to(torch.float16)
    engine = make_engine(Net().to(torch.float16), precision="bf16")
    for name, source in plain.named_parameters():
        assert equal_bits(masters(engine)[name], source.detach().float())


class MixedBlock(Block):
    """Computes its norm in fp32, and keeps it so."""

    def __init__(self) -> None:
        super().__init__()
        self.up.to(torch.bfloat16)
        self.down.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.float()).to(torch.bfloat16)
        return x + self.down(torch.relu(self.up(y)))


def test_parameters_kept_in_fp32_stay_so() -> None:
    def mixed() -> Net:
        model = Net(MixedBlock)
        model.embed.to(torch.bfloat16)
        model.head.to(torch.bfloat16)
        return model

    model, plain = mixed(), mixed()
    engine = make_engine(model, precision="bf16")
    for step in range(3):
        engine.train_step(batches_of(step, 2))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".norm." in name else torch.bfloat16), name
        before = dict(plain.named_parameters())[name]
        assert not torch.equal(masters(engine)[name], before.detach().float()), name


def test_rotary_tables_keep_their_precision() -> None:
    model = tiny_llama()
    engine = make_engine(model, precision="bf16")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert engine.train_step([make_batch(0)]).loss > 0


def reference_step(
    model: nn.Module,
    master: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    limit: float | None,
) -> None:
    """bf16 gradients of `loss` applied to fp32 `master`s; the model's weights become their rounding."""
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    if limit is not None:
        norm = float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())
        coefficient = torch.tensor(min(1.0, limit / (norm + 1e-6)), dtype=torch.float32)
        gradients = {name: g * coefficient for name, g in gradients.items()}
    for name, gradient in gradients.items():
        flat = gradient.reshape(-1)
        master[name].grad = nn.functional.pad(flat, (0, -flat.numel() % 64)).clone()
    optimizer.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(half_away(master[name][: parameter.numel()]).view_as(parameter))


@pytest.mark.parametrize("settings", [
    {"clip_norm": None}, {"clip_norm": 0.2}, {"clip_norm": 1e6, "clip_scope": "unit"},
], ids=["at once", "global", "unit"])  # fmt: skip
def test_training_equals_fp32_masters_beside_a_bf16_model(settings: dict[str, Any]) -> None:
    """Torch's fused AdamW on fp32 masters, from the bf16 gradients of a bf16 model; to the last bit."""
    model, plain = Net(), Net()
    master, groups = {}, {0.1: [], 0.0: []}
    for name, parameter in plain.named_parameters():
        flat = parameter.detach().reshape(-1)
        # whole vectors: torch rounds the last few elements of a tensor differently
        master[name] = nn.functional.pad(flat, (0, -flat.numel() % 64)).clone().requires_grad_()
        groups[0.1 if parameter.ndim >= 2 else 0.0].append(master[name])
        parameter.data = half_away(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    engine = make_engine(model, precision="bf16", optimizer=mt.AdamW(lr=1e-3, weight_decay=0.1), **settings)
    limit = settings["clip_norm"] if settings.get("clip_scope") != "unit" else None
    for step in range(6):
        loss = plain(**make_batch(step)).loss
        reference_step(plain, master, optimizer, loss, limit)
        assert engine.train_step([make_batch(step)]).loss == loss.item(), f"step {step}"
        found = masters(engine)
        for name, parameter in plain.named_parameters():
            expected = master[name].detach()[: parameter.numel()].view_as(parameter)
            assert equal_bits(found[name], expected), f"step {step}: {name}"
            assert torch.equal(dict(model.named_parameters())[name], parameter), f"step {step}: {name}"


def test_small_updates_add_up() -> None:
    """Each is below the resolution of bf16; in a bf16 weight alone they would all be lost."""
    model = Net()
    start = model.head.weight.detach().clone()
    engine = make_engine(model, precision="bf16", optimizer=mt.AdamW(lr=1e-6, weight_decay=0.0))
    for _ in range(20):
        engine.train_step([make_batch(0)])
    moved = (masters(engine)["head.weight"] - start).abs()
    assert moved.median() > 1e-5


def test_sum_over_micro_batches_is_rounded_once() -> None:
    model = Net()
    engine = make_engine(model, precision="bf16")
    batches = batches_of(0, 3)
    shares = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    twin = Net()
    for parameter in twin.parameters():
        parameter.data = half_away(parameter)
    total: dict[str, Tensor] = {}
    for batch, share in zip(batches, shares, strict=True):
        loss = twin(**batch).loss
        gradients = torch.autograd.grad(loss, list(twin.parameters()), torch.full_like(loss, share / sum(shares)))
        for (name, _), gradient in zip(twin.named_parameters(), gradients, strict=True):
            total[name] = total[name] + gradient.float() if name in total else gradient.float()
    engine.train_step(batches)
    for entry in engine.store.slots.values():
        assert entry.slab.gradient.dtype == torch.bfloat16
        found = entry.view(entry.slab.gradient)
        # ties may go either way
        assert torch.equal(found, total[entry.slot.name].bfloat16()) or torch.equal(
            found, half_away(total[entry.slot.name]).view_as(found)
        ), entry.slot.name


def test_accumulation_over_backward_calls_is_in_fp32() -> None:
    engine = make_engine(Net(), precision="bf16")
    for n in range(3):
        engine.model(**make_batch(n)).loss.backward()
    stats = engine.step()
    twin = Net()
    for parameter in twin.parameters():
        parameter.data = half_away(parameter)
    total = {name: torch.zeros(p.shape) for name, p in twin.named_parameters()}
    for n in range(3):
        twin.zero_grad()
        twin(**make_batch(n)).loss.backward()
        for name, parameter in twin.named_parameters():
            total[name] += parameter.grad.float()
    norm = float(torch.stack([t.double().square().sum() for t in total.values()]).sum().sqrt())
    assert stats.grad_norm == pytest.approx(norm, rel=1e-6)
    assert engine.train_step([make_batch(0)]).grad_norm > 0


def test_auto_precision_is_one_of_the_two() -> None:
    assert make_engine(Net(), precision="auto").precision in ("bf16", "fp32")


def zero(weight: nn.Parameter) -> None:
    weight.data.zero_()


def replace(weight: nn.Parameter) -> None:
    weight.data.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))


def zero_a_row(weight: nn.Parameter) -> None:
    weight.data[3] = 0


def zero_a_column(weight: nn.Parameter) -> None:
    weight.data[:, 5] = 0


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("write", [zero, replace, zero_a_row, zero_a_column])
def test_writing_through_data_becomes_the_master(write: Any, read: bool, device: str) -> None:
    """torch's version counters do not tell of it; low bits of the old master would turn zeros into NaN."""
    engine = make_engine(Net(), precision="bf16", device=device)
    for step in range(2):
        engine.train_step(batches_of(step, 1))
    engine.flush()
    weights = [engine.model.head.weight, engine.model.blocks[0].up.weight]
    for weight in weights:
        write(weight)
    expected = [weight.detach().float() for weight in weights]
    if not read:  # what the next update starts from; a learning rate of 0 leaves it there
        engine.train_step(batches_of(2, 1), lr=0.0)
    found = masters(engine)
    for name, master in zip(("head.weight", "blocks.0.up.weight"), expected, strict=True):
        assert torch.equal(found[name], master), name


def test_weights_that_nobody_writes_keep_their_low_bits() -> None:
    engine = make_engine(Net(), precision="bf16")
    engine.train_step(batches_of(0, 1))
    before = masters(engine)
    engine.train_step(batches_of(1, 1), lr=0.0)
    assert all(torch.equal(master, before[name]) for name, master in masters(engine).items())
    assert any((master != master.bfloat16().float()).any() for master in before.values())
