"""Masks of published chat templates: against the formats as their makers document them, written out by hand; against
TRL's training templates; and against transformers' rendering of the prompt that each answer is given to."""

import json
from dataclasses import replace

import published_templates as published
import pytest

from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CODE = "    if x:\n\treturn 1\n\n\n    return 2  # 两\n"
CALL = {"id": "call_1", "name": "weather", "arguments": {"city": "北京", "days": 3}}
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "a city"},
        "days": {"type": "integer", "description": "how many"},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": PARAMETERS}},
]
CASES = {
    "single": Dialogue([user("What is 2+2?"), assistant("It is four.")]),
    "system": Dialogue([{"role": "system", "content": "Be brief."}, user("What is 2+2?"), assistant("Four.")]),
    "multi": Dialogue(
        [user("One?"), assistant("First."), user("Two?"), assistant("第二。"), user("Three?"), assistant("Third.")]
    ),
    "code": Dialogue([user(CODE + "<|im_end|><|eot_id|>"), assistant(CODE)]),
    "reasoning": Dialogue(
        [
            user("One?"),
            assistant("First.", reasoning_content="I think\n\nso"),
            user("Two?"),
            assistant("Second.", reasoning_content="because"),
        ]
    ),
    "tool": Dialogue(
        [
            user("Weather in 北京?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "sunny", "tool_call_id": "call_1", "name": "weather"},
            assistant("It is sunny."),
        ],
        tools=TOOLS,
    ),
}

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}"
    "{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}{{ m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The tools, and the system message, are in the last user's message, so that each answer has another history.
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}"
    "{% set rest = messages %}{% set system = '' %}{% endif %}{% set ns = namespace(last=-1) %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST] ' }}"
    "{% if system and loop.index0 == ns.last %}{{ system + '\n\n' }}{% endif %}{{ m['content'] + '[/INST]' }}"
    "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS] [' }}{% for c in m['tool_calls'] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ ', ' if not loop.first }}{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + ', \"id\": \"' + c.id + '\"}' }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + (m['content'] | tojson) + ', \"call_id\": \"' + m['tool_call_id'] + '\"}[/TOOL_RESULTS]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% elif m['role'] == 'user' %}"
    "{{ '### Instruction:\n' + m['content'] + '\n\n' }}{% else %}{{ '### Response:\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
OWN = {"llama2": LLAMA2, "mistral": MISTRAL, "alpaca": ALPACA}

