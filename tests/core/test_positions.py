"""Which rows a recipe may give to a model: as long as the model has positions for, whatever the stage before used."""

import families
import pytest

from pipeline import pretrain
from pipeline.core import recipe
from pipeline.core.config import PlannedInput
from pipeline.core.errors import UserError
from pipeline.core.graph import check, nodes
from pipeline.models import build
from pipeline.train.config import TrainConfig
from pipeline.train.finetune_config import FinetuneConfig

KEYS = "batch_size: 4, steps: 1, sources: {one: {path: rows.jsonl}}"
CHAIN = f"""
name: lengths
model: {{family: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}
stages:
  pretrain: {{inputs: {{tokens: ./tokens, tokenizer: ./tokens}}, sequence_length: 8192, batch_size: 4, steps: 1}}
  sft: {{sequence_length: 2048, {KEYS}}}
  reward: {{sequence_length: 8192, {KEYS}}}
  dpo: {{sequence_length: 4096, {KEYS}}}
  ppo: {{sequence_length: 8192, {KEYS}}}
  assess: {{inputs: {{tokens: ./tokens, sft: sft}}, sequence_length: 8192}}
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/index.json").write_text("{}")
    (tmp_path / "r.yaml").write_text(CHAIN)
    return tmp_path


def checked(stage: str, *words: str) -> None:
    graph = nodes(recipe.load("r.yaml", list(words)))
    check(graph[stage], graph)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "assess"])
def test_a_stage_may_be_longer_than_the_one_before(world, stage):
    """Correctness 41: sft's rows of 2,048 tokens were taken for the model's positions."""
    checked(stage)
    with pytest.raises(
        UserError, match=rf"stages\.{stage}\.sequence_length: 8193 tokens are more than the 8192 positions"
    ):
        checked(stage, f"{stage}.sequence_length=8193")


def test_every_model_that_a_training_stage_takes_is_declared_as_one():
    """Else its positions would not be checked."""
    for kind in recipe.KINDS:
        module = recipe.module_of(kind)
        inputs = {name.rstrip("?") for name in module.INPUTS}
        if issubclass(module.Config, FinetuneConfig):
            assert set(module.Config.MODEL_INPUTS) == inputs, kind
        elif issubclass(module.Config, TrainConfig):
            assert set(module.Config.MODEL_INPUTS) <= inputs, kind


def test_models_are_found_by_the_names_that_a_stage_declares():
    class Distil(FinetuneConfig):
        MODEL_INPUTS = ("student", "teacher")

    config = Distil(kind="distil", sources={}, steps=1, batch_size=1, sequence_length=64)
    parent = FinetuneConfig(kind="sft", sources={}, steps=1, batch_size=1, sequence_length=8)
    model = pretrain.Config(
        kind="pretrain", model={"family": "llama"}, steps=1, batch_size=1, sequence_length=32, inputs={}
    )
    base = PlannedInput("base", model)
    inputs = {"student": PlannedInput("tuned", parent, {"model": base}), "teacher": base}
    assert config.initial_model(inputs).name == "tuned" and len(config.input_models(inputs)) == 2
    assert config.planned_positions(inputs) == 32
    with pytest.raises(UserError, match="positions that tuned gives its model(.|\\n)*positions that base gives"):
        config.check_inputs(inputs)


def test_shorter_pretraining_keeps_positions_and_longer_adds_them(world):
    """Correctness 41: a second pretraining stage on shorter rows, or on longer ones with scaled positions."""
    inputs = "{tokens: ./tokens, tokenizer: ./tokens, model: pretrain}"
    more = f"  anneal: {{kind: pretrain, inputs: {inputs}, sequence_length: 1024, batch_size: 4, steps: 1}}\n"
    (world / "r.yaml").write_text(
        CHAIN.replace("  sft:", more + "  sft:").replace("sft: {", "sft: {inputs: {model: anneal}, ")
    )
    checked("anneal")
    checked("sft", "sft.sequence_length=8192")
    longer = [
        "anneal.sequence_length=16384",
        "anneal.model_changes={rope_parameters: {rope_type: linear, factor: 2.0}}",
    ]
    checked("anneal", *longer)
    checked("sft", *longer, "sft.sequence_length=16384")
    with pytest.raises(UserError, match="16384 positions"):
        checked("sft", *longer, "sft.sequence_length=16385")
    with pytest.raises(UserError, match="16384 tokens are more than the 8192 positions"):
        checked("anneal", longer[0])


@pytest.mark.parametrize(
    "family, most", [("llama", 96), ("gpt2", 96), ("rwkv", None), ("mamba", None), ("bloom", None)]
)
def test_a_folder_made_elsewhere_is_asked(world, family, most):
    """Correctness 41: its config.json says how many positions there are, under the family's own name for them."""
    model = build.new({**families.of_family(family), "pad_vocab_to": 64}, families.Sized(64), 96, seed=1)
    model.save_pretrained(world / "base")
    (world / "base" / "tokenizer.json").touch()
    words = ["sft.inputs={model: ./base}", "dpo.inputs={model: sft}"]
    for stage in ("sft", "dpo"):
        checked(stage, *words, f"{stage}.sequence_length=96")
        longer = [*words, f"{stage}.sequence_length=97"]
        if most is None:
            checked(stage, *longer)
            continue
        with pytest.raises(UserError, match=f"97 .* more than the {most} positions"):
            checked(stage, *longer)


def test_a_reward_model_with_fewer_positions(world):
    """Correctness 41: ppo gives its rows to the reward model as well."""
    model = build.new({**families.of_family("llama"), "pad_vocab_to": 64}, families.Sized(64), 96, seed=1)
    model.save_pretrained(world / "judge")
    with pytest.raises(UserError, match="8192 is more than the 96 positions of the model in '?./judge"):
        checked("ppo", "ppo.inputs={policy: sft, reward: ./judge}")
