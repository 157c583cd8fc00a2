"""From a row's fields to what is trained on: a text, a conversation, a prompt with a completion, a pair of answers.

The formats are those in use: OpenAI's messages, Alpaca's instructions, ShareGPT's conversations, TRL's
prompt-completion and preference rows, and LLaMA-Factory's variants of these.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatrain.data.bad_rows import BadRowError, kind_of, names_of
from megatrain.data.messages import (
    OPENAI,
    SHAREGPT,
    Message,
    Wording,
    checked_text,
    message_of,
    messages_of,
    says_nothing,
)

FORMATS = ("text", "messages", "alpaca", "sharegpt", "prompt-completion", "preference")
# the fields that `columns` may rename
FIELDS = (
    *("text", "messages", "tools", "system", "instruction", "input", "output", "history"),
    *("prompt", "completion", "chosen", "rejected", "images"),
)


@dataclass(frozen=True)
class Text:
    """A document: every token is a target."""

    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation for a chat template; `first`: the message from which on assistant turns are targets; `unlearned`:
    places of those that a weight of 0 excepts."""

    messages: list[Message]
    tools: list[Any] | None = None
    first: int = 0
    unlearned: tuple[int, ...] = ()

    @property
    def answers(self) -> list[int]:
        """Places of the assistant turns that are targets."""
        turns = [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [place for place in turns if place >= self.first and place not in self.unlearned]


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
    """Where in a row its parts are: the format, names of fields that differ from ours, tags of turns; `unread`: parts
    that it has none of, whatever fields it has."""

    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

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
        form, wording = ("messages", OPENAI) if "role" in turns[0] else ("sharegpt", SHAREGPT)
        # before two answers a conversation that ends with a question is no conversation by itself
        if wording.who in turns[0] and not (formats and _ends_with_a_question(turns, wording)):
            formats.add(form)
    if found.has("instruction") and found.has("output"):
        formats.add("alpaca")
    if found.has("prompt") and found.has("completion"):
        formats.add("prompt-completion")
    if found.has("text"):
        formats.add("text")
    return formats


def chosen_format(found: set[str], method: str) -> str | None:
    """Of the formats that rows could be in, the one to take: what the method learns from, else the most specific.
    None where they do not tell."""
    wanted = {"dpo": "preference", "pretrain": "text"}.get(method)
    if wanted in found:
        return wanted
    rest = found - {"text"} or found
    rest = rest - {"preference"} or rest
    return next(iter(rest)) if len(rest) == 1 else None


def _ends_with_a_question(turns: Sequence[Any], wording: Wording) -> bool:
    speaker = turns[-1].get(wording.who) if isinstance(turns[-1], Mapping) else None
    return isinstance(speaker, str) and wording.speakers.get(speaker) == "user"


class _Row:
    """A row's fields by the names that formats know them by."""

    def __init__(self, fields: Mapping[str, Any], layout: Layout) -> None:
        self.fields, self.layout = fields, layout

    def has(self, part: str) -> bool:
        return part not in self.layout.unread and self.fields.get(self.layout.name(part)) is not None

    def text(self, part: str) -> str:
        """A field that must be there."""
        return checked_text(self.value(part), f"field {self.layout.name(part)!r}")

    def text_or_empty(self, part: str) -> str:
        return self.text(part) if self.has(part) else ""

    def value(self, part: str) -> Any:
        """A field that must be there, and not null."""
        if not self.has(part):
            raise self._missing([self.layout.name(part)])
        return self.fields[self.layout.name(part)]

    def _missing(self, names: Sequence[str]) -> BadRowError:
        null = next((name for name in names if name in self.fields and self.fields[name] is None), None)
        if null is not None:
            return BadRowError(f"has null in field {null!r}")
        wanted = " or ".join(map(repr, names))
        return BadRowError(f"has no field {wanted}; its fields are: {names_of(list(self.fields))}")

    def messages_or_none(self) -> Any:
        return next(
            (self.fields[name] for name in self._names_of_messages() if self.fields.get(name) is not None), None
        )

    def _names_of_messages(self) -> tuple[str, ...]:
        if "messages" in self.layout.unread:
            return ()
        own = self.layout.columns.get("messages")
        return ("messages", "conversations") if own is None else (own,)

    def turns(self) -> list[Any]:
        """The list of a conversation, in `messages` or `conversations`."""
        names = self._names_of_messages()
        turns = self.messages_or_none()
        if turns is None:
            raise self._missing(names)
        return _turns(turns, next(name for name in names if self.fields.get(name) is not None))

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
    before = messages_of(_turns(prompt, row.layout.name("prompt")), OPENAI)
    after = messages_of(_turns(completion, row.layout.name("completion")), OPENAI)
    return _chat([*before, *after], row.tools(), first=len(before))


# -- conversations ---------------------------------------------------------------------------------------


def _of_messages(row: _Row) -> Sample:
    return _chat(_conversation(row, OPENAI), row.tools())


def _sharegpt(row: _Row) -> Sample:
    return _chat(_conversation(row, SHAREGPT), row.tools())


def _conversation(row: _Row, wording: Wording) -> list[Message]:
    messages = messages_of(row.turns(), wording.with_tags(row.layout.tags))
    if row.text_or_empty("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row.text("system")})
    return messages


def _chat(messages: list[Message], tools: list[Any] | None, first: int = 0) -> Chat:
    """A conversation that has a turn to learn. In which order its roles may come, the template says."""
    unlearned = tuple(n for n, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight") == 0)
    messages = [{name: value for name, value in one.items() if name != "weight"} for one in messages]
    chat = Chat(messages, tools, first, unlearned)
    if not chat.answers:
        raise BadRowError("has no assistant message to learn")
    for place in chat.answers:
        if says_nothing(messages[place]):
            raise BadRowError(f"has an empty answer in message {place + 1}, from which there is nothing to learn")
    return chat


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
        messages.append({"role": "user", "content": checked_text(question, "its history")})
        messages.append({"role": "assistant", "content": checked_text(answer, "its history")})
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
    if isinstance(chosen, str) and (not row.has("prompt") or isinstance(row.value("prompt"), str)):
        plain = not row.has("instruction") and row.messages_or_none() is None
        return _plain_pair(row) if plain else _pair(_prompt(row), [chosen], [rejected], row)
    one, other = (answer if isinstance(answer, list) else [answer] for answer in (chosen, rejected))
    return _pair(_prompt(row), one, other, row)


def _prompt(row: _Row) -> list[Message]:
    """The messages before the two answers; none where the answers begin with them."""
    if row.has("instruction"):
        return _alpaca_prompt(row)
    if row.messages_or_none() is not None:
        wording = _wording(row.turns()[0], row)
        whole = isinstance(row.value("chosen"), list) and len(row.value("chosen")) > 1
        # beside whole conversations `messages` repeats one of them
        return [] if whole and wording is OPENAI else _conversation(row, wording)
    if not row.has("prompt"):
        return []
    prompt = row.value("prompt")
    if isinstance(prompt, str):
        # beside whole conversations a text only repeats what they begin with
        whole = isinstance(row.value("chosen"), list) and len(row.value("chosen")) > 1
        return [] if whole else [{"role": "user", "content": row.text("prompt")}]
    return messages_of(_turns(prompt, row.layout.name("prompt")), OPENAI)


def _wording(turn: Any, row: _Row) -> Wording:
    """Of preference rows either may be meant: OpenAI's, or ShareGPT's where nothing says that it is not."""
    if isinstance(turn, Mapping) and row.layout.tags.get("role_tag", "from") in turn and "role" not in turn:
        return SHAREGPT
    return OPENAI


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
            messages.append({"role": "assistant", "content": checked_text(turn, f"field {row.layout.name(name)!r}")})
        else:
            messages.append(message_of(turn, number, _wording(turn, row).with_tags(row.layout.tags)))
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
