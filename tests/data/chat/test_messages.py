"""Chat records: every field of a record is used, known to be metadata, or a reason to reject it, and text is kept as it
was written (correctness 2, 3, 45)."""

import json

import pytest
import tuned
from chat_data import filler, loaded, source_of

from pipeline.core.errors import UserError
from pipeline.data.chat.chat_sources import ChatSource, PreferenceSource, PromptSource
from pipeline.data.chat.conversations import first_usable, load_conversations, load_pairs, load_prompts
from pipeline.data.chat.template import Chat

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TURNS = [ASKED, ANSWERED]


def reason_of(path, record, load=load_conversations, kind=ChatSource, **keys) -> str:
    """Why the record is rejected."""
    rows, ledger = loaded(path, [record], load, kind, **keys)
    assert 1 not in rows, f"{record} is used: {rows[1]}"
    (found,) = (reason for reason, entry in ledger.sources["s"]["rejected"].items() if "a.jsonl:1" in entry["first"])
    return found


def answer(**fields):
    return {"messages": [ASKED, {**ANSWERED, **fields}]}


# ---- fields that change what should be learned -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "record, reason",
    [
        # reasoning
        (answer(thinking=5), "`thinking` of a message of the assistant is not text"),
        (
            answer(thinking="hm", content="<think>hm</think>a"),
            "a message of the assistant gives its reasoning twice: in a field and in <think>",
        ),
        (answer(thinking="hm", reasoning="so"), "a message of the assistant has two different reasonings"),
        (answer(reasoning_details=[{"text": "hm"}]), "a message of the assistant has `reasoning_details` (reasoning"),
        ({"messages": [{**ASKED, "thinking": "hm"}, ANSWERED]}, "a message of the user has `thinking` (reasoning"),
        ({"messages": [*TURNS, *TURNS], "reasoning": "hm"}, "the record has `reasoning` (reasoning"),
        (
            {"messages": [ASKED, {**ANSWERED, "thinking": "so"}], "reasoning": "hm"},
            "the record has two different reasonings",
        ),
        # tools
        (answer(tool_calls=[{"id": 1}]), "a message of the assistant has a tool call without the name of a function"),
        (answer(tool_calls="[{"), "the tool call of a message of the assistant is not JSON (Expecting property name"),
        (
            answer(tool_calls=[{"function": {"name": "f", "arguments": "{'x': 1}"}}]),
            "`arguments` of a tool call of a message of the assistant is not JSON (Expecting property name",
        ),
        (
            answer(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
            "`arguments` of a tool call of a message of the assistant are not a JSON object",
        ),
        (
            answer(tool_calls=[{"name": "f"}], function_call={"name": "f"}),
            "a message of the assistant gives its tool calls twice",
        ),
        ({"messages": [{**ASKED, "tool_calls": [{"name": "f"}]}, ANSWERED]}, "a message of the user has `tool_calls`"),
        ({"messages": TURNS, "tools": [{"description": "f"}]}, "`tools` has a function without a name"),
        ({"messages": TURNS, "tools": "f(x)"}, "`tools` is not JSON (Expecting value)"),
        (
            {"messages": TURNS, "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
            "the record gives its tools twice",
        ),
        *(
            (answer(tool_calls=[{"function": call}]), f"a message of the assistant has a tool call {reason}")
            for call, reason in (
                ({"name": "f", "action_input": {"x": 1}}, "with `action_input`, which is not a known field"),
                ({"name": "f", "url": "https://x"}, "with `url`, which is not a known field of a call"),
                ({"name": "f", "arguments": {}, "result": "r"}, "with `result`, which is not a known field"),
                ({"name": "f", "arguments": {"x": 1}, "weight": 0}, "with `weight`, which is not a known field"),
                ({"name": "f", "arguments": {"x": 1}, "Parameters": {"y": 1}}, "that gives its arguments twice"),
            )
        ),
        (
            answer(tool_calls=[{"function": {"name": "f"}, "arguments": {"x": 1}, "thought": "t"}]),
            "a message of the assistant has a tool call with `thought`, which is not a known",
        ),
        (
            answer(tool_calls=[{"type": "code_interpreter", "name": "f", "input": {}}]),
            "a message of the assistant has a tool call of type code_interpreter",
        ),
        (
            answer(tool_calls=[{"name": "g", "function": {"name": "f"}}]),
            "a message of the assistant has a tool call with two names",
        ),
        (
            answer(tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}]),
            "`arguments` of a tool call of a message of the assistant has the key `x` twice",
        ),
        (
            answer(tool_calls=[{"function": {"name": "f", "arguments": '{"x": NaN}'}}]),
            "`arguments` of a message of the assistant is not JSON",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "x": 1}'},
                ]
            },
            "a message of the assistant has a tool call with `x`",
        ),
        (
            {"chat": 'USER: q\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": {}} and so on'},
            "a message of the assistant has text after a tool call",
        ),
        # the order of parts
        (
            answer(content=[{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "after"}]),
            "a message of the assistant has text after a tool call",
        ),
        (
            answer(content=[{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "hm"}]),
            "a message of the assistant has reasoning after text",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "q"}, {"type": "tool_result", "content": "r"}],
                    },
                    ANSWERED,
                ]
            },
            "a message of the user has a tool's result after text",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "content": "r", "is_error": True}]},
                    ANSWERED,
                ]
            },
            "a message of the tool has `is_error` (tools), which is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "url": "a.jpg"}]}, ANSWERED]},
            "a part of a message of the user has `url`, which is not a known field of a part",
        ),
        ({"messages": TURNS, "tool_choice": "auto"}, "the record has `tool_choice` (tools), which is not supported"),
        ({"messages": [ASKED, {"role": "tool", "content": None}, ANSWERED]}, "a message of the tool is empty"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a message of the assistant has a tool call"),
        (
            {"system": "SYSTEM: {x", "chat": "USER: q\n\n\nASSISTANT: a"},
            "`system` names a function that is not JSON ({x)",
        ),
        ({"chat": "hello"}, "`chat` is not a transcript that begins with USER: or ASSISTANT:"),
        # content that is not text
        (
            {"messages": [{"role": "user", "content": "<image>q"}, ANSWERED], "images": ["a.png"]},
            "the record has `images`",
        ),
        ({"messages": TURNS, "videos": ["a.mp4"]}, "the record has `videos` (content that is not text)"),
        ({"messages": TURNS, "audios": ["a.wav"]}, "the record has `audios`"),
        ({"instruction": "q", "output": "a", "image": {"bytes": "x"}}, "the record has `image`"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "q"}]},
                    ANSWERED,
                ]
            },
            "a message of the user has a part of type image_url",
        ),
        (
            answer(content=[{"type": "thinking", "thinking": None}, {"type": "text", "text": "a"}]),
            "a message of the assistant has a part without text",
        ),
        (answer(content=[{"type": "text", "text": None}]), "a message of the assistant has a part without text"),
        (
            answer(content=[{"type": "text", "text": "a", "train": False}]),
            "a part of a message of the assistant has `train`",
        ),
        (answer(content=["a", "b"]), "a message of the assistant is not text"),
        # what carries loss
        (answer(weight=-0.5), "a message of the assistant has `weight`: expected true, false, or a number of at least"),
        (answer(weight="much"), "a message of the assistant has `weight`: expected"),
        (answer(weight=0, train=True), "a message of the assistant is marked both"),
        (answer(train=False), "all messages of the assistant are marked not to be trained on"),
        (
            answer(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]),
            "a message of the assistant has `train_d",
        ),
        (answer(mask=1), "a message of the assistant has `mask` (which tokens carry loss)"),
        ({"messages": [{**ASKED, "train": True}, ANSWERED]}, "a message of the user is marked to be trained on"),
        ({"messages": TURNS, "weight": 0}, "the record is marked not to be trained on"),
        ({"messages": TURNS, "loss_mask": [0, 1]}, "the record has `loss_mask` (which tokens carry loss)"),
        (
            {"messages": TURNS, "sample_weight": -2.0},
            "the record has `sample_weight`: expected true, false, or a number",
        ),
        ({"messages": TURNS, "loss": 2.31}, "the record has `loss`: expected true or false"),
        (answer(training=3), "a message of the assistant has `training`: expected true or false"),
        # how good it is
        ({"messages": TURNS, "label": False}, "`label` is false: a bad answer"),
        ({"prompt": "q", "completion": "a", "label": False}, "`label` is false: a bad answer"),
        ({"messages": TURNS, "kto_tag": "false"}, "`kto_tag` is false: a bad answer"),
        ({"messages": TURNS, "label": "spam"}, "the record has `label` that is neither true nor false"),
        ({"messages": TURNS, "score": -3}, "the record has `score` (a judgement of how good it is)"),
        # what the answer depends on
        ({"instruction": "q", "output": "a", "context": "c"}, "the record has `context` (what the answer depends on)"),
        ({"messages": TURNS, "documents": "c"}, "`documents` is not a list"),
        ({"messages": [{**ASKED, "name": "Ann"}, ANSWERED]}, "a message of the user has `name`"),
        (
            {"messages": TURNS, "chat_template_kwargs": {"messages": ["x"]}},
            "`chat_template_kwargs.messages` is not a variable of the chat template that a record may give",
        ),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, *TURNS]},
            "the record has two system messages",
        ),
        ({"system": 5, "messages": TURNS}, "`system` is not text"),
        ({"instruction": "q", "input": ["x"], "output": "a"}, "`input` is not text"),
        ({"instruction": "q", "history": [["q0"]], "output": "a"}, "`history` is not a list of [question, answer]"),
        ({"instruction": "q", "history": "q0", "output": "a"}, "`history` is not a list of [question, answer]"),
        ({"instruction": "q", "history": [["q0", 1]], "output": "a"}, "a message of the assistant is not text"),
        ({"messages": TURNS, "history": [["q0", "a0"]]}, "the record has `history`"),
        # two conversations in one record
        (
            {"messages": TURNS, "conversations": [{"from": "human", "value": "z"}]},
            "the record has `conversations` (another answer",
        ),
        ({"messages": TURNS, "response": "another answer"}, "the record has `response` (another answer"),
        (
            {"conversations": [{"from": "human", "value": "q"}], "chosen": ANSWERED, "rejected": ANSWERED},
            "the record has `chosen` (another answer, or another part",
        ),
        # behind a prefix or a suffix of metadata
        ({"messages": TURNS, "data_input": "x = 1"}, "the record has `data_input`, which is not a known"),
        (
            answer(finish_reason="length"),
            "a message of the assistant has `finish_reason` (length: the answer was cut off)",
        ),
        (
            {"messages": TURNS, "stop_reason": "max_tokens"},
            "the record has `stop_reason` (max_tokens: the answer was cut off)",
        ),
        ({"messages": TURNS, "source_code": "x = 1"}, "the record has `source_code`, which is not a known"),
        (
            {"instruction": "Sum it up.", "output": "a", "original_text": "long"},
            "the record has `original_text`, which is",
        ),
        ({"messages": TURNS, "meta_instruction": "You are Ann."}, "the record has `meta_instruction`, which is not"),
        ({"messages": TURNS, "img_path": "a.png"}, "the record has `img_path`, which is not a known"),
        ({"messages": TURNS, "picture_url": "a.png"}, "the record has `picture_url`, which is not a known"),
        ({"messages": TURNS, "media_files": ["a.png"], "wav_path": "a"}, "the record has `media_files`, which is not"),
        ({"messages": TURNS, "screenshot_path": "x"}, "the record has `screenshot_path`, which is not a known field"),
        ({"messages": TURNS, "figure_url": "x"}, "the record has `figure_url`, which is not a known field"),
        ({"messages": TURNS, "attachment_url": "x"}, "the record has `attachment_url`, which is not a known field"),
        ({"messages": TURNS, "chart_file": "x"}, "the record has `chart_file`, which is not a known field"),
        ({"messages": TURNS, "pdf_path": "x"}, "the record has `pdf_path`, which is not a known field"),
        ({"messages": TURNS, "diagram_path": "x"}, "the record has `diagram_path`, which is not a known field"),
        ({"messages": TURNS, "clip_url": "x"}, "the record has `clip_url`, which is not a known field"),
        ({"messages": TURNS, "menu_url": "x"}, "the record has `menu_url`, which is not a known field"),
        ({"messages": TURNS, "file_bytes": "x"}, "the record has `file_bytes`, which is not a known field"),
        ({"messages": TURNS, "file_diff": "x"}, "the record has `file_diff`, which is not a known field"),
        ({"messages": TURNS, "source_html": "x"}, "the record has `source_html`, which is not a known field"),
        ({"messages": TURNS, "source_knowledge": "x"}, "the record has `source_knowledge`, which is not a known field"),
        ({"messages": TURNS, "data_answer": "x"}, "the record has `data_answer`, which is not a known field"),
        ({"messages": TURNS, "meta_persona": "x"}, "the record has `meta_persona`, which is not a known field"),
        (
            {"messages": [{**ASKED, "content": "<image>q"}, ANSWERED], "file_name": "a.png"},
            "the record has `file_name` and <image> in its text",
        ),
        (
            {"messages": [{**ASKED, "content": "q <|image_1|>"}, ANSWERED], "image_path": None, "path": "a.png"},
            "the record has `path` and <|image_1|> in its text",
        ),
        # what metadata says of the loss
        ({"messages": TURNS, "metadata": {"weight": 0}}, "the record has `metadata` (its `weight` says which tokens"),
        (
            {"messages": TURNS, "meta": {"a": {"train": False}}},
            "the record has `meta` (its `a.train` says which tokens",
        ),
        ({"messages": TURNS, "extra_info": '{"lossMask": [0, 1]}'}, "the record has `extra_info` (its `lossMask` says"),
        (answer(metadata={"train": "false"}), "a message of the assistant has `metadata` (its `train` says which"),
        # nobody knows
        ({"messages": TURNS, "frobnicate": 1}, "the record has `frobnicate`, which is not a known field"),
        (answer(frobnicate="x"), "a message of the assistant has `frobnicate`, which is not a known"),
    ],
)
def test_a_field_that_changes_what_is_learned_rejects_the_record(tmp_path, record, reason):
    """correctness 2"""
    assert reason_of(tmp_path / "a.jsonl", record).startswith(reason)


