"""Tokenizers: loaded from a folder or the hub, or a byte-level BPE trained on the corpus itself."""

import math
import os
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from megatrain.data.tokenizer_files import check_tokenizer_files
from megatrain.errors import ConfigError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BPE_SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
MIN_BPE_VOCAB = 256 + 3  # every byte and the special tokens: nothing is ever out of vocabulary

# Words take one leading space or punctuation mark with them (`.append`, `_name`, `(self`), punctuation the
# line end that follows (`):\n`), and an indentation is one piece: in code these are the units that repeat.
_PIECES = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+ *(?= )",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_NO_FILES = "it has no tokenizer files that transformers reads"

# Merges settle long before a corpus of terabytes is read; this bounds the time and memory of training.
_SAMPLE_CHARACTERS = 64_000_000


def load_tokenizer(path: str, *, key: str = "model.tokenizer") -> Any:
    """The transformers tokenizer in folder `path` (or of that hub id).

    Raises ConfigError naming `key` where there is none, or where it has no end-of-text token: documents are
    joined with it.
    """
    from transformers import AutoTokenizer

    from megatrain.hub import check_hub_is_reachable
    from megatrain.model.loading import check_config, one_line

    folder = os.path.expanduser(path)
    if not os.path.exists(folder) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ConfigError(f"{key}: {path!r} does not exist; give a folder with a tokenizer or a hub id")
    try:
        check_hub_is_reachable(folder, "tokenizer_config.json", "tokenizer.json", "config.json")
        check_tokenizer_files(folder)
        check_config(folder)  # transformers builds the model's configuration to find the tokenizer's class
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:
        # transformers raises OSError, ValueError, KeyError or ImportError, by file and cause; tokenizers' own code, on
        # files that make no sense, what is no Exception at all
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        # about files, transformers' messages speak of its own classes; about the hub, they say what went wrong
        reason = one_line(error)
        if os.path.isdir(folder) and not isinstance(error, ConfigError):
            reason = f"its tokenizer's files are damaged ({reason})" if _has_tokenizer(folder) else _NO_FILES
        raise ConfigError(f"{key}: no tokenizer in {path!r}: {reason}") from None
    for name in (
        "is_local",
        "local_files_only",
    ):  # how it was found, which transformers would save as if it were its own
        tokenizer.init_kwargs.pop(name, None)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{key}: the tokenizer in {path!r} has no eos_token; documents are joined with it")
    longest = tokenizer.model_max_length
    if type(longest) not in (int, float) or math.isnan(longest) or longest <= 0:
        shown = reprlib.repr(longest)
        raise ConfigError(f"{key}: the tokenizer in {path!r} has model_max_length {shown}; expected a number above 0")
    return tokenizer


def _has_tokenizer(folder: str) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for name in _TOKENIZER_FILES)


def train_bpe(documents: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE of exactly `vocab_size` tokens (fewer on a tiny corpus), as a PreTrainedTokenizerFast.

    Deterministic: the same documents give the same tokenizer. Only the first 64 million characters are read.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,  # it deletes spaces: decoding must give back the exact text
        split_special_tokens=True,  # a text that speaks of `<|eos|>` does not end there
    )


def _sample(documents: Iterable[str]) -> Iterator[str]:
    left = _SAMPLE_CHARACTERS
    for text in documents:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
