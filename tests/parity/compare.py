"""Engine and plain PyTorch side by side on a zoo model: where they differ, step by step."""

import copy
import warnings
from dataclasses import dataclass, field

import torch
import zoo
from reference import PlainTrainer, gradient_differences, plain_norm, weight_differences

import megatrain as mt

LENGTHS = (12, 17, 9)  # of the three micro-batches; the second has padded rows


@dataclass
class Comparison:
    """Differences found; empty lists mean equal to the last bit."""

    model_type: str
    parameters: int = 0
    units: int = 0
    head: str = "chunked"
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences


def compare(
    model_type: str, *, steps: int, micro_batches: int, dropout: bool = True, clip_norm: float | None = 0.5
) -> Comparison:
    """Train both ways for `steps` of `micro_batches` with masked labels, weight decay and dropout."""
    plain = zoo.build(model_type, dropout=dropout)
    mine = zoo.build(model_type, dropout=dropout)
    settings = {"precision": "fp32", "clip_norm": clip_norm, "seed": 7, "threads": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = mt.Engine(mine, mt.AdamW(lr=1e-3, weight_decay=0.1), **settings)
    found = Comparison(model_type, sum(p.numel() for p in plain.parameters()), len(engine.partition.units))
    if engine.head.reason is not None:
        found.head = f"whole ({engine.head.reason})"
    trainer = PlainTrainer(
        plain, lr=1e-3, weight_decay=0.1, clip_norm=clip_norm, seed=7, whole_loss=engine.head.reason is not None
    )
    for step in range(steps):
        batches = [
            zoo.make_batch(plain, model_type, seed=100 * step + n, length=LENGTHS[n], padded=n == 1)
            for n in range(micro_batches)
        ]
        loss = trainer.backward([copy.deepcopy(b) for b in batches], engine.shifts_labels)
        stats = engine.train_step(batches)
        norm = plain_norm(plain)
        if stats.loss != loss:
            found.differences.append(f"step {step}: loss {stats.loss!r}, plain {loss!r}")
        if abs(stats.grad_norm - norm) > 1e-5 * norm:
            found.differences.append(f"step {step}: norm {stats.grad_norm}, plain {norm}")
        found.differences += [f"step {step}: gradient of {d}" for d in gradient_differences(plain, engine)]
        trainer.update(stats.grad_norm)
        found.differences += [f"step {step}: weight {n}" for n in weight_differences(plain, engine)]
        found.differences += [
            f"step {step}: buffer {n}"
            for (n, a), (_, b) in zip(plain.named_buffers(), mine.named_buffers(), strict=True)
            if not torch.equal(a, b)
        ]
        if not found.equal:
            break
    engine.close()
    return found