# What a model writes after the prompt, as the makers' documentation has it. {c}: the answer; {s}, {e}: without white
# space at both ends, at its end; {r}: its reasoning; and how many rows the three answers of "multi" are.
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京", "days": 3}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n北京\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
FORMS = {
    # name: (answer, answer with reasoning, tool call, rows of three turns)
    "llama2": (" {s} </s>", None, None, 1),
    "llama3": ("{s}<|eot_id|>", None, None, 1),
    "llama3_1": ("{s}<|eot_id|>", None, '{"name": "weather", "parameters": {"city": "北京", "days": 3}}<|eot_id|>', 1),
    "llama3_2": ("{s}<|eot_id|>", None, '{"name": "weather", "parameters": {"city": "北京", "days": 3}}<|eot_id|>', 1),
    "qwen2_5": ("{c}<|im_end|>", None, QWEN_CALL + "<|im_end|>", 1),
    "qwen3": (
        "<think>\n\n</think>\n\n{c}<|im_end|>",
        "<think>\n{r}\n</think>\n\n{c}<|im_end|>",
        "<think>\n\n</think>\n\n" + QWEN_CALL + "<|im_end|>",
        3,
    ),
    "qwen3_instruct_2507": ("{c}<|im_end|>", None, QWEN_CALL + "<|im_end|>", 1),
    "qwen3_vl": ("{c}<|im_end|>", None, QWEN_CALL + "<|im_end|>", 1),
    "qwen3_5_think": (
        "\n</think>\n\n{s}<|im_end|>",
        "{r}\n</think>\n\n{s}<|im_end|>",
        "\n</think>\n\n" + XML_CALL + "<|im_end|>",
        3,
    ),
    "qwen3_5_nothink": ("{s}<|im_end|>", None, XML_CALL + "<|im_end|>", 3),
    "qwen3_8": (
        "\n</think>\n\n{s}<|im_end|>",
        "{r}\n</think>\n\n{s}<|im_end|>",
        "\n</think>\n\n" + XML_CALL + "<|im_end|>",
        1,
    ),
    "deepseekv3": (
        "\n</think>\n\n{c}<｜end▁of▁sentence｜>",
        "{r}\n</think>\n\n{c}<｜end▁of▁sentence｜>",
        "\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "北京", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        3,
    ),
    "deepseek_r1_distill": (
        "\n</think>\n\n{c}<｜end▁of▁sentence｜>",
        "{r}\n</think>\n\n{c}<｜end▁of▁sentence｜>",
        None,
        3,
    ),
    "gemma": ("{s}<end_of_turn>", None, None, 1),
    "gemma3": ("{s}<end_of_turn>", None, None, 1),
    "gemma4_v5": (
        "{s}<turn|>",
        "<|channel>thought\n{r}\n<channel|>{s}<turn|>",
        '<|tool_call>call:weather{city:<|"|>北京<|"|>,days:3}<tool_call|><|tool_response>',
        1,
    ),
    "glm4moe": (
        "\n<think></think>\n{s}<|user|>",
        "\n<think>{r}</think>\n{s}<|user|>",
        "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>北京</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call><|observation|>",
        1,
    ),
    "gptoss": (
        "<|channel|>final<|message|>{c}<|return|>",
        "<|channel|>analysis<|message|>{r}<|end|><|start|>assistant<|channel|>final<|message|>{c}<|return|>",
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "北京", "days": 3}<|call|>',
        3,
    ),
    "phi3": ("{c}<|end|>", None, None, 1),
    "phi3_5": ("{c}<|end|>", None, None, 1),
    "cohere": ("{s}<|END_OF_TURN_TOKEN|>", None, None, 1),
    "cohere2": ("{c}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", None, None, 1),
    "lfm2_2_5": (
        "{c}<|im_end|>",
        "<think>{r}</think>{c}<|im_end|>",
        "<|tool_call_start|>[weather(city='北京', days=3)]<|tool_call_end|><|im_end|>",
        1,
    ),
    "nemotron_3_nano": (
        "</think>{e}<|im_end|>",
        "{r}\n</think>\n{s}<|im_end|>",
        "</think>\n" + XML_CALL + "\n<|im_end|>",
        3,
    ),
    "smolvlm": (" {c}<end_of_utterance>", None, None, 1),
    "mistral": (
        " {c}</s>",
        None,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "北京", "days": 3}, "id": "000000000"}]</s>',
        1,
    ),
    "alpaca": ("{c}</s>", None, None, 3),
}
WITHOUT_SYSTEM = ("gemma",)
WITHOUT_TOOLS = ("deepseekv3",)  # it writes calls, and not what may be called


def tokenizer_of(name):
    if name not in OWN:
        return published.tokenizer(name)
    fast = published.tokenizer("llava_next")
    fast.chat_template, fast.name_or_path = OWN[name], name
    return fast


def trained_texts(tokenizer, row) -> list[str]:
    """The text of each run of tokens that carry loss."""
    runs, run = [], []
    for index, trained in zip([*row.ids, 0], [*row.trained, False], strict=True):
        if trained:
            run.append(index)
        elif run:
            runs.append(tokenizer.decode(run, clean_up_tokenization_spaces=False))
            run = []
    return runs


def answers_of(dialogue) -> list[int]:
    return [number for number, message in enumerate(dialogue.messages) if message["role"] == "assistant"]


def check_prompts(chat, dialogue, rows) -> None:
    """Each answer stands right after the ids that inference would ask with."""
    numbers = iter(answers_of(dialogue))
    for row in rows:
        edges = [place for place in range(1, len(row.ids)) if row.trained[place] and not row.trained[place - 1]]
        for edge in edges:
            assert row.ids[:edge] == chat.prompt(dialogue.until(next(numbers)))
    assert next(numbers, None) is None, "an answer carries no loss"


