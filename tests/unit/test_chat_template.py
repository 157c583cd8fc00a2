"""Which tokens of a conversation are targets, by templates of several families, written here in short."""

import random
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers, processors

from megatrain.data import chat_template as chat_templates
from megatrain.data.bad_rows import BadRowError
from megatrain.data.chat_template import ChatTemplate, NotDerivableError, joined, without
from megatrain.data.encode import Encoder, encoder_settings
from megatrain.data.formats import Chat, Layout
from megatrain.data.jinja_chat import written
from megatrain.data.tokenizer import train_bpe
from megatrain.train.row_data import chat_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# drops the reasoning of earlier answers and gives the last one an empty block for it
THINKING = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant'"
    " else m.content %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ m.content if '</think>' in m.content else '<think>\n\n</think>\n\n' + m.content }}"
    "{% else %}{{ text }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# asks for an answer with words that it takes back
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# an end only after the last turn, and no token between turns
ONLY_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
_CLOSE = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
ONLY_END += _CLOSE

# reads contents as lists of parts, as templates of models that see do
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the same, marked
MARKED_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content | "
    "selectattr('type', 'equalto', 'text') %}{% if m.role == 'assistant' %}{% generation %}{{ part['text'] }}"
    "{% endgeneration %}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
)
# asks for an answer after a question alone, and fails on no messages
AFTER_QUESTIONS = CHATML.replace(
    "{% if add_generation_prompt %}", "{% if add_generation_prompt and messages[-1]['role'] == 'user' %}"
)
# writes all system messages first
GATHERING = (
    "{% for m in messages if m.role == 'system' %}{{ '<|im_start|>system\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "wörld 𝄞"},
    {"role": "user", "content": " how  are\n\nyou"},
    {"role": "assistant", "content": "fine, thanks "},
]


def tokenizer(template: str, *, trimmed: bool = False, eos: str = "<|eos|>") -> Any:
    made = train_bpe(["hello world, how are you? fine, thanks " * 9], 300)
    made.add_special_tokens({"additional_special_tokens": SPECIAL, "eos_token": eos})
    made.split_special_tokens = False
    made.chat_template = template
    if trimmed:  # llama 3: what a token stands for leaves spaces out
        backend = made.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def encoded(made: Any, messages: list[dict[str, Any]], *, seq_len: int = 10_000, everything: bool = False) -> Any:
    settings = encoder_settings(
        made, Layout("messages"), template=chat_template(made), seq_len=seq_len, everything=everything
    )
    return Encoder(settings).encode([{"messages": messages}])


def learned(made: Any, messages: list[dict[str, Any]]) -> list[str]:
    """The targets as texts, one for each stretch of them."""
    block = encoded(made, messages)
    assert block.bad == [] and block.fatal is None
    given = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    ids = made.apply_chat_template(given, tokenize=True, return_dict=False)
    assert block.tokens.tolist() == ids  # what is trained on is what transformers makes of the conversation
    return stretches_of(made, block)


