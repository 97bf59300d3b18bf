"""Templates that write the prompt which waits for an answer in another way than the conversation that has it, as
published ones do: each answer is learned right after the prompt that inference asks with.

The templates here are small ones of the same kinds as Mistral's, Baichuan's, GLM-4.7's, Gemma 4's, Command R7B's,
DeepSeek's and Kimi's; what is expected is written out by hand."""

from dataclasses import replace

import published_templates as published
import pytest

from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


ROLES = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + %s + '<|im_end|>\n' }}"
ASK = "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n%s' }}{%% endif %%}"
STRIPPED = "m['content'].split('</think>')[-1].lstrip('\n')"


def turns(answer: str, asked: str = "") -> str:
    """A template whose answers are the expression `answer`, and whose prompt ends with `asked`."""
    other = TURN % "m['content']"
    own = TURN % answer
    body = f"{{% if m['role'] == 'assistant' %}}{own}{{% else %}}{other}{{% endif %}}"
    return f"{{% for m in messages %}}{body}{{% endfor %}}{ASK % asked}"


# The system message is in the user's message that waits for an answer, and in no other.
SYSTEM_IN_THE_LAST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}<s>"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
LINES_BETWEEN = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{ '\n' + m['content'] }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
THOUGHT = "('<think>' + m['reasoning_content'] + '</think>' if m['reasoning_content'] else %s) + m['content']"
# name: (template, row texts of the conversation, each with the part that carries loss in [[ ]])
CONVERSATION = Dialogue([{"role": "system", "content": "S"}, user("1?"), assistant("A."), user("2?"), assistant("B.")])
KINDS = {
    "the system message in the last question": (
        SYSTEM_IN_THE_LAST,
        ["<s>[INST] S\n\n1?[/INST][[ A.</s>]]", "<s>[INST] 1?[/INST] A.</s>[INST] S\n\n2?[/INST][[ B.</s>]]"],
    ),
    "white space that only history has": (
        LINES_BETWEEN.replace("'<|user|>' if", "'<|system|>' if m['role'] == 'system' else '<|user|>' if"),
        [
            "<|system|>\nS\n\n<|user|>\n1?<|assistant|>\n[[A.\n\n<|user|>]]",
            "<|system|>\nS\n\n<|user|>\n1?\n\n<|assistant|>\nA.\n\n<|user|>\n2?<|assistant|>\n[[B.\n\n<|user|>]]",
        ],
    ),
    "an open thought that answers close": (
        turns(THOUGHT % "'</think>'", "<think>"),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n<think>[[</think>A.<|im_end|>]]",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n</think>A.<|im_end|>\n"
            "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n<think>[[</think>B.<|im_end|>]]",
        ],
    ),
    "an empty thought in the prompt alone": (
        turns("m['content']", "<|channel>thought\n<channel|>"),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n<|channel>thought\n<channel|>[[A.<|im_end|>]]",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
            "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n<|channel>thought\n<channel|>[[B.<|im_end|>]]",
        ],
    ),
    "an empty thought, and another one in history": (
        turns("'</think>' + m['content']", "<think></think>"),
        [
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n<think></think>[[A.<|im_end|>]]",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n</think>A.<|im_end|>\n"
            "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n<think></think>[[B.<|im_end|>]]",
        ],
    ),
}
OTHER_TOKENS = ["<|user|>", "<|assistant|>", "<|system|>", "<|channel>", "<channel|>"]


def chat_of(template: str, *more: str) -> Chat:
    from tokenizers import AddedToken

    tokenizer = published.tokenizer("qwen3")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in [*OTHER_TOKENS, "<s>", "</s>", *more]])
    if "<|im_end|>" not in template:
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = template
    return Chat(tokenizer)


def shown(chat: Chat, rows) -> list[str]:
    """The texts of rows, with what carries loss in [[ ]]."""
    assert not isinstance(rows, str), rows
    texts = []
    for row in rows:
        text, before = "", False
        for index, trained in zip(row.ids, row.trained, strict=True):
            text += ("[[" if trained and not before else "]]" if before and not trained else "") + chat.decode([index])
            before = trained
        texts.append(text + "]]")
    return texts


@pytest.mark.parametrize("name", KINDS)
def test_the_answer_follows_the_prompt_that_inference_asks_with(name):
    template, expected = KINDS[name]
    chat = chat_of(template)
    rows = chat.rows([CONVERSATION])[0]
    assert shown(chat, rows) == expected
    for row, number in zip(rows, (2, 4), strict=True):
        assert row.ids[: row.start] == chat.prompt(CONVERSATION.until(number))


