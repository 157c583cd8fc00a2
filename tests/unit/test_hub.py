"""What counts as no way to the hub, and what is left to huggingface_hub."""

import errno
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatrain import hub
from megatrain.data.tokenizer import load_tokenizer
from megatrain.errors import ConfigError
from megatrain.model.loading import check_weights


class Session:
    """Raises `errors` one after the other, each wrapped as HTTP libraries wrap them; then it answers."""

    def __init__(self, errors: list[BaseException]) -> None:
        self.errors = errors
        self.asked = 0

    def head(self, _url: str, timeout: float) -> None:
        self.asked += 1
        assert timeout > 0
        if self.errors:
            raise RuntimeError("wrapped") from self.errors.pop(0)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[BaseException]], Session]:
    def with_errors(errors: list[BaseException]) -> Session:
        session = Session(errors)
        monkeypatch.setattr(hub, "get_session", lambda: session)
        monkeypatch.setattr(hub.time, "sleep", lambda _seconds: None)
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
        return session

    return with_errors


NO_WAY = [
    ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    OSError(errno.ENETUNREACH, "Network is unreachable"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
]


@pytest.mark.parametrize("error", NO_WAY, ids=repr)
def test_no_way_to_the_hub_is_said_after_two_attempts(error: Any, ask: Any) -> None:
    session = ask([error, error, error])
    with pytest.raises(ConnectionError, match=f"cannot be reached: {error.strerror}"):
        hub.check_hub_is_reachable("org/name", "config.json")
    assert session.asked == 2


@pytest.mark.parametrize(
    "errors", [[], NO_WAY[:1], [TimeoutError("slow")], [ConnectionResetError(errno.ECONNRESET, "reset")]], ids=repr
)
def test_what_may_pass_is_left_to_the_hub_library(errors: list[BaseException], ask: Any) -> None:
    ask(list(errors))
    hub.check_hub_is_reachable("org/name", "config.json")


def test_offline_mode_and_files_in_the_cache_need_no_way(
    ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    session = ask(NO_WAY[:1] * 9)
    found = tmp_path / "config.json"
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda _repository, _file: str(found))
    hub.check_hub_is_reachable("org/name", "config.json")
    monkeypatch.undo()
    monkeypatch.setattr(hub, "get_session", lambda: session)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    hub.check_hub_is_reachable("org/name", "config.json")
    assert session.asked == 0


def test_tokenizers_and_weights_say_it_in_one_line(ask: Any) -> None:
    ask(NO_WAY[:1] * 2)
    with pytest.raises(ConfigError, match=r"model\.tokenizer: no tokenizer in 'org/name': .*cannot be reached"):
        load_tokenizer("org/name")
    ask(NO_WAY[:1] * 2)
    with pytest.raises(ConfigError, match=r"cannot fetch the weights of org/name: .*cannot be reached"):
        check_weights("org/name")