def test_metadata_and_empty_fields_do_not(tmp_path):
    """correctness 2: harmless fields of a record and of a message, fields that say nothing, and what is written
    twice, as published sets have them."""
    metadata = {
        "id": 7,
        "source": "forum",
        "lang": "zh",
        "language": "Chinese",
        "category": "coding",
        "topic": "sorting",
        "tags": ["a"],
        "model": "m",
        "created_at": "2024-01-01",
        "num_turns": 2,
        "conversation_hash": "f00",
        "prompt_id": "p",
        "metadata": {"x": [1], "weight": 1.0, "train": True, "loss": None},
        "meta": "x",
        "url": "https://example.org",
        "difficulty": "hard",
        "license": "CC0",
        "token_count": 12,
        "__index_level_0__": 3,
        "timestamp": 1.5,
        "original_id": 4,
        "source_file": "x.txt",
        "source_url": "https://example.org",
        "source_dataset": "d",
        "repo_path": "a/b",
        "meta_info": "x",
        "created_by": "x",
        "n_shots": 5,
        "document_id": 3,
        "来源": "知乎",
        "类别": "编程",
        "编号": 12,
    }
    nothing = {
        "tools": [],
        "images": None,
        "reasoning": "",
        "system": "",
        "history": [],
        "functions": "[]",
        "weight": None,
        "frobnicate": None,
        "context": {"text": None},
    }
    twice = {
        "prompt": "q",
        "text": "### Q: q ### A: a",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    }
    records = [
        {"messages": TURNS, **metadata},
        {"messages": [{**ASKED, "content": "q2"}, ANSWERED], **nothing},
        {"messages": TURNS, "label": True, **twice, "id": "other"},
        {"messages": [{**ASKED, "content": "q4", "id": 1, "timestamp": 2}, {**ANSWERED, "tool_calls": None, "weight": 1, "train": True}]},
        {"instruction": "q5", "input": "", "output": "a", "text": "Below is an instruction ... q5 ... a", "history": None},
        {"conversations": [{"from": "human", "value": "q6", "weight": 0.0}, {"from": "gpt", "value": "a", "weight": 1.0}]},
        {"messages": None, "conversations": None, "instruction": "q7", "output": "a"},
        # a set of pairs that also has the chosen conversation as messages
        {"messages": [{**ASKED, "content": "q8"}, ANSWERED], "prompt": "q8", "chosen": [{**ASKED, "content": "q8"}, ANSWERED],
         "rejected": [{**ASKED, "content": "q8"}, {**ANSWERED, "content": "b"}], "score_chosen": 8.0, "score_rejected": 3.0},
    ]  # fmt: skip
    rows, ledger = loaded(tmp_path / "a.jsonl", records)
    assert {place for place in range(1, 9) if place not in rows} == {3}  # the conversation of the first, again
    assert list(ledger.sources["s"]["rejected"]) == ["duplicate"]
    assert all("weight" not in message for row in rows.values() for message in row.messages)


