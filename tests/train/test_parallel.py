"""Layouts over two processes give what one process gives: losses, gradient norms, weights; resume bit for bit; stop
together."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
import tiny
import torch
from harness import files_of, succeed
from parallel_worker import FAST, GENERATING, LAYOUTS, PLAIN, STEPS, go_on, kind_of, micro_batches, model, muon, train
from paths import HELPERS, ROOT
from tiny_engine import LENGTH
from transformers import AutoModelForCausalLM, AutoTokenizer

CPU = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def marked(names) -> list:
    """The layouts of FAST as they are, the others as slow."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def results(request, saved, alone):
    """What two processes found: of the layouts in FAST, or of all where a slow test is among those that run."""
    ours = [item for item in request.session.items if item.path == request.path]
    words = ["all"] if any(item.get_closest_marker("slow") for item in ours) else []
    path = saved.parent / "results.pt"
    said = harness.launch(2, HELPERS / "parallel_worker.py", path, *words, cwd=saved.parent, seconds=900)
    assert "steps:" not in said and "SEED_LAYERS" not in said, "DeepSpeed's own messages"
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where one process and two leave their checkpoints, a folder each layout."""
    folder = tmp_path_factory.mktemp("parallel") / "checkpoints"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def alone(saved):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {
        kind: train(name, None, saved / name)
        for kind, name in (("plain", "one"), ("tied", "one tied"), ("frozen", "one frozen"))
    }
    muon(saved / "one muon")
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("name", marked(LAYOUTS))
def test_a_layout_trains_as_one_process_does(results, alone, name):
    """Losses and gradient norms of 6 steps, all of them clipped, to 1e-5 relative; weights to 1e-4 absolute after
    updates of 3e-3. A rank's whole share at once, four processes and faults that must be found are test_verify.py's."""
    expected, found = alone[kind_of(name)], results[name]
    assert found["before"] == pytest.approx(expected["before"], rel=1e-6)
    assert len(found["steps"]) == STEPS
    for one, other in zip(expected["steps"], found["steps"], strict=True):
        assert one["grad_norm"] > 0.5 and other["applied"]
        for key in ("loss", "grad_norm", "weight", "lr", *(["accuracy"] if "chunks" not in name else [])):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
    assert found["after"] == pytest.approx(expected["after"], rel=1e-5)
    if "forward" in found:  # the main process's share: the first data rank's rows
        rows = len(found["forward"])
        assert 0 < rows <= len(expected["forward"])
        torch.testing.assert_close(found["forward"], expected["forward"][:rows], rtol=1e-3, atol=1e-4)
    for key, value in expected["weights"].items():
        if key in found["weights"]:
            assert torch.allclose(found["weights"][key], value, atol=1e-4), key
        else:
            assert "tied" in name


@pytest.mark.parametrize("name", marked(name for name in LAYOUTS if "frozen" in name))
def test_what_has_no_gradient_stays_and_costs_nothing_in_a_checkpoint(results, saved, name):
    """Every second parameter is frozen: it keeps its bits, is in no file, and the disk estimate knows it."""
    from tiny_engine import config, spoiled

    from pipeline.train import engine, state

    start = model("frozen")
    frozen = {key for key, parameter in start.named_parameters() if not parameter.requires_grad}
    trained = {key for key, parameter in start.named_parameters() if parameter.requires_grad}
    for key, value in start.state_dict().items():
        assert torch.equal(results[name]["weights"][key], value) == (key in frozen), key
    reader = state.Reader(saved / name, "model")
    assert set(reader.parameters) == trained and {key for _, key in reader.pieces} == trained
    numel = sum(parameter.numel() for parameter in start.parameters() if parameter.requires_grad)
    stored = sum(stop - first for pieces in reader.pieces.values() for first, stop, *_ in pieces)
    assert stored == 3 * numel
    assert engine.build(start, spoiled, config()).state_bytes() == 12 * numel


@pytest.mark.parametrize("name", marked(LAYOUTS))
def test_resume_on_the_same_layout_is_exact(results, name):
    found = results[name]
    assert found["resumed steps"] == found["steps"][3:]
    assert all(torch.equal(value, found["weights"][key]) for key, value in found["resumed weights"].items())


def the_same_course(found, expected, rel=1e-5):
    assert len(found) == len(expected) == STEPS - 3
    for one, other in zip(expected, found, strict=True):
        assert other["applied"] and [other["loss"], other["grad_norm"]] == pytest.approx(
            [one["loss"], one["grad_norm"]], rel=rel
        )


@pytest.mark.parametrize("target", marked(PLAIN))
def test_any_layout_goes_on_from_any_other(results, alone, target):
    """What one process, DDP, ZeRO stages, offload and pipelines saved after 3 steps, loaded by each of them: losses
    and norms of the next 3 to 1e-5 of an uninterrupted run."""
    from tiny_engine import config

    targets = [into for _, into in results["elastic"]]
    assert targets.count(target) >= 2
    for (source, into), (said, found) in results["elastic"].items():
        if into == target:
            the_same_course(found, alone[kind_of(target)]["steps"][3:])
            parallel = config(parallel=LAYOUTS[target]).parallel
            words = (
                [f"pipeline {parallel.pipeline}"] * (parallel.pipeline > 1)
                + [f"zero {parallel.zero}"] * (parallel.zero is not None)
                + ["offload"] * parallel.offload
                + (["shard full"] if parallel.shard == "full" else ["shard hybrid of 2 copies"]) * bool(parallel.shard)
                + [f"tensor {parallel.tensor}"] * (parallel.tensor > 1)
            )
            assert said.endswith("now 2 processes" + (f" with {' and '.join(words)}" if words else "")), (source, said)
            assert said.startswith("saved with " + ("1 process;" if source.startswith("one") else "2 processes")), (
                source,
                said,
            )


@pytest.mark.parametrize("source", marked(PLAIN))
@pytest.mark.parametrize("zero", [None, 0])
def test_one_process_goes_on_from_what_two_saved(results, alone, saved, source, zero):
    """The other way round, with and without DeepSpeed; twice from one file, with the same bits."""
    from tiny_engine import config, spoiled

    from pipeline.train import engine

    trainer = engine.build(model(kind_of(source)), spoiled, config(micro_batch=2, parallel={"zero": zero}))
    said, found = go_on(trainer, saved / source)
    the_same_course(found, alone[kind_of(source)]["steps"][3:])
    assert said.startswith("saved with 2 processes") and "now 1 process" in said
    assert go_on(trainer, saved / source) == (said, found)


def test_muon_goes_on_from_one_process_to_two_and_back(results, saved):
    """1e-4: Newton-Schulz is iterated in bf16, which makes more of the last bits (1.2e-5 was seen in a norm)."""
    trainer = muon()
    expected = [trainer.step(micro_batches(trainer.config, trainer, step)) for step in range(3, STEPS)]
    the_same_course(results["elastic"]["one muon", "ddp muon"][1], expected, rel=1e-4)
    the_same_course(go_on(muon(), saved / "ddp muon")[1], expected, rel=1e-4)
    assert go_on(muon(), saved / "one muon") == ("", expected)


@pytest.mark.parametrize("name", marked(LAYOUTS))
def test_harm_on_one_process_is_kept_from_the_weights_of_all(results, name):
    found = results[name]
    assert [found[harm] for harm in ("nan loss", "infinite loss, finite gradient", "nan gradient")] == [False] * 3
    *refused, loss, norm, asked = found["refused"]
    assert refused == [False, True] and len(asked) == 1 and asked[0] == pytest.approx((loss, norm), rel=1e-6), (
        "asked once, with the loss and the norm that are reported"
    )
    assert all(torch.equal(value, found["weights"][key]) for key, value in found["harmed weights"].items())
    assert found["step after harm"]["applied"] and math.isfinite(found["step after harm"]["loss"])


@pytest.mark.parametrize("name", GENERATING)
def test_generation_from_shards(results, name):
    """The gathered model continues a prompt as one process does, and trains on afterwards."""
    from tiny_engine import config, loss_fn

    from pipeline.train import engine

    settings = config()
    trainer = engine.build(model(), loss_fn, settings)
    trainer.step(micro_batches(settings, trainer, 0))
    ids, loss = results["generated"][name]
    assert (
        ids
        == trainer.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=None)[
            0
        ].tolist()
    )
    assert loss == pytest.approx(trainer.step(micro_batches(settings, trainer, 1))["loss"], rel=1e-5)


# ---- the stage under a launcher --------------------------------------------------------------------------------------


def launch(folder: Path, *words: str) -> subprocess.Popen:
    command = [
        f"{Path(sys.executable).parent}/accelerate",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        str(ROOT / "pipeline" / "pretrain.py"),
    ]
    return subprocess.Popen(
        [*command, "recipe.yaml", *words],
        cwd=folder,
        env=CPU,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# recipes/llama-7b.yaml, smaller in every number, on two processes: the same family, the layout that its comment names for
# DeepSpeed (a pipeline over ZeRO-1), the same keys.
SMALL_LLAMA_7B = f"""
extends: {ROOT}/recipes/llama-7b.yaml
name: tiny
output: runs
model: {{hidden_size: 64, intermediate_size: 172, num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 4}}
stages:
  pretrain:
    inputs: {{tokens: ./tokens, tokenizer: ./tokenizer}}
    sequence_length: 32
    batch_size: 8
    steps: 80
    mixture: ~
    precision: fp32
    schedule: {{warmup_steps: 10}}
    parallel: {{shard: ~, zero: 1, pipeline: 2}}
    run: {{nodes: 1, processes: 2, device: auto}}
    save: {{every_steps: 1000}}
    heldout_rows: 10
    log: {{every_steps: 1, wandb: ~}}
    samples: {{every_steps: 50, prompts: [ape bee], max_new_tokens: 8, temperature: 0}}
