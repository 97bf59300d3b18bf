"""What a run writes of its steps, against numbers computed beside it."""

import json
import math

import pytest
import tiny
import torch
from harness import files_of, stage, succeed
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.data.tokens.row_sampler import RowSampler
from pipeline.data.tokens.store import TokenStore
from pipeline.models import cost

# The initial model's step: at lr 1e-30 no weight moves, so that every step's numbers can be had from the published
# model.
STILL = (
    "pretrain.save.asynchronous=false",
    "pretrain.optimizer.lr=1e-30",
    "pretrain.optimizer.weight_decay=0",
    "pretrain.micro_batch=4",
    "pretrain.log.every_steps=3",
    "pretrain.log.peak=0.5",
    "pretrain.steps=7",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meters")
    tiny.write_inputs(folder)
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    succeed("pretrain", "recipe.yaml", *STILL, cwd=folder)
    return folder


def published(folder, runs="runs"):
    return folder / runs / "tiny" / "pretrain" / "current"


def lines(folder, runs="runs") -> list[dict]:
    found = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (published(folder, runs) / "metrics.jsonl").read_text().splitlines()
    ]
    return [line for line in found if "grad_norm" in line]


def test_losses_and_bits_per_byte_are_those_of_the_rows(world):
    store = TokenStore(world / "tokens")
    sampler = RowSampler(store, 32, {"one": 2, "two": 1}, 5)
    model = AutoModelForCausalLM.from_pretrained(published(world) / "model").eval()

    def nats(rows):
        with torch.no_grad():
            return sum(
                model(input_ids=ids[None], labels=ids[None]).loss.item() * 32
                for ids in (torch.from_numpy(row.tokens) for row in rows)
            )

    for line, window in zip(lines(world), [(0, 1), (1, 3), (3, 6), (6, 7)], strict=True):
        last = [sampler.row(i) for i in range((line["step"] - 1) * 8, line["step"] * 8)]
        text = sum(int(store.token_bytes[row.tokens[1:]].sum()) for row in last)
        assert line["loss"] == pytest.approx(nats(last) / 256, rel=1e-5)
        assert line["bits_per_byte"] == pytest.approx(nats(last) / math.log(2) / text, rel=1e-5)
        rows = [sampler.row(i) for i in range(window[0] * 8, window[1] * 8)]
        for source in ("one", "two"):
            mine = [row for row in rows if row.source == source]
            assert line[f"loss/{source}"] == pytest.approx(nats(mine) / len(mine) / 32, rel=1e-5)
            seen = sampler.rows_by_source(line["step"] * 8)[source]
            assert line[f"tokens/{source}"] == seen * 32 and line[f"epochs/{source}"] == pytest.approx(
                seen / sampler.rows_per_epoch[source], abs=1e-4
            )


def test_rates_follow_from_times(world):
    model = AutoModelForCausalLM.from_pretrained(published(world) / "model")
    flops = cost.training_flops(model, cost.count(model), 32)
    for line in lines(world):
        assert line["tok_per_second"] == pytest.approx(256 / line["seconds/step"], rel=1e-3)
        assert (
            line["mfu"] == pytest.approx(line["tok_per_second"] * flops.full / 0.5e12, abs=1e-4)
            and line["mfu_causal"] <= line["mfu"]
        )
        parts = sum(line[f"seconds/{name}"] for name in ("data", "forward", "backward", "reduce", "update", "log"))
        assert parts == pytest.approx(line["seconds/step"], abs=1e-5)
        assert 0 < line["data_wait_share"] < 1 and 0.05 < line["peak_memory_gb"] < 10
    assert lines(world)[-1]["seconds_left"] == 0 and lines(world)[0]["seconds_left"] > 0


TIMED = ("time", "tok_per_second", "mfu", "mfu_causal", "data_wait_share", "peak_memory_gb", "seconds_left")