def test_ignored_fields_are_read_as_though_they_were_not_there(tmp_path):
    """correctness 2"""
    records = [
        {
            "messages": [{**ASKED, "name": "Ann"}, {**ANSWERED, "reasoning_content": "hm"}],
            "score": 3,
            "frobnicate": [1],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "rate it", "score": 1}]},
                {**ANSWERED, "tool_calls": [{"function": {"name": "rate", "arguments": {"score": 5}}}]},
            ]
        },
    ]
    rows, _ = loaded(tmp_path / "a.jsonl", records, ignore=["name", "reasoning_content", "score", "frobnicate"])
    assert rows[1].messages == TURNS and rows[2].messages[0]["content"] == "rate it"
    assert rows[2].messages[1]["tool_calls"] == [{"name": "rate", "arguments": {"score": 5}}]  # not fields of a record
    with pytest.raises(ValueError, match="'content' carries the conversation itself"):
        ChatSource(path="a.jsonl", ignore=["content"])


def test_a_name_in_ignore_that_no_record_has_is_reported(tmp_path, capsys):
    parts = [{"type": "text", "text": "q", "rate": 1}]
    records = [{"messages": [{"role": "user", "content": parts}, {**ANSWERED, "mood": "calm"}], "score": 3}]
    _, ledger = loaded(tmp_path / "a.jsonl", records, ignore=["rate", "mood", "score", "scoer"])
    ledger.judge(1.0)
    said = capsys.readouterr().out
    assert "WARNING sources.s.ignore: no record has scoer; remove or correct the name" in " ".join(said.split())


