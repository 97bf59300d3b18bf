"""Damaged records and files for the tuning stages: each is a bad record or one sentence, never a traceback
(correctness 29)."""

import copy
import json
import random
import time

import pytest
import tuned
from chat_data import filler

from pipeline.core.errors import UserError
from pipeline.data.chat.chat_sources import ChatSource, PreferenceSource, PromptSource
from pipeline.data.chat.conversations import first_usable, load_conversations, load_pairs, load_prompts
from pipeline.data.chat.template import Chat

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}
RECORDS = [
    {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "id": 1, "tools": []},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"prompt": "q", "completion": "a", "label": True},
    {"prompt": [USER], "completion": [ANSWER]},
    {"instruction": "q", "input": "i", "output": "a", "history": [["q0", "a0"]]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER], "images": None},
    {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 1.5},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "b"}], "score_chosen": 2, "score_rejected": 1},
    {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}], "messages": [USER, ANSWER]},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
]  # fmt: skip
DEEP = json.loads("[" * 200 + "]" * 200)
ODD = [
    None, True, False, 0, -1, 1.5, 1e400, float("nan"), 10**400, "", " ", "x", "\n\n", "\ud800", "a\udfffb", "\U000f0000",
    "\x00", "<|im_end|>", "<|im_start|>", "٣", "²", "{x}", "[]", "null", "9" * 400, "e\u0301" * 50, [], {}, [None], [[]], [{}],
    ["a", "b"], {"a": 1}, {"": ""}, {"\ud800": "\ud800"}, [["q", "a"]], [["q"]], [USER], [ANSWER], [USER, USER], {"role": "assistant"},
    {"role": [], "content": {}}, {"role": "user", "content": None}, {"from": None, "value": 1}, {"type": "text"}, DEEP,
    [{"type": "text", "text": 3}], [{"type": ["text"], "text": "x"}], {"role": "\ud800", "content": "x"},
]  # fmt: skip
NAMES = [
    "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "system", "chosen", "rejected",
    "label", "weight", "train", "margin", "tools", "role", "content", "from", "value", "text", "type", "name", "reasoning_content",
    "tool_calls", "\ud800", "", "x" * 5000, "images", "score_chosen", "score_rejected", "kto_tag", "loss",
]  # fmt: skip


def places_of(value, path=()) -> list[tuple]:
    """Paths of all values inside a record."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places_of(inner, (*path, key))
    return found


def mutated(record: dict, draw: random.Random) -> dict:
    """A record with one to three values replaced, removed, renamed, added or doubled."""
    record = copy.deepcopy(record)
    for _ in range(draw.randint(1, 3)):
        places = places_of(record)
        *above, last = draw.choice(places) if places else ("messages",)
        holder = record
        for key in above:
            holder = holder[key]
        action = draw.choice(["replace", "replace", "remove", "rename", "add", "double"])
        if not places or action == "add":
            target = holder if isinstance(holder, dict) else record
            target[draw.choice(NAMES)] = copy.deepcopy(draw.choice(ODD))
        elif action == "replace":
            holder[last] = copy.deepcopy(draw.choice(ODD))
        elif action == "remove":
            del holder[last]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw.choice(NAMES)] = holder.pop(last)
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
    return record


def damaged(line: bytes, draw: random.Random) -> bytes:
    """A line with a few bytes changed, removed or put in."""
    data = bytearray(line)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data)) if data else 0
        change = draw.randrange(3)
        if change == 0 and data:
            data[at] = draw.randrange(256)
        elif change == 1:
            del data[at : at + draw.randint(1, 6)]
        else:
            data[at:at] = draw.choice(
                [b'"', b"{", b"]", b"\xff", b"\\ud800", b"\x00", b"\n", b"\\", b"\xef\xbb\xbf", b"1e999", b"NaN"]
            )
    return bytes(data)


READERS = [
    (load_conversations, ChatSource, {}),
    (load_conversations, ChatSource, {"ignore": ["tools", "weight"], "answer": "{output}", "where": {"label": [True, None]}}),
    (load_conversations, ChatSource, {"messages": [{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{completion}"}]}),
    (load_pairs, PreferenceSource, {}),
    (load_pairs, PreferenceSource, {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}", "margin": "{margin}"}),
    (load_prompts, PromptSource, {}),
    (load_prompts, PromptSource, {"prompt": "{prompt}", "answer": "{messages.0.content}"}),
]  # fmt: skip


def conversations_in(row) -> list[list[dict]]:
    """What the stages encode of a row."""
    if hasattr(row, "chosen"):
        return list(row.dialogues)
    return [row.dialogue]


def read_all(path, lines: list[bytes], chat: Chat) -> None:
    """Every reader on a file of these lines, with good rows behind them; what is kept can be encoded and reported."""
    good = [{**row, "prompt": row["instruction"], "completion": row["output"], "chosen": "yes " + row["output"], "rejected": "no", "margin": 1, "messages": None} for row in filler(20)]  # fmt: skip
    path.write_bytes(b"".join(line + b"\n" for line in [*lines, *(json.dumps(row).encode() for row in good)]))
    for load, kind, keys in READERS:
        source = kind(path=str(path), **keys)
        try:
            first_usable(source, "s")
            train, heldout, ledger = load({"s": source}, 0.3)
        except UserError as error:
            str(error).encode()  # it can be printed
            continue
        for row in train + heldout:
            for conversation in conversations_in(row):
                for found in chat.encode([conversation]):
                    assert isinstance(found, str) or len(found.ids) == len(found.trained)
        json.dumps(ledger.report(), ensure_ascii=False).encode()


def fuzz(path, seed: int, count: int) -> None:
    draw = random.Random(seed)
    chat = Chat(tuned.tokenizer(path / "tokenizer"))
    while count > 0:
        records = [mutated(draw.choice(RECORDS), draw) for _ in range(min(count, 50))]
        lines = [json.dumps(record).encode() for record in records]
        lines = [damaged(line, draw) if draw.random() < 0.2 else line for line in lines]
        started = time.monotonic()
        read_all(path / "a.jsonl", lines, chat)
        assert time.monotonic() - started < 20
        count -= len(lines)


def test_odd_values_anywhere(tmp_path):
    """correctness 29: every odd value in every place of every shape."""
    lines = []
    for record in RECORDS:
        for path in places_of(record):
            for value in ODD:
                changed = copy.deepcopy(record)
                holder = changed
                for key in path[:-1]:
                    holder = holder[key]
                holder[path[-1]] = value
                lines.append(json.dumps(changed).encode())
    read_all(tmp_path / "a.jsonl", random.Random(0).sample(lines, 400), Chat(tuned.tokenizer(tmp_path / "tokenizer")))


def test_mutated_records(tmp_path):
    """correctness 29"""
    fuzz(tmp_path, 1, 200)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_mutated_records(tmp_path, seed):
    """correctness 29: 4 x 2,500 records, one file of 50 at a time."""
    fuzz(tmp_path, 100 + seed, 2500)
