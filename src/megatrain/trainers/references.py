"""Models that TRL loads by itself while a trainer is made: references, and judges that are given by name."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatrain.device.base import streams
from megatrain.engine.engine import Engine

_SETTING = "model_init_kwargs"


@contextmanager
def references_on_host(trainer: type, args: Any, engine: Engine) -> Iterator[None]:
    """Inside, TRL loads them into host memory, from where they are streamed, instead of onto the GPU as a whole. What
    it is told for that is in `args` meanwhile; afterwards `args` are as they were."""
    given = getattr(args, _SETTING, None)
    if not streams(engine.device) or not hasattr(args, _SETTING) or isinstance(given, str):
        yield
        return
    args.model_init_kwargs = {"device_map": "cpu"} | (given or {})
    loggers = [logging.getLogger(cls.__module__) for cls in trainer.__mro__] if given is None else []
    for logger in loggers:
        logger.addFilter(_is_about_what_was_given)
    try:
        yield
    finally:
        args.model_init_kwargs = given
        for logger in loggers:
            logger.removeFilter(_is_about_what_was_given)


def _is_about_what_was_given(record: logging.LogRecord) -> bool:
    """TRL warns that the setting is of no account for a model that is there already; the user has not made it."""
    return _SETTING not in record.getMessage()
