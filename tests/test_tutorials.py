"""docs/tutorials/: their recipes are checked as they are, and their commands are run, with smaller numbers and made-up
data. What is not run has the reason in a comment above it."""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import zstandard
from paths import ROOT
from ruamel.yaml import YAML
from typer.testing import CliRunner

TUTORIALS = sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md") if ".zh" not in path.name)
CHECKS = ("recipe check", "plan", "status")  # and whatever has --dry-run
# what a laptop needs hours for, in seconds: path of a key in the recipe -> value; None removes it
FINETUNED = {"sequence_length": 128, "batch_size": 4, "micro_batch": 2, "precision": "fp32"}
SMALL = {
    "own-text": {
        "mine.yaml": {
            "model.hidden_size": 32,
            "model.intermediate_size": 64,
            "model.num_hidden_layers": 2,
            "model.num_attention_heads": 2,
            "stages.tokenizer.vocab_size": 300,
            "stages.pretrain.time": None,
            "stages.pretrain.steps": 4,
            "stages.pretrain.sequence_length": 128,
            "stages.pretrain.batch_size": 4,
            "stages.pretrain.schedule.warmup_steps": 1,
            "stages.pretrain.samples.max_new_tokens": 4,
            "stages.sft.sequence_length": 128,
            "stages.sft.batch_size": 4,
            "stages.sft.max_new_tokens": 4,
            "stages.sft.epochs": 1,
        }
    },
    "qwen-chinese": {
        "qwen-zh.yaml": {
            "stages.clean.holdout": 0.1,
            "stages.tokenizer.add_tokens": 20,
            "stages.pretrain.tokens": 1024,
            "stages.pretrain.sequence_length": 64,
            "stages.pretrain.batch_size": 4,
            "stages.pretrain.precision": "fp32",
            "stages.pretrain.schedule.warmup_steps": 1,
            **{f"stages.sft.{key}": value for key, value in FINETUNED.items()},
            "stages.sft.max_new_tokens": 4,
            "stages.sft.epochs": 1,
            "stages.before.sequence_length": 64,
            "stages.after.sequence_length": 64,
        }
    },
    "dpo-own-pairs": {
        "pairs.yaml": {
            "stages.dpo.inputs.model": "./model",
            **{f"stages.dpo.{key}": value for key, value in FINETUNED.items()},
        }
    },
    "grpo-own-reward": {
        "grpo.yaml": {
            "stages.sft.inputs.model": "./model",
            **{f"stages.sft.{key}": value for key, value in FINETUNED.items()},
            "stages.sft.max_new_tokens": 4,
            "stages.grpo.precision": "fp32",
            "stages.grpo.steps": 2,
            "stages.grpo.samples": 2,
            "stages.grpo.batch_size": 2,
            "stages.grpo.rollout.max_new_tokens": 4,
            "stages.grpo.evaluate_prompts": 4,
            # the tiny model gives no answer with a number
            "stages.grpo.alarms": {},
        }
    },
    "slurm": {"big.yaml": {}},
}
NOUNS = ["barometer", "compass", "lantern", "harbour", "village", "river", "tower", "garden", "letter", "winter"]
HANZI = "春夏秋冬山水花鸟风月云雨江河湖海东西南北金木火土日星辰光影诗书画琴棋酒茶"


def page_of(name: str) -> Path:
    return ROOT / "docs" / "tutorials" / f"{name}.md"


def sentences(draw: random.Random, number: int) -> str:
    text = [
        f"The {draw.choice(NOUNS)} near the {draw.choice(NOUNS)} was {draw.randrange(90)} years old."
        for _ in range(number)
    ]
    return " ".join(text)


