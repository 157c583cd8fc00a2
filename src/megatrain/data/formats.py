"""From a row's fields to what is trained on: a text, a conversation, a prompt with a completion, a pair of answers.

The formats are those in use: OpenAI's messages, Alpaca's instructions, ShareGPT's conversations, TRL's
prompt-completion and preference rows, and LLaMA-Factory's variants of these.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatrain.data.bad_rows import BadRowError, kind_of, names_of

FORMATS = ("text", "messages", "alpaca", "sharegpt", "prompt-completion", "preference")
# the fields that `columns` may rename
FIELDS = (
    *("text", "messages", "tools", "system", "instruction", "input", "output", "history"),
    *("prompt", "completion", "chosen", "rejected", "images"),
)

Message = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A document: every token is a target."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation for a chat template; `first`: the message from which on assistant turns are targets."""

    messages: list[Message]
    tools: list[Any] | None = None
    first: int = 0


@dataclass(frozen=True)
class Completion:
    """Plain texts that follow each other; only the second is a target."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Chat | Completion
    rejected: Chat | Completion


Sample = Text | Chat | Completion | Pair


@dataclass(frozen=True)
class Layout:
    """Where in a row its parts are: the format, names of fields that differ from ours, tags of sharegpt turns."""

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def name(self, part: str) -> str:
        return self.columns.get(part, part)


def sample_of(row: Mapping[str, Any], layout: Layout) -> Sample:
    """What a row says in a layout. Raises BadRowError."""
    return _SAMPLES[layout.format](_Row(row, layout))


def detect(row: Mapping[str, Any], columns: Mapping[str, str]) -> set[str]:
    """The formats that a row could be in, by its fields."""
    found = _Row(row, Layout("text", columns))
    formats = set()
    if found.has("chosen") and found.has("rejected"):
        formats.add("preference")
    turns = found.messages_or_none()
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        if "role" in turns[0]:
            formats.add("messages")
        elif "from" in turns[0]:
            formats.add("sharegpt")
    if found.has("instruction") and found.has("output"):
        formats.add("alpaca")
    if found.has("prompt") and found.has("completion"):
        formats.add("prompt-completion")
    if found.has("text"):
        formats.add("text")
    return formats


class _Row:
    """A row's fields by the names that formats know them by."""

    def __init__(self, fields: Mapping[str, Any], layout: Layout) -> None:
        self.fields, self.layout = fields, layout

    def has(self, part: str) -> bool:
        return self.fields.get(self.layout.name(part)) is not None

    def text(self, part: str) -> str:
        """A field that must be there."""
        name = self.layout.name(part)
        if name not in self.fields:
            raise BadRowError(f"has no field {name!r}; its fields are: {names_of(list(self.fields))}")
        return _checked(self.fields[name], f"field {name!r}")

    def text_or_empty(self, part: str) -> str:
        return self.text(part) if self.has(part) else ""

    def value(self, part: str) -> Any:
        name = self.layout.name(part)
        if self.fields.get(name) is None:
            raise BadRowError(f"has no field {name!r}; its fields are: {names_of(list(self.fields))}")
        return self.fields[name]

    def messages_or_none(self) -> Any:
        if "messages" in self.layout.columns or "messages" in self.fields:
            return self.fields.get(self.layout.name("messages"))
        return self.fields.get("conversations")

    def turns(self) -> list[Any]:
        """The list of a conversation, in `messages` or `conversations`."""
        turns = self.messages_or_none()
        name = self.layout.columns.get("messages", "messages")
        if turns is None:
            raise BadRowError(
                f"has no field {name!r}{'' if 'messages' in self.layout.columns else ' or ' + repr('conversations')}; "
                f"its fields are: {names_of(list(self.fields))}"
            )
        return _turns(turns, name)

    def tools(self) -> list[Any] | None:
        """Descriptions of tools: a list, or one written as JSON."""
        if not self.has("tools"):
            return None
        tools = self.value("tools")
        if isinstance(tools, str):
            if not tools.strip():
                return None
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError):
                raise BadRowError(f"has no JSON in field {self.layout.name('tools')!r}") from None
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise BadRowError(
                f"has {kind_of(tools)} in field {self.layout.name('tools')!r}; expected a list of objects"
            )
        return tools or None


def _checked(value: Any, what: str) -> str:
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


def _turns(turns: Any, name: str) -> list[Any]:
    if not isinstance(turns, list):
        raise BadRowError(f"has {kind_of(turns)} in field {name!r}; expected a list of messages")
    if not turns:
        raise BadRowError(f"has an empty conversation in field {name!r}")
    return turns


# -- text and plain prompts ------------------------------------------------------------------------------


def _text(row: _Row) -> Sample:
    return Text(row.text("text"))


