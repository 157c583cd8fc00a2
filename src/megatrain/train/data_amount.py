"""How much there is to train on, before a run is set up: looked at where that is quick, and it may be too little."""

import dataclasses

from megatrain.config import Config
from megatrain.data.pairs import epoch_of
from megatrain.data.row_source import Source
from megatrain.errors import ConfigError
from megatrain.train import build
from megatrain.train.image_data import names_images
from megatrain.train.model_settings import ModelSettings

_MOST_BYTES = 32 << 20  # seconds to tokenise; more than this is many steps, however large they are


def tokens_per_epoch(config: Config, corpora: build.Corpora, settings: ModelSettings) -> int | None:
    """Sequences of `data.seq_len` tokens that one pass is, in tokens. None where nobody looked: at much data, at what
    is downloaded bit by bit, or for want of a tokenizer. Raises ConfigError where it is no data."""
    sources, files = corpora.train.sources, corpora.train.files
    if any(source.streaming for source in sources):
        return None
    try:
        if not files or sum(path.stat().st_size for path in files) > _MOST_BYTES:
            return None
        if names_images(config, corpora.train):  # a sequence for each row; pictures are not decoded for it
            return sum(round(source.weight * _count_rows(source)) for source in sources) * config.data.seq_len
        tokenizer = build.given_tokenizer(config)
    except (OSError, ConfigError):
        return None
    alone = dataclasses.replace(config, train=dataclasses.replace(config.train, tokens_per_step=None, epochs=1))
    data = build.build_data(alone, dataclasses.replace(corpora, eval=None), tokenizer, settings.config)
    sequences = 2 * epoch_of(data.pairs)[0] if data.pairs is not None else 0 if data.rows is None else data.rows.count
    return sequences * config.data.seq_len


def _count_rows(source: Source) -> int:
    assert source.rows is not None
    return source.rows.count if source.rows.count is not None else sum(1 for _ in source.rows.read())