def written(form: str, message: dict) -> str:
    content = message["content"]
    return (
        form.replace("{c}", content)
        .replace("{s}", content.strip())
        .replace("{e}", content.rstrip())
        .replace("{r}", message.get("reasoning_content", "").strip("\n"))
    )


@pytest.mark.parametrize("name", sorted(FORMS))
def test_answers_are_as_their_makers_write_them(name):
    plain, reasoned, call, rows_of_three = FORMS[name]
    tokenizer = tokenizer_of(name)
    chat = Chat(tokenizer)
    for case, dialogue in CASES.items():
        rows = chat.rows([dialogue])[0]
        if case == "tool" and name in WITHOUT_TOOLS:
            assert rows == "the chat template does not write the tools"
            dialogue = replace(dialogue, tools=None)
            rows = chat.rows([dialogue])[0]
        if case == "reasoning" and reasoned is None:
            assert isinstance(rows, str) and "reasoning" in rows
            continue
        if case == "tool" and call is None:
            assert rows == "the chat template does not write tool calls"
            continue
        if case == "system" and name in WITHOUT_SYSTEM:
            assert rows == "the chat template refuses it: System role not supported (line 1 of the template)"
            continue
        assert not isinstance(rows, str), (case, rows)
        expected = []
        for message in dialogue.messages:
            if message["role"] == "assistant":
                form = reasoned if "reasoning_content" in message else plain
                expected.append(call if "tool_calls" in message else written(form, message))
        if case == "tool" and name == "deepseekv3":  # the answer to a tool's result is not asked for with <think>
            expected[-1] = expected[-1].removeprefix("\n</think>\n\n")
        texts = [text for row in rows for text in trained_texts(tokenizer, row)]
        assert texts == expected, case
        if case == "multi":
            assert len(rows) == rows_of_three
        check_prompts(chat, dialogue, rows)
        for row in rows:
            assert row.ids[-1] in chat.end_ids


@pytest.mark.parametrize("name", published.names())
def test_every_published_template_is_used_or_refused_with_a_reason(name):
    """72 files: an answer is always what transformers renders after the prompt, or its difference is a known one."""
    tokenizer = published.tokenizer(name)
    chat = Chat(tokenizer)
    for case, dialogue in CASES.items():
        rows = chat.rows([dialogue])[0]
        if isinstance(rows, str):
            assert case in ("reasoning", "tool") or (case, name) == ("system", "gemma"), (case, rows)
            continue
        check_prompts(chat, dialogue, rows)
        texts = [text for row in rows for text in trained_texts(tokenizer, row)]
        for number, text in zip(answers_of(dialogue), texts, strict=True):
            message = dialogue.messages[number]
            assert message["content"].strip() in text and message.get("reasoning_content", "").strip() in text


# ---- TRL's training templates ----------------------------------------------------------------------------------------

# Their prompt ends with <think>, and TRL's variant teaches an answer that does not close it.
OPEN_THOUGHT = ("deepseek", "nemotron")


def hugging_face(dialogue) -> list[dict]:
    """Messages in the form of transformers and TRL."""
    messages = []
    for message in dialogue.messages:
        message = dict(message)
        if "tool_calls" in message:
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in message["tool_calls"]
            ]
        messages.append(message)
    return messages