def stretches_of(made: Any, block: Any) -> list[str]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], block.targets, [False]]).astype(int)))
    return [made.decode(block.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize(
    ("template", "stretches"),
    [
        (CHATML, ["wörld 𝄞<|im_end|>", "fine, thanks <|im_end|>"]),
        (LLAMA3, ["wörld 𝄞<|eot_id|>", "fine, thanks<|eot_id|>"]),
        (MISTRAL, [" wörld 𝄞<|eos|>", " fine, thanks <|eos|>"]),
        (GENERATION, ["wörld 𝄞<|im_end|>", "fine, thanks <|im_end|>"]),
        (THINKING, ["wörld 𝄞<|im_end|>", "<think>\n\n</think>\n\nfine, thanks <|im_end|>"]),
    ],
    ids=["chatml", "llama3", "mistral", "generation", "thinking"],
)
def test_every_assistant_turn_is_learned_with_its_end(template: str, stretches: list[str], trimmed: bool) -> None:
    assert learned(tokenizer(template, trimmed=trimmed), CHAT) == stretches


def test_reasoning_that_is_dropped_is_not_learned() -> None:
    messages = [*CHAT[:1], {"role": "assistant", "content": "<think>hm</think>\n\nyes"}, *CHAT[2:]]
    assert learned(tokenizer(THINKING), messages) == ["yes<|im_end|>", "<think>\n\n</think>\n\nfine, thanks <|im_end|>"]
    assert learned(tokenizer(THINKING), messages[:2]) == ["<think>hm</think>\n\nyes<|im_end|>"]


def test_a_generation_block_without_its_end_takes_it_in() -> None:
    short = GENERATION.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ m.content }}{% endgeneration %}{{ eos_token }}"
    )
    assert learned(tokenizer(short, eos="<|im_end|>"), CHAT[:2]) == ["wörld 𝄞<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (FORGETFUL, "before message 2 it asks for an answer in other words than it keeps"),
        (ONLY_END, "later messages change how message 2 is written"),
    ],
)
def test_what_cannot_be_told_is_not_guessed(template: str, reason: str) -> None:
    made = tokenizer(template)
    block = encoded(made, CHAT)
    assert block.fatal == (0, reason)
    everything = encoded(made, CHAT, everything=True)
    assert everything.fatal is None and everything.targets[1:].all() and not everything.targets[0]


def test_the_end_of_an_only_answer_may_be_the_end_of_all() -> None:
    assert learned(tokenizer(ONLY_END), CHAT[:2]) == ["assistant: wörld 𝄞\n<|eos|>"]  # it writes no name to ask


def test_an_end_after_every_conversation_is_no_part_of_earlier_turns() -> None:
    made = tokenizer(CHATML + _CLOSE)
    last = "fine, thanks <|im_end|>\n<|eos|>"
    assert learned(made, CHAT) == ["wörld 𝄞<|im_end|>", last]
    assert learned(made, [*CHAT, CHAT[0]]) == ["wörld 𝄞<|im_end|>", "fine, thanks <|im_end|>"]
    assert learned(made, [CHAT[1], *CHAT]) == ["wörld 𝄞<|im_end|>", "wörld 𝄞<|im_end|>", last]
    template = chat_template(made)
    assert template is not None and template.end_of_turn() == "<|im_end|>"
    # where later turns change how earlier ones are written
    assert learned(tokenizer(THINKING + _CLOSE), CHAT)[0] == "wörld 𝄞<|im_end|>"


def test_a_conversation_that_a_template_refuses_is_a_bad_row() -> None:
    block = encoded(tokenizer(MISTRAL), [{"role": "system", "content": "s"}, *CHAT])
    assert block.bad == [(0, "is refused by the chat template: Only user and assistant roles are supported!")]


def test_only_what_follows_the_prompt_is_learned() -> None:
    for source in (CHATML, GENERATION, THINKING):
        template = chat_template(tokenizer(source))
        assert template is not None
        rendered = template.render(Chat(CHAT, first=3))
        assert len(rendered.spans) == 1
        assert rendered.text[slice(*rendered.spans[0])].endswith("fine, thanks <|im_end|>")


def test_begin_of_text_comes_once() -> None:
    made = tokenizer(LLAMA3)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", made.bos_token_id)]
    )
    assert encoded(made, CHAT).tokens.tolist().count(made.bos_token_id) == 1
    settings = encoder_settings(made, Layout("prompt-completion"), template=None, seq_len=99, everything=False)
    for prompt in ("hello", "<|bos|>hello"):
        tokens = Encoder(settings).encode([{"prompt": prompt, "completion": " world"}]).tokens.tolist()
        assert tokens[0] == made.bos_token_id and tokens.count(made.bos_token_id) == 1
        assert tokens[-1] == made.eos_token_id and tokens.count(made.eos_token_id) == 1


def test_answers_without_an_end_are_counted() -> None:
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert encoded(tokenizer(bare), CHAT).unended == 2
    assert encoded(tokenizer(bare), CHAT[:2]).unended == 1
    assert encoded(tokenizer(CHATML), CHAT).unended == 0


