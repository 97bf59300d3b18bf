"""Evaluation sets in the sources of every tuning stage, through the stages: prompts, answers of either kind, and
what a system says; counted by set, and shown by `alma inspect data`."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tuned
from cleaned import plain_tokens, published
from harness import succeed
from word_corpus import words, write

EXAM = [
    "how many apples does the farmer have left after he gave a third of them to each of his neighbours",
    "which of these four gases makes up the greatest share of the air that we breathe on earth",
]
EXAM_ZH = ["小明每天早上七点出门上学走路需要二十五分钟请问他几点能够到达学校门口"]
COMMON = (
    "steps: 1, batch_size: 4, sequence_length: 256, precision: fp32, holdout: 0.3, schedule: {kind: constant},"
    " decontaminate: {sets: {exam: {path: exam.jsonl, text: q}, exam_zh: {path: exam_zh.jsonl, text: q}}}"
)
PAIRS = "sources: {rows: {path: rows.jsonl, prompt: '{q}', chosen: '{a}', rejected: '{b}'}}"
RECIPE = f"""
name: t
stages:
  sft:
    {{inputs: {{model: ./base}}, {COMMON}, max_prompts: 0,
      sources: {{rows: {{path: rows.jsonl, messages: [{{role: user, content: 'Say: {{q}}'}}, {{role: assistant, content: '{{a}}'}}]}}, chat: {{path: chat.jsonl}}}}}}
  reward: {{{COMMON}, {PAIRS}}}
  dpo: {{{COMMON}, {PAIRS}}}
  ppo:
    {{inputs: {{policy: sft, reward: reward}}, {COMMON}, sources: {{rows: {{path: rows.jsonl, prompt: 'Answer: {{q}}'}}}}, rollout: {{max_new_tokens: 4}}, evaluate_prompts: 4,
      ppo: {{epochs: 1, minibatches: 1, calibrate: 4}}}}
