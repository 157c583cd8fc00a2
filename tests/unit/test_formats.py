"""Rows in every format become the conversation, completion or pair that they say, or are refused in words."""

import json
from typing import Any

import pytest

from megatrain.data.bad_rows import BadRowError
from megatrain.data.formats import Chat, Completion, Layout, Pair, Text, chosen_format, detect, sample_of


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


QA = [user("q"), assistant("a")]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

ROWS: list[tuple[str, dict[str, Any], Any]] = [
    ("text", {"text": "t"}, Text("t")),
    ("messages", {"messages": [system("s"), *QA]}, Chat([system("s"), *QA])),
    ("messages", {"conversations": QA}, Chat(QA)),
    ("messages", {"messages": QA, "system": "s"}, Chat([system("s"), *QA])),
    ("messages", {"messages": [user("q"), {**assistant("a"), "name": None}]}, Chat(QA)),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, assistant("a")]},
        Chat(QA),
    ),
    (
        "messages",
        {
            "messages": [
                user("q"),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "r"},
                assistant("a"),
            ],
            "tools": json.dumps(TOOLS),
        },
        Chat(
            [
                user("q"),
                {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALLED}]},
                {"role": "tool", "content": "r"},
                assistant("a"),
            ],
            TOOLS,
        ),
    ),
    # in which order roles come, the chat template says
    ("messages", {"messages": [system("s"), assistant("hi"), *QA]}, Chat([system("s"), assistant("hi"), *QA])),
    ("messages", {"messages": [assistant("hi")]}, Chat([assistant("hi")])),
    ("messages", {"messages": [user("p"), *QA, system("s"), *QA]}, Chat([user("p"), *QA, system("s"), *QA])),
    ("messages", {"messages": [*QA, assistant("b")]}, Chat([*QA, assistant("b")])),
    # OpenAI's weight
    (
        "messages",
        {"messages": [user("q"), {**assistant("bad"), "weight": 0}, user("q"), {**assistant("a"), "weight": 1}]},
        Chat([user("q"), assistant("bad"), *QA], unlearned=(1,)),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q", "weight": 0},
                {"from": "gpt", "value": "", "weight": 0},
                {"from": "human", "value": "q", "weight": None},
                {"from": "gpt", "value": "a", "weight": 1.0},
            ]
        },
        Chat([user("q"), assistant(""), *QA], unlearned=(1,)),
    ),
    ("messages", {"messages": None, "conversations": QA}, Chat(QA)),
    ("alpaca", {"instruction": "q", "output": "a"}, Chat(QA)),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, Chat([user("q\ni"), assistant("a")])),
    (
        "alpaca",
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q0", "a0"]]},
        Chat([system("s"), user("q0"), assistant("a0"), *QA]),
    ),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, Chat(QA)),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "a"},
            ],
            "system": "s",
            "tools": "",
        },
        Chat(
            [
                system("s"),
                user("q"),
                {"role": "assistant", "content": "", "tool_calls": [CALLED]},
                {"role": "tool", "content": "r"},
                assistant("a"),
            ]
        ),
    ),
    ("prompt-completion", {"prompt": "p", "completion": "c"}, Completion("p", "c")),
    ("prompt-completion", {"prompt": [user("q")], "completion": [assistant("a")]}, Chat(QA, first=1)),
    (
        "prompt-completion",
        {"prompt": [user("1"), assistant("2"), user("q")], "completion": [assistant("a")]},
        Chat([user("1"), assistant("2"), *QA], first=3),
    ),
    (
        "preference",
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        Pair(Completion("p", "c"), Completion("p", "r")),
    ),
    (
        "preference",
        {"chosen": "Who? Me and you", "rejected": "Who? Me and me"},
        Pair(Completion("Who? Me and ", "you"), Completion("Who? Me and ", "me")),
    ),
    (
        "preference",
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        Pair(Chat(QA, first=1), Chat([user("q"), assistant("b")], first=1)),
    ),
    (
        "preference",
        {"chosen": QA, "rejected": [user("q"), assistant("b")]},
        Pair(Chat(QA, first=1), Chat([user("q"), assistant("b")], first=1)),
    ),
    (  # UltraFeedback: the prompt once more, as a text
        "preference",
        {"prompt": "q", "chosen": QA, "rejected": [user("q"), assistant("b")]},
        Pair(Chat(QA, first=1), Chat([user("q"), assistant("b")], first=1)),
    ),
    (  # LLaMA-Factory, alpaca with ranking
        "preference",
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        Pair(Chat(QA, first=1), Chat([user("q"), assistant("b")], first=1)),
    ),
    (  # LLaMA-Factory, sharegpt with ranking
        "preference",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        Pair(Chat(QA, first=1), Chat([user("q"), assistant("b")], first=1)),
    ),
]