def test_fields_that_the_source_names_have_a_meaning(tmp_path):
    """correctness 2: what `where` selects by, and what `answer` is read from, is not left out."""
    source = source_of(
        tmp_path / "a.jsonl",
        [{**row, "score": index % 3, "answer": {"text": "x"}} for index, row in enumerate(filler())],
        where={"score": [1, 2]},
        answer="{answer.text}",
    )
    train, heldout, ledger = load_conversations(source, 0.3)
    assert len(train) + len(heldout) == 26 and not ledger.sources["s"]["rejected"]
    assert {row.answer for row in train} == {"x"}


def test_a_source_of_such_records_says_what_to_do(tmp_path):
    """correctness 2, 45"""
    source = source_of(tmp_path / "a.jsonl", [{"messages": TURNS, "frobnicate": index} for index in range(1, 4)])
    with pytest.raises(
        UserError, match=r"none of its 3 records can be used: 3 x the record has `frobnicate`.*ignore: \[frobnicate\]"
    ):
        load_conversations(source, 0.3)
    # all fields in one go
    odd = {"messages": TURNS, "frobnicate": 1, "score": 2, "标签": "x"}
    with pytest.raises(UserError, match=r"has `score` .*ignore: \[score, frobnicate, 标签\]` to train without"):
        load_conversations(source_of(tmp_path / "odd.jsonl", [odd]), 0.3)
    with pytest.raises(UserError, match="none of its 2 records can be used"):
        first_usable(source["s"], "s", most=2)
    rows = [{"messages": []}, {"messages": TURNS}]
    source = source_of(tmp_path / "b.jsonl", rows)["s"]
    assert first_usable(source, "s").messages == TURNS
    with pytest.raises(UserError, match="1 x too odd"):
        first_usable(source, "s", encode=lambda row: "too odd")
    with pytest.raises(UserError, match="no records after where"):
        first_usable(ChatSource(path=source.path, where={"x": 1}), "s")