"""
# Stage -> set -> (rows left out, items found). Rows 0 to 3 ask an item of exam, 4 and 5 answer with one, 6 to 8 answer
# with Chinese, 9 has it as the worse answer; two chats have a system that tells one.
EXPECTED = {
    "sft": {"exam": (4 + 2 + 2, 2), "exam_zh": (3, 1)},
    "reward": {"exam": (4 + 2, 2), "exam_zh": (3 + 1, 1)},
    "dpo": {"exam": (4 + 2, 2), "exam_zh": (3 + 1, 1)},
    "ppo": {"exam": (4, 1), "exam_zh": (0, 0)},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decontaminated")
    tuned.base(folder / "base", length=512)
    rng = random.Random(0)

    def said(number: int) -> str:
        return " ".join("".join(rng.choices("abcdefgiklmnoprstu", k=rng.randrange(2, 8))) for _ in range(number))

    rows = [{"q": said(9), "a": said(5), "b": said(5)} for _ in range(60)]
    for number in range(4):
        rows[number]["q"] = f"{said(2)} {EXAM[0].upper()}? {said(2)}"
    for number in (4, 5):
        rows[number]["a"] = f"{said(2)} {' '.join(EXAM[1].split()[1:15])} {said(2)}"
    for number, key in ((6, "a"), (7, "a"), (8, "a"), (9, "b")):
        rows[number][key] = f"{said(2)}{EXAM_ZH[0][3:26]}"
    rows[10]["q"] = " ".join(EXAM[0].split()[:12])  # a run of twelve words is none of thirteen
    chats = [
        {
            "messages": [
                {"role": "system", "content": said(4)},
                {"role": "user", "content": said(8)},
                {"role": "assistant", "content": said(3)},
            ]
        }
        for _ in range(30)
    ]
    for chat in chats[:2]:
        chat["messages"][0]["content"] = f"Remember: {EXAM[1]}."
    for name, lines in (
        ("rows", rows),
        ("chat", chats),
        ("exam", [{"q": text} for text in [*EXAM, "too short"]]),
        ("exam_zh", [{"q": text} for text in EXAM_ZH]),
    ):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("stage", EXPECTED)
def test_no_stage_trains_on_evaluation_sets(world, stage):
    succeed(stage, "r.yaml", cwd=world)
    report = json.loads((world / "runs/t" / stage / "current/report.json").read_text())
    assert {
        name: (entry["documents"], entry["items_found"]) for name, entry in report["decontamination"].items()
    } == EXPECTED[stage]
    assert report["decontamination"]["exam"]["items"] == 3 and report["decontamination"]["exam"]["too_short"] == 1
    left = {}
    for entry in report["sources"].values():
        for reason, listed in entry["rejected"].items():
            assert reason.startswith(("has text of the evaluation set ", "near duplicate")), reason
            left[reason] = left.get(reason, 0) + listed["count"]
        assert entry["records"] == entry["train"] + entry["heldout"] + sum(
            listed["count"] for listed in entry["rejected"].values()
        )
    assert {name: left.get(f"has text of the evaluation set {name}", 0) for name in EXPECTED[stage]} == {
        name: documents for name, (documents, _) in EXPECTED[stage].items()
    }
    text = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "inspect", "data", "r.yaml", stage],
        cwd=world,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    documents, items = EXPECTED[stage]["exam"]
    assert (
        re.search(rf"^ ?exam +3 +{items} \({items / 3:.1%}\) +{documents} +1 *$", text, re.M)
        and "NOT" not in text
        and "has text of the evaluation set exam (first: rows.jsonl:1, " in text
    ), text


LONG = [chr(0x4E00 + i) for i in range(2000)]


def report_of(folder: Path) -> dict:
    return json.loads((published(folder) / "report.json").read_text())


def plain_contaminated(text: str, items: list[str], words: int = 13, characters: int = 20) -> bool:
    """By sets of tuples, one window after the other."""

    def chinese(run) -> bool:
        return sum("\u4e00" <= token <= "\u9fff" for token in run) * 2 > len(run)

    def runs(known: list[str]) -> set:
        return {
            tuple(known[i : i + n])
            for n in (words, characters)
            for i in range(len(known) - n + 1)
            if chinese(known[i : i + n]) == (n == characters)
        }

    known = plain_tokens(text)
    for item in items:
        asked = plain_tokens(item)
        if runs(asked):
            if runs(asked) & runs(known):
                return True
        elif len(asked) >= 8 and any(known[i : i + len(asked)] == asked for i in range(len(known))):
            return True
    return False


def test_evaluation_text_is_found_as_by_sets_of_tuples(tmp_path):
    from pipeline.data.dedup.decontaminate import Decontaminate, find_contaminated

    rng = random.Random(4)
    vocabulary = words(rng, 400)
    items = [" ".join(rng.choices(vocabulary, k=rng.randrange(3, 40))) for _ in range(60)] + [
        "".join(rng.choices(LONG, k=rng.randrange(5, 60))) for _ in range(60)
    ]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps({"q": item}) + "\n" for item in items))
    texts = []
    for i in range(100):
        item = plain_tokens(items[rng.randrange(120)])
        at = rng.randrange(len(item))
        taken = item[at : at + rng.randrange(5, 30)] if i % 3 else item
        own = rng.choices(vocabulary, k=30) if i % 2 else rng.choices(LONG, k=30)
        texts.append(" ".join([*own, *taken, *rng.choices(vocabulary, k=10)]))
    wanted = Decontaminate(sets={"exam": {"path": str(tmp_path / "exam.jsonl"), "text": "q"}})
    found, report = find_contaminated(texts, wanted)
    expected = [plain_contaminated(text, items) for text in texts]
    assert [match is not None for match in found] == expected and 20 < sum(expected) < 95


def test_decontamination_in_cleaning_is_counted_by_set(tmp_path):
    rng = random.Random(5)
    questions = [" ".join(words(rng, 25)) for _ in range(20)]
    exam_zh = ["".join(rng.choices(LONG, k=40)) for _ in range(20)]
    rows = [{"text": " ".join(words(rng, 60))} for _ in range(50)]
    rows += [
        {"text": " ".join(words(rng, 30)) + "\n" + questions[i] + " " + " ".join(words(rng, 30))} for i in range(5)
    ]
    rows += [
        {"text": "".join(rng.choices(LONG, k=60)) + exam_zh[0][5:30] + "".join(rng.choices(LONG, k=60))}
        for _ in range(3)
    ]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in questions))
    (tmp_path / "exam_zh.txt").write_text("\n".join(exam_zh))
    block = {
        "sets": {
            "exam": {"path": "exam.jsonl", "text": "q"},
            "exam_zh": {"path": "exam_zh.txt", "sample_by": "line"},
            "clean": {"path": "exam.jsonl", "text": "none {q}", "limit": 1},
        }
    }
    block["sets"]["clean"] = {"path": "other.jsonl"}
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": " ".join(words(rng, 30))}) + "\n")
    path = write(tmp_path, {"a": rows}, decontaminate=block)
    succeed("clean", path, cwd=tmp_path)
    report = report_of(tmp_path)
    assert report["sources"]["a"]["filtered"] == {"contaminated": 8} and report["total"]["train_documents"] == 50
    found = {
        name: (entry["documents"], entry["items_found"], entry["items"])
        for name, entry in report["decontamination"].items()
    }
    assert found == {"exam": (5, 5, 20), "exam_zh": (3, 1, 20), "clean": (0, 0, 1)}
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": rows[0]["text"]}) + "\n")  # another set is another result
    assert (
        "up to date" not in succeed("clean", path, cwd=tmp_path)
        and report_of(tmp_path)["decontamination"]["clean"]["documents"] == 1
    )


def test_decontamination_of_conversations(tmp_path):
    from pipeline.data.chat.chat_sources import ChatSource
    from pipeline.data.chat.conversations import load_conversations
    from pipeline.data.dedup.decontaminate import Decontaminate

    rng = random.Random(6)
    rows = [{"q": " ".join(words(rng, 30)), "a": " ".join(words(rng, 5))} for _ in range(200)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exam.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(row["q"].split()[4:24])}) + "\n" for row in rows[:7])
    )
    source = {
        "chat": ChatSource(
            path=str(tmp_path / "chat.jsonl"),
            messages=[{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}],
        )
    }
    train, heldout, counted = load_conversations(
        source, 0.2, Decontaminate(sets={"exam": {"path": str(tmp_path / "exam.jsonl")}})
    )
    assert len(train) + len(heldout) == 193
    assert counted.sources["chat"]["rejected"]["has text of the evaluation set exam"]["count"] == 7
