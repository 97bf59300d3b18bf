"""What sft, reward, dpo, kto and ppo share: the length of a run in epochs, and adapters."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import tuned
from harness import files_of, launch, stage, succeed
from safetensors import safe_open

from pipeline.core.config import identity
from pipeline.core.errors import UserError
from pipeline.dpo import Config
from pipeline.models import build
from pipeline.sft import Config as SftConfig
from pipeline.train.finetune_config import FinetuneSchedule
from pipeline.train.scores import reward_scores

KEYS = {"sources": {"s": {"path": "x"}}, "batch_size": 10, "sequence_length": 64}


@pytest.mark.parametrize(
    "epochs, rows, steps", [(1, 100, 10), (2, 95, 19), (1.1, 100, 11), (0.3, 100, 3), (0.001, 100, 1), (3, 7, 3)]
)
def test_epochs_in_steps(epochs, rows, steps):
    """Rounded up, so that every row is taken `epochs` times; a float's error is not a step."""
    resolved = Config(**KEYS, epochs=epochs).in_steps(rows)
    assert resolved.steps == steps and resolved.epochs is None


@pytest.mark.parametrize("ratio, steps, warmup", [(0.1, 40, 4), (0.03, 100, 3), (0.01, 5, 1), (1, 7, 7)])
def test_warmup_as_a_share_of_the_steps(ratio, steps, warmup):
    """Rounded up, as transformers' TrainingArguments does."""
    resolved = Config(**KEYS, steps=steps, schedule={"warmup_ratio": ratio}).in_steps(100)
    assert resolved.schedule.warmup_steps == warmup and resolved.schedule.warmup_ratio is None


def test_a_warmup_longer_than_the_run_is_said_as_soon_as_it_is_known():
    def said(**keys) -> tuple[str, str]:
        config = Config(**KEYS, schedule={"warmup_steps": 12}, **keys)
        return " ".join(config.warnings()), " ".join(config.in_steps(100).warnings())

    words = "a warmup of 12 steps is longer than the run of 10, so that the learning rate never reaches its peak"
    early, late = said(steps=10)
    assert words in early and words in late
    early, late = said(epochs=1)
    assert words not in early and words in late
    assert "warmup" not in said(steps=12)[0]


def test_one_length_and_one_warmup():
    with pytest.raises(ValueError, match="the length of the run is missing; give steps or epochs"):
        Config(**KEYS)
    with pytest.raises(ValueError, match="steps: 3 and epochs: 2 both say how long the run is; remove one"):
        Config(**KEYS, steps=3, epochs=2)
    with pytest.raises(ValueError, match="warmup_steps: 5 and warmup_ratio both say how long the warmup is"):
        FinetuneSchedule(warmup_ratio=0.1, warmup_steps=5)


def test_keys_at_their_default_change_no_fingerprint():
    keys = identity(Config(**KEYS, steps=3))
    assert keys["steps"] == 3 and "epochs" not in keys and "schedule" not in keys