@pytest.mark.parametrize(("form", "row", "sample"), ROWS, ids=[f"{n}-{row[0]}" for n, row in enumerate(ROWS)])
def test_rows_say_what_they_say(form: str, row: dict[str, Any], sample: Any) -> None:
    assert sample_of(row, Layout(form)) == sample
    assert form in detect(row, {}) or "instruction" in row or form == "preference"


def test_columns_of_other_names_and_tags_of_other_words() -> None:
    row = {"chat": [{"who": "me", "what": "q"}, {"who": "you", "what": "a"}], "text": "x"}
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you"}
    assert sample_of(row, Layout("sharegpt", {"messages": "chat"}, tags)) == Chat(QA)


def test_openai_messages_with_tags_are_the_same_conversation() -> None:
    """LLaMA-Factory's `formatting: openai`, with its own words for speakers or without."""
    row = {
        "messages": [
            user("q"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "r"},
            assistant("a"),
        ]
    }
    plain = sample_of(row, Layout("messages"))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    assert isinstance(plain, Chat) and plain.messages[1]["tool_calls"] == [{"id": "1", **CALLED}]
    for form in ("messages", "sharegpt"):
        assert sample_of(row, Layout(form, {"messages": "messages"}, tags)) == plain
    own = [{"r": "me", "c": "q"}, {"r": "it", "c": "a"}, {"r": "call", "c": '{"name": "f", "arguments": {"x": 1}}'}]
    tags = {"role_tag": "r", "content_tag": "c", "user_tag": "me", "assistant_tag": "it", "function_tag": "call"}
    called = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    assert sample_of({"messages": own}, Layout("messages", {}, tags)) == Chat([*QA, called])