@pytest.mark.parametrize("form", ["%d %b %Y", "%A, %d %B %Y", "%-d.%-m.%y %H:%M:%S", "%j %U%% %%d", "at %", "today"])
def test_todays_date_is_the_same_on_all_days(form: str) -> None:
    for dated in (
        f"{{% if strftime_now is defined %}}{{{{ 'On ' + strftime_now('{form}') }}}}{{% endif %}}",
        f"\n{{% set f = '{form}' %}}{{% macro day() %}}{{{{ strftime_now(f) }}}}{{% endmacro %}}On {{{{ day() }}}}",
    ):
        text = ChatTemplate(dated + CHATML).render(Chat(CHAT)).text
        plain = ChatTemplate(("\n" if dated[0] == "\n" else "") + "{{ 'On ' }}" + CHATML).render(Chat(CHAT)).text
        assert text == plain.replace("On ", "On " + datetime(2024, 7, 26).strftime(form), 1)


# -- contents as templates read them ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "stretches"),
    [
        (PARTS, ["wörld 𝄞<|im_end|>", "fine, thanks <|im_end|>"]),
        (MARKED_PARTS, ["wörld 𝄞", "fine, thanks "]),
    ],
)
def test_a_template_that_reads_parts_is_given_parts(template: str, stretches: list[str]) -> None:
    made = tokenizer(template)
    block = encoded(made, CHAT)
    in_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    assert block.tokens.tolist() == made.apply_chat_template(in_parts, tokenize=True, return_dict=False)
    assert stretches_of(made, block) == stretches
    assert encoded(made, in_parts).tokens.tolist() == block.tokens.tolist()  # OpenAI's own parts
    assert encoded(tokenizer(CHATML), in_parts).tokens.tolist() == encoded(tokenizer(CHATML), CHAT).tokens.tolist()


CALLS = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look_up"}}]},
    {"role": "tool", "content": "r"},
    CHAT[1],
]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML.replace("m.content", "m.content[:2]"), CHAT, "has an answer in message 2 that the chat template does"),
        (GENERATION.replace("{{ m.content +", "{{"), CHAT, "has an answer in message 2 that the chat template does"),
        (CHATML, CALLS, "has a call of 'look_up' in message 2, which the chat template does not write"),
    ],
)
def test_an_answer_that_is_not_written_is_no_example(
    template: str, messages: list[dict[str, Any]], reason: str, everything: bool
) -> None:
    ((_, found),) = encoded(tokenizer(template), messages, everything=everything).bad
    assert found.startswith(reason)


# writes no answer but the last, and marks all
LAST_ONLY = GENERATION.replace("{{ m.content + '<|im_end|>' }}{% end", "{{ m.content if loop.last }}<|im_end|>{% end")
# writes the tools that there are, as models with tools are told of them
_TOOLS_FIRST = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
_YES = [{"role": "user", "content": "yes or no?"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (GENERATION, CALLS, "has a call of 'look_up' in message 2, which the chat template does not write"),
        (LAST_ONLY, [*_YES, *CHAT[:2]], "has an answer in message 2 that the chat template does not write as it is"),
    ],
)
def test_words_that_stand_elsewhere_are_no_answer(
    template: str, messages: list[dict[str, Any]], reason: str, everything: bool
) -> None:
    """Not in the list of tools, nor in the question."""
    chat = Chat(messages, [{"type": "function", "function": {"name": "look_up"}}])
    with pytest.raises(BadRowError, match=f"^{reason}$"):
        ChatTemplate(_TOOLS_FIRST + template).render(chat, everything=everything)


def test_answers_that_the_template_does_not_mark_are_not_learned() -> None:
    marks_last = GENERATION.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    assert learned(tokenizer(marks_last), [*_YES, *CHAT[:2]]) == ["wörld 𝄞<|im_end|>"]
    unlearned = [_YES[0], {**_YES[1], "weight": 0}, *CHAT[:2]]
    block = encoded(tokenizer(marks_last), unlearned, everything=True)
    assert block.bad == [(0, "has weight 0 in message 2, which the chat template does not mark")]