# ---- fields with a meaning -------------------------------------------------------------------------------------------


def test_history_becomes_turns(tmp_path):
    """correctness 2: as LLaMA-Factory reads Alpaca's history, before the instruction."""
    record = {"instruction": "q3", "input": "i", "output": "a3", "history": [["q1", "a1"], ["q2", "a2"]], "system": "s"}
    rows, _ = loaded(tmp_path / "a.jsonl", [record])
    said = [(message["role"], message["content"]) for message in rows[1].messages]
    assert said == [("system", "s"), *(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")), ("user", "q3\ni"), ("assistant", "a3")]  # fmt: skip
    prompts, _ = loaded(tmp_path / "b.jsonl", [record], load_prompts, PromptSource)
    assert prompts[1].messages == [
        {key: message[key] for key in ("role", "content")} for message in rows[1].messages[:-1]
    ]
    pair = {**record, "chosen": "good", "rejected": "bad"}
    pairs, _ = loaded(
        tmp_path / "c.jsonl", [{key: pair[key] for key in pair if key != "output"}], load_pairs, PreferenceSource
    )
    assert pairs[1].prompt == prompts[1].messages and pairs[1].chosen["content"] == "good"


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"loss": 0}, {"weight": "0"}, {"training": False}, {"loss_weight": 0.0}]
)
def test_a_message_marked_not_to_be_trained_on_carries_no_loss(tmp_path, flag):
    """correctness 2: the wrong answer is read and not learned; its correction is."""
    tokenizer = tuned.tokenizer(tmp_path)
    key = next(iter(flag))
    record = {
        "messages": [
            {"role": "user", "content": "kind of cat?"},
            {"role": "assistant", "content": "metal", **flag},
            {"role": "user", "content": "no"},
            {"role": "assistant", "content": "animal", key: 1},
            {"role": "user", "content": "thanks"},
            {"role": "assistant", "content": "never mind", key: 0},
        ]
    }
    rows, _ = loaded(tmp_path / "a.jsonl", [record])
    assert len(rows[1].messages) == 4  # nothing that is learned can see what follows
    ((row,),) = Chat(tokenizer).rows([rows[1].messages])
    assert (
        tokenizer.decode([token for token, trained in zip(row.ids, row.trained, strict=True) if trained])
        == "animal<|im_end|>"
    )
    plain = [{key: message[key] for key in ("role", "content")} for message in rows[1].messages]
    assert row.ids == Chat(tokenizer).encode([plain])[0].ids
    # in another order the first is learned alone, and the second is cut off
    flipped = [{"role": "user", "content": "q"}, ANSWERED, ASKED, {**ANSWERED, "content": "b", "weight": 0.0}]
    ((row,),) = Chat(tokenizer).rows([flipped])
    assert row.ids == Chat(tokenizer).encode([flipped[:2]])[0].ids


def test_weights_of_messages_and_records_reach_the_tokens(tmp_path):
    """A weight of an answer, times that of its record, is the weight of each of its tokens in the loss."""
    tokenizer = tuned.tokenizer(tmp_path)
    record = {
        "messages": [ASKED, {**ANSWERED, "weight": 0.5}, ASKED, {"role": "assistant", "content": "b"}],
        "sample_weight": "3",
    }
    rows, _ = loaded(tmp_path / "a.jsonl", [record])
    ((row,),) = Chat(tokenizer).rows([rows[1].messages])
    plain = [{key: message[key] for key in ("role", "content")} for message in rows[1].messages]
    ((oracle,),) = Chat(tokenizer).rows([plain])
    assert (row.ids, row.trained) == (oracle.ids, oracle.trained) and oracle.weights is None
    weights = [weight for weight, trained in zip(row.weights, row.trained, strict=True) if trained]
    first = len(tokenizer.encode("a", add_special_tokens=False)) + 1
    assert weights == [1.5] * first + [3.0] * (len(weights) - first)
    assert all(weight == 0 for weight, trained in zip(row.weights, row.trained, strict=True) if not trained)


