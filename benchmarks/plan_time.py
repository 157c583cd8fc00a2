"""Predicted against measured step times, turn by turn, since a machine's speed changes from one minute to the next.

    python benchmarks/plan_time.py [CONFIG.yaml ...] [--rounds 5] [--section.key value ...]

Each round times the units, plays the step, and takes a few steps of the engine; the ratio of the two is one of that
round. Without a CONFIG: `megatrain demo`, and a llama of 34M parameters in fp32 and bf16. The aim is 15%.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness  # noqa: F401 (first: it prepares the environment)
from harness.machine import describe_machine
from harness.percentiles import Spread
from harness.results import RESULTS, Results

from megatrain.config import Config, load_config
from megatrain.planner.durations import durations
from megatrain.planner.plan import Plan
from megatrain.planner.simulate import simulate
from megatrain.train import build
from megatrain.train.model_settings import Vocabulary, read_model_settings
from megatrain.train.planning import RunPlanner, measured_here
from megatrain.train.run_folder import RunFolder

_SETTLING, _STEPS = 4, 5
_DEMO = Path(build.__file__).parents[1] / "recipes" / "demo.yaml"
_LLAMA_34M = """
model:
  config: {model_type: llama, hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 8, num_attention_heads: 8,
           num_key_value_heads: 8, max_position_embeddings: 512, tie_word_embeddings: false}
  tokenizer: {train: bpe, vocab_size: 8192}
data: {train: stdlib, seq_len: 512}
train: {steps: 100, tokens_per_step: 1024}
engine: {micro_batch: 2}
"""


def compare(name: str, config: Config, rounds: int) -> tuple[Spread, Spread, Spread]:
    """(predicted, measured, predicted / measured), over the rounds."""
    corpora, settings = build.find_corpora(config), read_model_settings(config)
    tokenizer = build.given_tokenizer(config) or build.trained_tokenizer(config, corpora)
    settings.fit(Vocabulary.of(tokenizer))
    optimizer, planner = build.plan_training(config, settings, RunFolder(str(config.output)))
    data = build.build_data(config, corpora, tokenizer, settings.config)
    plan = planner.plan()
    batches_of = build.batches_of(config, data)
    found: list[tuple[float, float]] = []
    with build.build_engine(config, settings, optimizer, plan) as engine:
        engine.model.train()
        for step in range(_SETTLING):
            engine.train_step(batches_of(step), lr=1e-5)
        for number in range(rounds):
            predicted = _predicted(config, plan, planner)
            times = [engine.train_step(batches_of(number * _STEPS + n), lr=1e-5).seconds for n in range(_STEPS)]
            found.append((predicted, statistics.median(times)))
            print(f"{name}  round {number + 1}: predicted {predicted:.3f} s, measured {times}", flush=True)
    predicted, measured = zip(*found, strict=True)
    return Spread.of(predicted), Spread.of(measured), Spread.of(p / m for p, m in found)


def _predicted(config: Config, plan: Plan, planner: RunPlanner) -> float:
    """With the placement that the engine has, and units timed now."""
    hardware, measured = measured_here(config, plan.workload, planner.device)
    sequences = plan.settings.sequences
    times = durations(plan.workload, plan.placement, hardware, sequences, measured)
    in_host_memory = hardware.computes_in_host_memory
    return simulate(plan.workload, plan.placement, times, sequences, in_host_memory=in_host_memory).step_seconds


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options, rest = parser.parse_known_args(argv)
    overrides = [(name.removeprefix("--"), value) for name, value in zip(rest[::2], rest[1::2], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        llama = Path(folder) / "llama-34m.yaml"
        llama.write_text(_LLAMA_34M)
        cases = [(_DEMO, "fp32"), (llama, "fp32"), (llama, "bf16")]
        cases = [(path, "") for path in options.configs] or cases
        for path, precision in cases:
            given = [*overrides, ("output", f"{folder}/run"), *([("engine.precision", precision)] if precision else [])]
            config = load_config(str(path), given)
            name = f"{path.stem}, {config.engine.precision} on {config.engine.device}"
            predicted, measured, ratio = compare(name, config, options.rounds)
            print(f"{name}: predicted / measured {ratio.p50:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})", flush=True)
            device = "cpu" if config.engine.device == "auto" else config.engine.device
            Results(options.results, describe_machine(device)).record(
                "plan", name, predicted=(predicted, "s"), seconds_per_step=(measured, "s"), of_measured=(ratio, "")
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