def test_calls_of_tools_are_learned() -> None:
    calling = CHATML.replace("m.content", "(m.tool_calls[0].function.name if m.tool_calls else m.content)")
    assert learned(tokenizer(calling), CALLS) == ["look_up<|im_end|>", "wörld 𝄞<|im_end|>"]


def test_arguments_are_objects_but_where_a_template_joins_texts() -> None:
    given = '{"city" :"Zürich"}'  # written in no common way, as the user has it
    called = {"name": "look_up", "arguments": given}
    messages = [CALLS[0], {**CALLS[1], "tool_calls": [{"type": "function", "function": called}]}, *CALLS[2:]]
    for arguments, expected in (
        ("f.name + ' ' + f.arguments", given),
        ("f.name + ' ' + f.arguments | tojson", '{"city": "Zürich"}'),
        ("f.name + ' ' + f.arguments.city", "Zürich"),
    ):
        calling = CHATML.replace("m.content", f"(({arguments}) if m.tool_calls else m.content)")
        calling = calling.replace(
            "{{ '<|im_start|>'", "{% set f = (m.tool_calls or [{}])[0].function %}{{ '<|im_start|>'", 1
        )
        made = tokenizer(calling)
        assert stretches_of(made, encoded(made, messages))[0] == f"look_up {expected}<|im_end|>"


def test_conversations_with_tools_go_through_the_template_for_them() -> None:
    made = tokenizer("")
    made.chat_template = {"default": CHATML, "tool_use": "{{ tools | length }}" + CHATML}
    template = chat_template(made)
    assert template is not None
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (None, tools):
        expected = made.apply_chat_template(CHAT, tools=given, tokenize=False)
        assert template.render(Chat(CHAT, given)).text == expected
        assert template.asking(Chat(CHAT[:1], given)) == made.apply_chat_template(
            CHAT[:1], tools=given, tokenize=False, add_generation_prompt=True
        )


def test_turns_that_are_marked_are_told_without_writing_each_again(monkeypatch: pytest.MonkeyPatch) -> None:
    template, calls = ChatTemplate(GENERATION), []
    monkeypatch.setattr(chat_templates, "written", lambda *given, **how: calls.append(how) or written(*given, **how))
    assert len(template.render(Chat(CHAT * 3)).spans) == 6 and len(calls) == 1


# -- orders of roles, weights ----------------------------------------------------------------------------

_SYSTEM = {"role": "system", "content": "be kind"}
_HELLO = {"role": "assistant", "content": "good day"}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GENERATION, THINKING, AFTER_QUESTIONS, GATHERING])
@pytest.mark.parametrize(
    ("messages", "stretches"),
    [
        ([_HELLO, *CHAT[:2]], ["good day", "wörld 𝄞"]),
        ([_SYSTEM, _HELLO, *CHAT[:2]], ["good day", "wörld 𝄞"]),
        ([CHAT[0], *CHAT[:2]], ["wörld 𝄞"]),
        ([*CHAT[:2], _HELLO], ["wörld 𝄞", "good day"]),
        ([_SYSTEM, *CHAT[:2], _SYSTEM, CHAT[0], _HELLO], ["wörld 𝄞", "good day"]),
    ],
    ids=["answer first", "greeting", "two questions", "two answers", "system in the middle"],
)
def test_roles_come_in_any_order_that_the_template_writes(
    template: str, messages: list[dict[str, Any]], stretches: list[str]
) -> None:
    end = "<|eot_id|>" if template == LLAMA3 else "<|im_end|>"
    if template == AFTER_QUESTIONS:  # where it does not ask, the model is to begin its turn, too
        unasked = messages[1:2] == [_HELLO] or (messages[-1:] == [_HELLO] and len(messages) == 3)
        stretches = ["<|im_start|>assistant\n" + one if one == "good day" and unasked else one for one in stretches]
    if template == THINKING:
        stretches = [*stretches[:-1], "<think>\n\n</think>\n\n" + stretches[-1]]
        if messages[-1] != _HELLO or len(messages) > 3:
            messages, stretches = [*messages, CHAT[0]], [text.split("\n")[-1] for text in stretches]
        else:
            return  # two answers: the first is written as an earlier one only when the second is there
    assert learned(tokenizer(template), messages) == [text + end for text in stretches]