def test_parts_that_are_not_to_be_read_are_not_there() -> None:
    row = {"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]], "input": "i", "tools": "x"}
    assert sample_of(row, Layout("alpaca", unread=("system", "history", "input", "tools"))) == Chat(QA)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"body": "t"}, "has no field 'text'; its fields are: body"),
    ("text", {"text": 3}, "has a number in field 'text'; expected a string"),
    ("text", {"text": "\ud800"}, r"has \ud800 by itself in field 'text', which is half of a surrogate pair and no "),
    ("messages", {"a": 1}, "has no field 'messages' or 'conversations'; its fields are: a"),
    ("messages", {"messages": []}, "has an empty conversation in field 'messages'"),
    ("messages", {"messages": "hi"}, "has a string in field 'messages'; expected a list of messages"),
    ("messages", {"messages": ["hi"]}, "has a string as message 1; expected an object with role and content"),
    ("messages", {"messages": [user("q")]}, "has no assistant message to learn"),
    ("messages", {"messages": [user("q"), {**assistant("a"), "weight": 0}]}, "has no assistant message to learn"),
    ("messages", {"messages": [user("q"), {**assistant("a"), "weight": 0.5}]}, "has weight 0.5 in message 2; expected"),
    ("messages", {"messages": [user("q"), {**assistant("a"), "weight": True}]}, "has weight True in message 2; expec"),
    # an empty answer, the same everywhere
    ("messages", {"messages": [user("q"), assistant(" ")]}, "has an empty answer in message 2, from which there is no"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": ""}]}, "has an empty answer in message 1, from which"),
    ("prompt-completion", {"prompt": [user("q")], "completion": [assistant("")]}, "has an empty answer in message 2"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["b", ""]]}, "has an empty answer in message 2"),
    ("preference", {"prompt": [user("q")], "chosen": "a", "rejected": " "}, "has an empty answer in message 2"),
    # null is there, and nothing
    ("messages", {"messages": None, "id": 3}, "has null in field 'messages'"),
    ("text", {"text": None}, "has null in field 'text'"),
    ("prompt-completion", {"prompt": None, "completion": "c"}, "has null in field 'prompt'"),
    (
        "messages",
        {"messages": [{"role": "bot", "content": "x"}]},
        "has role 'bot' in message 1; expected one of system",
    ),
    ("messages", {"messages": [{"role": "user"}]}, "has no content in message 1"),
    ("messages", {"messages": [user("q"), assistant("\udfff")]}, r"has \udfff by itself in content of message 2"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "has a part of type 'image' in message 1, which is no text",
    ),
    ("messages", {"messages": QA, "tools": "{"}, "has no JSON in field 'tools'"),
    ("messages", {"messages": QA, "tools": [1]}, "has a list in field 'tools'; expected a list of objects"),
    ("alpaca", {"instruction": "q"}, "has no field 'output'; its fields are: instruction"),
    ("alpaca", {"instruction": "q", "output": " "}, "has an empty field 'output'"),
    ("alpaca", {"instruction": "", "output": "a"}, "has an empty field 'instruction'"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, "has no list of [question, answer] in field"),
    (
        "sharegpt",
        {"conversations": [{"from": "me", "value": ""}]},
        "has from 'me' in message 1; expected one of system",
    ),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "has no value in message 1"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
        "has a function call that is no JSON in message 2",
    ),
    ("prompt-completion", {"prompt": "p", "completion": " "}, "has an empty field 'completion'"),
    ("prompt-completion", {"prompt": "p"}, "has no field 'completion'; its fields are: prompt"),
    ("preference", {"chosen": "a", "rejected": ["b"]}, "has a string as chosen and a list as rejected"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "has the same answer as chosen and as rejected"),
    ("preference", {"chosen": "one", "rejected": "two"}, "has no field 'prompt', and chosen and rejected do not begin"),
    (
        "preference",
        {"chosen": QA, "rejected": [user("x"), assistant("b")]},
        "has no prompt, and chosen and rejected do",
    ),
]


@pytest.mark.parametrize(("form", "row", "reason"), BAD, ids=[f"{n}-{row[0]}" for n, row in enumerate(BAD)])
def test_bad_rows_say_why(form: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        sample_of(row, Layout(form))
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)


def test_formats_are_told_by_fields() -> None:
    assert detect({"messages": QA, "text": "x"}, {}) == {"messages", "text"}
    assert detect({"conversations": [{"from": "human", "value": "q"}], "text": None}, {}) == {"sharegpt"}
    assert detect({"prompt": "p", "messages": QA}, {}) == {"messages"}
    assert detect({"question": "p", "answer": "c"}, {"prompt": "question", "completion": "answer"}) == {
        "prompt-completion"
    }
    assert detect({"question": "p"}, {}) == set()
    # before two answers a conversation may end with the question
    pair = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    assert detect({"conversations": [{"from": "human", "value": "q"}], **pair}, {}) == {"preference"}


@pytest.mark.parametrize(
    ("found", "method", "chosen"),
    [
        ({"text", "alpaca"}, "auto", "alpaca"),  # tatsu-lab/alpaca
        ({"text", "alpaca"}, "pretrain", "text"),
        ({"messages", "preference"}, "auto", "messages"),  # ultrafeedback_binarized
        ({"messages", "preference"}, "dpo", "preference"),
        ({"alpaca", "messages"}, "auto", None),
        ({"text"}, "dpo", "text"),
        (set(), "sft", None),
    ],
)
def test_of_several_formats_the_method_and_the_most_specific_count(
    found: set[str], method: str, chosen: str | None
) -> None:
    assert chosen_format(found, method) == chosen