@pytest.mark.parametrize("name", published.names(training=True))
def test_masks_equal_those_of_trls_training_templates(name):
    """With the same template, our trained tokens are TRL's without the header of a turn and without what follows its
    end."""
    tokenizer = published.tokenizer(name)
    chat = Chat(tokenizer)
    compared = 0
    for case in ("single", "system", "multi", "reasoning", "tool"):
        # transformers leaves tokens out that are a part of a character
        messages = [{**one, "content": one["content"].replace("第二。", "Second.")} for one in CASES[case].messages]
        dialogue = replace(CASES[case], messages=messages)
        rows = chat.rows([dialogue])[0]
        if isinstance(rows, str) or name.startswith(OPEN_THOUGHT):
            continue
        if name == "diffusion_gemma_training" and case in ("reasoning", "tool"):  # TRL leaves tokens of a turn out
            continue
        texts = [text for row in rows for text in trained_texts(tokenizer, row)]
        for number, text in zip(answers_of(dialogue), texts, strict=True):
            messages = hugging_face(dialogue.until(number + 1))
            if chat.style.parts:
                messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
            theirs = tokenizer.apply_chat_template(
                messages, tools=dialogue.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            runs = trained_texts(tokenizer, _Masked(theirs["input_ids"], theirs["assistant_masks"]))
            prompt = tokenizer.decode(chat.prompt(dialogue.until(number)), clean_up_tokenization_spaces=False)
            header, after = runs[-1].split(text.strip(), 1)
            assert prompt.rstrip().endswith(header.rstrip()), (case, header)
            assert not after.strip() or after.strip() in tokenizer.all_special_tokens, (case, after)
            compared += 1
    assert compared or name.startswith(OPEN_THOUGHT)


class _Masked:
    def __init__(self, ids, mask):
        self.ids, self.trained = ids, [bool(value) for value in mask]


# ---- makers' own tokenizers ------------------------------------------------------------------------------------------

MAKERS_TEMPLATES = {"gptoss": "gptoss", "llama2": None, "llama3_1": "llama3_1"}
FORM_OF = {"deepseek_v3": ("{c}<｜end▁of▁sentence｜>", 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(published.MAKERS))
def test_with_the_makers_tokenizers(name):
    tokenizer = published.makers_tokenizer(name)
    if name in MAKERS_TEMPLATES:
        tokenizer.chat_template = LLAMA2 if name == "llama2" else published.source(MAKERS_TEMPLATES[name])
    chat = Chat(tokenizer)
    form, number = FORM_OF.get(name) or (FORMS[name][0], FORMS[name][3])
    for case in ("single", "system", "multi", "code"):
        dialogue = CASES[case]
        rows = chat.rows([dialogue])[0]
        if (name, case) == ("llama2", "code"):  # its tokenizer cannot encode the answer alone
            continue
        assert not isinstance(rows, str), (case, rows)
        answers = [message for message in dialogue.messages if message["role"] == "assistant"]
        texts = [text for row in rows for text in trained_texts(tokenizer, row)]
        expected = [written(form, message) for message in answers]
        if name == "llama2":  # its decoder drops one space in front
            expected = [text.removeprefix(" ") for text in expected]
        assert texts == expected, case
        check_prompts(chat, dialogue, rows)
        if case == "multi":
            assert len(rows) == number
    for case in ("reasoning", "tool"):
        rows = chat.rows([CASES[case]])[0]
        if not isinstance(rows, str):
            check_prompts(chat, CASES[case], rows)


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "deepseek_r1_distill"])
def test_no_row_shows_reasoning_that_inference_would_not(name):
    """The history in each row is what the template writes of it for the next question."""
    tokenizer = published.tokenizer(name)
    rows = Chat(tokenizer).rows([CASES["reasoning"]])[0]
    assert len(rows) == 2
    first, second = (tokenizer.decode(row.ids) for row in rows)
    assert "I think\n\nso" in first and "I think\n\nso" not in second and "First." in second and "because" in second
    # also where the reasoning is written in the answer itself
    messages = [dict(message) for message in CASES["reasoning"].messages]
    for message in messages:
        if reasoning := message.pop("reasoning_content", None):
            message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
    inline = Chat(tokenizer).rows([Dialogue(messages)])[0]
    if name == "qwen3":  # gpt-oss has a channel for reasoning, and DeepSeek keeps white space after </think>
        assert [row.ids for row in inline] == [row.ids for row in rows]


def test_arguments_are_one_form_for_all_templates():
    """Templates that want JSON text get text, others an object: both write the same call."""
    for name in ("deepseekv3", "qwen3", "llama3_1"):
        tokenizer = published.tokenizer(name)
        rows = Chat(tokenizer).rows([replace(CASES["tool"], tools=None)])[0]
        assert json.dumps(CALL["arguments"], ensure_ascii=False) in tokenizer.decode(rows[0].ids)