@pytest.mark.parametrize("template", [CHATML, GENERATION, MISTRAL, PARTS])
@pytest.mark.parametrize("number", [0, 1])
def test_an_answer_of_weight_0_is_no_target(template: str, number: int) -> None:
    made = tokenizer(template)
    every = encoded(made, CHAT)
    messages = [dict(message) for message in CHAT]
    messages[1 + 2 * number]["weight"] = 0
    messages[3 - 2 * number]["weight"] = 1
    block, everything = encoded(made, messages), encoded(made, messages, everything=True)
    assert block.tokens.tolist() == everything.tokens.tolist() == every.tokens.tolist()
    kept, dropped = stretches_of(made, every)[1 - number], stretches_of(made, every)[number]
    assert stretches_of(made, block) == [kept]
    assert made.decode(everything.tokens[~everything.targets][1:]) == dropped  # the first token is never a target


# where a tool has answered, writes what follows as the assistant's, in every conversation that goes so far
AFTER_TOOL = (
    "{% set t = namespace(open=false) %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '[/RESULT]' if t.open }}{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}<|im_end|>"
    "{% endgeneration %}{% set t.open = false %}{% else %}{{ '<|im_start|>' + m.content }}"
    "{% set t.open = m.role == 'tool' %}{% endif %}{% endfor %}{{ '[/RESULT]' if t.open }}"
)
# the line end between answers is marked with the one before
MARKED_LINES = GENERATION.replace(
    "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>' }}{{ '\n' if not loop.last }}{% endgeneration %}"
)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("template", "messages", "stretches"),
    [
        (AFTER_TOOL, CALLS, ["look_up<|im_end|>", "[/RESULT]wörld 𝄞<|im_end|>"]),
        (MARKED_LINES, CHAT, ["wörld 𝄞<|im_end|>\n", "fine, thanks <|im_end|>"]),
    ],
    ids=["after a tool", "line ends"],
)
def test_marks_belong_to_the_answer_that_they_hold(
    template: str, messages: list[dict[str, Any]], stretches: list[str], number: int
) -> None:
    made, place = tokenizer(template), 1 + 2 * number
    assert stretches_of(made, encoded(made, messages)) == stretches
    weighted = [{**one, "weight": int(at == place)} for at, one in enumerate(messages)]
    assert stretches_of(made, encoded(made, weighted)) == [stretches[number]]
    everything = encoded(made, weighted, everything=True)
    assert made.decode(everything.tokens[~everything.targets][1:]) == stretches[1 - number]


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL, THINKING])
def test_derived_targets_are_those_of_a_generation_mask(source: str) -> None:
    """The same template with the mask written into it, on random conversations."""
    asks = source.index("{% if add_generation_prompt %}") if source != MISTRAL else len(source)
    masked = {
        CHATML: GENERATION,
        LLAMA3: LLAMA3[:asks].replace(
            "m.content | trim + '<|eot_id|>' }}",
            "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}"
            "{% endgeneration %}{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}",
        ),
        MISTRAL: MISTRAL.replace(
            "{{ ' ' + m.content + eos_token }}", "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
        ),
        THINKING: "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}",
    }[source]
    derived, given = tokenizer(source), tokenizer(masked)
    draw = random.Random(7)
    for _ in range(40):
        turns = draw.randint(1, 4)
        words = ["hi", " ", "\n", "é𝄞", "a b ", "</", "assistant", "user:\n", "x" * 30, "."]
        messages = [
            {
                "role": role,
                "content": draw.choice("abc") + "".join(draw.choices(words, k=draw.randint(0, 6))) + draw.choice("xyz"),
            }
            for _ in range(turns)
            for role in ("user", "assistant")
        ]
        one, other = encoded(derived, messages), encoded(given, messages)
        assert one.fatal is None and one.tokens.tolist() == other.tokens.tolist()
        assert one.targets.tolist() == other.targets.tolist()


