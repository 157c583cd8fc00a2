"""`megatrain data`: the first examples as the model sees them, and all of them in numbers."""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

import numpy as np

from megatrain.config import Config, override, parse_config
from megatrain.data import best_fit
from megatrain.data.examples import Drawn, Examples, PreferenceExamples, of_one_epoch
from megatrain.data.mixture import Mixture
from megatrain.data.rows import documents_as_examples
from megatrain.data.statistics import Statistics, pieces_of, statistics_of
from megatrain.errors import ConfigError
from megatrain.train.build import find_corpora, given_tokenizer, trained_tokenizer
from megatrain.train.image_data import names_images, prepare_images
from megatrain.train.row_data import prepare_rows, prepare_texts
from megatrain.yaml_file import read_yaml

_LONGEST_SHOWN = 6000  # characters of an example
_OPEN, _CLOSE = "⟦", "⟧"

_REPEATED = re.compile(r"(<[^<>\s]+>)\1{7,}")  # an image is a token many times over

Piece = tuple[str, bool]


def data_command(
    path: str, overrides: Sequence[tuple[str, str]], *, examples: int, as_json: bool, out: TextIO | None = None
) -> None:
    """Print what the settings in `path` make of their data. Raises ConfigError."""
    settings = read_yaml(path)
    override(settings, overrides)
    config = parse_config(settings, for_training=False)
    if config.data.train is None:
        raise ConfigError("data.train: missing; give a text file, a folder, a .jsonl file or stdlib")
    if config.model.path is None and config.model.tokenizer is None:
        raise ConfigError("model.tokenizer: missing; give model.path or model.tokenizer, whose tokens are shown")
    corpora = find_corpora(config)
    tokenizer = given_tokenizer(config) or trained_tokenizer(config, corpora)
    found = {"train": _look(config, corpora.train, tokenizer, examples)}
    if corpora.eval is not None:
        found["eval"] = _look(config, corpora.eval, tokenizer, examples)
    out = out or sys.stdout
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=1), file=out)
    else:
        for name, told in found.items():
            _print(f"data.{name}", told, out)


def _look(config: Config, mixture: Mixture, tokenizer: Any, count: int) -> dict[str, Any]:
    """What is to be said of a mixture, as plain values."""
    seq_len = config.data.seq_len
    examples: Examples | PreferenceExamples
    sources: list[dict[str, Any]] = []
    said: Sequence[str] = []
    packed = None
    if names_images(config, mixture):
        found = prepare_images(config, mixture, tokenizer, keep_tokens=True)
        assert found.examples is not None
        examples, said = found.examples, found.said
    elif mixture.kind == "text":
        examples = _of_text(config, mixture, tokenizer)
        packed = _packed(config, mixture, examples)
        if packed is not None and (cuts := _cuts_of(examples, tokenizer.eos_token_id)):
            said = [f"{mixture.described}: documents longer than data.seq_len are cut {cuts:,} times"]
    else:
        rows = prepare_rows(config, mixture, tokenizer)
        assert not isinstance(rows.examples, Drawn)  # but those of the first epoch
        examples, said = rows.examples, rows.said
        packed = _packed(config, mixture, examples)
        sources = [
            {
                "source": one.source.described,
                "format": one.source.layout.format,
                "weight": one.source.weight,
                **asdict(one.counts),
                "statistics": _numbers(one.examples, seq_len, len(tokenizer)),
            }
            for one in rows.sources
        ]
    return {
        "detected": mixture.detected,
        "said": said,
        "sources": sources,
        "mixture": _numbers(examples, seq_len, len(tokenizer)),
        "packed": packed,
        "examples": [_shown(examples, number, tokenizer) for number in range(min(count, len(examples)))],
    }


def _joined(config: Config, mixture: Mixture) -> bool:
    """Whether a text is given to the model joined to others: held-out texts always are."""
    return mixture.key == "data.eval" or config.data.packing in ("auto", "joined")


def _of_text(config: Config, mixture: Mixture, tokenizer: Any) -> Examples:
    """Texts as the sequences that they are trained in, or as documents. All of it is a target but what nothing stands
    before: the first token of each, or of a text to measure on, whose windows overlap, the first of all."""
    stream = prepare_texts(config, mixture, tokenizer)
    seq_len = config.data.seq_len
    if not _joined(config, mixture):
        found = documents_as_examples(stream, tokenizer.eos_token_id, seq_len)
    else:
        count = len(stream.sequences(seq_len))
        if count == 0:
            raise ConfigError(
                f"{mixture.key}: {len(stream.tokens)} tokens are less than one sequence of data.seq_len = {seq_len}"
            )
        tokens = stream.tokens[: count * seq_len]
        found = Examples(tokens, np.ones(len(tokens), bool), np.arange(count + 1) * seq_len, stream.utf8_bytes)
    firsts = found.offsets[:-1]
    found.targets[firsts if mixture.key == "data.train" else firsts[:1]] = False
    return found