def test_code_keeps_its_indentation_after_white_space_that_differs():
    chat = chat_of(LINES_BETWEEN)
    rows = chat.rows([Dialogue([user("1?"), assistant("    if x:\n        y()\n")])])[0]
    assert shown(chat, rows) == ["<|user|>\n1?<|assistant|>\n[[    if x:\n        y()\n\n\n<|user|>]]"]


def test_a_prompt_that_asks_for_something_else_is_refused():
    """The model would be taught to answer in the middle of what the prompt has begun."""
    from pipeline.core.errors import UserError

    with pytest.raises(UserError, match="writes a prompt that waits for an answer differently"):
        chat_of(turns("m['content']", "<judge>\\n"))


def test_reasoning_after_a_closed_thought_is_refused():
    template, _ = KINDS["an empty thought in the prompt alone"]
    rows = chat_of(template).rows([Dialogue([user("1?"), assistant("A.", reasoning_content="because")])])[0]
    assert "asks for answers without reasoning" in rows


# ---- reasoning that templates drop -----------------------------------------------------------------------------------

FIELD = Dialogue(
    [user("1?"), assistant("A.", reasoning_content="so"), user("2?"), assistant("B.", reasoning_content="as")]
)
INLINE = Dialogue(
    [user("1?"), assistant("<think>\nso\n</think>\n\nA."), user("2?"), assistant("<think>\nas\n</think>\n\nB.")]
)
HEAD = "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
REASONED = [
    f"{HEAD}[[<think>\nso\n</think>\n\nA.<|im_end|>]]",
    f"{HEAD}A.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n[[<think>\nas\n</think>\n\nB.<|im_end|>]]",
]


@pytest.mark.parametrize("dialogue", [FIELD, INLINE], ids=["field", "inline"])
@pytest.mark.parametrize(
    "answer", [STRIPPED, f"(m['content'] if loop.last else {STRIPPED})"], ids=["of all answers", "of earlier answers"]
)
def test_a_template_that_removes_thoughts_from_text(answer, dialogue):
    """As DeepSeek-R1-0528's, which removes it from the last answer too, and QwQ's, which knows no field for it: the
    model writes it, so it is learned, and no history shows it."""
    chat = chat_of(turns(answer))
    assert shown(chat, chat.rows([dialogue])[0]) == REASONED


@pytest.mark.parametrize("asked", ["", "<think>"], ids=["closed prompt", "open prompt"])
def test_a_template_that_writes_an_empty_thought_for_every_answer(asked):
    """As Kimi K2's, which shows no reasoning of an answer that calls nothing, the last one included."""
    chat = chat_of(turns("'<think></think>' + m['content']", asked))
    rows = chat.rows([FIELD])[0]
    begin = f"{asked}[[{'' if asked else '<think>'}"
    history = f"{HEAD}<think></think>A.<|im_end|>\n<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n"
    assert shown(chat, rows) == [f"{HEAD}{begin}so</think>A.<|im_end|>]]", f"{history}{begin}as</think>B.<|im_end|>]]"]


def test_reasoning_that_says_what_the_answer_says_is_not_taken_for_it():
    dialogue = Dialogue([user("1?"), assistant("4", reasoning_content="4")])
    assert "does not write the reasoning" in chat_of(turns("m['content']")).rows([dialogue])[0]
    (row,) = shown(chat_of(turns(STRIPPED)), chat_of(turns(STRIPPED)).rows([dialogue])[0])
    assert row == f"{HEAD}[[<think>\n4\n</think>\n\n4<|im_end|>]]"


def test_a_template_that_knows_nothing_of_reasoning_rejects_it():
    rows = chat_of(turns("m['content']")).rows([FIELD])[0]
    assert rows == "the chat template does not write the reasoning of an answer"


# ---- ends, marks and calls -------------------------------------------------------------------------------------------


def test_the_end_of_a_turn_behind_the_end_of_its_text():
    """As Kimi K3's: several tokens with text between them close an answer, and the same ones close a thought."""
    answer = (
        "'<think>' + m['reasoning_content']|default('', true) + '<close>think<sep><open>answer<sep>' + m['content']"
        " + '<close>answer<sep>'"
    )
    chat = chat_of(turns(answer, "<think>"), "<close>", "<open>", "<sep>")
    dialogue = Dialogue([user("1?"), assistant("A.", reasoning_content="so")])
    assert shown(chat, chat.rows([dialogue])[0]) == [
        f"{HEAD}<think>[[so<close>think<sep><open>answer<sep>A.<close>answer<sep><|im_end|>]]"
    ]


