"""Messages of a conversation, as OpenAI and ShareGPT write them, in the form that chat templates take."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatrain.data.bad_rows import BadRowError, kind_of

Message = dict[str, Any]

_CALL = "function_call"  # ShareGPT's turn whose content is a call of a tool, in JSON
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Wording:
    """The fields of a message that say who speaks and what, and the speakers' names with the roles that they mean."""

    who: str
    what: str
    speakers: Mapping[str, str]

    def with_tags(self, tags: Mapping[str, str]) -> "Wording":
        """Where LLaMA-Factory's tags name fields and speakers, those."""
        own = {tags[tag]: role for tag, role in _SPEAKER_TAGS.items() if tag in tags}
        who, what = tags.get("role_tag", self.who), tags.get("content_tag", self.what)
        return replace(self, who=who, what=what, speakers={**self.speakers, **own})


_SPEAKER_TAGS = {
    "system_tag": "system",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "function_tag": _CALL,
    "observation_tag": "tool",
}
OPENAI = Wording(
    "role",
    "content",
    {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {"function": "tool"},
)
SHAREGPT = Wording(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        _CALL: _CALL,
        "observation": "tool",
        "function_response": "tool",
        "tool": "tool",
    },
)


def messages_of(turns: Sequence[Any], wording: Wording) -> list[Message]:
    """Raises BadRowError."""
    return [message_of(turn, number, wording) for number, turn in enumerate(turns, start=1)]


def message_of(turn: Any, number: int, wording: Wording) -> Message:
    """A message cleaned of nulls: content as one text, arguments of tool calls as objects. `weight` is still in it.
    Raises BadRowError."""
    who, what = wording.who, wording.what
    if not isinstance(turn, Mapping):
        raise BadRowError(f"has {kind_of(turn)} as message {number}; expected an object with {who} and {what}")
    given = {name: value for name, value in turn.items() if value is not None}
    speaker, content = given.pop(who, None), given.pop(what, None)
    if not isinstance(speaker, str) or speaker not in wording.speakers:
        expected = ", ".join(wording.speakers)
        raise BadRowError(f"has {who} {speaker!r} in message {number}; expected one of {expected}")
    role = wording.speakers[speaker]
    if "tool_calls" in given:
        given["tool_calls"] = _tool_calls(given["tool_calls"], number)
        if not given["tool_calls"]:
            del given["tool_calls"]
        elif content is None:
            content = ""
    if content is None:
        raise BadRowError(f"has no {what} in message {number}")
    content = _content(content, what, number)
    for name in _REASONING:
        if name in given:
            checked_text(given[name], f"{name} of message {number}")
    if "weight" in given and (type(given["weight"]) not in (int, float) or given["weight"] not in (0, 1)):
        raise BadRowError(f"has weight {given['weight']!r} in message {number}; expected 0 (not learned) or 1")
    if role == _CALL:
        role, content, given["tool_calls"] = "assistant", "", _calls_in(content, number)
    return {"role": role, "content": content} | {
        name: value for name, value in given.items() if name not in ("role", "content")
    }


def checked_text(value: Any, what: str) -> str:
    """A string of whole characters. Raises BadRowError."""
    if not isinstance(value, str):
        raise BadRowError(f"has {kind_of(value)} in {what}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character, "\ud800"; UTF-8 cannot
        half = f"\\u{ord(value[error.start]):04x}"
        raise BadRowError(
            f"has {half} by itself in {what}, which is half of a surrogate pair and no character; write both halves or "
            "remove it"
        ) from None
    return value


def says_nothing(message: Message) -> bool:
    """Whether an answer has neither words nor reasoning nor calls of tools."""
    said = any(str(message.get(name, "")).strip() for name in ("content", *_REASONING))
    return not said and not message.get("tool_calls")


def _content(content: Any, what: str, number: int) -> str:
    """A text, or OpenAI's list of parts where all are texts."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        others = sorted({str(part.get("type")) for part in content} - {"text"})
        if others:
            raise BadRowError(f"has a part of type {others[0]!r} in message {number}, which is no text")
        content = "".join(checked_text(part.get("text"), f"a part of message {number}") for part in content)
    return checked_text(content, f"{what} of message {number}")


# -- calls of tools --------------------------------------------------------------------------------------


def _tool_calls(calls: Any, number: int) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError(f"has {kind_of(calls)} as tool_calls of message {number}; expected a list of objects")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI writes arguments as JSON in a string; most templates expect the object."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _tool_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            return dict(call)
        if isinstance(found, dict):
            return {**call, "arguments": Arguments(found, arguments)}
    return dict(call)


class Arguments(dict[str, Any]):
    """A call's arguments, and the JSON `text` that they were given as, for templates that write that."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text


def with_argument_texts(message: Message) -> Message:
    """The message with the arguments of its calls as the texts that they were given as."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_text(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": arguments.text} if isinstance(arguments, Arguments) else dict(call)


def _calls_in(content: str, number: int) -> list[dict[str, Any]]:
    """ShareGPT's calls: one, or a list of them, as JSON."""
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError):
        raise BadRowError(f"has a function call that is no JSON in message {number}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRowError(f"has a function call without a name in message {number}")
    return [{"type": "function", "function": _tool_call(call)} for call in calls]