def _packed(config: Config, mixture: Mixture, examples: Examples | PreferenceExamples) -> dict[str, Any] | None:
    """The rows of an epoch that several examples share; None where data.packing is something else."""
    shared = config.data.packing == "best_fit" or (config.data.packing == "auto" and mixture.kind == "chat")
    if mixture.key != "data.train" or not shared or not isinstance(examples, Examples) or len(examples) == 0:
        return None
    seq_len = config.data.seq_len
    rows = len(best_fit.pack(np.minimum(examples.lengths, seq_len), seq_len))
    return {"packing": "best_fit", "rows": rows, "fill": len(examples.tokens) / (rows * seq_len)}


def _cuts_of(examples: Examples, end: int) -> int:
    """How often documents were cut into pieces: these do not end with the end-of-text token."""
    return int((examples.tokens[examples.offsets[1:] - 1] != end).sum())


def _numbers(examples: Examples | PreferenceExamples, seq_len: int, vocabulary: int) -> dict[str, Any]:
    if isinstance(examples, PreferenceExamples):
        both = {"chosen": of_one_epoch(examples.chosen), "rejected": of_one_epoch(examples.rejected)}
        return {name: _numbers(one, seq_len, vocabulary) for name, one in both.items()}
    found: Statistics = statistics_of(examples, seq_len, vocabulary)
    return asdict(found)


def _shown(examples: Examples | PreferenceExamples, number: int, tokenizer: Any) -> dict[str, Any]:
    if isinstance(examples, PreferenceExamples):
        both = {"chosen": of_one_epoch(examples.chosen), "rejected": of_one_epoch(examples.rejected)}
        return {name: _shown(one, number, tokenizer) for name, one in both.items()}
    tokens, labels = examples.tokens_of(number), examples.labels_of(number)
    pieces = [{"text": text, "target": target} for text, target in pieces_of(tokens, labels, tokenizer)]
    return {"tokens": len(tokens), "pieces": pieces}


# -- for people ------------------------------------------------------------------------------------------


def _print(name: str, told: dict[str, Any], out: TextIO) -> None:
    from rich.console import Console

    console = Console(file=out, highlight=False, soft_wrap=True, markup=False)
    coloured = console.color_system is not None and not console.no_color
    for number, example in enumerate(told["examples"], start=1):
        for kind, one in _parts(example):
            console.print(f"--- {name}: example {number}{kind}, {one['tokens']:,} tokens ---", style="bold")
            _print_pieces([(piece["text"], piece["target"]) for piece in one["pieces"]], console, coloured=coloured)
    if told["examples"]:
        marked = "green" if coloured else f"in {_OPEN} {_CLOSE}"
        console.print(f"(what is {marked} is learned)\n")
    for line in (*told["detected"], *told["said"]):
        console.print(line)
    for source in told["sources"] if len(told["sources"]) > 1 else ():
        for kind, numbers in _parts(source["statistics"]):
            console.print(f"{source['source']}{kind}: {_words(numbers)}")
    for kind, numbers in _parts(told["mixture"]):
        console.print(f"{name}{kind}: {_words(numbers)}")
    if (packed := told["packed"]) is not None:
        console.print(f"{name}: {packed['packing']} packs them into {packed['rows']:,} rows, {packed['fill']:.1%} full")
    console.print()


def _parts(told: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Of a pair, both of its parts."""
    return [(f" {name}", told[name]) for name in ("chosen", "rejected")] if "chosen" in told else [("", told)]


def _words(numbers: dict[str, Any]) -> str:
    lengths = ", ".join(f"{percent}% up to {length:,}" for percent, length in numbers["lengths"].items())
    share = numbers["target_tokens"] / max(1, numbers["tokens"])
    return (
        f"{numbers['examples']:,} examples, {numbers['tokens']:,} tokens, {numbers['target_tokens']:,} of them targets "
        f"({share:.1%}); lengths: {lengths}; one to a row they fill {numbers['fill']:.1%}; "
        f"{numbers['vocabulary']:,} of {numbers['vocabulary_size']:,} tokens of the vocabulary occur"
    )


def _print_pieces(pieces: Sequence[Piece], console: Any, *, coloured: bool) -> None:
    from rich.text import Text

    shown, left = Text(), _LONGEST_SHOWN
    for text, target in pieces:
        part = _visible(_REPEATED.sub(_counted, text)[:left])
        if coloured:
            shown.append(part, style="green" if target else "dim")
        else:
            shown.append(f"{_OPEN}{part}{_CLOSE}" if target else part)
        left -= len(part)
        if left <= 0:
            shown.append(" ...")
            break
    console.print(shown)


def _counted(found: re.Match[str]) -> str:
    return f"{found[1]} x {len(found[0]) // len(found[1]):,} "


def _visible(text: str) -> str:
    """What would move a terminal's cursor is written out."""
    return "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)
