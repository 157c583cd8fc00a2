"""Conversations as a model's chat template writes them, and which characters of that the model itself is to write.

A template with a generation mask (`{% generation %}`) says so. For others it is derived: what the template writes up to
an assistant's turn, asking for it, must be how the whole conversation begins, and the turn ends where the
conversation up to and with it ends. Nothing is guessed: where neither holds, that is an error. And so is an answer
that does not stand in what the template wrote for it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise, zip_longest

from megatrain.data.bad_rows import BadRowError
from megatrain.data.formats import Chat
from megatrain.data.jinja_chat import Span, written
from megatrain.data.messages import Message
from megatrain.data.said import check_said, texts_of

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "Qx7mark9xQ"  # what nobody says


class NotDerivableError(ValueError):
    """The assistant's turns cannot be told apart from what else the template writes."""


def not_derivable(where: str, error: object, *, everything: bool, pairs: bool = False) -> str:
    """What to say of NotDerivableError. Of pairs only answers are learned; with `everything` it is answers of weight 0
    that have to be told."""
    others = "data.train_on: all, or " if not everything else "no answer there weight: 0, or "
    return (
        f"data.train_on: what the assistant says in {where} cannot be told from the chat template: {error}; give "
        f"{'' if pairs else others}a data.chat_template with {{% generation %}} around what is learned (TRL comes with "
        "such templates of well-known models, trl/chat_templates/*_training.jinja)"
    )