def _prompt_completion(row: _Row) -> Sample:
    prompt, completion = row.value("prompt"), row.value("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        plain = Completion(row.text("prompt"), row.text("completion"))
        if not plain.completion.strip():
            raise BadRowError(f"has an empty field {row.layout.name('completion')!r}")
        return plain
    before = _messages(_turns(prompt, row.layout.name("prompt")))
    after = _messages(_turns(completion, row.layout.name("completion")))
    return _chat([*before, *after], row.tools(), first=len(before))


# -- conversations ---------------------------------------------------------------------------------------

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def _of_messages(row: _Row) -> Sample:
    messages = _messages(row.turns())
    if row.text_or_empty("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row.text("system")})
    return _chat(messages, row.tools())


def _messages(turns: Sequence[Any]) -> list[Message]:
    return [_message(turn, number) for number, turn in enumerate(turns, start=1)]


def _message(turn: Any, number: int) -> Message:
    """OpenAI's form, cleaned of nulls: content as one text, arguments of tool calls as objects."""
    if not isinstance(turn, Mapping):
        raise BadRowError(f"has {kind_of(turn)} as message {number}; expected an object with role and content")
    message = {name: value for name, value in turn.items() if value is not None}
    role = message.get("role")
    if role not in _ROLES:
        raise BadRowError(f"has role {role!r} in message {number}; expected one of {', '.join(_ROLES)}")
    if role == "function":  # OpenAI's older name
        message["role"] = "tool"
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], number)
        if not message["tool_calls"]:
            del message["tool_calls"]
    if "content" not in message and "tool_calls" in message:
        message["content"] = ""
    if "content" not in message:
        raise BadRowError(f"has no content in message {number}")
    message["content"] = _content(message["content"], number)
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            _checked(message[name], f"{name} of message {number}")
    return message


def _content(content: Any, number: int) -> str:
    """A text, or OpenAI's list of parts where all are texts."""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        others = sorted({str(part.get("type")) for part in content} - {"text"})
        if others:
            raise BadRowError(f"has a part of type {others[0]!r} in message {number}, which is no text")
        content = "".join(_checked(part.get("text"), f"a part of message {number}") for part in content)
    return _checked(content, f"content of message {number}")


def _tool_calls(calls: Any, number: int) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError(f"has {kind_of(calls)} as tool_calls of message {number}; expected a list of objects")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI writes arguments as JSON in a string; templates expect the object."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _tool_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return dict(call)
        if isinstance(arguments, dict):
            return {**call, "arguments": arguments}
    return dict(call)


def _chat(messages: list[Message], tools: list[Any] | None, first: int = 0) -> Chat:
    """A conversation whose order makes sense and that has a turn to learn."""
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            after = f"after {before}" if before else "first"
            raise BadRowError(f"has {role} {after} in message {number}, which is no order of roles for a conversation")
        before = role
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise BadRowError("has no assistant message to learn")
    return Chat(messages, tools, first)


_MAY_FOLLOW = {
    "": {"system", "developer", "user"},
    "system": {"user"},
    "developer": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant", "user"},
}

# -- sharegpt --------------------------------------------------------------------------------------------

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
_SPEAKER_TAGS = {
    "system_tag": "system",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "function_tag": "function_call",
    "observation_tag": "tool",
}


def _sharegpt(row: _Row) -> Sample:
    return _chat(_sharegpt_messages(row), row.tools())


def _sharegpt_messages(row: _Row) -> list[Message]:
    tags = row.layout.tags
    messages = [_turn(turn, number, tags) for number, turn in enumerate(row.turns(), start=1)]
    if row.text_or_empty("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row.text("system")})
    return messages


def _turn(turn: Any, number: int, tags: Mapping[str, str]) -> Message:
    who_tag, what_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if not isinstance(turn, Mapping):
        raise BadRowError(f"has {kind_of(turn)} as message {number}; expected an object with {who_tag} and {what_tag}")
    speakers = _SPEAKERS | {tags[tag]: role for tag, role in _SPEAKER_TAGS.items() if tag in tags}
    speaker = turn.get(who_tag)
    if not isinstance(speaker, str) or speaker not in speakers:
        expected = ", ".join(speakers)
        raise BadRowError(f"has {who_tag} {speaker!r} in message {number}; expected one of {expected}")
    if what_tag not in turn:
        raise BadRowError(f"has no {what_tag} in message {number}")
    role, content = speakers[speaker], _checked(turn[what_tag], f"{what_tag} of message {number}")
    if role != "function_call":
        return {"role": role, "content": content}
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError):
        raise BadRowError(f"has a function call that is no JSON in message {number}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRowError(f"has a function call without a name in message {number}")
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": _tool_call(call)} for call in calls],
    }


# -- alpaca ----------------------------------------------------------------------------------------------


