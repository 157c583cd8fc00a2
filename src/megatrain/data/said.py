"""Whether what the assistant says in a conversation stands in what a chat template made of it."""

import re
from collections.abc import Mapping

from megatrain.data.bad_rows import BadRowError
from megatrain.data.messages import Message

# what ends reasoning, in the markup of several families: templates may leave out what stands before it
_REASONED = re.compile(r"</(?:seed:)?(?:think|thinking|reasoning)>|\[/THINK\]|◁/think▷|<channel\|>")


def texts_of(message: Message) -> list[str]:
    """A message's content: a text, or those of its parts."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def check_said(message: Message, place: int, text: str) -> None:
    """Raise BadRowError where `text`, which a template wrote for the assistant's message number `place` + 1, lacks its
    words, or a tool that it calls. Beside calls a template may leave words out; spaces may differ."""
    calls = message.get("tool_calls") or ()
    for call in calls:
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            raise BadRowError(f"has a call of {name!r} in message {place + 1}, which the chat template does not write")
    if not calls and not all(_holds(text, said) for said in texts_of(message)):
        raise BadRowError(f"has an answer in message {place + 1} that the chat template does not write as it is")


def _holds(text: str, said: str) -> bool:
    if said.strip() in text:
        return True
    kept = _squeezed(text)
    return _squeezed(said) in kept or _squeezed(_REASONED.split(said)[-1]) in kept


def _squeezed(text: str) -> str:
    return "".join(text.split())