def test_white_space_in_front_of_marked_text_is_learned():
    """`ASSISTANT:{% generation %}`: the model writes the space that the template has in front of an answer."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}{% else %}ASSISTANT: "
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    chat = chat_of(template)
    dialogue = Dialogue([user("1?"), assistant("A.")])
    rows = chat.rows([dialogue])[0]
    assert shown(chat, rows) == ["USER: 1?\nASSISTANT:[[ A.</s>]]"]
    assert rows[0].ids[: rows[0].start] == chat.prompt(dialogue.until(1))


CALLS = Dialogue(
    [
        user("1?"),
        assistant("", tool_calls=[{"name": "sky", "arguments": {"city": "Rome"}}, {"name": "sky", "arguments": {"city": "Bari"}}]),
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "wet"},
        assistant("A."),
    ],
    tools=[{"type": "function", "function": {"name": "sky", "description": "d", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}],
)  # fmt: skip
KIMI = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + (m['name'] or m['role']) + '\n' }}{% if m['role'] == 'tool' %}{{ '## Return of ' + m['tool_call_id'] + '\n' }}{% endif %}"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}{{ '<tool_call>' + c['id'] + ' ' + (c['function']['arguments'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{% if tools %}{{ '[TOOLS]' + (tools | tojson) }}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{% if m['tool_call_id'] | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    "{{ '[RESULT]' + m['tool_call_id'] + ' ' + m['content'] }}{% else %}{% for c in m['tool_calls'] or [] %}"
    "{{ '[CALL]' + c['id'] + ' ' + (c['function'] | tojson) }}{% endfor %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("given", [False, True], ids=["without ids", "with ids"])
def test_ids_of_calls_in_the_form_that_a_template_wants(given):
    """Kimi's ids are functions.NAME:NUMBER and say what is called; Mistral's have nine digits. Results that name no
    call, as glaive's, answer the calls in their order."""
    dialogue = CALLS
    if given:
        first, called, one, two, last = CALLS.messages
        calls = [{**call, "id": f"call_{name}"} for name, call in zip("xy", called["tool_calls"], strict=True)]
        results = [{**one, "tool_call_id": "call_y"}, {**two, "tool_call_id": "call_x"}]
        dialogue = replace(CALLS, messages=[first, {**called, "tool_calls": calls}, *results, last])
    chat = chat_of(KIMI)
    (row,) = chat.rows([dialogue])[0]
    text = shown(chat, [row])[0].partition("[[")[2]
    order = (1, 0) if given else (0, 1)
    assert text == (
        '<tool_call>functions.sky:0 {"city": "Rome"}</tool_call><tool_call>functions.sky:1 {"city": "Bari"}</tool_call><|im_end|>]]\n'
        f"<|im_start|>tool\n## Return of functions.sky:{order[0]}\nsunny<|im_end|>\n<|im_start|>tool\n"
        f"## Return of functions.sky:{order[1]}\nwet<|im_end|>\n<|im_start|>assistant\n[[A.<|im_end|>]]"
    )
    chat = chat_of(MISTRAL, "[INST]", "[/INST]", "[CALL]", "[RESULT]", "[TOOLS]")
    (row,) = chat.rows([dialogue])[0]
    text = shown(chat, [row])[0]
    assert f"[RESULT]00000000{order[0]} sunny[RESULT]00000000{order[1]} wet[[A.</s>]]" in text


def test_a_call_behind_the_end_of_an_empty_answer():
    """As GigaChat's, which writes a call as a message of its own, with the same end."""
    template = (
        "{% if tools %}{{ (tools | tojson) }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% for c in m['tool_calls'] or [] %}{{ '<|im_start|>call\n' + (c['function'] | tojson) + '<|im_end|>\n' }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = chat_of(template)
    calls = [{"name": "sky", "arguments": {"city": "Rome"}}]
    dialogue = replace(CALLS, messages=[user("1?"), assistant("", tool_calls=calls)])
    (row,) = chat.rows([dialogue])[0]
    said = '<|im_end|>\n<|im_start|>call\n{"name": "sky", "arguments": {"city": "Rome"}}<|im_end|>'
    assert shown(chat, [row])[0].partition("[[")[2] == f"{said}]]"
