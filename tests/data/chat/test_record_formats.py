"""Formats of records that need no templates: what each becomes, how it is reported, and what a stage says of a record in
no known format."""

import json

import published_templates as published
import pytest
from chat_data import filler, loaded, source_of

from pipeline.core.errors import UserError
from pipeline.data.chat.chat_sources import ChatSource, LabelledSource, PreferenceSource, PromptSource, StepSource
from pipeline.data.chat.conversations import load_conversations, load_labelled, load_pairs, load_prompts, load_stepped
from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "weather", "arguments": {"city": "北京", "days": 3}}
SPELLED = json.dumps(CALL["arguments"], ensure_ascii=False)
FUNCTION = {"name": "weather", "description": "The weather", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
RESULT = {"role": "tool", "content": "sunny"}
USED = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ANSWERED]


def with_id(message: dict, **more) -> dict:
    return {**message, **more}


CALLED_WITH_ID = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]}
OPENAI = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": SPELLED}}

CONVERSATIONS = {
    "messages": (
        {"messages": [ASKED, ANSWERED]},
        [ASKED, ANSWERED],
        "messages (role, content)",
    ),
    "roles": (
        {"messages": [{"role": "developer", "content": "s"}, {"role": "Human", "content": "q"}, {"role": "MODEL", "content": "a"}]},
        [{"role": "system", "content": "s"}, ASKED, ANSWERED],
        "messages (role, content)",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        [{"role": "system", "content": "s"}, ASKED, ANSWERED],
        "ShareGPT (conversations: from, value)",
    ),
    "lmsys": ({"conversation": [ASKED, ANSWERED]}, [ASKED, ANSWERED], "conversation (role, content)"),
    "prompt": ({"prompt": "q", "completion": "a"}, [ASKED, ANSWERED], "prompt + completion"),
    "alpaca": (
        {"instruction": "q", "input": "", "output": "a", "history": [["q0", "a0"]]},
        [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}, ASKED, ANSWERED],
        "Alpaca (instruction, input, output)",
    ),
    "reasoning": (
        {"messages": [ASKED, {**ANSWERED, "reasoning_content": " hm\n"}]},
        [ASKED, {**ANSWERED, "reasoning_content": " hm\n"}],
        "messages (role, content)",
    ),
    "thinking of the record": (
        {"instruction": "q", "output": "a", "thinking": "hm"},
        [ASKED, {**ANSWERED, "reasoning_content": "hm"}],
        "Alpaca (instruction, input, output)",
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "a"}]},
            ]
        },
        [ASKED, {**ANSWERED, "reasoning_content": "hm"}],
        "messages (role, content)",
    ),
    "openai tools": (
        {
            "messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [OPENAI]}, {"role": "tool", "tool_call_id": "c1", "content": "sunny"}, ANSWERED],
            "tools": [TOOL],
        },
        [ASKED, CALLED_WITH_ID, {**RESULT, "tool_call_id": "c1"}, ANSWERED],
        "messages (role, content)",
    ),
    "arguments as an object": (
        {
            "messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}, RESULT, ANSWERED],
            "tools": json.dumps([TOOL]),
        },
        USED,
        "messages (role, content)",
    ),
    "text and call": (
        {"messages": [ASKED, {"role": "assistant", "content": "I look.", "tool_calls": json.dumps([OPENAI])}, {**RESULT, "name": "weather"}, ANSWERED], "tools": [TOOL]},
        [ASKED, {**CALLED_WITH_ID, "content": "I look."}, {**RESULT, "name": "weather"}, ANSWERED],
        "messages (role, content)",
    ),
    "functions": (
        {
            "messages": [ASKED, {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": SPELLED}}, {"role": "function", "name": "weather", "content": "sunny"}, ANSWERED],
            "functions": [FUNCTION],
        },
        [*USED[:2], {**RESULT, "name": "weather"}, ANSWERED],
        "messages (role, content)",
    ),
    "sharegpt tools": (
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "sunny"}, {"from": "gpt", "value": "a"}],
            "tools": json.dumps([FUNCTION]),
        },
        USED,
        "ShareGPT (conversations: from, value)",
    ),
    "glaive": (
        {
            "system": f"SYSTEM: You are helpful. Use these -\n{json.dumps(FUNCTION, indent=4)}\n",
            "chat": f"USER: q\n\n\nASSISTANT: <functioncall> {{\"name\": \"weather\", \"arguments\": '{SPELLED}'}} <|endoftext|>\n\n\nFUNCTION RESPONSE: sunny\n\n\nASSISTANT: a <|endoftext|>\n\n\n",
        },
        [{"role": "system", "content": "You are helpful. Use these"}, *USED],
        "glaive (system, chat)",
    ),
    "glaive with names of speakers in its text": (
        {"system": "", "chat": "USER: the log says USER: bob\n\n\nASSISTANT: An AI ASSISTANT: yes <|endoftext|>"},
        [{**ASKED, "content": "the log says USER: bob"}, {**ANSWERED, "content": "An AI ASSISTANT: yes"}],
        "glaive (system, chat)",
    ),
    "anthropic": (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": CALL["arguments"]}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}]},
                ANSWERED,
            ],
            "tools": [{"name": "weather", "description": "The weather", "input_schema": FUNCTION["parameters"]}],
        },
        [ASKED, CALLED_WITH_ID, {**RESULT, "tool_call_id": "c1"}, ANSWERED],
        "messages (role, content)",
    ),
    "tools with their type beside the name": (
        {"messages": USED, "tools": [{"type": "function", **FUNCTION}]},
        USED,
        "messages (role, content)",
    ),
    "result as an object": (
        {"messages": [*USED[:2], {"role": "tool", "content": {"temp": 3, "天": "晴"}}, ANSWERED], "tools": [TOOL]},
        [*USED[:2], {"role": "tool", "content": '{"temp": 3, "天": "晴"}'}, ANSWERED],
        "messages (role, content)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(tmp_path, name):
    record, messages, form = CONVERSATIONS[name]
    rows, ledger = loaded(tmp_path / "a.jsonl", [record])
    assert rows[1].messages == messages and rows[1].format == form
    assert ledger.sources["s"]["formats"][form] >= 1
    if "tool_calls" in str(messages):
        assert rows[1].tools == [TOOL]
        assert ledger.sources["s"]["with"] == {"tool calls": 1, "tools": 1}
        # all forms are one text
        tokenizer = published.tokenizer("qwen3")
        (row, last) = Chat(tokenizer).rows([rows[1].dialogue])[0]
        said = "I look.\n" if name == "text and call" else ""
        call = f'{said}<tool_call>\n{{"name": "weather", "arguments": {SPELLED}}}\n</tool_call><|im_end|>'
        assert tokenizer.decode(row.ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n" + call)
        assert not any(row.trained[: row.start])
        assert messages[-2]["content"] in tokenizer.decode(last.ids[: last.start])


def test_two_calls_in_one_turn():
    tokenizer = published.tokenizer("qwen3")
    calls = [CALL, {"name": "clock", "arguments": {}}]
    messages = [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    two = Chat(tokenizer).rows([Dialogue(messages)])[0]
    assert tokenizer.decode(two[0].ids).count("<tool_call>") == 2
    refused = Chat(published.tokenizer("llama3_1")).rows([Dialogue(messages)])[0]
    assert refused.startswith("the chat template refuses it: This model only supports single tool-calls at once! (line")


def test_what_a_template_does_not_write_rejects_the_record():
    """Instead of being dropped by the template without a word."""
    chat = Chat(published.tokenizer("llama3"))
    thought = {**ANSWERED, "reasoning_content": "hm"}
    for dialogue, reason in (
        (Dialogue([ASKED, thought]), "the chat template does not write the reasoning of an answer"),
        (Dialogue(USED, [TOOL]), "the chat template does not write tool calls"),
        (Dialogue([ASKED, ANSWERED], [TOOL]), "the chat template does not write the tools"),
        (
            Dialogue([ASKED, ANSWERED], options={"enable_thinking": False}),
            "the chat template does not know `enable_thinking`",
        ),
        (
            Dialogue([ASKED, ANSWERED], options={"documents": [{"text": "d"}]}),
            "the chat template does not know `documents`",
        ),
    ):
        assert chat.rows([dialogue]) == [reason] == chat.encode([dialogue])
    assert chat.rows([Dialogue([ASKED, thought])])[0] == "the chat template does not write the reasoning of an answer"
    call = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
    dropped = Chat(published.tokenizer("llama3_1")).rows([Dialogue([ASKED, call], [TOOL])])[0]
    assert dropped == "the chat template does not write the content of a message of the assistant"
    phi = Chat(published.tokenizer("phi3")).rows([Dialogue([ASKED, RESULT, ANSWERED])])[0]
    assert phi == "the chat template does not write the content of a message of the tool"
    with pytest.raises(ValueError, match="does not write the tools"):
        chat.prompt(Dialogue([ASKED], [TOOL]))


def test_variables_of_the_template(tmp_path):
    """A record may say that its answer was given without thinking: the empty thought is then part of the prompt."""
    record = {"messages": [ASKED, ANSWERED], "chat_template_kwargs": {"enable_thinking": False}}
    same = {"messages": [{**ASKED, "content": "q2"}, ANSWERED], "enable_thinking": False}
    rows, ledger = loaded(tmp_path / "a.jsonl", [record, same])
    assert rows[1].options == rows[2].options == {"enable_thinking": False}
    assert ledger.sources["s"]["with"] == {"template variables": 2}
    tokenizer = published.tokenizer("qwen3")
    chat = Chat(tokenizer)
    (row,) = chat.rows([rows[1].dialogue])[0]
    assert tokenizer.decode(row.ids[row.start :]) == "a<|im_end|>"
    assert tokenizer.decode(row.ids[: row.start]).endswith("<think>\n\n</think>\n\n")
    assert row.ids[: row.start] == chat.prompt(rows[1].dialogue.until(1))


def test_a_table_gives_the_same_rows_as_json_lines(tmp_path):
    """Parquet gives all objects of a column the same keys, with null where one has none: these nulls are not learned."""
    import pyarrow
    import pyarrow.parquet

    records = []
    for number, argument in enumerate(("city", "expression", "days")):
        call = {"name": f"f{number}", "arguments": {argument: {"value": "x", **({"unit": "m"} if number else {})}}}
        parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
        records.append(
            {
                "messages": [
                    {**ASKED, "content": f"q{number}"},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                ],
                "tools": [{"name": f"f{number}", "parameters": parameters}],
            }
        )
    records += [{"messages": [{**ASKED, "content": row["instruction"]}, ANSWERED]} for row in filler()]
    train, heldout, _ = load_conversations(source_of(tmp_path / "a.jsonl", records), 0.3)
    expected = {row.messages[0]["content"]: (row.messages, row.tools) for row in train + heldout}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    train, heldout, _ = load_conversations({"s": ChatSource(path=str(tmp_path / "a.parquet"))}, 0.3)
    assert {row.messages[0]["content"]: (row.messages, row.tools) for row in train + heldout} == expected
    # JSON lines say themselves what is null
    call = {"name": "f", "arguments": {"x": None}}
    record = {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    rows, _ = loaded(tmp_path / "b.jsonl", [record])
    assert rows[1].messages[1]["tool_calls"] == [call]


def test_spellings_of_a_tool_call(tmp_path):
    """Whatever the field of its arguments is called and wherever it is; ids may be numbers."""
    calls = [
        *({"function": {"name": "weather", name: CALL["arguments"]}} for name in ("kwargs", "params", "Arguments", "tool_input")),
        {"function": {"name": "weather"}, "arguments": SPELLED},
        {"name": "weather", "arguments": CALL["arguments"], "parameters": {}},
    ]  # fmt: skip
    records = [
        {"messages": [{**ASKED, "content": f"q{number}"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for number, call in enumerate(calls)
    ]
    for number, name in enumerate(("call_id", "id")):
        call = {"role": "assistant", "content": "", "tool_calls": [{**CALL, name: 5}]}
        result = {**RESULT, "call_id" if name == "call_id" else "tool_call_id": 5}
        records.append({"messages": [{**ASKED, "content": f"id{number}"}, call, result, ANSWERED]})
    rows, _ = loaded(tmp_path / "a.jsonl", records)
    assert [rows[place].messages[1]["tool_calls"] for place in range(1, len(calls) + 1)] == [[CALL]] * len(calls)
    for place in (len(calls) + 1, len(calls) + 2):
        assert rows[place].messages[1:3] == [
            {**CALLED_WITH_ID, "tool_calls": [{**CALL, "id": "5"}]},
            {**RESULT, "tool_call_id": "5"},
        ]


def test_documents_are_given_to_the_template_as_text():
    """What documents say must be written, and not how their fields are called; a token that is spelled in one, or in
    another variable of the template, stays text."""
    tokenizer = published.tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}{{ persona or '' }}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = Chat(tokenizer)
    document = {"doc_id": 7, "title": "t", "text": "a <|im_end|> b"}
    options = {"documents": [document], "persona": "<|im_start|>Ann"}
    (row,) = chat.rows([Dialogue([ASKED, ANSWERED], options=options)])[0]
    assert chat.decode(row.ids).startswith("t: a <|im_end|> b\n<|im_start|>Ann<|im_start|>user\nq<|im_end|>\n")
    turns = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert [row.ids.count(token) for token in turns] == [2, 2]  # of the question and the answer alone
    dropped = Dialogue([ASKED, ANSWERED], options={"documents": [{**document, "body": "not written"}]})
    assert chat.rows([dropped])[0] == "the chat template does not write the documents"


PAIRS = {
    "plain": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt + chosen + rejected"),
    "conversational": (
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [{**ANSWERED, "content": "b"}]},
        "prompt + chosen + rejected",
    ),
    "implicit": (
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {**ANSWERED, "content": "b"}]},
        "chosen + rejected, which begin with the prompt",
    ),
    "llama-factory": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "ShareGPT (conversations: from, value) + chosen + rejected",
    ),
    "llama-factory alpaca": (
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        "Alpaca (instruction, input) + chosen + rejected",
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "transcripts (Human, Assistant)",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tmp_path, name):
    record, form = PAIRS[name]
    rows, _ = loaded(tmp_path / "a.jsonl", [record], load_pairs, PreferenceSource)
    assert rows[1].prompt == [ASKED] and rows[1].format == form
    assert (rows[1].chosen, rows[1].rejected) == (ANSWERED, {**ANSWERED, "content": "b"})


def test_messages_as_json_text(tmp_path):
    """As sets from databases and CSV files have them: read as messages, and never as the text of a user's message."""
    turns, other = [ASKED, ANSWERED], {**ANSWERED, "content": "b"}
    share = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for record in (
        {"messages": json.dumps(turns)},
        {"conversations": json.dumps(share)},
        {"prompt": json.dumps([ASKED]), "completion": json.dumps([ANSWERED])},
        {"prompt": "q", "completion": json.dumps(ANSWERED)},
    ):
        rows, _ = loaded(tmp_path / "a.jsonl", [record])
        assert rows[1].messages == turns
    for record in (
        {"messages": json.dumps(turns)},
        {"prompt": json.dumps([ASKED])},
        {"conversations": json.dumps(share)},
    ):
        rows, _ = loaded(tmp_path / "a.jsonl", [record], load_prompts, PromptSource)
        assert rows[1].messages == [ASKED]
    for record in (
        {"prompt": "q", "chosen": json.dumps([ANSWERED]), "rejected": json.dumps([other])},
        {"messages": json.dumps([ASKED]), "chosen": "a", "rejected": "b"},
        {"chosen": json.dumps(turns), "rejected": json.dumps([ASKED, other])},
    ):
        rows, _ = loaded(tmp_path / "a.jsonl", [record], load_pairs, PreferenceSource)
        assert rows[1].prompt == [ASKED] and (rows[1].chosen, rows[1].rejected) == (ANSWERED, other)
    bad = [
        {"messages": str(turns)},
        {"prompt": str([ASKED])},
        {"conversation": "Human: q"},
        {"prompt": json.dumps(turns)},
    ]
    rows, ledger = loaded(tmp_path / "a.jsonl", bad, load_prompts, PromptSource)
    assert not {1, 2, 3, 4} & set(rows)
    assert list(ledger.sources["s"]["rejected"]) == [
        "`messages` is a text of messages that is not JSON",
        "`prompt` is a text of messages that is not JSON",
        "`conversation` is not a list of messages",
        "the prompt does not end with the user",
    ]
    data = '[{"role": "admin"}]'  # a text about data is a text
    rows, _ = loaded(tmp_path / "a.jsonl", [{"prompt": data, "completion": "a"}])
    assert rows[1].messages[0]["content"] == data


def test_prompts_that_are_transcripts(tmp_path):
    """hh-rlhf's texts with the prompt in a field of its own: turns, and not one message with names of speakers."""
    text = "\n\nHuman: q\n\nAssistant: a\n\nHuman: again\n\nAssistant:"
    turns = [ASKED, ANSWERED, {"role": "user", "content": "again"}]
    rows, _ = loaded(tmp_path / "a.jsonl", [{"prompt": text}], load_prompts, PromptSource)
    assert rows[1].messages == turns
    pair = {"prompt": text, "chosen": " a", "rejected": " b"}
    rows, _ = loaded(tmp_path / "a.jsonl", [pair], load_pairs, PreferenceSource)
    assert rows[1].prompt == turns
    assert (rows[1].chosen["content"], rows[1].rejected["content"]) == ("a", "b")
    rows, _ = loaded(tmp_path / "a.jsonl", [{"prompt": text, "completion": " a"}])
    assert rows[1].messages == [*turns, ANSWERED]


def test_pairs_with_reasoning_and_tools(tmp_path):
    from pipeline.train.preference_data import encode_pairs

    chosen = {"role": "assistant", "content": None, "tool_calls": [OPENAI]}
    records = [
        {"prompt": [ASKED], "chosen": [{**ANSWERED, "reasoning_content": "hm"}], "rejected": [ANSWERED]},
        {"prompt": [{**ASKED, "content": "q2"}], "chosen": [chosen], "rejected": [ANSWERED], "tools": [TOOL]},
    ]
    rows, ledger = loaded(tmp_path / "a.jsonl", records, load_pairs, PreferenceSource)
    tokenizer = published.tokenizer("qwen3")
    arrays = encode_pairs([rows[1], rows[2]], "train", Chat(tokenizer), 4096, ledger)
    answers = [
        tokenizer.decode(arrays[f"train.{which}"][index][arrays["train.start"][index] :])
        for index in (0, 1)
        for which in ("chosen", "rejected")
    ]
    assert answers == [
        "<think>\nhm\n</think>\n\na<|im_end|>",
        "<think>\n\n</think>\n\na<|im_end|>",
        f'<think>\n\n</think>\n\n<tool_call>\n{{"name": "weather", "arguments": {SPELLED}}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\na<|im_end|>",
    ]


LABELLED = [
    ({"prompt": "q1", "completion": "a", "label": True}, True, "prompt + completion + label"),
    ({"messages": [{**ASKED, "content": "q2"}, ANSWERED], "label": False}, False, "messages (role, content) + label"),
    (
        {"conversations": [{"from": "human", "value": "q3"}, {"from": "gpt", "value": "a"}], "kto_tag": "false"},
        False,
        "ShareGPT (conversations: from, value) + kto_tag",
    ),
    ({"instruction": "q4", "output": "a", "label": 1}, True, "Alpaca (instruction, input, output) + label"),
]


def test_judged_answers(tmp_path):
    records = [record for record, _, _ in LABELLED]
    bad = [
        {"prompt": "q5", "completion": "a", "label": "good"},
        {"prompt": "q6", "completion": "a"},
        {"prompt": "q7", "completion": "a", "label": True, "kto_tag": False},
    ]
    extra = [{**row, "label": True} for row in filler()]
    source = source_of(tmp_path / "a.jsonl", [*records, *bad, *extra], LabelledSource)
    train, heldout, ledger = load_labelled(source, 0.3)
    rows = {int(row.place.rpartition(":")[2]): row for row in train + heldout}
    for place, (_, label, form) in enumerate(LABELLED, 1):
        row = rows[place]
        assert (row.label, row.format, row.answer) == (label, form, ANSWERED)
        assert row.prompt == [{**ASKED, "content": f"q{place}"}]
    reasons = list(ledger.sources["s"]["rejected"])
    assert reasons[0] == "`label` is neither true nor false"
    assert reasons[1].startswith(
        "no judged answer among its fields (prompt, completion): expected prompt + completion + label"
    )
    assert reasons[2] == "`label` and `kto_tag` contradict each other"
    templates = {"prompt": "{q}?", "completion": "{a}", "label": "{good}"}
    records = [{"q": f"{row['instruction']}", "a": "x", "good": index % 2} for index, row in enumerate(filler())]
    train, heldout, _ = load_labelled(source_of(tmp_path / "b.jsonl", records, LabelledSource, **templates), 0.3)
    assert sorted(row.label for row in train + heldout) == [False] * 20 + [True] * 20
    with pytest.raises(ValueError, match="completion and label is missing"):
        LabelledSource(path="x", prompt="{q}")


SHEPHERD = (
    "Janet has 3 eggs. She eats 1. How many are left? Step 1: She has 3 - 1 = 2 eggs. ки\nStep 2: The answer is: 2 ки"
)
STEPPED = [
    ({"prompt": "q1", "completions": ["a", "b "], "labels": [True, False]}, ["a", "b "], [True, False]),
    ({"prompt": [{**ASKED, "content": "q2"}], "completions": ["a"], "labels": [1]}, ["a"], [True]),
    (
        {"input": SHEPHERD, "label": SHEPHERD.replace("ки\n", "+\n").replace("ки", "-"), "task": "GSM8K"},
        ["Step 1: She has 3 - 1 = 2 eggs.", "Step 2: The answer is: 2"],
        [True, False],
    ),
]


def test_answers_with_judged_steps(tmp_path):
    """TRL's fields, and a record as Math-Shepherd publishes them; what is not one of both is dropped with its reason."""
    bad = [
        ({"prompt": "q", "completions": ["a"], "labels": [True, False]}, "1 completions have 2 labels"),
        ({"prompt": "q", "completions": ["a"], "labels": ["good"]}, "a label is neither true nor false"),
        ({"prompt": "q", "completions": ["a", " "], "labels": [True, True]}, "a step is empty"),
        ({"prompt": "q", "completions": [], "labels": []}, "the answer has no steps"),
        ({"prompt": "q", "completions": ["a"], "labels": [True], "score": 3}, "the record has `score`"),
        ({"input": "q Step 1: a ки", "label": "q Step 1: b +"}, "`label` is not `input` with + or -"),
        ({"input": "q Step 1: a ки Step 2: b", "label": "q Step 1: a + Step 2: b"}, "`input` does not end with ки"),
        ({"input": "q a ки", "label": "q a +"}, "`input` has no `Step 1:`"),
        ({"prompt": "q", "completion": "a", "label": True}, "no answer with judged steps among its fields"),
    ]
    extra = [{"prompt": f"{row['instruction']}", "completions": ["x", "y"], "labels": [True, True]} for row in filler()]
    records = [record for record, *_ in [*STEPPED, *bad]]
    train, heldout, ledger = load_stepped(source_of(tmp_path / "a.jsonl", [*records, *extra], StepSource), 0.3)
    rows = {int(row.place.rpartition(":")[2]): row for row in train + heldout}
    for place, (_, steps, labels) in enumerate(STEPPED, 1):
        assert (rows[place].steps, rows[place].labels) == (steps, labels)
    assert rows[3].prompt == [{**ASKED, "content": "Janet has 3 eggs. She eats 1. How many are left?"}]
    assert rows[3].format == "Math-Shepherd (input, label)"
    reasons = list(ledger.sources["s"]["rejected"])
    assert len(rows) == len(records) - len(bad) + len(extra)
    for (_, expected), reason in zip(bad, reasons, strict=True):
        assert reason.startswith(expected), (reason, expected)


def test_all_answers_to_a_prompt_are_held_out_together(tmp_path):
    """Sets of judged steps have dozens of answers to a prompt: held out one by one, hardly a prompt would be left."""
    records = []
    for row in filler():
        for number in range(12):
            steps = [f"{row['instruction']} {number} {number * 7919}", f"it is {number * number}"]
            records.append({"prompt": row["instruction"], "completions": steps, "labels": [True, number % 2 == 0]})
    train, heldout, ledger = load_stepped(source_of(tmp_path / "a.jsonl", records, StepSource), 0.3)
    assert "its prompt is held out" not in ledger.sources["s"]["rejected"]
    asked = [{row.prompt[0]["content"] for row in rows} for rows in (train, heldout)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]


@pytest.mark.parametrize(
    "load, kind, record, message",
    [
        (
            load_conversations,
            ChatSource,
            {"question": "q", "answer": "a"},
            r"no conversation among its fields \(question, answer\): expected messages, conversations, prompt \+ completion,"
            r" instruction \+ output, or templates \(first: a.jsonl:1\); give the source templates: messages:"
            r" \[{role: user, content: '{question}'}, {role: assistant, content: '{answer}'}\]",
        ),
        (
            load_conversations,
            ChatSource,
            {"instruction": "q", "response": "a"},
            r"nearest is instruction \+ output, without output .*content: '{response}'",
        ),
        (
            load_conversations,
            ChatSource,
            {"instruction": "q", "output": 4},
            r"or templates; it has instruction \+ output, but `output` is a number",
        ),
        (
            load_pairs,
            PreferenceSource,
            {"prompt": "q", "chosen": "a", "rejected": None},
            r"or templates; it has chosen \+ rejected, but `rejected` is null",
        ),
        (
            load_pairs,
            PreferenceSource,
            {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
            r"prompt: \[{role: system, content: '{system}'}, {role: user, content: '{question}'}\], chosen: '{chosen}'",
        ),
        (load_pairs, PreferenceSource, {"prompt": "q", "chosen": "a"}, r"nearest is prompt \+ chosen \+ rejected, without rejected"),
        (load_prompts, PromptSource, {"frage": "q"}, r"no prompt among its fields \(frage\): expected prompt, instruction, messages"),
    ],
)  # fmt: skip
def test_a_record_in_no_known_format_names_the_nearest(tmp_path, load, kind, record, message):
    with pytest.raises(UserError, match=message):
        load(source_of(tmp_path / "a.jsonl", [record] * 3, kind), 0.3)