class TemplateSyntaxError(ValueError):
    """The template is no Jinja."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans`: the characters to learn, in order; `unended`: how many of them end with no
    special token, by which the model learns to stop; `plain`: it is no template's, and begin-of-text and end-of-text
    are still to be put around it."""

    text: str
    spans: Sequence[Span]
    unended: int = 0
    plain: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and what it may name: `names` such as bos_token. `special`: texts of all special tokens.
    `with_tools`: the template for conversations that describe tools, where the model has one for them."""

    text: str
    names: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    with_tools: str | None = None

    @property
    def has_generation_mask(self) -> bool:
        return _GENERATION.search(self.text) is not None

    def check(self) -> None:
        """Raise TemplateSyntaxError."""
        from jinja2 import TemplateSyntaxError as JinjaSyntaxError

        try:
            self._written([{"role": "user", "content": "a"}], Chat([]))
        except BadRowError as error:
            if isinstance(error.__cause__, JinjaSyntaxError):
                raise TemplateSyntaxError(f"line {error.__cause__.lineno}: {error.__cause__.message}") from None

    def render(self, chat: Chat, *, everything: bool = False) -> Rendered:
        """The conversation with its assistant turns from `chat.first` on, or all of it, to learn; those of weight 0
        never.

        Raises BadRowError where the template refuses it or leaves out what is said, NotDerivableError where it hides
        which part is whose.
        """
        return self._for(chat)._render(chat, everything=everything)

    def asking(self, chat: Chat) -> str:
        """The conversation as the model is given it to say what comes next. Raises BadRowError."""
        return self._for(chat)._written(chat.messages, chat, ask=True)[0]

    def end_of_turn(self) -> str | None:
        """The special token that follows an answer; None where there is none."""
        manner = _manner(self)
        return None if manner is None else manner.end

    def _for(self, chat: Chat) -> "ChatTemplate":
        """As transformers chooses between a model's templates."""
        return self if chat.tools is None or self.with_tools is None else replace(self, text=self.with_tools)

    def _written(
        self, messages: Sequence[Message], chat: Chat, *, ask: bool = False, mask: bool = False
    ) -> tuple[str, list[Span]]:
        return written(self.text, self.names, messages, chat.tools, ask=ask, mask=mask)

    def _render(self, chat: Chat, *, everything: bool) -> Rendered:
        whole, marked = self._written(chat.messages, chat, mask=self.has_generation_mask)
        if everything:
            self._check_said(chat, whole)
            excepted = self._spans(chat, whole, marked, chat.unlearned) if chat.unlearned else []
            return Rendered(whole, without([(0, len(whole))], excepted))
        spans = self._spans(chat, whole, marked, chat.answers)
        unended = sum(not whole[:end].rstrip().endswith(self.special) for _, end in joined(spans))
        return Rendered(whole, spans, unended)

    def _spans(self, chat: Chat, whole: str, marked: Sequence[Span], turns: Sequence[int]) -> list[Span]:
        """What the assistant says in `turns`, each with the end-of-text token that follows it directly: the model is
        to write it, too."""
        eos = self.names.get("eos_token")
        try:
            masked = self.has_generation_mask
            spans = self._masked(chat, whole, marked, turns) if masked else self._derived(chat, whole, turns)
        except NotDerivableError as error:
            if _in_common_order(chat) or _manner(self) is None:
                raise
            # the template is fine with other rows
            raise BadRowError(
                f"has an order of roles in which the chat template hides whose words are whose: {error}"
            ) from None
        return [(start, end + len(eos) if eos and whole.startswith(eos, end) else end) for start, end in spans]

    def _masked(self, chat: Chat, whole: str, marked: Sequence[Span], turns: Sequence[int]) -> list[Span]:
        """The template's own spans in `turns`. A turn without any is one that the template does not want learned."""
        found: list[Span] = []
        left = [span for span in marked if span[0] < span[1]]
        if _each_holds_its_own(chat, turns, [whole[start:end] for start, end in joined(left)]):
            return left  # which tells without writing the conversation up to each turn
        for stretch in self._stretches(chat, whole):
            # a mark may hold a line end that comes with the next turn, and where others stand behind the answer, too,
            # the next answer's may begin before that turn does
            own = [one for one in left if (one[0] < stretch.end if stretch.exact else one[1] <= stretch.end)]
            left = left[len(own) :]
            wanted = [place for place in stretch.places if place in turns]
            if not wanted:
                continue
            if len(wanted) < len(stretch.places):
                raise NotDerivableError(f"message {stretch.places[0] + 2} changes how those before it are written")
            text = "".join(whole[start:end] for start, end in own) or whole[slice(*self._reach(chat, stretch, whole))]
            for place in wanted:
                said = any(texts_of(chat.messages[place])) or chat.messages[place].get("tool_calls")
                if said and not own and place in chat.unlearned:  # with all else learned, these have to be cut out
                    raise BadRowError(f"has weight 0 in message {place + 1}, which the chat template does not mark")
                check_said(chat.messages[place], place, text)
            found += own
        return found

    def _check_said(self, chat: Chat, whole: str) -> None:
        """Raise BadRowError where an answer does not stand in what the template writes for it."""
        for stretch in self._stretches(chat, whole):
            start, end = self._reach(chat, stretch, whole)
            for place in stretch.places:
                if place in chat.answers:
                    check_said(chat.messages[place], place, whole[start:end])

    def _stretches(self, chat: Chat, whole: str) -> list["_Stretch"]:
        """The conversation cut after its answers. Where that cannot be told, because later messages change how those
        before are written, before the next answer, or after it."""
        answers = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
        found: list[_Stretch] = []
        places: list[int] = []
        begin = 0
        for place, following in zip_longest(answers, answers[1:]):
            places.append(place)
            after = len(whole) if following is None else self._length(chat, place + 1, whole)
            end = self._length(chat, following, whole) if after is None else after
            if end is not None and end >= begin:
                found.append(_Stretch(places, begin, end, after is not None))
                begin, places = end, []
        return found

    def _reach(self, chat: Chat, stretch: "_Stretch", whole: str) -> Span:
        """What the template writes for the answers of a stretch, without what stands before them, if it can be told."""
        begin = self._length(chat, stretch.places[0], whole)
        return (begin if begin is not None and stretch.begin <= begin <= stretch.end else stretch.begin), stretch.end

    def _length(self, chat: Chat, count: int, whole: str) -> int | None:
        """How much of the conversation the template writes for the first `count` messages; None where those after them
        change that."""
        if count == 0:
            return 0
        try:
            text, _ = self._written(chat.messages[:count], chat)
        except BadRowError:
            return None
        return next((len(one) for one in (text, self._unclosed(text)) if whole.startswith(one)), None)

    def _unclosed(self, text: str) -> str:
        """Without the end-of-text by which some templates end every conversation: it is no part of an earlier turn."""
        return text.removesuffix(self.names.get("eos_token", ""))

    def _derived(self, chat: Chat, whole: str, turns: Sequence[int]) -> list[Span]:
        spans: list[Span] = []
        for place in turns:
            start = self._start(chat, place, whole)
            end = self._end(chat, place, whole, start)
            if spans and start < spans[-1][1]:
                raise NotDerivableError(f"message {place + 1} begins before message {place} ends")
            check_said(chat.messages[place], place, whole[start:end])
            spans.append((start, end))
        return spans

    def _start(self, chat: Chat, place: int, whole: str) -> int:
        try:
            asked, _ = self._written(chat.messages[:place], chat, ask=True)
            reason = f"before message {place + 1} it asks for an answer in other words than it keeps"
        except BadRowError as error:
            asked, reason = None, f"it does not write the conversation up to message {place}: {error}"
        if asked is not None and whole.startswith(asked):
            return len(asked)
        manner = _manner(self)
        start = None if manner is None or not manner.asks else self._start_by_mark(chat, place, whole, manner)
        if start is None:
            raise NotDerivableError(reason)
        return start

    def _start_by_mark(self, chat: Chat, place: int, whole: str, manner: "_Manner") -> int | None:
        """Where the conversation up to the message cannot be written by itself: after the words by which the template
        asks elsewhere, right before a mark in place of the message."""
        messages = list(chat.messages)
        messages[place] = {**messages[place], "content": _MARK}
        try:
            marked, _ = self._written(messages, chat)
        except BadRowError:
            return None
        before = marked.partition(_MARK)[0]
        found = re.search(rf"{re.escape(manner.asks)}({re.escape(manner.lead)}|\s*)\Z", before)
        if found is None or before == marked:
            return None
        start = found.start() + len(manner.asks)
        return start if whole.startswith(before[:start]) else None

    def _end(self, chat: Chat, place: int, whole: str, start: int) -> int:
        """Where an answer's last token ends: what follows that up to the next turn, such as a line end, nobody asks
        the model for."""
        try:
            upto, _ = self._written(chat.messages[: place + 1], chat)
        except BadRowError:  # it wants what comes later
            upto = ""
        closed = not whole.startswith(upto)
        if closed:
            upto = self._unclosed(upto)
        if whole.startswith(upto) and len(upto) > start:
            spoken = upto.rstrip()
            if len(spoken) > start and spoken.endswith(self.special):
                return len(spoken)
            if not closed:  # else what ends the answer comes after the last alone
                return len(upto)
        return self._end_of_rewritten(chat.messages[place], place, whole, start)

    def _end_of_rewritten(self, message: Message, place: int, whole: str, start: int) -> int:
        """Where later turns change how an answer is written, such as without its reasoning: at its end-of-turn token,
        if what stands before that is the end of the answer."""
        manner = _manner(self)
        token = None if manner is None else manner.end
        content = "".join(texts_of(message)).strip()
        if token is None or token in content:
            raise NotDerivableError(f"later messages change how message {place + 1} is written")
        found = whole.find(token, start)
        if found < 0 or not whole[start:found].rstrip().endswith(content.rpartition("\n")[2]):
            raise NotDerivableError(f"later messages change how message {place + 1} is written")
        return found + len(token)