def hanzi(draw: random.Random) -> str:
    return "".join("".join(draw.choices(HANZI, k=draw.randrange(6, 14))) + "。" for _ in range(20))


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_data(folder: Path) -> None:
    """The files that the tutorials ask their readers to have."""
    draw = random.Random(0)
    for number in range(60):
        path = folder / "books" / "shelf" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(sentences(draw, 12) for _ in range(3)), encoding="utf-8")
    write_lines(folder / "notes.jsonl", [{"text": sentences(draw, 15)} for _ in range(60)])
    write_lines(folder / "en" / "a.jsonl", [{"text": sentences(draw, 15)} for _ in range(80)])
    write_lines(folder / "zh" / "a.jsonl", [{"text": hanzi(draw)} for _ in range(120)])
    turns = [(f"What is {noun} number {number}?", f"It is a {noun}.") for number in range(8) for noun in NOUNS]
    messages = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in turns]
    write_lines(folder / "chat.jsonl", [{"messages": pair} for pair in messages])
    write_lines(folder / "pairs.jsonl", [{"prompt": ask, "chosen": answer, "rejected": "No."} for ask, answer in turns])
    tasks = [{"question": f"How many km are {a} km and {b} km?", "expected": a + b} for a in range(9) for b in range(9)]
    write_lines(folder / "prompts.jsonl", tasks)
    text = "".join(json.dumps({"text": sentences(draw, 15)}) + "\n" for _ in range(40))
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl.zst").write_bytes(zstandard.compress(text.encode()))


def write_model(folder: Path) -> None:
    """An untrained model of Qwen 3's family, whose tokenizer knows the data a little."""
    from harness import byte_level
    from transformers import AutoTokenizer

    from pipeline.data.tokenizer.tokenizer_folder import publish as publish_tokenizer
    from pipeline.models import build
    from pipeline.models.publish import publish

    draw = random.Random(1)
    publish_tokenizer(byte_level([sentences(draw, 10) for _ in range(40)], 340), folder / "tokenizer")
    template = ROOT / "pipeline" / "data" / "chat" / "templates" / "qwen3.jinja"
    shutil.copy(template, folder / "tokenizer" / "chat_template.jinja")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    block = {"family": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    block |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    model = build.new(block, tokenizer, 2048, seed=1)
    for name in ("qwen3-0.6b", "model"):
        publish(model.state_dict(), model.config, folder / "tokenizer", folder / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorials")
    write_data(folder)
    write_model(folder)
    return folder


def place(world: Path, folder: Path, name: str) -> None:
    """A reader's folder: the data, and the files that the tutorial shows."""
    for path in world.iterdir():
        (folder / path.name).symlink_to(path)
    for file, text in pages.files(page_of(name)).items():
        (folder / file).write_text(text, encoding="utf-8")


def is_check(words: list[str]) -> bool:
    """Whether a command only looks: it can be run as it is, without the work before it."""
    if words[0] != "alma" or "|" in words:
        return False
    line = " ".join(words[1:])
    return "--dry-run" in words or any(line.startswith(f"{check} ") for check in CHECKS)


def run_lines(name: str) -> list[str]:
    return [
        line
        for block in pages.blocks(page_of(name))
        if block.language == "sh" and not block.not_run
        for line in pages.commands(block)
    ]


def test_every_tutorial_has_smaller_numbers_here():
    assert sorted(SMALL) == TUTORIALS
    assert all(
        {file for file in pages.files(page_of(name)) if file.endswith(".yaml")} == set(SMALL[name]) for name in SMALL
    )


@pytest.mark.parametrize("name", TUTORIALS)
def test_recipes_pass_every_check_as_they_are(name, world, tmp_path, monkeypatch):
    """`alma recipe check`, `alma run --dry-run` and `alma plan`, with the tutorial's own numbers."""
    from pipeline.cli import app

    place(world, tmp_path, name)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in run_lines(name) if is_check(shlex.split(line))]
    assert len(lines) >= 2
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_commands_do_what_the_page_says(name, world, tmp_path):
    """All of them in their order, in a shell, with the recipe made small."""
    place(world, tmp_path, name)
    for file, changes in SMALL[name].items():
        shrink(tmp_path / file, changes)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in run_lines(name):
        script = f"set -o pipefail; {line}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def shrink(path: Path, changes: dict) -> None:
    """Set keys of a recipe: path of the key, with dots -> value; None removes the key."""
    yaml = YAML()
    recipe = yaml.load(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split(".")
        block = recipe
        for parent in parents:
            block = block[parent]
        if value is None:
            del block[last]
        else:
            block[last] = value
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(recipe, file)
