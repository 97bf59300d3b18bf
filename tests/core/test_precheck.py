"""What is wrong with sources and chat templates is found before the first stage runs, all of it."""

import json
import os
import shutil
from pathlib import Path

import chain_rows
import pytest
import tiny
import tuned

from pipeline.core import chain
from pipeline.core.errors import UserError
from pipeline.core.precheck import checked
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage

TEXT = "a {words} {noun} is a {kind}, and the {noun} is {words}; {kind} {noun} {words} {noun}, {words} {kind}"
TUNING = "steps: 1, batch_size: 2, sequence_length: 64"
RECIPE = f"""\
name: early
model: {{family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}}
stages:
  clean:
    holdout: 0.1
    filters: {{max_repeated_shingles: 1.0}}
    sources:
      animals: {{path: animals.txt, sample_by: line}}
      nouns: {{path: rows.jsonl, text: "{TEXT}"}}
  tokenizer:
    vocab_size: 320
    algorithm: byte-bpe
  pack: {{}}
  pretrain: {{{TUNING}}}
  sft:
    steps: 1
    batch_size: 2
    sequence_length: 64
    sources:
      nouns: {{path: rows.jsonl, {tuned.CHAT}}}
  dpo:
    steps: 1
    batch_size: 2
    sequence_length: 64
    sources:
      nouns: {{path: rows.jsonl, {tuned.PAIR}}}
  ppo:
    steps: 1
    batch_size: 2
    sequence_length: 64
    rollout: {{max_new_tokens: 4}}
    inputs: {{policy: sft, reward: ./judge}}
    sources:
      nouns: {{path: rows.jsonl, prompt: 'What is a {{words}} {{noun}}?'}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    chain_rows.rows_of(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def place(text: str) -> int:
    """Line of the recipe that begins with this."""
    return next(number for number, line in enumerate(RECIPE.splitlines(), 1) if line.strip().startswith(text))


def refused(how: str, *words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        if how == "run":
            chain.run(load("r.yaml", words))
        else:
            checked("r.yaml", words, sources=True)
    assert not list(Path("runs").glob("*/*/*.partial")) and not list(Path("runs").glob("*/*/current"))
    return str(caught.value).splitlines()


@pytest.mark.parametrize("how", ["run", "check"])
def test_every_unusable_source_of_every_stage_is_told_before_the_first_runs(folder, how):
    """correctness 44"""
    (folder / "few.jsonl").write_text("".join(json.dumps({"prompt": f"what is {i}?"}) + "\n" for i in range(2)))
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 3)
    words = [
        "clean.sources.nouns.text=nuon",
        "clean.sources.animals.path=animals.jsonl",
        "tokenizer.weights={animals: 1, beasts: 2}",
        "sft.sources.nouns={path: chats.jsonl}",
        "sft.sources.more={path: nowhere.jsonl}",
        "dpo.sources.nouns.chosen='{best}'",
        "ppo.sources={few: {path: few.jsonl}}",
    ]
    shutil.copy(folder / "animals.txt", folder / "animals.jsonl")
    lines = refused(how, *words)
    for key, said in [
        ("clean.sources.nouns", "none of its 792 records is good; the first: rows.jsonl:1: no field 'nuon'"),
        ("clean.sources.animals", "sources.animals: sample_by is for txt"),
        ("tokenizer.weights", "stages.tokenizer.weights: its text has no source 'beasts'; it has animals, nouns"),
        ("sft.sources.nouns", "sources.nouns: none of its 3 records can be used: 3 x no message of the assistant"),
        ("sft.sources.more", "sources.more: nowhere.jsonl does not exist"),
        ("dpo.sources.nouns", "can be used: 792 x no field 'best'"),
        ("ppo.sources", "holdout: 0.05 leaves"),
    ]:
        matches = [line for line in lines if said in line]
        assert matches and f"command line, {key}" in matches[0], (key, said, lines)
    assert any("stages.ppo.inputs.reward: judge: model_type is None" in line for line in lines), lines
    assert len(lines) == 8, lines


def test_a_source_in_the_file_is_told_with_its_line(folder):
    """correctness 44"""
    (folder / "rows.jsonl").write_text('{"a": 1}\n')
    lines = refused("run")
    for stage in ("clean", "sft", "dpo", "ppo"):
        after = place(f"{stage}:")
        number = next(n for n, line in enumerate(RECIPE.splitlines(), 1) if n > after and "nouns: {path" in line)
        assert any(line.startswith(f"r.yaml:{number}: sources.nouns: none of its") for line in lines), (stage, lines)


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")


def _silent_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("nothing of what was said")


def _refusing_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")


@pytest.mark.parametrize("harm", [_no_template, _broken_template, _silent_template, _refusing_template])
@pytest.mark.parametrize("through", ["judge", "model", "earlier"])
def test_a_chat_template_that_cannot_be_used_is_found_before_the_first_stage(folder, tmp_path_factory, harm, through):
    """correctness 44: of a folder that a stage names, or that an earlier stage begins from."""
    harness_folder = _tokenizer_folder(tmp_path_factory)
    shutil.copytree(harness_folder, folder / "judge", dirs_exist_ok=True)
    harm(folder / "judge")
    words = {"judge": [], "model": ["sft.inputs={model: ./judge}"], "earlier": ["pretrain.inputs={model: ./judge}"]}[
        through
    ]
    lines = refused("run", *words)
    assert all("r.yaml" in line or "command line" in line for line in lines), lines
    assert any("template" in line for line in lines), lines


_made: list[Path] = []


def _tokenizer_folder(tmp_path_factory) -> Path:
    """A published tokenizer with the stage's own chat template, and a config beside it."""
    if not _made:
        from harness import byte_level

        from pipeline.data.tokenizer.tokenizer_folder import publish

        made = tmp_path_factory.mktemp("judge")
        publish(byte_level(tiny.texts(0, 50), 290), made)
        (made / "config.json").write_text("{}")
        _made.append(made)
    return _made[0]


def test_what_is_right_runs_and_published_stages_are_not_read_again(folder):
    """correctness 44: nothing is refused that would run, and what is up to date needs no source."""
    words = ["ppo=~"]
    checked("r.yaml", words, sources=True)
    run_stage(load("r.yaml", words), "clean")
    os.unlink("animals.txt")
    with pytest.raises(UserError) as caught:
        chain.run(load("r.yaml", [*words, "sft.sources.nouns.path=nowhere.jsonl"]))
    assert "nowhere.jsonl" in str(caught.value) and "animals" not in str(caught.value)