@pytest.mark.parametrize("kind", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_a_run_of_epochs_is_the_run_of_as_many_steps(kind, tmp_path):
    """Also when it is killed in its second epoch."""
    tuned.copy_until(kind, tmp_path)
    small = (f"{kind}.sources.nouns.limit=60", f"{kind}.schedule={{kind: cosine, warmup_ratio: 0.1}}")
    if kind == "sft":
        small = (*small, "sft.packing=false", "sft.max_prompts=0")
    code, text = stage(kind, "tiny.yaml", *small, f"{kind}.steps=~", f"{kind}.epochs=2", cwd=tmp_path, fault="save:3")
    assert code == -9, text
    succeed(kind, "tiny.yaml", *small, f"{kind}.steps=~", f"{kind}.epochs=2", cwd=tmp_path)
    current = tmp_path / "runs/tiny" / kind / "current"
    in_epochs = files_of(current)
    metrics = json.loads((current / "manifest.json").read_text())["metrics"]
    rows = metrics["train_conversations" if kind == "sft" else "train_pairs"]
    steps = -(-2 * rows // 8)
    assert metrics["epochs"] == steps * 8 / rows >= 2
    succeed(kind, "tiny.yaml", *small, f"{kind}.steps={steps}", cwd=tmp_path)
    assert files_of(current) == in_epochs


def test_a_length_that_other_keys_do_not_fit_is_refused(tmp_path):
    """Known only once the rows are."""
    tuned.copy_until("dpo", tmp_path)
    words = ("dpo.steps=~", "dpo.epochs=0.02", "dpo.save.keep_best=true", "dpo.evaluate_every=4")
    code, text = stage("dpo", "tiny.yaml", *words, cwd=tmp_path)
    assert code == 2 and "save.keep_best: no step is both saved" in text and "Traceback" not in text, text


def test_user_errors_name_the_stage():
    with pytest.raises(UserError, match="stage dpo: batch_size 10 is not divisible by 3 data-parallel ranks"):
        Config(**KEYS, kind="dpo", epochs=1).check(3)


# ---- adapters --------------------------------------------------------------------------------------------------------

LORA = "lora: {rank: 8}, "
LORA_RECIPE = (
    tuned.RECIPE.replace("steps: 40, optimizer: {lr: 5e-3}", LORA + "steps: 24, optimizer: {lr: 1e-2}")
    .replace("steps: 30, optimizer: {lr: 3e-3}", LORA + "steps: 8, optimizer: {lr: 1e-2}")
    .replace("steps: 20, optimizer: {lr: 1e-3}", LORA + "steps: 8, optimizer: {lr: 1e-2}")
    .replace("name: tiny", "name: lora")
)


def current(folder, kind):
    return (folder / "runs/lora" / kind / "current").resolve()


def numbers(folder, kind):
    return json.loads((current(folder, kind) / "manifest.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """All three stages with adapters, uninterrupted."""
    folder = tuned.world(tmp_path_factory.mktemp("adapted"))
    (folder / "lora.yaml").write_text(LORA_RECIPE)
    assert LORA_RECIPE.count("rank: 8") == 3
    texts = {kind: succeed(kind, "lora.yaml", cwd=folder) for kind in ("sft", "reward", "dpo")}
    return folder, texts


def parent_of(folder, kind):
    return folder / "base/model" if kind == "sft" else current(folder, "sft") / "model"


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_adapters_learn_and_are_merged(adapted, kind):
    """The base stays as it was, checkpoints hold the adapter only, and the published model has the parent's names."""
    from safetensors.torch import load_file

    folder, texts = adapted
    metrics = numbers(folder, kind)
    assert metrics["heldout_loss_after"] < metrics["heldout_loss_before"]
    assert "adapter merged; logits differ by at most" in texts[kind]
    parent = load_file(parent_of(folder, kind) / "model.safetensors")
    published = load_file(current(folder, kind) / "model/model.safetensors")
    score = {"score.weight"} if kind == "reward" else set()
    names = parent.keys() - ({"lm_head.weight"} if kind == "reward" else set())
    assert published.keys() == names | score
    changed = {name for name in names if not torch.equal(parent[name], published[name])}
    assert changed == {name for name in names if "_proj" in name}
    saved = set()
    for path in (current(folder, kind) / "checkpoints").glob("step-*/*.safetensors"):
        with safe_open(path, "pt") as file:
            saved |= {key.partition("/")[2].partition("@")[0] for key in file.keys()}  # noqa: SIM118
    assert {name for name in saved if "lora_" not in name} == score and len(saved) > 20


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_adapters_killed_and_resumed(adapted, kind, tmp_path):
    """Twice, with the bytes of the run that was not killed."""
    folder, _ = adapted
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/lora" / kind)
    for fault in ("save:2", "work:3"):
        code, text = stage(kind, "lora.yaml", cwd=tmp_path, fault=fault)
        assert code == -9, text
    succeed(kind, "lora.yaml", cwd=tmp_path)
    assert files_of(current(tmp_path, kind)) == files_of(current(folder, kind))


TWO_RANKS = """
import sys
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage
from pipeline.core import distributed
layout = sys.argv[1]
words = [f"{name}.{key}" for name in ("sft", "reward", "dpo") for key in
         (f"parallel.{layout}", "micro_batch=2", "run.processes=2", "steps=4")]
recipe = load("lora.yaml", [*words, "reward.inputs.model=./learned", "dpo.inputs.model=./learned"])
for name in ("sft", "reward", "dpo"):
    run_stage(recipe, name)
    distributed.barrier()
distributed.shutdown()
"""


@pytest.mark.parametrize(
    "layout",
    [
        "zero=null",
        *(pytest.param(f"zero={stage}", marks=pytest.mark.slow) for stage in (0, 1, 2, 3)),
        pytest.param("shard=full", marks=pytest.mark.slow),
    ],
)
def test_adapters_on_two_ranks_like_one_process(adapted, layout, tmp_path):
    """Losses of the first steps and the evaluation before them within 1e-5, for every engine."""
    folder, _ = adapted
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    shutil.copytree(current(folder, "sft"), tmp_path / "learned")
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "two.py").write_text(TWO_RANKS)
    launch(2, "two.py", layout, cwd=tmp_path)
    for kind in ("sft", "reward", "dpo"):
        one, two = (logged_losses(where, kind) for where in (folder, tmp_path))
        assert len(two) == 4
        np.testing.assert_allclose(two, one[:4], atol=1e-5, err_msg=kind)
        before = [numbers(where, kind)["heldout_loss_before"] for where in (folder, tmp_path)]
        assert before[0] == pytest.approx(before[1], abs=1e-5)


def logged_losses(folder, kind):
    lines = (current(folder, kind) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_an_adapter_is_published_for_peft_and_for_the_next_stage(adapted, tmp_path):
    """peft's model of the parent and the published adapter has the logits of the merged model; dpo, with and without an
    adapter of its own, starts from it; export writes a complete model."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    folder, _ = adapted
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    with (tmp_path / "lora.yaml").open("a") as file:
        file.write("  export: {inputs: {model: sft}}\n")
        prompts = "{nouns: {path: rows.jsonl, prompt: 'What is a {words} {noun}?', answer: '{kind}'}}"
        models = f"{{adapter: sft, merged: {current(folder, 'sft')}}}"
        file.write(
            f"  assess: {{inputs: {models}, max_rows: 0, sources: {prompts}, max_prompts: 8, max_new_tokens: 6}}\n"
        )
    words = ["sft.lora.publish=adapter", "dpo.steps=2"]
    succeed("sft", "lora.yaml", *words, cwd=tmp_path)
    published = current(tmp_path, "sft") / "model"
    assert {path.name for path in published.glob("*.safetensors")} == {"adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base/model")
    theirs = peft.PeftModel.from_pretrained(base, published).eval()
    merged = AutoModelForCausalLM.from_pretrained(current(folder, "sft") / "model").eval()
    ids = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = merged(ids).logits
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(build.load(published).eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)

    before = numbers(folder, "dpo")["heldout_logp_chosen_before"]
    for more in (["dpo.lora=~"], []):
        succeed("dpo", "lora.yaml", *words, *more, cwd=tmp_path)
        assert numbers(tmp_path, "dpo")["heldout_logp_chosen_before"] == pytest.approx(before, abs=1e-4)
    code, text = stage("dpo", "lora.yaml", *words, "dpo.lora.publish=adapter", cwd=tmp_path)
    assert code == 2 and "is an adapter itself; use publish: merged here" in text and "Traceback" not in text, text
    succeed("export", "lora.yaml", *words, cwd=tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(current(tmp_path, "export"), dtype=torch.float32)
    torch.testing.assert_close(exported(ids).logits, expected, atol=0.05, rtol=0.05)  # bf16
    succeed("assess", "lora.yaml", *words, cwd=tmp_path)
    answers = [json.loads(line) for line in (current(tmp_path, "assess") / "samples.jsonl").read_text().splitlines()]
    assert len(answers) == 8 and all(row["adapter"] == row["merged"] for row in answers)

    shutil.copytree(published, tmp_path / "adapter")
    weights = tmp_path / "base/model/model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    for kind, key in (("export", "model"), ("dpo", "model"), ("assess", "adapter")):
        code, text = stage(kind, "lora.yaml", f"{kind}.inputs.{key}=./adapter", cwd=tmp_path)
        assert code == 2 and "is an adapter of another model" in text and "Traceback" not in text, text


def test_an_adapter_of_a_reward_model(adapted, tmp_path):
    """Its score layer is in the adapter, its calibration in config.json."""
    folder, _ = adapted
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    succeed("reward", "lora.yaml", "reward.lora.publish=adapter", cwd=tmp_path)
    models = [build.load(current(where, "reward") / "model", head="judge") for where in (folder, tmp_path)]
    rows = [[7, 8, 9], [20, 30, 40, 50]]
    merged, adapter = (reward_scores(model, rows) for model in models)
    torch.testing.assert_close(adapter, merged, atol=1e-5, rtol=1e-5)
    assert not torch.equal(merged[0], merged[1])


@pytest.mark.slow
def test_a_base_in_4_bits_killed_and_resumed(adapted, tmp_path):
    """It ends with the bytes of a run that was not killed, its checkpoints hold the adapter only, and the published
    model is made of the numbers that were multiplied."""
    from safetensors.torch import load_file

    bitsandbytes = pytest.importorskip("bitsandbytes")
    folder, _ = adapted
    words = ["sft.lora.base=nf4", "sft.precision=bf16", "sft.steps=6", "sft.max_prompts=4"]
    for where in ("whole", "killed"):
        shutil.copytree(folder, tmp_path / where, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / where / "runs")
    text = succeed("sft", "lora.yaml", *words, cwd=tmp_path / "whole")
    assert "adapter merged; logits differ" in text and "82,800 frozen" in text
    assert stage("sft", "lora.yaml", *words, cwd=tmp_path / "killed", fault="save:1")[0] == -9
    succeed("sft", "lora.yaml", *words, cwd=tmp_path / "killed")
    whole, killed = (current(tmp_path / where, "sft") for where in ("whole", "killed"))
    assert files_of(whole) == files_of(killed)
    for path in (whole / "checkpoints").glob("step-*/*.safetensors"):
        with safe_open(path, "pt") as file:
            assert all("lora_" in key for key in file.keys())  # noqa: SIM118
    base = load_file(folder / "base/model/model.safetensors")
    model = load_file(whole / "model/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    packed, state = bitsandbytes.functional.quantize_4bit(base[name], compress_statistics=True, quant_type="nf4")
    state.dtype = torch.bfloat16
    rounded = bitsandbytes.functional.dequantize_4bit(packed, state).float()
    change = torch.linalg.svdvals(model[name] - rounded)
    assert change[7] > 1e-3 and change[8] < 1e-5 * change[0]  # an update of rank 8


BASES = """
import json, sys
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage
from pipeline.core import distributed
layout = sys.argv[1]
for base in sys.argv[2:]:
    run_stage(load(f"{base}.yaml", [f"sft.{key}" for key in (
        f"parallel.{layout}", "micro_batch=2", "run.processes=2", "steps=3", "max_prompts=2", "precision=bf16",
        f"lora.base={base}")]), "sft")
    distributed.barrier()
distributed.shutdown()
"""


@pytest.mark.parametrize(
    "layout, bases",
    [
        pytest.param("zero=null", ("fp32", "bf16", "nf4"), marks=pytest.mark.slow),
        pytest.param("zero=1", ("fp32", "bf16", "nf4"), marks=pytest.mark.slow),
        pytest.param("zero=2", ("fp32", "bf16", "nf4"), marks=pytest.mark.slow),
        pytest.param("zero=3", ("fp32", "bf16", "nf4"), marks=pytest.mark.slow),
        pytest.param("shard=full", ("fp32", "bf16", "nf4"), marks=pytest.mark.slow),
    ],
)
def test_a_base_in_bf16_or_4_bits_on_two_ranks(adapted, layout, bases, tmp_path):
    """In bf16 the losses are those of the model in fp32 to the bit: its weights are rounded beforehand."""
    from safetensors.torch import load_file, save_file

    if "nf4" in bases:
        pytest.importorskip("bitsandbytes")
    folder, _ = adapted
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs")
    weights = tmp_path / "base/model/model.safetensors"
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})
    for base in bases:
        (tmp_path / f"{base}.yaml").write_text(LORA_RECIPE.replace("name: lora", f"name: {base}"))
    (tmp_path / "bases.py").write_text(BASES)
    launch(2, "bases.py", layout, *bases, cwd=tmp_path)
    losses = {}
    for base in bases:
        lines = (tmp_path / f"runs/{base}/sft/current/metrics.jsonl").read_text().splitlines()
        losses[base] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses["bf16"] == losses["fp32"] and len(losses["bf16"]) == 3
    if "nf4" in bases:
        assert losses["nf4"] != losses["fp32"]
        np.testing.assert_allclose(losses["nf4"], losses["fp32"], rtol=0.05)


def test_ways_to_keep_the_base_that_cannot_be_had():
    for keys, message in (
        ({"lora": {"base": "bf16"}, "precision": "fp32"}, "lora.base: bf16 cannot be combined with precision: fp32"),
        (
            {"activation_checkpointing": "selective", "parallel": {"zero": 3}},
            "activation_checkpointing: selective cannot be combined with zero: 3",
        ),
    ):
        with pytest.raises(UserError, match=f"stage dpo: {message}"):
            Config(**KEYS, kind="dpo", steps=1, **keys).check(1)
    assert "base" not in str(identity(Config(**KEYS, steps=3, lora={"rank": 4})))


def test_a_missing_package_is_named_before_the_first_stage(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = Config(**KEYS, kind="dpo", steps=1, lora={"base": "nf4"})
    with pytest.raises(UserError, match="stage dpo: lora.base: nf4 needs the package bitsandbytes"):
        config.check_machine()
    Config(**KEYS, kind="dpo", steps=1, lora={"base": "bf16"}).check_machine()


def test_the_usual_learning_rate_is_named(adapted, tmp_path):
    folder, _ = adapted
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    text = succeed("dpo", "lora.yaml", "dpo.optimizer={}", "dpo.steps=1", cwd=tmp_path)
    assert "WARNING: optimizer.lr: 1e-06 is the default for training all weights" in text


# ---- speed and memory ------------------------------------------------------------------------------------------------

SAME = {
    "sft": (["attention=eager"], ["loss_chunk=7"], ["loss_chunk=~", "activation_checkpointing=full"]),
    "reward": (["attention=eager", "activation_checkpointing=selective"],),
    "dpo": (["attention=eager", "loss_chunk=~"], ["loss_chunk=7", "activation_checkpointing=full"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SAME))
def test_keys_of_speed_and_memory_change_no_loss(kind, tmp_path):
    """Within 1e-5. With compile: true all rows have one length, so a killed run ends with the same bytes."""
    tuned.copy_until(kind, tmp_path)
    expected = [line["loss"] for line in tuned.lines(tuned.plain(), kind) if "loss" in line][:4]

    def run(*words) -> dict[str, bytes]:
        given = [f"{kind}.{word}" for word in ("steps=4", "save={every_steps: 2}", *words)]
        succeed(kind, "tiny.yaml", *given, "--restart", cwd=tmp_path)
        losses = [line["loss"] for line in tuned.lines(tmp_path, kind) if "loss" in line]
        np.testing.assert_allclose(losses, expected, atol=1e-5, err_msg=str(words))
        return files_of(tmp_path / "runs/tiny" / kind / "current")

    for words in SAME[kind]:
        run(*words)
    compiled = run("compile=true")
    shutil.rmtree(tmp_path / "runs/tiny" / kind)
    words = [f"{kind}.{word}" for word in ("steps=4", "save={every_steps: 2}", "compile=true")]
    code, text = stage(kind, "tiny.yaml", *words, cwd=tmp_path, fault="save:1")
    assert code == -9, text
    succeed(kind, "tiny.yaml", *words, cwd=tmp_path)
    assert files_of(tmp_path / "runs/tiny" / kind / "current") == compiled


@pytest.mark.parametrize(
    "words, message",
    [
        ({"parallel": {"zero": 3}, "compile": True}, "compile: true cannot be combined with zero: 3"),
        ({"attention": "flash_attention_2", "packing": True}, "a micro-batch here has 10; use micro_batch: 1"),
    ],
)
def test_keys_that_cannot_be_combined(words, message):
    with pytest.raises(UserError, match=message):
        SftConfig(**KEYS, kind="sft", steps=1, **words).check(1)
