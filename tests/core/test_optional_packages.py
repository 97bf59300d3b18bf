"""A stage runs without the packages that it does not need, and names those that it does before it works."""

import os
import subprocess
import sys

import pytest
import tiny
from paths import ROOT
from typer.testing import CliRunner

from pipeline.checks import layouts
from pipeline.cli import app
from pipeline.core import optional_packages
from pipeline.core.errors import UserError
from pipeline.core.recipe import load

OPTIONAL = ("deepspeed", "ninja", "wandb", "datasets", "trl", "bitsandbytes", "gguf", "opencc", "resiliparse", "peft")
BLOCKED = f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # as if it were not installed: find_spec finds nothing, import raises
from pipeline.core.stage import main
main(sys.argv[1], sys.argv[2:])
"""


def blocked(kind: str, *words: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BLOCKED, kind, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_pretraining_in_one_process_needs_no_optional_package(tmp_path):
    tiny.write_inputs(tmp_path)
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    answer = blocked("pretrain", "recipe.yaml", cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (tmp_path / "runs/tiny/pretrain/current/model/model.safetensors").is_file()
    answer = blocked("pretrain", "recipe.yaml", "pretrain.parallel.zero=1", "output=other", cwd=tmp_path)
    assert answer.returncode == 2 and answer.stderr.splitlines()[-1] == (
        "error: stage pretrain: parallel.zero: 1 needs the package deepspeed, which is not installed; run pip install"
        " 'alma[deepspeed]', or split the model with torch: shard: full"
    )


RECIPE = """
name: lacking
model: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
stages:
  clean: {sources: {text: {dataset: org/name, revision: abc}}}
  tokenizer: {vocab_size: 300}
  pack: {}
  pretrain:
    {sequence_length: 32, batch_size: 8, steps: 4, parallel: {pipeline: 2}, run: {processes: 2}, log: {wandb: mine}}
"""
LACKING = (
    "clean: sources.text.dataset needs the package datasets, which is not installed; run pip install 'alma[datasets]',"
    " or give the data set's files as `path`",
    "pretrain: parallel.pipeline: 2 needs the package deepspeed, which is not installed; run pip install"
    " 'alma[deepspeed]'",
    "pretrain: log.wandb needs the package wandb, which is not installed; run pip install 'alma[wandb]', or remove it",
)


@pytest.fixture
def without(monkeypatch):
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)


def test_all_missing_packages_are_named_before_the_first_stage(tmp_path, monkeypatch, without):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    answer = CliRunner().invoke(app, ["run", "recipe.yaml"])
    assert isinstance(answer.exception, UserError)
    for line in LACKING:
        assert f"stage {line}" in str(answer.exception)
    # The recipe itself is right, and may be for another machine.
    answer = CliRunner().invoke(app, ["recipe", "check", "recipe.yaml"])
    assert answer.exit_code == 0, answer.output
    for line in LACKING:
        name = line.partition(":")[0]
        assert f"{name}: WARNING: not on this machine: stage {line}" in answer.output


def test_the_quickstart_needs_none_of_them(without):
    for config in load("quickstart").stages.values():
        config.check_machine()


def test_proofs_leave_out_the_layouts_of_a_missing_package(without):
    refused = {trial["layout"] for trial in layouts.trials(["fp32"], list(layouts.LAYOUTS)) if "refused" in trial}
    trained = {layout.name for layout in layouts.LAYOUTS} - refused
    assert not any("ZeRO" in name or "pipeline" in name for name in trained)
    assert refused == {"ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "pipeline of 2", "pipeline of 2 x 2 data ranks, ZeRO-1"}


def test_every_extra_that_a_message_names_exists_and_brings_the_package():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in optional_packages.EXTRAS.items():
        assert any(requirement.replace("-", "_").startswith(package) for requirement in extras[extra])
