"""Small user-written models and the comparison with plain PyTorch that the other engine tests use, and what these
rest on."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from reference import PlainTrainer, gradient_differences, kept_gradients, placed, plain_norm, weight_differences
from torch import Tensor, nn

import megatrain as mt

VOCABULARY, WIDTH = 29, 8
torch.set_num_threads(1)  # the models are too small for more


@dataclass
class Output:
    loss: Tensor

    def __getitem__(self, key: str) -> Tensor:
        return getattr(self, key)


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Embedding, blocks, head; the loss is shifted as transformers shifts it. Weights depend on `seed` alone."""

    def __init__(
        self,
        block: Callable[[], nn.Module] = Block,
        count: int = 2,
        seed: int = 0,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            make = block if dropout is None else (lambda: Block(dropout))
            self.blocks = nn.ModuleList([make() for _ in range(count)])
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return Output(self.loss(self.head(self.hidden(input_ids)), labels))


def make_batch(seed: int, rows: int = 2, length: int = 6, masked: int = 2) -> dict[str, Tensor]:
    """Random tokens as inputs and labels; `masked` of the labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[0, 1 : 1 + masked] = -100
    return {"input_ids": tokens, "labels": labels}


def batches_of(step: int, count: int) -> list[dict[str, Tensor]]:
    """Micro-batches of different shapes and target counts."""
    return [make_batch(100 * step + n, rows=1 + (n + 1) % 3, length=5 + 2 * n, masked=n) for n in range(count)]


def make_engine(model: nn.Module, **settings: Any) -> mt.Engine:
    defaults = {
        "optimizer": mt.AdamW(lr=1e-2, weight_decay=0.1),
        "precision": "fp32",
        "clip_norm": 0.5,
        "seed": 3,
        "threads": 1,
        "kernels": "torch",
    }
    return mt.Engine(model, **(defaults | settings))


def plain_trainer(model: nn.Module, clip_norm: float | None = 0.5) -> PlainTrainer:
    return PlainTrainer(model, lr=1e-2, weight_decay=0.1, clip_norm=clip_norm, seed=3, whole_loss=True)


def assert_same_buffers(plain: nn.Module, mine: nn.Module) -> None:
    for (name, expected), (_, found) in zip(plain.named_buffers(), mine.named_buffers(), strict=True):
        assert torch.equal(expected, found), f"buffer {name}: {found}, plain {expected}"


def assert_close_weights(plain: nn.Module, engine: mt.Engine, tolerance: float = 1e-6) -> None:
    mine = engine.model.state_dict()
    for name, parameter in plain.state_dict().items():
        torch.testing.assert_close(mine[name], parameter, rtol=tolerance, atol=tolerance)


def assert_trains_like_plain(
    model: nn.Module,
    *,
    micro_batches: int = 1,
    steps: int = 3,
    prepare: Callable[[mt.Engine], Any] | None = None,
    tolerance: float | None = None,
    **settings: Any,
) -> mt.Engine:
    """Train a copy of `model` in plain PyTorch, where the engine computes, and `model` with the engine: losses,
    gradients and buffers are the same bits after every step, weights after the last (until then nobody looks,
    so a streaming device's updates run beside the next step).

    `tolerance`: where a tensor's gradient has three or more parts, a unit sums its own before the rest are added."""
    plain = copy.deepcopy(model)
    trainer, engine = plain_trainer(plain, settings.get("clip_norm", 0.5)), make_engine(model, **settings)
    plain.to(engine.device.torch_device)
    if prepare is not None:
        prepare(engine)
    for step in range(steps):
        batches = batches_of(step, micro_batches)
        loss = trainer.backward(placed(batches, engine.device.torch_device))
        stats = engine.train_step(batches)
        assert stats.grad_norm > 0
        if tolerance is None:
            assert stats.loss == loss, f"step {step}"
            assert gradient_differences(plain, engine) == [], f"step {step}"
        else:
            assert abs(stats.loss - loss) < tolerance
            mine = kept_gradients(engine)
            for name, parameter in plain.named_parameters():
                torch.testing.assert_close(mine[name], parameter.grad.cpu(), rtol=tolerance, atol=tolerance)
        trainer.update(stats.grad_norm)
        assert_same_buffers(plain, model)
    assert tolerance is not None or weight_differences(plain, engine) == []
    return engine


def free_step(engine: mt.Engine, losses: Sequence[Callable[[nn.Module], Tensor]]) -> Any:
    """One optimizer step under the caller's own loop: a backward for each of `losses`."""
    for loss in losses:
        loss(engine.model).backward()
    return engine.step()


def assert_free_loop_like_plain(
    model: nn.Module, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor], *, steps: int = 3, **settings: Any
) -> mt.Engine:
    """As `assert_trains_like_plain`, under the caller's own loop and with a loss of the caller's."""
    plain = copy.deepcopy(model)
    trainer, engine = plain_trainer(plain), make_engine(model, **settings)
    plain.to(engine.device.torch_device)
    for step in range(steps):
        batch: dict[str, Tensor] = dict(placed([make_batch(step)], engine.device.torch_device)[0])
        expected = loss(plain, batch)
        expected.backward()
        found = loss(model, batch)
        found.backward()
        assert torch.equal(found, expected), f"step {step}"
        stats = engine.step()
        assert abs(stats.grad_norm - plain_norm(plain)) <= 1e-5 * stats.grad_norm
        assert gradient_differences(plain, engine) == [], f"step {step}"
        trainer.update(stats.grad_norm)
        assert_same_buffers(plain, model)
    assert weight_differences(plain, engine) == []
    return engine


def test_the_comparison_notices_a_changed_gradient() -> None:
    """A reference that found nothing would prove nothing."""
    model = Net()
    plain = copy.deepcopy(model)
    trainer, engine = plain_trainer(plain), make_engine(model)
    trainer.backward(batches_of(0, 2))
    engine.train_step(batches_of(0, 2))
    assert gradient_differences(plain, engine) == []
    with torch.no_grad():
        plain.blocks[1].up.weight.grad[3, 2] *= 1 + 2**-20
    assert [d.split(":")[0] for d in gradient_differences(plain, engine)] == ["blocks.1.up.weight"]


def test_plain_trainer_is_torch_adamw() -> None:
    model = Net()
    theirs = copy.deepcopy(model)
    trainer = plain_trainer(model, clip_norm=None)
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(3):
        batch = make_batch(step)
        trainer.backward([batch])
        trainer.update(1.0)
        optimizer.zero_grad()
        theirs(**batch).loss.backward()
        optimizer.step()
    for mine, expected in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