@dataclass(frozen=True)
class _Stretch:
    """The characters from `begin` to `end`, which hold the answers `places`; `exact`: they end with the last of those,
    else before the next."""

    places: Sequence[int]
    begin: int
    end: int
    exact: bool


_QUESTION: Message = {"role": "user", "content": "a"}
_ANSWER: Message = {"role": "assistant", "content": _MARK}


@dataclass(frozen=True)
class _Manner:
    """How a template writes an answer to a question: `asks` for it, then perhaps a `lead`, such as an empty block for
    reasoning, the answer, and `end`: the special token after it, None where there is none."""

    asks: str
    lead: str
    end: str | None


def _manner(template: ChatTemplate) -> _Manner | None:
    """None where it asks in other words than it keeps."""
    return _manner_of(template.text, tuple(sorted(template.names.items())), template.special)


@lru_cache(maxsize=8)
def _manner_of(text: str, names: tuple[tuple[str, str], ...], special: tuple[str, ...]) -> _Manner | None:
    try:
        question, asked, whole = (
            written(text, dict(names), messages, None, ask=ask)[0]
            for messages, ask in (([_QUESTION], False), ([_QUESTION], True), ([_QUESTION, _ANSWER], False))
        )
    except BadRowError:
        return None
    if not whole.startswith(asked):
        return None
    lead, _, after = whole[len(asked) :].partition(_MARK)
    if not asked.startswith(question):  # some templates end every conversation with end-of-text
        eos = dict(names).get("eos_token", "")
        question, after = question.removesuffix(eos), after.removesuffix(eos) or after
    end = next((token for token in special if after.rstrip() == token), None)
    asks = asked[len(question) :] if asked.startswith(question) else ""
    return _Manner(asks, lead, end)


_MAY_FOLLOW = {
    "": {"system", "developer", "user"},
    "system": {"user"},
    "developer": {"user"},
    "user": {"assistant"},
    "assistant": {"user", "tool"},
    "tool": {"tool", "assistant", "user"},
}


def _in_common_order(chat: Chat) -> bool:
    """Whether roles take turns, which every template has been made for."""
    roles = ["", *(message["role"] for message in chat.messages)]
    return all(role in _MAY_FOLLOW[before] for before, role in pairwise(roles))


def _each_holds_its_own(chat: Chat, turns: Sequence[int], texts: Sequence[str]) -> bool:
    """Whether all answers of a conversation are in `turns` and stand in as many texts, in order."""
    answers = [place for place, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if list(turns) != answers or len(texts) != len(answers):
        return False
    try:
        for place, text in zip(answers, texts, strict=True):
            check_said(chat.messages[place], place, text)
    except BadRowError:
        return False
    return True


def joined(spans: Sequence[Span]) -> list[Span]:
    """Spans that touch as one."""
    found: list[Span] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def without(spans: Sequence[Span], holes: Sequence[Span]) -> list[Span]:
    """What is left of `spans` outside of `holes`; both are in order."""
    left = []
    for start, end in spans:
        for first, last in holes:
            if first < end and last > start:
                left.append((start, first))
                start = last
        left.append((start, end))
    return [(start, end) for start, end in left if start < end]
