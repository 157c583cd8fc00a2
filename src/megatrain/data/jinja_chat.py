"""A Jinja chat template written out: by transformers' own sandbox, on one day, with contents in the form that it reads.

Templates of text models read a message's content as a string, those of models that see often as a list of parts, and
one that loops over parts finds none in a string: it would write the conversation without its words, and say nothing.
Arguments of calls are objects, but for templates that join texts and refuse them.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from megatrain.data.bad_rows import BadRowError
from megatrain.data.messages import Arguments, Message, with_argument_texts

Span = tuple[int, int]

_SAID = ("Qx7 one", "Ax9 two")  # what no template says by itself

# Templates may write today's date: the same data would be other tokens tomorrow. This day stands for all days.
_DAY = datetime(2024, 7, 26)
_DIRECTIVES = [flag + letter for flag in "-_0^#" for letter in "aAbBdejHIklmMpSuUVwWyY"]
_DIRECTIVES += [*"aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZf"]
_WRITTEN = {f"%{one}": _DAY.strftime(f"%{one}") for one in _DIRECTIVES} | {"%s": "1721952000"}  # in no time zone
_PERCENT = "\x00"  # of %%, until all others are written
# A macro of this name hides the function: what is given to a template as a value can be no function.
_STRFTIME = (
    "{% macro strftime_now(format) %}{% set day = namespace(text=format | replace('%%', '"
    + _PERCENT
    + "')) %}{% for directive, written in "
    + repr(_WRITTEN)
    + ".items() %}{% set day.text = day.text | replace(directive, written) %}{% endfor %}{{ day.text | replace('"
    + _PERCENT
    + "', '%') }}{% endmacro %}{{ '' }}"  # after a block, unlike after a value, the next line end would be lost
)


def written(
    template: str,
    names: Mapping[str, str],
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    *,
    ask: bool = False,
    mask: bool = False,
) -> tuple[str, list[Span]]:
    """(the conversation as text, what `{% generation %}` marks in it with `mask`). `ask`: with the beginning of the
    next answer. Raises BadRowError with what the template says of the conversation."""
    given = tuple(sorted(names.items()))
    if _reads_parts(template, given):
        messages = [_in_parts(message) for message in messages]
    if any("tool_calls" in message for message in messages) and _joins_arguments(template, given):
        messages = [with_argument_texts(message) for message in messages]
    return _rendered(template, names, messages, tools, ask=ask, mask=mask)


def _in_parts(message: Message) -> Message:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


@lru_cache(maxsize=16)
def _reads_parts(template: str, names: tuple[tuple[str, str], ...]) -> bool:
    """Whether it writes the words of a conversation only where contents are lists of parts."""
    plain = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), _SAID, strict=True)]
    return not _says_all(template, dict(names), plain) and _says_all(template, dict(names), list(map(_in_parts, plain)))


@lru_cache(maxsize=16)
def _joins_arguments(template: str, names: tuple[tuple[str, str], ...]) -> bool:
    """Whether it refuses a call's arguments as an object, and writes them as OpenAI's text."""
    function = {"name": _SAID[1], "arguments": Arguments({"a": _SAID[0]}, f'{{"a": "{_SAID[0]}"}}')}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    messages: list[Message] = [{"role": "user", "content": "a"}]
    messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    if _reads_parts(template, names):
        messages = [_in_parts(message) for message in messages]
    texts = [with_argument_texts(message) for message in messages]
    return not _says_all(template, dict(names), messages) and _says_all(template, dict(names), texts)


def _says_all(template: str, names: Mapping[str, str], messages: Sequence[Message]) -> bool:
    try:
        text, _ = _rendered(template, names, messages, None)
    except BadRowError:
        return False
    return all(said in text for said in _SAID)


def _rendered(
    template: str,
    names: Mapping[str, str],
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    *,
    ask: bool = False,
    mask: bool = False,
) -> tuple[str, list[Span]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=_STRFTIME + template if "strftime_now" in template else template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=mask,
            **names,
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise BadRowError(f"is refused by the chat template: {' '.join(str(error).split())[:200]}") from error
    return texts[0], [(start, end) for start, end in spans[0]] if mask else []
