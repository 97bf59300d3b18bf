"""What pretraining refuses before it works: one sentence, exit code 2."""

import shutil

import numpy as np
import pytest
import tiny
from harness import stage, succeed

from pipeline.core import chain
from pipeline.core.errors import UserError
from pipeline.core.graph import check, nodes
from pipeline.core.recipe import load

LONG = (
    "  anneal:\n    kind: pretrain\n    inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: pretrain}\n   "
    " sequence_length: 64\n    batch_size: 8\n    steps: 2\n"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny.write_inputs(folder)
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    return folder


def refused(folder, *words, recipe="recipe.yaml", **options) -> str:
    code, text = stage("pretrain", recipe, "output=wrong", *words, cwd=folder, **options)
    assert code == 2 and "Traceback" not in text and text.count("error:") == 1, text
    assert not list(folder.glob("wrong/tiny/*/*.partial/checkpoints")), "nothing was worked on"
    return text.partition("error:")[2]


@pytest.mark.parametrize(
    "words, said",
    [
        (["pretrain.mixture={one: 0.6, two: 0.35}"], "its weights sum to 0.95, expected 1"),
        (["pretrain.mixture={one: -1, two: 2}"], "one has the weight -1"),
        (["pretrain.mixture={one: .nan, two: 2}"], "mixture.one is nan, expected a finite number"),
        (["pretrain.mixture={one: 0, two: 0}"], "no source has a weight above 0"),
        (["pretrain.mixture={one: 1, tow: 1}"], "no source 'tow'; it has one, two"),
        (["pretrain.run.device=cuda"], "run.device: cuda asks for a GPU, and torch"),
        (["pretrain.micro_batch=3"], "not divisible by micro_batch 3; use 2 or 4"),
        (
            ["pretrain.parallel.pipeline=2"],
            "1 process cannot be divided into pipeline: 2 stages; launch 2, or give parallel.pipeline=1",
        ),
        (["pretrain.log.peak=fast"], "log.peak"),
    ],
)
def test_a_recipe_that_cannot_be_run(world, words, said):
    assert said in refused(world, *words)


def test_tokens_beyond_the_vocabulary(world):
    """Of packed tokens that were made elsewhere every id is looked at."""
    shutil.copytree(
        (world / "tokens").resolve(), world / "made", ignore=shutil.ignore_patterns("manifest.json", "run.json")
    )
    words = ["pretrain.inputs={tokens: ./made, tokenizer: ./tokenizer}"]
    path = world / "made/train/two-00000.tokens.npy"
    tokens = np.load(path)
    tokens[1234] = 290
    np.save(path, tokens)
    assert "token 1234 of source two (train) is 290, beyond the vocabulary of 290" in refused(world, *words)
    tokens[1234] = 289
    np.save(path, tokens)
    succeed("pretrain", "recipe.yaml", "output=made-elsewhere", "pretrain.steps=1", *words, cwd=world)


def test_rows_longer_than_the_model_and_tokens_of_another_tokenizer(world):
    succeed("pretrain", "recipe.yaml", "pretrain.steps=1", cwd=world)
    (world / "long.yaml").write_text(tiny.RECIPE.replace("steps: 6", "steps: 1") + LONG)
    code, text = stage("pretrain", "long.yaml", "--stage", "anneal", cwd=world)
    assert code == 2 and "64 is more than the 32 positions of the model" in text and "Traceback" not in text, text


@pytest.mark.parametrize(
    "world_size, keys, said",
    [
        (3, {}, "batch_size 8 is not divisible by 3 data-parallel ranks; use 6 or 9, or 1 or 2 processes"),
        (12, {}, "use 12, or 4 or 8 processes"),
        (
            6,
            {"pipeline": 4},
            "6 processes cannot be divided into pipeline: 4 stages; launch 4 or 8, or give parallel.pipeline=2 or 3",
        ),
        (6, {"pipeline": 2}, "not divisible by 3 data-parallel ranks; use 6 or 9, or 2 or 4 processes"),
    ],
)
def test_a_topology_that_the_batch_does_not_fit(world, world_size, keys, said):
    config = load(world / "recipe.yaml", [f"pretrain.parallel.{key}={value}" for key, value in keys.items()]).stages[
        "pretrain"
    ]
    with pytest.raises(UserError, match=said):
        config.check(world_size)


def test_the_chain_knows_the_sources_before_anything_is_made(tmp_path):
    """A slip in a mixture is found when the recipe is checked, and not after hours of cleaning and packing. So is a
    GPU that is not there."""
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2,"
        " intermediate_size: 64}\nstages:\n  clean: {sources: {web: {path: a}, code: {path: b}}}\n  tokenizer:"
        " {vocab_size: 300}\n  pack: {}\n  pretrain: {sequence_length: 32, batch_size: 8, steps: 1, mixture: {web: 1,"
        " cod: 1}}\n"
    )
    graph = nodes(load(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match="stages.pretrain.mixture: its text has no source 'cod'; it has code, web"):
        check(graph["pretrain"], graph)
    with pytest.raises(UserError, match="run.device: cuda"):
        chain.run(
            load(
                tmp_path / "r.yaml",
                ["pretrain.mixture={web: 1, code: 1}", "pretrain.run.device=cuda", f"output={tmp_path}"],
            )
        )


def test_a_gpu_is_refused_where_the_launcher_forbids_it(world):
    assert "ACCELERATE_USE_CPU=true forbids it" in refused(
        world, "pretrain.run.device=cuda", env={"ACCELERATE_USE_CPU": "true"}
    )


def test_a_checkpoint_of_another_model(world):
    code, _ = stage(
        "pretrain", "recipe.yaml", "output=fork", "pretrain.save.asynchronous=false", cwd=world, fault="work:3"
    )
    assert code == -9
    code, text = stage("pretrain", "recipe.yaml", "output=fork", "model.hidden_size=48", "--fork", cwd=world)
    assert (
        code == 2
        and "is of another model: model.embed_tokens.weight is [290, 32] there and [290, 48] here" in text
        and "Traceback" not in text
    ), text


def test_a_run_without_a_valid_checkpoint_says_that_it_begins_anew(world):
    """Both checkpoints of a killed run torn, one in its data and one in its marker."""
    words = ["output=torn", "pretrain.save.asynchronous=false"]
    assert stage("pretrain", "recipe.yaml", *words, cwd=world, fault="work:5")[0] == -9
    (folder,) = (world / "torn/tiny/pretrain").glob("*.partial/checkpoints")
    for path in (folder / "step-000004/model-00000.safetensors", folder / "step-000002/complete.json"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = succeed("pretrain", "recipe.yaml", *words, cwd=world)
    assert said.count("is damaged") == 2 and "no valid checkpoint is left" in said and "starting from step 0" in said
