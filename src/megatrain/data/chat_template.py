"""Conversations as a model's chat template writes them, and which characters of that the model itself is to write.

A template with a generation mask (`{% generation %}`) says so. For others it is derived: what the template writes up to
an assistant's turn, asking for it, must be how the whole conversation begins, and the turn ends where the
conversation up to and with it ends. Nothing is guessed: where neither holds, that is an error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from megatrain.data.bad_rows import BadRowError
from megatrain.data.formats import Chat, Message

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"strftime_now\(\s*(\"[^\"]*\"|'[^']*')\s*\)")
# Templates may write today's date: the same data would be other tokens tomorrow. This one stands for all days.
_DATES = {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26", "%d %B %Y": "26 July 2024", "%B %d, %Y": "July 26, 2024"}


class NotDerivableError(ValueError):
    """The assistant's turns cannot be told apart from what else the template writes."""


class TemplateSyntaxError(ValueError):
    """The template is no Jinja."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans`: the characters to learn, in order; `ended`: whether the last of them end with a
    special token, by which the model learns to stop; `plain`: it is no template's, and begin-of-text and end-of-text
    are still to be put around it."""

    text: str
    spans: Sequence[Span]
    ended: bool
    plain: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and what it may name: `names` such as bos_token. `special`: texts of all special tokens."""

    text: str
    names: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()

    @property
    def has_generation_mask(self) -> bool:
        return _GENERATION.search(self.text) is not None

    def check(self) -> None:
        """Raise TemplateSyntaxError."""
        from jinja2 import TemplateSyntaxError as JinjaSyntaxError

        try:
            _render(self, [{"role": "user", "content": "a"}], None)
        except BadRowError as error:
            if isinstance(error.__cause__, JinjaSyntaxError):
                raise TemplateSyntaxError(f"line {error.__cause__.lineno}: {error.__cause__.message}") from None

    def render(self, chat: Chat, *, everything: bool = False) -> Rendered:
        """The conversation with its assistant turns from `chat.first` on, or all of it, to learn.

        Raises BadRowError where the template refuses it, NotDerivableError where it hides which part is whose.
        """
        if everything:
            whole, _ = _render(self, chat.messages, chat.tools)
            return Rendered(whole, [(0, len(whole))], True)
        if self.has_generation_mask:
            whole, spans = _render(self, chat.messages, chat.tools, mask=True)
            spans = self._masked(chat, whole, spans)
        else:
            whole, _ = _render(self, chat.messages, chat.tools)
            spans = self._derived(chat, whole)
        spans = [(start, self._with_end_token(whole, end)) for start, end in spans]
        return Rendered(whole, spans, bool(spans) and whole[: spans[-1][1]].endswith(self.special))

    def asking(self, chat: Chat) -> str:
        """The conversation as the model is given it to say what comes next. Raises BadRowError."""
        return _render(self, chat.messages, chat.tools, ask=True)[0]

    def end_of_turn(self) -> str | None:
        """The special token that follows an answer; None where there is none."""
        return _end_of_turn(self)

    def _with_end_token(self, whole: str, end: int) -> int:
        """Past the end-of-text token that follows directly: the model is to write it, too."""
        eos = self.names.get("eos_token")
        return end + len(eos) if eos and whole.startswith(eos, end) else end

    def _masked(self, chat: Chat, whole: str, spans: list[Span]) -> list[Span]:
        """The template's own spans, without those of turns that are no targets."""
        spans = [span for span in spans if span[0] < span[1]]
        if chat.first:
            before, _ = _render(self, chat.messages[: chat.first], chat.tools)
            if not whole.startswith(before):
                raise NotDerivableError(f"message {chat.first + 1} changes how those before it are written")
            spans = [(max(start, len(before)), end) for start, end in spans if end > len(before)]
        return spans

    def _derived(self, chat: Chat, whole: str) -> list[Span]:
        spans: list[Span] = []
        for place, message in enumerate(chat.messages):
            if message["role"] != "assistant" or place < chat.first:
                continue
            start = self._start(chat, place, whole)
            end = self._end(chat, place, whole, start)
            if spans and start < spans[-1][1]:
                raise NotDerivableError(f"message {place + 1} begins before message {place} ends")
            spans.append((start, end))
        return spans

    def _start(self, chat: Chat, place: int, whole: str) -> int:
        try:
            asked, _ = _render(self, chat.messages[:place], chat.tools, ask=True)
        except BadRowError as error:
            raise NotDerivableError(f"it does not write the conversation up to message {place}: {error}") from None
        if not whole.startswith(asked):
            raise NotDerivableError(f"before message {place + 1} it asks for an answer in other words than it keeps")
        return len(asked)

    def _end(self, chat: Chat, place: int, whole: str, start: int) -> int:
        """Where an answer's last token ends: what follows that up to the next turn, such as a line end, nobody asks
        the model for."""
        try:
            upto, _ = _render(self, chat.messages[: place + 1], chat.tools)
        except BadRowError as error:
            raise NotDerivableError(f"it does not write the conversation up to message {place + 1}: {error}") from None
        if whole.startswith(upto) and len(upto) > start:
            spoken = upto.rstrip()
            return len(spoken) if len(spoken) > start and spoken.endswith(self.special) else len(upto)
        return self._end_of_rewritten(chat.messages[place], place, whole, start)

    def _end_of_rewritten(self, message: Message, place: int, whole: str, start: int) -> int:
        """Where later turns change how an answer is written, such as without its reasoning: at its end-of-turn token,
        if what stands before that is the end of the answer."""
        token = _end_of_turn(self)
        content = str(message["content"]).strip()
        if token is None or token in content:
            raise NotDerivableError(f"later messages change how message {place + 1} is written")
        found = whole.find(token, start)
        if found < 0 or not whole[start:found].rstrip().endswith(content.rpartition("\n")[2]):
            raise NotDerivableError(f"later messages change how message {place + 1} is written")
        return found + len(token)


@lru_cache(maxsize=8)
def _probe(template: str, names: tuple[tuple[str, str], ...], special: tuple[str, ...]) -> str | None:
    plain = ChatTemplate(template, dict(names), special)
    chat = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    try:
        whole, _ = _render(plain, chat.messages, None)
        start = plain._start(chat, 1, whole)
    except (BadRowError, NotDerivableError):
        return None
    said = whole[start:].rstrip()
    return next((token for token in special if said.endswith(f"b{token}")), None)


def _end_of_turn(template: ChatTemplate) -> str | None:
    """The special token that follows an answer; None where there is none."""
    return _probe(template.text, tuple(sorted(template.names.items())), template.special)


def _render(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    *,
    ask: bool = False,
    mask: bool = False,
) -> tuple[str, list[Span]]:
    """By transformers' own sandbox. Raises BadRowError with what the template says of the conversation."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=_on_one_day(template.text),
            add_generation_prompt=ask,
            return_assistant_tokens_mask=mask,
            **template.names,
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise BadRowError(f"is refused by the chat template: {' '.join(str(error).split())[:200]}") from error
    return texts[0], [(start, end) for start, end in spans[0]] if mask else []


@lru_cache(maxsize=8)
def _on_one_day(template: str) -> str:
    """The template with a fixed date in place of today's."""

    def fixed(found: re.Match[str]) -> str:
        wanted = found.group(1)[1:-1]
        return repr(_DATES.get(wanted, _DATES["%Y-%m-%d"]))

    return _DATE.sub(fixed, template)
