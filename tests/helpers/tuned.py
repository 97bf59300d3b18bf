"""A small world for the tuning stages: a base model that knows nothing, and a task it can learn in seconds: the kind
of thing a noun names."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from harness import files_of, stage, succeed

KINDS = {
    "animal": ["cat", "dog", "horse", "小猫"],
    "plant": ["rose", "oak", "wheat", "竹子"],
    "metal": ["iron", "gold", "zinc", "青铜"],
}
WORDS = ["old", "red", "small", "good", "new", "bright", "很大", "漂亮", "便宜", "quiet", "heavy", "strange"]


def rows() -> list[dict]:
    """Every pair of words with every noun, in a fixed order that mixes kinds."""
    found = []
    for first in WORDS:
        for second in WORDS:
            if first < second:
                for nouns in zip(*KINDS.values(), strict=True):
                    for kind, noun in zip(KINDS, nouns, strict=True):
                        wrong = list(KINDS)[(list(KINDS).index(kind) + len(found) % 2 + 1) % 3]
                        found.append({"words": f"{first} {second}", "noun": noun, "kind": kind, "wrong": wrong})
    return found


def stepped_rows() -> list[dict]:
    """Answers of two or three steps, of which one may name a wrong kind; all after it count as wrong, too."""
    found = []
    for index, row in enumerate(rows()):
        wrong_from = (None, 0, 1, 2)[index % 4]
        steps = [row["kind"] if place != wrong_from else row["wrong"] for place in range(2 + index % 2)]
        labels = [wrong_from is None or place < wrong_from for place in range(len(steps))]
        prompt = f"What is a {row['words']} {row['noun']}?"
        found.append({"prompt": prompt, "completions": steps, "labels": labels})
    return found


def tokenizer(folder: Path, sentencepiece: bool = False):
    from harness import byte_level
    from transformers import AutoTokenizer

    from pipeline.data.tokenizer import spm_model, spm_trainer
    from pipeline.data.tokenizer.tokenizer_folder import publish

    texts = [
        f"What is a {row['words']} {row['noun']}?\nA {row['kind']} 是什么？\n\nassistant\n{row['kind']}"
        for row in rows()
    ] * 2
    if sentencepiece:
        model = spm_trainer.train_sentencepiece(texts, 380, True, 0.9995, folder / "log")
        publish(spm_model.to_fast_tokenizer(model), folder)
        (folder / "tokenizer.model").write_bytes(model)
    else:
        publish(byte_level(texts, 380), folder)
    return AutoTokenizer.from_pretrained(folder)


def base(folder: Path, hidden: int = 48, length: int = 64, family: str = "llama") -> Path:
    """A folder with an untrained model and its tokenizer."""
    from pipeline.models import build
    from pipeline.models.publish import publish

    made = tokenizer(folder / "tokenizer")
    block = {
        "family": family,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "initializer_range": 0.1,
    }
    model = build.new(block, made, length, seed=1)
    publish(model.state_dict(), model.config, folder / "tokenizer", folder / "model")
    return folder


def write_rows(path: Path, extra: list = ()) -> None:
    path.write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in [*rows(), *extra]) + "\n", encoding="utf-8"
    )


CHAT = "messages: [{role: user, content: 'What is a {words} {noun}?'}, {role: assistant, content: '{kind}'}]"
PAIR = "prompt: 'What is a {words} {noun}?', chosen: '{kind}', rejected: '{wrong}'"
COMMON = (
    "batch_size: 8, sequence_length: 64, precision: fp32, save: {every_steps: 4, keep: 2}, log: {every_steps: 1},"
    " schedule: {kind: constant}"
)

RECIPE = f"""
name: tiny
seed: 3
stages:
  sft:
    {{inputs: {{model: ./base}}, {COMMON}, steps: 40, optimizer: {{lr: 5e-3}}, max_prompts: 24, max_new_tokens: 6,
     sources: {{nouns: {{path: rows.jsonl, {CHAT}, answer: '{{kind}}'}}}}}}
  reward:
    {{{COMMON}, steps: 30, optimizer: {{lr: 3e-3}}, sources: {{nouns: {{path: rows.jsonl, {PAIR}}}}}}}
  dpo:
    {{{COMMON}, steps: 20, optimizer: {{lr: 1e-3}}, sources: {{nouns: {{path: rows.jsonl, {PAIR}}}}}}}
"""


def world(folder: Path) -> Path:
    base(folder / "base")
    write_rows(folder / "rows.jsonl")
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def metrics(folder: Path, stage: str) -> dict:
    return json.loads((folder / "runs/tiny" / stage / "current/manifest.json").read_text())["metrics"]


def lines(folder: Path, stage: str) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "runs/tiny" / stage / "current/metrics.jsonl").read_text().splitlines()
    ]


@functools.cache
def plain() -> Path:
    """The world after uninterrupted runs of all three stages, made once for all test files."""
    folder = Path(tempfile.mkdtemp(prefix="alma-tuned-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    world(folder)
    for name in ("sft", "reward", "dpo"):
        succeed(name, "tiny.yaml", cwd=folder)
    return folder


def copy_until(stage: str, folder: Path) -> Path:
    """A copy of the plain world as it was before `stage`."""
    shutil.copytree(plain(), folder, symlinks=True, dirs_exist_ok=True)
    for later in ("sft", "reward", "dpo")[("sft", "reward", "dpo").index(stage) :]:
        shutil.rmtree(folder / "runs/tiny" / later)
    return folder


def killed_like_plain(name: str, folder: Path, faults: list[str], kill_after: float | None = None) -> str:
    """Kill a stage at each of `faults` in turn, always going on from what was left, let it end, and compare with the
    run that was left alone."""
    copy_until(name, folder)
    for fault in faults:
        code, text = stage(name, "tiny.yaml", cwd=folder, fault=fault)
        assert code == -9, f"{name} did not reach {fault}: {code}\n{text}"
    if kill_after is not None:
        stage(name, "tiny.yaml", cwd=folder, kill_after=kill_after)
    text = succeed(name, "tiny.yaml", cwd=folder)
    expected, found = (files_of(where / "runs/tiny" / name / "current") for where in (plain(), folder))
    assert expected == found
    kept, again = metrics(plain(), name), metrics(folder, name)
    assert {key: value for key, value in kept.items() if "per_second" not in key} == {
        key: value for key, value in again.items() if "per_second" not in key
    }
    assert [line["loss"] for line in lines(plain(), name) if "loss" in line] == [
        line["loss"] for line in lines(folder, name) if "loss" in line
    ]
    return text
