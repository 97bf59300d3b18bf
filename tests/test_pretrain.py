"""The pretraining stage as a user starts it: what comes out, kills at every point, stopping, and mistakes."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import tiny
import torch
from harness import files_of, stage, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import chain, recipe
from pipeline.data.tokens import TokenStore
from pipeline.errors import UserError
from pipeline.models import build


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs, the recipe, and an uninterrupted run in runs/."""
    folder = tmp_path_factory.mktemp("pretrain")
    tiny.write_inputs(folder)
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    said = succeed("pretrain", "recipe.yaml", cwd=folder)
    return folder, said


def published(folder, runs="runs"):
    return folder / runs / "tiny" / "pretrain" / "current"


def metrics(folder, runs="runs") -> dict:
    return json.loads((published(folder, runs) / "manifest.json").read_text())["metrics"]


def bits_per_byte(folder, model) -> float:
    """By transformers and the stored text sizes alone: the first 5 rows of each source, each read with an eos before its first token."""
    nats = size = 0
    for source in ("one", "two"):
        store = TokenStore(folder / "tokens", "heldout")
        stream = np.concatenate([[store.eos_id], store.read(source, 0, 5 * 32)]).astype(np.int64)
        for row in range(5):
            ids = torch.from_numpy(stream[row * 32 : row * 32 + 33])[None]
            nats += 32 * model(input_ids=ids, labels=ids).loss.item()
            size += int(store.token_bytes[ids[0, 1:]].sum())
    return nats / math.log(2) / size