def _alpaca(row: _Row) -> Sample:
    output = row.text("output")
    if not output.strip():
        raise BadRowError(f"has an empty field {row.layout.name('output')!r}")
    return _chat([*_alpaca_prompt(row), {"role": "assistant", "content": output}], row.tools())


def _alpaca_prompt(row: _Row) -> list[Message]:
    messages: list[Message] = []
    if row.text_or_empty("system"):
        messages.append({"role": "system", "content": row.text("system")})
    history = row.value("history") if row.has("history") else []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRowError(f"has no list of [question, answer] in field {row.layout.name('history')!r}")
    for question, answer in history:
        messages.append({"role": "user", "content": _checked(question, "its history")})
        messages.append({"role": "assistant", "content": _checked(answer, "its history")})
    wanted = "\n".join(part for part in (row.text("instruction"), row.text_or_empty("input")) if part)
    if not wanted.strip():
        raise BadRowError(f"has an empty field {row.layout.name('instruction')!r}")
    return [*messages, {"role": "user", "content": wanted}]


# -- preference ------------------------------------------------------------------------------------------


def _preference(row: _Row) -> Sample:
    chosen, rejected = row.value("chosen"), row.value("rejected")
    if type(chosen) is not type(rejected):
        raise BadRowError(
            f"has {kind_of(chosen)} as chosen and {kind_of(rejected)} as rejected; expected two of a kind"
        )
    if chosen == rejected:
        raise BadRowError("has the same answer as chosen and as rejected")
    if isinstance(chosen, str) and isinstance(row.fields.get(row.layout.name("prompt"), ""), str):
        plain = not row.has("instruction") and row.messages_or_none() is None
        return _plain_pair(row) if plain else _pair(_prompt(row), [chosen], [rejected], row)
    one, other = (answer if isinstance(answer, list) else [answer] for answer in (chosen, rejected))
    return _pair(_prompt(row), one, other, row)


def _prompt(row: _Row) -> list[Message]:
    """The messages before the two answers; none where the answers begin with them."""
    if row.has("instruction"):
        return _alpaca_prompt(row)
    if row.messages_or_none() is not None:
        turns = row.turns()
        if row.layout.tags or (isinstance(turns[0], Mapping) and "from" in turns[0]):
            return _sharegpt_messages(row)
        if isinstance(row.value("chosen"), list) and len(row.value("chosen")) > 1:
            return []  # beside whole conversations `messages` repeats one of them
        return _messages(turns)
    prompt = row.fields.get(row.layout.name("prompt"))
    if prompt is None:
        return []
    if isinstance(prompt, str):
        # beside whole conversations a text only repeats what they begin with
        whole = isinstance(row.value("chosen"), list) and len(row.value("chosen")) > 1
        return [] if whole else [{"role": "user", "content": row.text("prompt")}]
    return _messages(_turns(prompt, row.layout.name("prompt")))


def _pair(prompt: list[Message], chosen: list[Any], rejected: list[Any], row: _Row) -> Pair:
    one, other = (_answer(turns, name, row) for turns, name in ((chosen, "chosen"), (rejected, "rejected")))
    shared = 0 if prompt else _shared(one, other)
    prompt, one, other = [*prompt, *one[:shared]], one[shared:], other[shared:]
    if not prompt:
        raise BadRowError("has no prompt, and chosen and rejected do not begin with the same message")
    tools = row.tools()
    chats = (_chat([*prompt, *answer], tools, first=len(prompt)) for answer in (one, other))
    return Pair(*chats)


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _answer(turns: list[Any], name: str, row: _Row) -> list[Message]:
    """Messages of an answer: texts, OpenAI's, or sharegpt's."""
    messages = []
    for number, turn in enumerate(_turns(turns, row.layout.name(name)), start=1):
        if isinstance(turn, str):
            messages.append({"role": "assistant", "content": _checked(turn, f"field {row.layout.name(name)!r}")})
        elif isinstance(turn, Mapping) and "role" not in turn:
            messages.append(_turn(turn, number, row.layout.tags))
        else:
            messages.append(_message(turn, number))
    return messages


def _plain_pair(row: _Row) -> Pair:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if row.has("prompt"):
        prompt = row.text("prompt")
    else:  # what both begin with, up to the end of a word
        shared = _shared(chosen, rejected)
        while shared and not chosen[shared - 1].isspace():
            shared -= 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise BadRowError("has no field 'prompt', and chosen and rejected do not begin with the same words")
    if not chosen.strip() or not rejected.strip():
        raise BadRowError("has an empty answer")
    return Pair(Completion(prompt, chosen), Completion(prompt, rejected))


_SAMPLES = {
    "text": _text,
    "messages": _of_messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "prompt-completion": _prompt_completion,
    "preference": _preference,
}


def conversational(sample: Sample) -> bool:
    """Whether it needs a chat template."""
    return isinstance(sample, Chat) or (isinstance(sample, Pair) and isinstance(sample.chosen, Chat))
