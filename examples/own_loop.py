"""A training loop of one's own: megatrain.Engine takes an optimizer step, everything else is in this file.

    python examples/own_loop.py --model Qwen/Qwen3-8B-Base --data texts.jsonl --output runs/own-loop

`texts.jsonl` has a text to a line, {"text": "..."}. Started again, it goes on from the last checkpoint to the last bit:
what a step is given depends on its number alone.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import megatrain as mt

Batch = dict[str, torch.Tensor]


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = read_texts(Path(args.data), tokenizer, args.seq_len)
    output = Path(args.output)

    optimizer = mt.AdamW(lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    saved = sorted(output.glob("step-*"))
    if saved:
        engine = mt.Engine.from_checkpoint(saved[-1], optimizer, clip_norm=1.0)
    else:
        engine = mt.Engine.from_pretrained(args.model, optimizer, clip_norm=1.0)
    done = int(saved[-1].name.removeprefix("step-")) if saved else 0

    engine.model.train()
    for step in range(done, args.steps):
        # All micro-batches at once: each layer comes to the GPU once forward and once backward, however many there are.
        # The loss is the mean over the target tokens of all of them, whatever their lengths.
        batches = batches_of_step(step, texts, args.rows, args.micro_batch)
        stats = engine.train_step(batches, lr=learning_rate(step, args))
        speed = stats.target_tokens / stats.seconds
        print(f"step {step + 1}  loss {stats.loss:.4f}  norm {stats.grad_norm:.3f}  {speed:,.0f} tokens/s", flush=True)
        if (step + 1) % args.save_every == 0:
            engine.save(output / f"step-{step + 1:06}", tokenizer=tokenizer, background=True)  # training goes on
    engine.save_pretrained(output / "model", tokenizer=tokenizer)  # a plain transformers folder
    engine.close()


def read_texts(path: Path, tokenizer: Any, seq_len: int) -> list[list[int]]:
    """Each text's tokens with an end-of-text, cut at `seq_len`."""
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:seq_len] for text in texts]


def batches_of_step(step: int, texts: list[list[int]], rows: int, micro_batch: int) -> list[Batch]:
    """The micro-batches of a step: the next `rows` texts, in an order that each epoch shuffles anew."""
    numbers = [divmod(step * rows + row, len(texts)) for row in range(rows)]
    chosen = [texts[shuffled(epoch, len(texts))[place]] for epoch, place in numbers]
    chosen.sort(key=len)  # those of a micro-batch are then of nearly the same length
    return [padded(chosen[start : start + micro_batch]) for start in range(0, rows, micro_batch)]


def shuffled(epoch: int, count: int) -> list[int]:
    return random.Random(epoch).sample(range(count), count)


def padded(texts: list[list[int]]) -> Batch:
    """Texts of different lengths, filled up on the right with what is neither seen nor learned."""
    longest = max(map(len, texts))
    tokens = [text + [0] * (longest - len(text)) for text in texts]
    labels = [text + [-100] * (longest - len(text)) for text in texts]
    seen = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
    return {
        "input_ids": torch.tensor(tokens),
        "labels": torch.tensor(labels),  # not shifted: the model does that
        "attention_mask": torch.tensor(seen),
    }


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Up over the first twentieth of the steps, then down to zero."""
    warmup = max(1, args.steps // 20)
    return args.lr * min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-8B-Base", help="a transformers folder or hub id")
    parser.add_argument("--data", required=True, help="texts, JSON lines")
    parser.add_argument("--output", default="runs/own-loop")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=64, help="texts to a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="texts that pass through the model together")
    parser.add_argument("--seq-len", type=int, default=4096, help="longer texts are cut")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--save-every", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    main()