def test_the_model_is_what_the_metrics_say(world):
    folder, said = world
    found = metrics(folder)
    model = AutoModelForCausalLM.from_pretrained(published(folder) / "model").eval()
    with torch.no_grad():
        assert found["bits_per_byte_after"] == pytest.approx(bits_per_byte(folder, model), rel=1e-5)
    assert found["bits_per_byte_after"] < found["bits_per_byte_before"] and found["loss_before"] == pytest.approx(math.log(290), abs=0.1)
    assert found["parameters"] == model.num_parameters() and found["tokens"] == 6 * 8 * 32
    assert f"{model.num_parameters():,} parameters" in said and "1,536 tokens = 6 steps x 8 rows x 32" in said
    assert set(found["bits_per_byte_sources"]) == {"one", "two"}
    tokenizer = AutoTokenizer.from_pretrained(published(folder) / "model")
    assert tokenizer.decode(model.generate(**tokenizer("ape bee", return_tensors="pt"), max_new_tokens=3)[0])
    lines = [json.loads(line) for line in (published(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 2, 3, 4, 5, 6] and lines[0]["heldout_bits_per_byte"] == found["bits_per_byte_before"]


def test_it_learns_what_follows_what(world):
    """A word is followed by the next of the list in nine of ten cases; 2.71 bits a byte at the start, under 0.6 after 150 steps."""
    folder, _ = world
    succeed("pretrain", "recipe.yaml", "output=learn", "pretrain.steps=150", "pretrain.optimizer.lr=1e-2", "pretrain.precision=bf16", "pretrain.save.every_steps=150", cwd=folder)
    assert metrics(folder, "learn")["bits_per_byte_after"] < 0.6


@pytest.mark.parametrize("faults", [["work:1"], ["work:3", "work:2"], ["save:1", "save:2"], ["save:3", "publish:1"], ["publish:2"]], ids=lambda f: "-".join(f).replace(":", ""))
def test_killed_and_started_again_it_ends_the_same(world, faults):
    folder, _ = world
    runs = "killed-" + "-".join(faults).replace(":", "")
    for fault in faults:
        code, text = stage("pretrain", "recipe.yaml", f"output={runs}", "pretrain.save.asynchronous=false", cwd=folder, fault=fault)
        assert code == -9, f"{fault}: {code}\n{text}"
    said = succeed("pretrain", "recipe.yaml", f"output={runs}", cwd=folder)
    assert files_of(published(folder, runs)) == files_of(published(folder))
    expected, found = metrics(folder), metrics(folder, runs)
    for key in set(expected) - {"tokens_per_second"}:
        assert found[key] == expected[key], key
    steps = [json.loads(line)["step"] for line in (published(folder, runs) / "metrics.jsonl").read_text().splitlines() if "grad_norm" in line]
    assert steps == [1, 2, 3, 4, 5, 6], "the curve runs once"
    assert ("goes on from step-" in said) == (faults[-1] not in ("work:1", "publish:2") and faults != ["save:1"])


def test_killed_at_random_moments_it_ends_the_same(world):
    folder, _ = world
    draw = random.Random(7)
    for _ in range(6):
        code, text = stage("pretrain", "recipe.yaml", "output=random", cwd=folder, kill_after=draw.uniform(0.2, 1.5))
        if code == 0:
            break
        assert code == -9, text
    succeed("pretrain", "recipe.yaml", "output=random", cwd=folder)
    assert files_of(published(folder, "random")) == files_of(published(folder))


def test_a_fork_to_a_longer_horizon_goes_on_from_the_last_checkpoint(world):
    folder, _ = world
    succeed("pretrain", "recipe.yaml", "output=fork", cwd=folder)
    said = succeed("pretrain", "recipe.yaml", "output=fork", "pretrain.steps=8", "--fork", cwd=folder)
    assert "goes on from step-000006" in said and metrics(folder, "fork")["tokens"] == 8 * 8 * 32


def test_it_goes_on_from_another_pretraining_stage_and_other_layouts_of_memory_change_nothing(world):
    """A second stage with a schedule of its own begins where the first ended; micro-batches and recomputed activations are execution, so no new run."""
    folder, _ = world
    (folder / "two.yaml").write_text(
        tiny.RECIPE + "  anneal:\n    kind: pretrain\n    inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: pretrain}\n"
        "    sequence_length: 32\n    batch_size: 8\n    steps: 2\n    precision: fp32\n    mixture: {two: 1}\n    document_mask: true\n    heldout_rows: 10\n    optimizer: {lr: 1e-4}\n"
    )
    succeed("pretrain", "two.yaml", "--stage", "anneal", cwd=folder)
    first = metrics(folder)
    second = json.loads((folder / "runs/tiny/anneal/current/manifest.json").read_text())["metrics"]
    assert second["bits_per_byte_before"] == pytest.approx(first["bits_per_byte_after"], rel=1e-6)
    assert second["bits_per_byte_after"] != second["bits_per_byte_before"]
    assert "up to date" in succeed("pretrain", "recipe.yaml", "pretrain.micro_batch=2", "pretrain.activation_checkpointing=true", cwd=folder)


@pytest.mark.parametrize(
    "word, said",
    [
        ("pretrain.mixture={one: 1, tow: 1}", "two"),
        ("model.family=lama", "did you mean llama"),
        ("model.hiden_size=3", "did you mean hidden_size"),
        ("pretrain.parallel.pipeline=2", "1 process cannot be divided into pipeline: 2"),
        ("pretrain.micro_batch=3", "not divisible by micro_batch 3"),
        ("pretrain.sequence_length=100000", "sequence_length"),
        ("pretrain.inputs={tokens: ./tokenizer, tokenizer: ./tokenizer}", "index.json"),
        ("pretrain.parallel={zero: 3}", "does not go with zero: 3"),
    ],
)
def test_mistakes_are_one_sentence(world, word, said):
    folder, _ = world
    code, text = stage("pretrain", "recipe.yaml", "output=wrong", word, *(["pretrain.compile=true"] if "zero" in word else []), cwd=folder)
    assert code == 2 and said in text and "Traceback" not in text and text.count("error:") == 1, text


# ---- going on from a model -------------------------------------------------------------------------------------------------

LONGER = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}


def test_a_hub_folder_goes_on_with_longer_rows(world, tmp_path):
    """Twice the context by scaled positions. What training starts from has the logits of transformers' model with the same configuration, and so has what it publishes."""
    folder, _ = world
    source = published(folder) / "model"
    copy = tmp_path / "by-hand"
    shutil.copytree(source, copy)
    written = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**written, "rope_parameters": LONGER, "max_position_embeddings": 64}))
    ids = torch.randint(3, 290, (2, 64), generator=torch.Generator().manual_seed(0))
    by_hand, plain = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (copy, source))
    ours = build.load(source, config=build.changed(source, {"rope_parameters": LONGER}, 64)).eval()
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, by_hand(ids).logits) and not torch.allclose(ours(ids).logits, plain(ids).logits, atol=1e-4)
    (folder / "hub").exists() or shutil.copytree(source, folder / "hub")
    block = "  longer: {kind: pretrain, inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: ./hub}, sequence_length: 64, batch_size: 4, steps: 2, precision: fp32, heldout_rows: 4"
    (folder / "longer.yaml").write_text(tiny.RECIPE + block + f", model_changes: {{rope_parameters: {json.dumps(LONGER)}}}}}\n")
    succeed("pretrain", "longer.yaml", "--stage", "longer", cwd=folder)
    made = AutoModelForCausalLM.from_pretrained(folder / "runs/tiny/longer/current/model")
    assert made.config.max_position_embeddings == 64 and made.config.rope_parameters["rope_type"] == "yarn"
    for word, said in [("model_changes={}", "more than the 32 positions"), ("model_changes={hidden_size: 64}", "would change the shape of"), ("model_changes={rope: 1}", "has no such key")]:
        code, text = stage("pretrain", "longer.yaml", "--stage", "longer", "output=wrong", f"longer.{word}", *([] if "{}" in word else ["longer.sequence_length=32"]), cwd=folder)
        assert code == 2 and said in text and "Traceback" not in text, text


def test_longer_rows_without_positions_are_refused_before_anything_runs(world, monkeypatch):
    folder, _ = world
    anneal = "  anneal: {kind: pretrain, inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: pretrain}, sequence_length: 64, batch_size: 4, steps: 2}\n"
    (folder / "anneal.yaml").write_text(tiny.RECIPE + anneal)
    monkeypatch.chdir(folder)
    graph = chain.nodes(recipe.load("anneal.yaml"))
    with pytest.raises(UserError, match="64 tokens are more than the 32 positions"):
        chain.check(graph["anneal"], graph)
    graph = chain.nodes(recipe.load("anneal.yaml", [f"anneal.model_changes={{rope_parameters: {json.dumps(LONGER)}}}"]))
    chain.check(graph["anneal"], graph)


def test_a_model_with_other_tokens_is_refused(world):
    folder, _ = world
    other = folder / "other"
    other.exists() or shutil.copytree(published(folder) / "model", other)
    spec = json.loads((other / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    code, text = stage("pretrain", "recipe.yaml", "output=wrong", "pretrain.inputs.model=./other", cwd=folder)
    assert code == 2 and "is not the tokenizer of inputs.model" in text, text
