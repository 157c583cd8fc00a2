"""The way to the hub. Where there is none, huggingface_hub asks six times, which takes 23 seconds for each file."""

import errno
import os
import socket
import time
from collections.abc import Iterator

from huggingface_hub import constants, get_session, try_to_load_from_cache

_NO_WAY = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH})
_PAUSE_SECONDS = 1.0


def check_hub_is_reachable(source: str, *files: str) -> None:
    """Raise ConnectionError where `source` is a hub id of which none of `files` is in the cache, and nothing answers
    where the hub should be: no such name, a refused connection, no route. A network that is merely slow is left to
    huggingface_hub."""
    if os.path.isdir(source) or constants.HF_HUB_OFFLINE:
        return
    if any(try_to_load_from_cache(source, file) is not None for file in files):
        return
    if _why_no_way() is not None:
        time.sleep(_PAUSE_SECONDS)  # a name server may have been asked at a bad moment
        why = _why_no_way()
        if why is not None:
            raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {why}")


def _why_no_way() -> str | None:
    """Asks as huggingface_hub will, through the same proxies and certificates."""
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of a library whose name changes with the version of huggingface_hub
        for cause in _causes(error):
            if isinstance(cause, socket.gaierror) or (isinstance(cause, OSError) and cause.errno in _NO_WAY):
                return cause.strerror or str(cause)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