def test_scores_of_a_pair_stop_neither_its_prompt_nor_its_order(tmp_path):
    """correctness 2: files of pairs also give prompts for PPO; their scores are of answers that are not read."""
    pair = {"chosen": "a", "rejected": "b"}
    for better, worse in (
        ("score_chosen", "score_rejected"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_avg_rating", "rejected_avg_rating"),
        ("reward_chosen", "reward_rejected"),
    ):
        records = [{"prompt": "q1", **pair, better: 3, worse: 1}, {"prompt": "q2", **pair, better: 1.0, worse: 2.0}]
        prompts, _ = loaded(tmp_path / "a.jsonl", records, load_prompts, PromptSource)
        assert prompts[1].text == "q1" and prompts[2].text == "q2"
        pairs, ledger = loaded(tmp_path / "b.jsonl", records, load_pairs, PreferenceSource)
        assert 1 in pairs and 2 not in pairs
        assert any(" is below " in reason for reason in ledger.sources["s"]["rejected"])


def test_prompts_keep_their_system_message_and_earlier_turns(tmp_path):
    """correctness 2: a `system` field for PPO prompts."""
    system = {"role": "system", "content": "be brief"}
    again = {"role": "user", "content": "again"}
    records = [
        {"prompt": "q1", "system": "be brief"},
        {"messages": [system, ASKED, ANSWERED]},
        {"system": "be brief", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "again"}]},
        {"messages": [*TURNS, {"role": "user", "content": "something quite different"}, ANSWERED]},
        {"prompt": [system, again], "solution": "x", "reward_model": {"ground_truth": "x"}, "ability": "math", "data_source": "d"},
        {"prompt": "q6", "completion": "a", "label": False, "score": 1},
        {"prompt": "q7", "tools": [{"name": "f"}]},
        {"prompt": [{**ANSWERED, "reasoning_content": "hm"}, ASKED]},
        {"prompt": "q9", "system": ["x"]},
        {"prompt": "q10", "images": ["a.png"]},
        {"prompt": [ASKED, ANSWERED]},
        {"messages": [system]},
    ]  # fmt: skip
    rows, ledger = loaded(tmp_path / "a.jsonl", records, load_prompts, PromptSource)
    assert [rows[place].messages for place in range(1, 7)] == [
        [system, {"role": "user", "content": "q1"}],
        [system, ASKED],
        [system, *TURNS, again],
        [*TURNS, {"role": "user", "content": "something quite different"}],
        [system, again],
        [{"role": "user", "content": "q6"}],
    ]
    assert rows[7].tools == [{"type": "function", "function": {"name": "f"}}] and rows[7].text == "q7"
    assert rows[8].messages[0]["reasoning_content"] == "hm"
    assert not {9, 10, 11, 12} & set(rows)
    found = {entry["first"][0]: reason for reason, entry in ledger.sources["s"]["rejected"].items()}
    assert found["a.jsonl:9"] == "`system` is not text" and "`images`" in found["a.jsonl:10"]
    assert found["a.jsonl:11"] == "the prompt does not end with the user"
    assert rows[6].text == "q6" and rows[1].text == "system: be brief\n\nuser: q1"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "{instruction}?"}]
    rows, _ = loaded(tmp_path / "b.jsonl", [{"instruction": " x"}], load_prompts, PromptSource, prompt=turns)
    assert rows[1].messages == [system, {"role": "user", "content": " x?"}]