"""


@pytest.mark.slow
def test_a_small_llama_7b_on_two_processes_stops_when_asked_and_goes_on(tmp_path):
    """accelerate launch: SIGTERM to the launcher; all save at one step and leave word; started again, the model is
    that of one process (1e-3)."""
    tiny.write_inputs(tmp_path)
    (tmp_path / "recipe.yaml").write_text(SMALL_LLAMA_7B)
    child = launch(tmp_path)
    folder = tmp_path / "runs" / "tiny" / "pretrain"
    try:
        deadline = time.time() + 400
        while not any('"step": 5,' in path.read_text() for path in folder.glob("*.partial/metrics.jsonl")):
            assert time.time() < deadline and child.poll() is None, child.communicate(timeout=20)[0]
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=300)[0]
    finally:
        child.kill()
    word = json.loads((folder / "requeue.json").read_text())
    assert 5 <= word["step"] < 80 and word["signal"] == "SIGTERM" and f"saved at step {word['step']}" in said
    assert [path.name for path in folder.glob("*.partial/checkpoints/*")] == [f"step-{word['step']:06d}"]
    child = launch(tmp_path)
    said = child.communicate(timeout=600)[0]
    assert child.returncode == 0 and f"resuming from step-{word['step']:06d}" in said, said
    assert not (folder / "requeue.json").exists() and "terminate called" not in said
    succeed("pretrain", "recipe.yaml", "output=alone", "pretrain.parallel={}", cwd=tmp_path)
    one, two = (
        json.loads((tmp_path / runs / "tiny/pretrain/current/manifest.json").read_text())["metrics"]
        for runs in ("alone", "runs")
    )
    assert two["bits_per_byte_before"] == pytest.approx(one["bits_per_byte_before"], rel=1e-6)
    assert two["bits_per_byte_after"] == pytest.approx(one["bits_per_byte_after"], rel=1e-3)
    assert two["tokens"] == one["tokens"]
    shown = [json.loads(line) for line in (folder / "current/logs/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in shown] == [50, 80] and "step 80: ape bee → " + shown[1]["text"] in said
    model, reader = (
        AutoModelForCausalLM.from_pretrained(folder / "current/model"),
        AutoTokenizer.from_pretrained(folder / "current/model"),
    )
    ids = torch.tensor([[reader.eos_token_id, *reader("ape bee", add_special_tokens=False).input_ids]])
    assert reader.decode(
        model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    ).startswith(shown[1]["text"]), "stages put together"
    last = [
        json.loads(line)
        for line in (folder / "current/metrics.jsonl").read_text().splitlines()
        if '"grad_norm"' in line
    ][-1]
    assert last["tokens/one"] + last["tokens/two"] == two["tokens"] == sum(two["tokens_sources"].values())
    assert last["seconds/step_max"] >= last["seconds/step"] > 0 and last["tok_per_second"] == pytest.approx(
        256 / last["seconds/step"], rel=0.01
    )
    assert set(files_of(folder / "current")) == set(files_of(tmp_path / "alone/tiny/pretrain/current"))


NUMBER = 8  # bytes: one that DeepSpeed's processes agree on, of the gradient norm


@pytest.mark.parametrize("name", marked(name for name in PLAIN if "tied" not in name and "offload" not in name))
def test_a_step_sends_what_its_layout_needs(results, name):
    """Bytes of complete tensors in a step of two micro-batches (four of half the size in a pipeline), all in fp32.
    ZeRO-3 gathers no weights of a model as small as this one, whose processes keep them (DeepSpeed's threshold is
    100,000 elements), so only what it shares out after the step. What FSDP sends in bf16 is test_fsdp.py's."""
    own = model()
    total = 4 * sum(parameter.numel() for parameter in own.parameters())
    vectors = 4 * sum(parameter.numel() for parameter in own.parameters() if parameter.dim() == 1)
    table = 4 * 62 * 32  # 61 rows, as two processes share them
    matrices = total - vectors + 2 * (table - 4 * 61 * 32)
    hidden = 4 * 2 * LENGTH * 32  # of a micro-batch of two rows
    expected = {
        "ddp": {"allreduce": total},
        "zero 0": {"allreduce": total},
        "zero 1": {"allreduce": total + NUMBER, "allgather": total},
        "zero 2": {"allreduce": 2 * total + NUMBER, "allgather": total},
        "zero 3": {"reduce_scatter": 2 * total, "allgather": total},
        # the embedding is not gathered for the backward pass
        "fsdp": {"allgather": 2 * (2 * matrices - table), "reduce_scatter": 2 * matrices, "allreduce": vectors},
        "fsdp hybrid": {"allreduce": total},
        # of each of four micro-batches, because both processes read all rows: embedding, output layer, and four of each
        # layer; here also the logits of 31 words
        "fsdp tensor": {"allreduce": vectors + 4 * 14 * hidden, "allgather": 4 * 2 * LENGTH * 4 * 31},
        "pipeline": {"send": 4 * hidden, "recv": 4 * hidden},
    }[name]
    for sent, *_ in results[name]["counted"]:
        assert {kind for _, kind in sent} == {"float32"}
        found = {operator: count for (operator, _), count in sent.items()}
        if name == "pipeline":  # the rest stays in a stage, which is one process here
            found = {operator: found[operator] for operator in expected}
        assert found == expected


READS = {"ddp": 0, "fsdp": 0, "fsdp hybrid": 0, "fsdp tensor": 2, "zero 0": 1, "zero 1": 4, "zero 2": 4, "zero 3": 2}


@pytest.mark.parametrize("name", marked(READS))
def test_a_step_waits_for_few_values(results, name):
    """Of tensors, besides the sums that are read once a step: none, with DeepSpeed the gradient norm and whether it is
    finite. transformers reads one more for each of the two micro-batches, because they have no positions (pretraining's
    have them: test_engine.py); in a tensor group, where both processes read all rows, there are four."""
    for *_, reads in results[name]["counted"]:
        assert reads == READS[name] + 2
