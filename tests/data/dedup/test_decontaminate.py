"""Evaluation sets in the sources of every tuning stage, through the stages: prompts, answers of either kind, and
what a system says; counted by set, and shown by `alma inspect data`."""

import json
import random
import re
import subprocess
import sys

import pytest
import tuned
from harness import succeed

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
