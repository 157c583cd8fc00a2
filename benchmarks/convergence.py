"""500 steps on real text: does training in bf16 with exact fp32 masters end where it should?

A tiny Llama-style model reads the Python standard library's sources byte by byte. Four ways to train it, all of which
compute in bf16 (weights, activations and gradients; the products as the engine computes them on this CPU):

    engine     the engine, precision bf16: bf16 weight and 16-bit remainder, together the fp32 master
    int8       the engine with moments of one byte
    master     plain PyTorch: torch.optim.AdamW on fp32 copies of the weights, copied back as bf16 after each step
    in place   plain PyTorch: torch.optim.AdamW on the bf16 weights themselves

Two parts. "From scratch" trains random weights at a large learning rate, the first three ways. "Fine-tuning"
goes on from one half-trained model at the learning rate of 1e-5 that fine-tuning uses, all four ways. The first three
are repeated with several orders of the data; what is compared is the loss on the same unseen files.

Expected, written down before the first run:
  - the engine's loss is within the run-to-run spread of `master` (its lowest to its highest loss over the data orders,
    widened by that spread on either side, since the lowest and highest of a few runs understate it), in both parts;
  - so is `int8`'s: its rounding is small beside the noise of gradients, and right on average;
  - `in place` is visibly worse at 1e-5: a bf16 weight of 0.05 has a spacing of 2.4e-4, so an update of 1e-5 rounds to
    nothing, and only weights near zero move. It keeps less than half of the improvement that `master` reaches.

    python benchmarks/convergence.py [--steps N] [--seeds N] [--json]       exits 1 where an expectation fails
"""

import argparse
import copy
import json
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import megatrain as mt
from megatrain.device.cpu import CpuDevice

BATCH, LENGTH = 8, 64
HALF_TRAINED_STEPS = 200
SCRATCH_LR, FINE_TUNING_LR = 3e-3, 1e-5
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0

