"""Tiny models that see, with processors made on the spot: a tokenizer trained here, images of a few pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tiny_models import TEXT
from transformers import AutoConfig, AutoModelForImageTextToText

from megatrain.data.tokenizer import train_bpe

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_TEMPLATE = "".join(
    (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}",
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}",
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    )
)
_TOKENS = {
    "image_token": "<image>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "video_token": "<video>",
    "vision_start_token": "<start_of_vision>",
    "vision_end_token": "<end_of_vision>",
}


def _tokenizer() -> Any:
    text = train_bpe(["what is in this picture? it is red. and this one? it is blue, and wide."] * 4, 320)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=text.backend_tokenizer,
        bos_token=text.bos_token,
        eos_token=text.eos_token,
        pad_token=text.pad_token,
        extra_special_tokens=_TOKENS,
    )
    more = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": more}, replace_extra_special_tokens=False)
    return tokenizer


def _llava_next(tokenizer: Any) -> tuple[Any, Any]:
    pinpoints = [[16, 16], [16, 32], [32, 16]]
    image_processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
    )
    processor = transformers.LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE", "<image>"),
    )
    config = AutoConfig.for_model(
        "llava_next",
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
    )
    return processor, config


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    image_processor = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, image_seq_length=4)
    processor = transformers.Gemma3Processor(
        image_processor, tokenizer, image_seq_length=4, chat_template=_TEMPLATE.replace("IMAGE", "<start_of_image>")
    )
    config = AutoConfig.for_model(
        "gemma3",
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={"model_type": "gemma3_text", **TEXT, "vocab_size": len(tokenizer)},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return processor, config


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    image_processor = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    processor = transformers.Idefics3Processor(
        image_processor, tokenizer, image_seq_len=4, chat_template=_TEMPLATE.replace("IMAGE", "<image>")
    )
    config = AutoConfig.for_model(
        "idefics3",
        vision_config={"model_type": "idefics3_vision", **VISION},
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer)},
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
    )
    return processor, config


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    """As on the hub: parts of a processor, which takes videos, too."""
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    image_processor = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}, **sizes
    )
    tokenizer.chat_template = _TEMPLATE.replace("IMAGE", "<start_of_vision><image><end_of_vision>")
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        text_config={
            "model_type": "qwen2_5_vl_text",
            **TEXT,
            "vocab_size": len(tokenizer),
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        },
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    return Parts(image_processor, tokenizer), config


@dataclass(frozen=True)
class Parts:
    """What is saved of a processor that transformers makes only where there is torchvision."""

    image_processor: Any
    tokenizer: Any

    def save_pretrained(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        name = folder / "preprocessor_config.json"
        name.write_text(name.read_text().replace("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor"))


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "llava_next": _llava_next,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "qwen2_5_vl": _qwen2_5_vl,
}


def save_tiny(model_type: str, folder: Path) -> None:
    """A model with its processor, as from the hub."""
    import torch

    processor, config = FAMILIES[model_type](_tokenizer())
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    processor.save_pretrained(folder)