def timeless(folder, runs) -> list[list]:
    """All lines, evaluations too, without what a clock or the machine says; keys in their order."""
    found = (published(folder, runs) / "metrics.jsonl").read_text().splitlines()
    return [
        [(key, value) for key, value in json.loads(line).items() if key not in TIMED and not key.startswith("seconds/")]
        for line in found
    ]


def test_a_killed_run_writes_the_lines_of_one_that_was_not(world):
    """Lines every 4 steps, checkpoints every 2, killed between two lines, behind a line that no checkpoint has, and
    inside a save: losses and tokens of each source since the last line are those of all its steps, to the bit."""
    words = (
        "pretrain.save.asynchronous=false",
        "pretrain.log.every_steps=4",
        "pretrain.steps=10",
        "pretrain.evaluate_every=3",
    )
    succeed("pretrain", "recipe.yaml", *words, "output=whole", cwd=world)
    for fault, begun in (("work:3", None), ("work:5", 2), ("save:1", 6), (None, 6)):
        code, said = stage("pretrain", "recipe.yaml", *words, "output=killed", cwd=world, fault=fault)
        assert code == (-9 if fault else 0), said
        assert begun is None or f"resuming from step-{begun:06d}" in said
    found = timeless(world, "killed")
    assert found == timeless(world, "whole")
    trained = [dict(line) for line in found if "grad_norm" in dict(line)]
    assert [line["step"] for line in trained] == [1, 4, 8, 10] and "loss/one" in trained[2]
    assert not any("mfu" in line for line in lines(world, "killed")), "no peak, no MFU"
    counted = json.loads((published(world, "killed") / "manifest.json").read_text())["metrics"]["tokens_sources"]
    assert sum(counted.values()) == 10 * 8 * 32 == trained[-1]["tokens/one"] + trained[-1]["tokens/two"]


def test_samples_on_schedule_change_nothing_and_are_the_model_s(world):
    """Text after a prompt is what transformers' own generate gives; the weights are those of a run without samples;
    killed in between, the lines are the same."""
    words = [
        *STILL[3:-1],
        "pretrain.steps=7",
        "pretrain.samples={every_steps: 3, prompts: [ape bee, 小猫], max_new_tokens: 6, temperature: 0}",
    ]
    said = succeed("pretrain", "recipe.yaml", *words, "output=sampled", cwd=world)
    plain = [*words[:-1], "output=unsampled"]
    succeed("pretrain", "recipe.yaml", *plain, cwd=world)
    assert files_of(published(world, "sampled")) == files_of(published(world, "unsampled"))
    found = [json.loads(line) for line in (published(world, "sampled") / "logs/samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in found] == [
        (step, prompt) for step in (3, 6, 7) for prompt in ("ape bee", "小猫")
    ]
    folder = published(world, "sampled") / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("ape bee", add_special_tokens=False).input_ids]])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )[0, ids.shape[1] :]
    assert (
        found[-2]["text"] == tokenizer.decode([i for i in made if i != tokenizer.eos_token_id])
        and f"step 7: ape bee → {found[-2]['text']}" in said
    )
    words[-1] = words[-1].replace("temperature: 0", "temperature: 1")
    succeed("pretrain", "recipe.yaml", *words, "output=warm", cwd=world)
    code, _ = stage("pretrain", "recipe.yaml", *words, "output=cold", cwd=world, fault="work:7")
    assert code == -9
    succeed("pretrain", "recipe.yaml", *words, "output=cold", cwd=world)
    kept = [(published(world, runs) / "logs/samples.jsonl").read_bytes() for runs in ("warm", "cold")]
    assert kept[0] == kept[1]
    code, text = stage(
        "pretrain",
        "recipe.yaml",
        "pretrain.samples={every_steps: 3, prompts: [ape], max_new_tokens: 40}",
        "output=wrong",
        cwd=world,
    )
    assert code == 2 and "40 new ones are more than sequence_length 32" in text and "Traceback" not in text