Step = Callable[[Tensor, float], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3, help="orders of the data (default 3)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    train, unseen = read_sources()

    scratch = new_model()
    half_trained = copy.deepcopy(scratch)
    run(Master(half_trained), train, seed=1000, steps=HALF_TRAINED_STEPS, lr=SCRATCH_LR, decay=False)
    half_trained = half_trained.float()  # the bf16 weights: all start from the same numbers

    losses: dict[str, list[float]] = {}
    start = loss_on(half_trained, unseen)
    both = {"engine": Engine, "int8": Int8, "master": Master}
    parts = [
        ("from scratch", scratch, SCRATCH_LR, both),
        ("fine-tuning", half_trained, FINE_TUNING_LR, {**both, "in place": InPlace}),
    ]
    for part, model, lr, ways in parts:
        for name, way in ways.items():
            for seed in range(1 if way is InPlace else arguments.seeds):
                trained = copy.deepcopy(model)
                trainer = way(trained)
                run(trainer, train, seed=seed, steps=arguments.steps, lr=lr, decay=part == "from scratch")
                losses.setdefault(f"{part}, {name}", []).append(loss_on(trainer.finish(), unseen))
                if not arguments.json:
                    print(f"  {part}, {name}, data order {seed}: {losses[f'{part}, {name}'][-1]:.4f}", flush=True)
    checks = judge(losses, start)
    seconds = time.perf_counter() - started
    parameters = sum(p.numel() for p in scratch.parameters())
    if arguments.json:
        results = {"parameters": parameters, "steps": arguments.steps, "start_of_fine_tuning": start}
        print(json.dumps({**results, "losses": losses, "checks": checks, "seconds": round(seconds, 1)}, indent=2))
    else:
        print(f"\n{parameters:,} parameters, {arguments.steps} steps of {BATCH} x {LENGTH} bytes; loss on unseen files")
        print(f"  {'before fine-tuning':26s} {start:.4f}")
        for name, values in losses.items():
            print(f"  {name:26s} {mean(values):.4f}   (lowest {min(values):.4f}, highest {max(values):.4f})")
        for check, holds in checks.items():
            print(f"{'yes' if holds else 'NO '}  {check}")
        print(f"{seconds:.0f} s")
    return 0 if all(checks.values()) else 1


def judge(losses: dict[str, list[float]], start: float) -> dict[str, bool]:
    """The expectations of the module's docstring."""
    checks = {}
    for part in ("from scratch", "fine-tuning"):
        master = losses[f"{part}, master"]
        spread = max(master) - min(master)
        for name in ("engine", "int8"):
            found = mean(losses[f"{part}, {name}"])
            checks[f"{part}: {name} is within the spread of master"] = (
                min(master) - spread <= found <= max(master) + spread
            )
    gained = start - mean(losses["fine-tuning, master"])
    kept = start - mean(losses["fine-tuning, in place"])
    checks["fine-tuning: in place keeps less than half of the improvement"] = kept < 0.5 * gained
    return checks


# -- the four ways ---------------------------------------------------------------------------------------------------


class Engine:
    moments = "fp32"

    def __init__(self, model: nn.Module) -> None:
        settings = mt.AdamW(lr=1.0, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, moments=self.moments)
        self.engine = mt.Engine(model, settings, precision="bf16", clip_norm=CLIP, threads=1)

    def step(self, ids: Tensor, lr: float) -> None:
        self.engine.train_step([{"input_ids": ids, "labels": ids}], lr=lr)

    def finish(self) -> nn.Module:
        self.engine.close()
        return self.engine.model


class Int8(Engine):
    moments = "int8"


class Plain:
    """Plain PyTorch; `updated` are the tensors that the optimizer updates, by the model's bf16 parameter."""

    def __init__(self, model: nn.Module, updated: dict[nn.Parameter, nn.Parameter]) -> None:
        self.model = model
        self.updated = updated
        groups = [
            {"params": [u for u in updated.values() if u.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [u for u in updated.values() if u.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPS, fused=True)

    def step(self, ids: Tensor, lr: float) -> None:
        with CpuDevice("bf16").computing():
            self.model(input_ids=ids, labels=ids).loss.backward()
        for parameter, updated in self.updated.items():
            updated.grad = parameter.grad.to(updated.dtype)
        nn.utils.clip_grad_norm_(self.updated.values(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            for parameter, updated in self.updated.items():
                if parameter is not updated:
                    parameter.copy_(updated)
                parameter.grad = None

    def finish(self) -> nn.Module:
        return self.model


class Master(Plain):
    def __init__(self, model: nn.Module) -> None:
        masters = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
        super().__init__(to_bf16(model), masters)


class InPlace(Plain):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(to_bf16(model), {p: p for p in model.parameters()})


def to_bf16(model: nn.Module) -> nn.Module:
    """Weights alone: tables such as rotary frequencies keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def run(trainer: Engine | Plain, text: Tensor, *, seed: int, steps: int, lr: float, decay: bool) -> None:
    """20 steps of warm-up; with `decay` the learning rate then falls to a tenth."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([text[start : start + LENGTH] for start in starts.tolist()]).long()
        factor = min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps if decay else 1.0)
        trainer.step(ids, lr * factor)


# -- model and text ---------------------------------------------------------------------------------------------------


def new_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def read_sources() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's own modules: to train on, and unseen (every tenth file)."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, file in enumerate(files):
        parts[number % 10 == 9].append(file.read_bytes())
    train, unseen = (torch.frombuffer(bytearray(b"\n".join(p)), dtype=torch.uint8) for p in parts)
    return train, unseen


def loss_on(model: nn.Module, text: Tensor) -> float:
    """Mean loss of 256 pieces spread over `text`, in fp32, so that only the weights count."""
    model = copy.deepcopy(model).float().eval()
    starts = torch.linspace(0, len(text) - LENGTH - 1, 256).long().tolist()
    ids = torch.stack([text[start : start + LENGTH] for start in starts]).long()
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
