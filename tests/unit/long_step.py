"""One step over a long sequence in a process of its own: what the plan says of its memory, and what it took.

python tests/unit/long_step.py TOKENS HIDDEN SEQUENCE_CHUNK_TOKENS|auto|whole [WINDOW]

WINDOW: of attention; without, each token attends to all before it.

Prints a JSON object. Bytes are those beyond what the engine held before the step; a step over few tokens came first.
"""

import json
import sys

import torch

import megatrain as mt
from megatrain.memory.limits import resident_bytes
from megatrain.model.loading import initialise, load_config
from megatrain.planner.placement import HOST, Placement, ledger
from megatrain.planner.workload import build_workload

_HELD_BEFORE = ("weights", "remainders", "moments", "gradients", "process")


def main(tokens: int, hidden: int, setting: int | str | None, window: int | None) -> None:
    config = load_config(
        {
            "model_type": "mistral",  # without a window a llama
            "sliding_window": window,
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,  # narrow, since attention is what takes the time
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 256,
            "max_position_embeddings": tokens,
        }
    )
    work = build_workload(config, precision="fp32", seq_len=tokens, sequence_chunk_tokens=setting or "auto")
    placement = Placement(dict.fromkeys([u.index for u in work.homes], HOST), 1, chunked=setting is not None)
    planned = ledger(work, placement, 1, in_host_memory=True, process=0)[HOST]
    engine = mt.Engine(
        initialise(config, 0), device="cpu", precision="fp32", keep_graphs="off", sequence_chunk_tokens=setting
    )
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randint(0, 256, (1, n), generator=generator) for n in (64, tokens))
    engine.train_step([{"input_ids": short, "labels": short}])
    before = resident_bytes()
    stats = engine.train_step([{"input_ids": long, "labels": long}])
    found = {
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "seconds": stats.seconds,
        "predicted_bytes": sum(n for name, n in planned.items() if name not in _HELD_BEFORE),
        "measured_bytes": stats.host_peak_bytes - before,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    known = {"auto": "auto", "whole": None}
    tokens, hidden, setting, *rest = sys.argv[1:]
    main(int(tokens), int(hidden), known[setting] if setting in known else int(setting), int(rest[0]) if rest else None)