def test_examples_are_cut_from_the_right_or_left_out() -> None:
    made = tokenizer(CHATML)
    whole = encoded(made, CHAT)
    first = int(np.flatnonzero(whole.targets)[0])
    cut = encoded(made, CHAT, seq_len=first + 2)
    assert (cut.truncated, cut.left_out) == (1, 0)
    assert cut.tokens.tolist() == whole.tokens[: first + 2].tolist() and cut.targets.sum() == 2
    none = encoded(made, CHAT, seq_len=first)
    assert (none.truncated, none.left_out, len(none.tokens)) == (0, 1, 0)


def test_bytes_are_those_of_the_targets() -> None:
    made = tokenizer(CHATML)
    assert encoded(made, CHAT).utf8_bytes == len("wörld 𝄞fine, thanks ".encode())  # no special token's spelling
    words = len("user\nassistant\n\n\n") + len("hellowörld 𝄞".encode())
    assert encoded(made, CHAT[:2], everything=True).utf8_bytes == words
    length = len(encoded(made, CHAT[:2]).tokens)
    assert encoded(made, CHAT[:2], seq_len=length - 2).utf8_bytes == len("wörld 𝄞".encode())
    assert 0 < encoded(made, CHAT[:2], seq_len=length - 7).utf8_bytes < len("wörld 𝄞".encode())


def test_spans_that_touch_are_one_answer() -> None:
    """The end of a turn may be marked for itself, and with the line end after it."""
    split = GENERATION.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
        "{{ m.content }}{% endgeneration %}{% generation %}{{ '<|im_end|>\n' }}{% endgeneration %}",
    )
    block = encoded(tokenizer(split), CHAT)
    assert block.unended == 0 and stretches_of(tokenizer(split), block)[0] == "wörld 𝄞<|im_end|>\n"
    assert joined([(0, 1), (1, 3), (4, 5), (5, 6), (6, 7)]) == [(0, 3), (4, 7)]


def test_an_order_that_hides_whose_words_are_whose_makes_a_bad_row() -> None:
    """Not the end of the run, which a template that hides them always is."""
    merging = (
        "{% for m in messages %}{% if loop.previtem is not defined or loop.previtem.role != m.role %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% endif %}{{ m.content }}"
        "{% if loop.nextitem is not defined or loop.nextitem.role != m.role %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    block = encoded(tokenizer(merging), [*CHAT[:2], _HELLO])
    assert block.fatal is None and block.bad[0][1].startswith("has an order of roles in which the chat template hides")
    assert learned(tokenizer(merging), [CHAT[0], *CHAT[:2]]) == ["wörld 𝄞<|im_end|>"]


def test_weights_go_with_a_template_that_ends_every_conversation() -> None:
    made = tokenizer(MARKED_PARTS + "{{ eos_token }}")
    messages = [dict(message) for message in CHAT]
    messages[1]["weight"] = 0
    assert stretches_of(made, encoded(made, messages)) == ["fine, thanks "]


def test_spans_have_holes() -> None:
    assert without([(0, 9), (12, 20)], [(0, 2), (5, 6), (9, 12), (18, 22)]) == [(2, 5), (6, 9), (12, 18)]
    assert without([(3, 5)], [(0, 9)]) == [] and without([(3, 5)], []) == [(3, 5)]


def test_advice_names_no_setting_that_does_not_help() -> None:
    for everything, pairs in ((False, True), (True, True), (True, False)):
        assert "train_on: all" not in chat_templates.not_derivable("a", "b", everything=everything, pairs=pairs)


def test_a_template_that_fails_in_its_own_way_is_named() -> None:
    template = ChatTemplate("{{ messages[0].content + 1 }}")
    with pytest.raises(BadRowError, match="is refused by the chat template: "):
        template.render(Chat(CHAT))
    with pytest.raises(NotDerivableError):
        ChatTemplate(FORGETFUL, {}, tuple(SPECIAL)).render(Chat(CHAT))
