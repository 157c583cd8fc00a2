"""Chat fine-tuning by TRL's SFTTrainer on a model that does not fit the GPU: TRL's loop, data and logging, our memory.

    pip install 'megatrain[trainers]'
    python examples/trl_sft.py --model Qwen/Qwen3-8B --data chats.jsonl --output runs/trl-sft

`chats.jsonl` has a conversation to a line, {"messages": [{"role": "user", "content": "..."}, ...]}. Started again, it
goes on from the last checkpoint in the output folder.
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import megatrain as mt


class StreamedSFT(mt.StreamedTrainerMixin, SFTTrainer):
    """The mixin comes first; everything else is TRL's."""


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset("json", data_files=args.data, split="train")
    engine = mt.Engine.from_pretrained(args.model)  # weights in host memory; layers pass through the GPU
    trainer = StreamedSFT(
        model=engine.model,
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=1e-5,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            max_grad_norm=1.0,
            # Weights pass through the GPU twice for each of these micro-batches: rather large ones than many.
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.accumulate,
            max_length=args.max_length,
            packing=True,
            assistant_only_loss=True,
            bf16=False,  # autocast; on a GPU the engine's weights are bf16 already, with exact fp32 masters behind them
            logging_steps=1,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to="none",  # or "tensorboard", "wandb"
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    last = get_last_checkpoint(args.output) if Path(args.output).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(f"{args.output}/model")  # a plain transformers folder
    engine.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-8B", help="a transformers folder or hub id")
    parser.add_argument("--data", required=True, help="conversations, JSON lines")
    parser.add_argument("--output", default="runs/trl-sft")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--micro-batch", type=int, default=8, help="rows that pass through the model together")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches to a step")
    parser.add_argument("--max-length", type=int, default=4096, help="tokens to a row")
    parser.add_argument("--save-steps", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    main()