def test_pairs(tmp_path):
    """correctness 2, 29: fields of pairs, and lists where texts are expected."""
    good, bad = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
    pair = {"chosen": "good", "rejected": "bad"}
    records = [
        {"prompt": "q1", **pair, "score_chosen": 9, "score_rejected": 2, "prompt_id": "x", "source": "s"},
        {
            "prompt": "q2",
            "chosen": [{**ASKED, "content": "q2"}, good],
            "rejected": [{**ASKED, "content": "q2"}, bad],
            "messages": [{**ASKED, "content": "q2"}, good],
        },
        {"prompt": "q3", **pair, "margin": 2, "system": "s"},
        {"prompt": [{**ASKED, "content": "q4"}, {**ANSWERED, "weight": 0}, ASKED], **pair},
        {"prompt": "q5", **pair, "score_chosen": 2, "score_rejected": 9},
        {"prompt": "q6", **pair, "margin": "nan"},
        {"prompt": "q7", **pair, "tools": [{"name": "f"}]},
        {"prompt": "q8", "chosen": {**good, "reasoning_content": "hm"}, "rejected": bad},
        {"prompt": "q9", "chosen": {**good, "train": False}, "rejected": bad},
        {"prompt": "q10", "chosen": ["good"], "rejected": ["bad"]},
        {"prompt": ["q11"], **pair},
        {"prompt": "q12", "chosen": [], "rejected": []},
        {"prompt": "q13", "chosen": 5, "rejected": {"a": "b"}},
        {"prompt": "q14", **pair, "label": True},
        {"prompt": 15, **pair},
        {"prompt": "q16", "chosen": "good\ud800", "rejected": "bad"},
        {"prompt": "q17", **pair, "images": ["x"]},
        {"prompt": "q18", "chosen": "  indented", "rejected": "indented"},
        {"prompt": "q19", **pair, "weight": 2},
        {"prompt": "q20", "chosen": {**good, "loss_weight": 0.5}, "rejected": bad},
        {"prompt": "q21", **pair, "margin": -1},
        {"prompt": "q22", **pair, "score_chosen": 5, "score_rejected": 5.0},
        {"prompt": "q23", "chosen": "q23\ngood", "rejected": "q23\nbad"},
        {"prompt": "q24", "chosen": "q24 good", "rejected": "q24 bad"},
    ]
    rows, ledger = loaded(tmp_path / "a.jsonl", records, load_pairs, PreferenceSource)
    assert {place for place in range(1, 25) if place in rows} == {1, 2, 3, 4, 7, 8, 18, 24}
    assert [rows[place].margin for place in (1, 2, 3, 4)] == [0.0, 0.0, 2.0, 0.0]
    assert rows[3].prompt[0] == {"role": "system", "content": "s"} and rows[18].chosen["content"] == "  indented"
    assert all("weight" not in message for message in rows[4].prompt)
    assert rows[7].tools[0]["function"]["name"] == "f" and rows[8].chosen["reasoning_content"] == "hm"
    found = {place: reason for reason, entry in ledger.sources["s"]["rejected"].items() for place in entry["first"]}
    for place, reason in {
        5: "score_chosen is below score_rejected",
        6: "margin is not a number",
        9: "chosen is marked not to be trained on",
        10: "a message has no role and content",
        11: "a message has no role and content",
        12: "an empty answer",
        13: "`chosen` is not text",
        14: "the record has `label`",
        15: "`prompt` is not text",
        16: "a message of the assistant has half a character",
        17: "the record has `images`",
        19: "the record has the weight 2; weights are only supported in conversations",
        20: "chosen has the weight 0.5",
        21: "margin is negative: it says that the rejected answer is better",
        22: "score_chosen equals score_rejected: neither answer is better",
        23: "chosen and rejected begin with the text of the prompt",
    }.items():
        assert found[f"a.jsonl:{place}"].startswith(reason), (place, found[f"a.jsonl:{place}"])


def test_a_margin_that_the_loss_does_not_know_is_refused(tmp_path):
    """correctness 2: reward models learn margins; in DPO the key is refused and such pairs are left out."""
    from pipeline.dpo import Config
    from pipeline.train.preference_data import encode_pairs

    records = [
        {"prompt": "q1 is this", "chosen": "good", "rejected": "bad", "margin": 2},
        {"prompt": "another one", "chosen": "x", "rejected": "y", "margin": 0},
    ]
    chat = Chat(tuned.tokenizer(tmp_path))
    for margins, places in ((True, [1, 2]), (False, [2])):
        rows, ledger = loaded(tmp_path / "a.jsonl", records, load_pairs, PreferenceSource)
        arrays = encode_pairs([rows[1], rows[2]], "train", chat, 512, ledger, margins)
        assert arrays["train.margin"].tolist() == [records[place - 1]["margin"] for place in places]
        assert any("has a margin" in reason for reason in ledger.sources["s"]["rejected"]) != margins
    keys = {"steps": 1, "batch_size": 1, "sequence_length": 64}
    with pytest.raises(ValueError, match="s.margin is for reward models"):
        Config(sources={"s": {"path": "x", "margin": "{m}"}}, **keys)


# ---- text ------------------------------------------------------------------------------------------------------------

CODE = "    if x:\n\treturn 1\n\n\n\n    return 2  \n\n"
WRITTEN = [
    CODE,
    "\n\n# title\n",
    "a\r\nb\r\n",
    "全角　空格，\u3000\n\n\n标点。",
    "e\u0301 is not \xe9",
    "\ufeffbom\x0b\x0c",
    "  x",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_text_is_kept_as_it_was_written(tmp_path, text):
    """correctness 3: in every shape, through templates, and into the tokens of a byte-level tokenizer."""
    shapes = [
        {"messages": [{"role": "system", "content": text}, {"role": "user", "content": text + "1"}, {"role": "assistant", "content": text}]},
        {"conversations": [{"from": "human", "value": text + "2"}, {"from": "gpt", "value": text}], "system": text},
        {"prompt": text + "3", "completion": text, "system": text},
        {"instruction": text + "4", "output": text, "system": text},
        {"messages": [{"role": "system", "content": text}, {"role": "user", "content": [{"type": "text", "text": text + "5"}]}, {"role": "assistant", "content": [{"type": "text", "text": text}]}]},
    ]  # fmt: skip
    rows, _ = loaded(tmp_path / "a.jsonl", shapes)
    for place in range(1, 6):
        assert [message["content"] for message in rows[place].messages] == [text, f"{text}{place}", text]
    tokenizer = tuned.tokenizer(tmp_path / "tokenizer")
    chat = Chat(tokenizer)
    for row in chat.encode([rows[place].messages for place in range(1, 6)]):
        said = tokenizer.decode([token for token, trained in zip(row.ids, row.trained, strict=True) if trained])
        assert said == text + "<|im_end|>"
    pairs, _ = loaded(
        tmp_path / "b.jsonl", [{"prompt": text, "chosen": text, "rejected": "x"}], load_pairs, PreferenceSource
    )
    assert (pairs[1].prompt[0]["content"], pairs[1].chosen["content"]) == (text, text)
    prompts, _ = loaded(tmp_path / "c.jsonl", [{"prompt": text}], load_prompts, PromptSource)
    assert prompts[1].messages[0]["content"] == text
    templates = [{"role": "user", "content": "{instruction}"}, {"role": "assistant", "content": "{output}"}]
    rows, _ = loaded(tmp_path / "d.jsonl", [{"instruction": text, "output": text}], messages=templates)
    assert [message["content"] for message in rows[1].messages] == [text, text]


def test_white_space_does_not_hide_a_held_out_prompt(tmp_path):
    """correctness 3: text is compared as in cleaning, though it is kept as it was written."""
    rows = filler(100, length=40)
    _, heldout, _ = load_conversations(source_of(tmp_path / "a.jsonl", rows), 0.2)
    asked = heldout[0].messages[0]["content"]
    near = [{"instruction": f"  {asked}\n", "output": f"answer {index}"} for index in range(3)]
    train, again, ledger = load_conversations(source_of(tmp_path / "b.jsonl", rows + near), 0.2)
    assert not any(row.messages[0]["content"].strip() == asked for row in train)


@pytest.mark.parametrize(
    "load, kind, record",
    [
        (load_conversations, ChatSource, {"messages": [ASKED, {"role": "assistant", "content": "\udc80"}]}),
        (load_conversations, ChatSource, {"prompt": "\ud83d", "completion": "a"}),
        (load_conversations, ChatSource, {"messages": TURNS, "system": "\ud800"}),
        (load_prompts, PromptSource, {"prompt": "x\ud800y"}),
        (load_pairs, PreferenceSource, {"prompt": "x\ud800y", "chosen": "a", "rejected": "b"}),
    ],
)
def test_half_characters_reject_the_record(tmp_path, load, kind, record):
    """correctness 29"""
    assert "half a character (a lone surrogate)" in reason_of(tmp_path / "a.jsonl", record, load, kind)


def test_names_from_records_are_printable_in_reasons(tmp_path):
    """correctness 29: report.json can be written whatever a record is called, and stays small."""
    records = [
        {"\ud800": 1},
        {"messages": [{"role": "\ud800" * 500, "content": "x"}]},
        {"x" * 10_000: 1, "messages": TURNS},
    ]
    _, ledger = loaded(tmp_path / "a.jsonl", records)
    text = json.dumps(ledger.report(), ensure_ascii=False)
    assert len(text.encode()) < 2000


# ---- what is lost ----------------------------------------------------------------------------------------------------


def test_notable_losses_are_warned_of_and_too_many_end_the_stage(tmp_path, capsys):
    """correctness 45"""
    bad = [{"messages": TURNS, "label": False}] * 3 + [{"messages": [ASKED, {**ANSWERED, "mask": "x"}]}]
    rows = filler(93) + bad + filler(93)[:5]
    train, heldout, ledger = load_conversations(source_of(tmp_path / "a.jsonl", rows), 0.1)
    for split, found in (("train", train), ("heldout", heldout)):
        ledger.keep(found, split, [None] * len(found))
    ledger.check(0.1)
    ledger.judge(0.05)
    formats, *warnings = capsys.readouterr().out.splitlines()
    assert formats == "sources.s: 93 records read as Alpaca (instruction, input, output)"
    assert len(warnings) == 1  # copies; three of 102 are not a notable share
    assert warnings[0].startswith("WARNING sources.s: 5 of 102 records (5%) dropped: duplicate (first: a.jsonl:98); ")
    with pytest.raises(
        UserError, match=r"4 of 102 records cannot be used \(3.9%\), more than max_bad 0.03: 3 x `label` is false"
    ):
        ledger.judge(0.03)
    # half of a source: the stage's default refuses it, and a user who allows it is told
    train, heldout, ledger = load_conversations(source_of(tmp_path / "b.jsonl", filler(50) + [{"messages": TURNS, "label": False, "id": index} for index in range(50)]), 0.1)  # fmt: skip
    with pytest.raises(UserError, match="50 of 100 records cannot be used"):
        ledger.judge(0.05)
    capsys.readouterr()
    ledger.judge(0.6)
    _, line = capsys.readouterr().out.splitlines()
    assert "50 of 100 records (50%) dropped: `label` is false: a bad answer (first: b.jsonl:51); exclude such records with `where: {label: true}`" in line  # fmt: skip
