"""The FSDP engine: models that are never complete, gathers in bf16, and how parameters are split. That it computes what
the other engines compute is in test_parallel.py, test_families.py and test_verify.py."""

import ctypes
import gc
from pathlib import Path

import families
import fsdp_worker
import harness
import pytest
import simulated_fsdp
import sparse_model
import torch
from counted import Counted
from paths import HELPERS, ROOT
from pydantic import ValidationError
from tiny_engine import config
from transformers import AutoModelForCausalLM

from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.models import build, cost, folder_weights, frozen, lora, model_block
from pipeline.models.lora_config import Lora
from pipeline.train import engine, state
from pipeline.train.config import Parallel


def launch(folder: Path, *words: str) -> dict:
    """Results of fsdp_worker.py in two processes."""
    harness.launch(2, HELPERS / "fsdp_worker.py", folder / "results.pt", *words, cwd=folder)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def results(folder):
    return launch(folder)


@pytest.mark.parametrize("name", fsdp_worker.MODELS)
def test_a_model_that_was_never_complete_has_the_same_initial_weights(results, name):
    """Bit for bit those that one process draws."""
    expected = dict(fsdp_worker.made(name, materialise=True).state_dict())
    found = results["initial", name]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", fsdp_worker.ROUNDED)
def test_gathering_matrices_in_bf16_changes_no_bit(results, name):
    """Losses, norms and weights of 3 steps are those with gathers in fp32: the matrices would be rounded in each
    product anyway."""
    steps, weights = results["bf16 gathers", name]
    expected, expected_weights = results["fp32 gathers", name]
    assert steps == expected and all(stats["applied"] for stats in steps)
    assert all(torch.equal(weights[key], value) for key, value in expected_weights.items())
    observed = results["observed", name]
    assert observed["types"] == {("torch.bfloat16", "torch.float32")}
    assert observed["products"] == {(torch.bfloat16, torch.bfloat16)}
    assert observed["sent"] == fsdp_worker.expected_bytes(name)
    assert observed["complete"] == 1, "of three layers, in the forward and in the backward pass"


def test_experts_are_split_inside_where_their_number_is_not_divisible(results, folder):
    """Three experts over two processes: by the rows of each. Every element is in the checkpoint once."""
    placements = results["placements"]
    assert {dim for name, dim in placements.items() if "experts" in name} == {1}
    assert {dim for name, dim in placements.items() if "experts" not in name} == {0}
    reader = state.Reader(folder / "experts", "model")
    for name, value in results["saved", "experts"].items():
        assert torch.equal(reader.read("weight", name, 0, value.numel()).view(value.shape), value)
        stored = sum(piece.stop - piece.start for piece in reader.pieces["exp_avg", name])
        assert stored == value.numel()


@pytest.mark.slow
def test_what_processes_cannot_share_evenly_is_gathered_filled_up():
    """Six experts over 32 processes, whose first matrices can be cut by rows of an expert, 32 of them, and whose second
    ones, of 48 rows, cannot: of these as much as 32 experts is gathered and reduced, and models/cost.py knows it."""
    sizes = {"hidden_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    words = [f"model.{key}={value}" for key, value in sizes.items()]
    words += ["pretrain.micro_batch=1", "pretrain.sequence_length=16"]
    stage = load(ROOT / "recipes" / "qwen3-30b-a3b.yaml", words).stages["pretrain"]
    model_config = model_block.full_config(stage.model, families.Sized(64), 16)
    with torch.device("meta"):
        size = cost.count(AutoModelForCausalLM.from_config(model_config))
    expected = 32 * 48 + 2 * 32 * 48 + 64 * 32 + 32 * 48 + 6 * 32 * 48 + 32 * 48 * 16  # q, k and v, o, router, experts
    vectors = 2 * 48 + 2 * 8
    assert size.padding(32) * size.largest_layer == pytest.approx(expected + vectors)
    with simulated_fsdp.simulated(stage, 32), Counted() as counted:
        model = simulated_fsdp.on_meta(stage, model_config)
        trainer = simulated_fsdp.engine_of(model, simulated_fsdp.loss, stage, "model")
        simulated_fsdp.micro_batch(trainer, stage)
    assert counted.bytes["allgather", "bfloat16"] == 2 * 2 * 2 * expected  # layers, forward and backward, bytes
    assert counted.bytes["reduce_scatter", "float32"] == 4 * (2 * expected + 2 * 64 * 48)


@pytest.mark.parametrize("name", ["llama", "mup", "experts"])
def test_files_written_by_many_processes_are_those_of_one(results, folder, name):
    """Byte for byte, experts included, which transformers writes one by one."""
    parts, whole = (
        {path.name: path.read_bytes() for path in (folder / f"{name}-{how}").iterdir()} for how in ("parts", "whole")
    )
    assert parts == whole
    assert len([file for file in parts if file.endswith(".safetensors")]) > 2


def test_publishing_and_sampling_hold_no_more_than_a_file_and_two_layers(results):
    """A model of 12 layers, in addition to a process's share of it. Published: the largest file, of 20,000 bytes, and
    one matrix and its copies. Sampled: the layer that computes and the next one, each as it is received and as it is
    used, and the tables."""
    shapes = {name: value.shape for name, value in fsdp_worker.made("deep", materialise=False).named_parameters()}
    sizes = {name: 4 * shape.numel() for name, shape in shapes.items()}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    table = sizes["model.embed_tokens.weight"]
    assert results["peaks"]["publishing"] < 20_000 + 4 * max(sizes.values()) < sum(sizes.values()) / 8
    assert results["peaks"]["sampling"] < 4 * layer + 4 * table < sum(sizes.values()) / 2


@pytest.mark.slow
def test_a_model_of_70_billion_starts_and_trains_within_a_shard_and_a_layer():
    """LLaMA 2 70B on 256 GPUs, at its full width on fake tensors, with 4 and with 6 of its 80 layers. While it is
    built: its shard and one complete layer, 2% more at most. Each further layer takes 16 bytes of a parameter over 256
    processes and its kept input, 2% more at most, so all 80 need less than 24 GiB."""
    recipe = load(ROOT / "recipes" / "llama-2-70b.yaml", ["pretrain.micro_batch=1"])
    config, vocabulary = recipe.stages["pretrain"], families.Sized(recipe.stages["tokenizer"].vocab_size)
    model_config = model_block.full_config(config.model, vocabulary, config.sequence_length)
    width, inner, heads = model_config.hidden_size, model_config.intermediate_size, model_config.num_key_value_heads
    layer = 2 * width**2 + 2 * width * heads * model_config.head_dim + 3 * width * inner
    tables = 2 * model_config.vocab_size * width
    world, steps = config.run.world, {}
    for count in (4, 6):
        model_config.num_hidden_layers = count
        building, steps[count] = simulated_fsdp.peaks(config, model_config, world)
        assert 4 * layer < building < 1.02 * 4 * (layer + (count * layer + tables) / world)
    per_layer = (steps[6] - steps[4]) / 2
    kept = 16 * layer / world + 4 * width * config.sequence_length * config.micro_batch
    assert kept <= per_layer < 1.02 * kept
    assert steps[6] + 74 * per_layer < 24 * 2**30


@pytest.mark.parametrize("name", ["llama", "mup", "experts"])
def test_what_each_process_reads_is_together_what_the_folder_has(results, folder, name):
    """Bit for bit, three experts over two processes included."""
    expected = AutoModelForCausalLM.from_pretrained(folder / f"{name}-whole", dtype=torch.float32).state_dict()
    found = results["read", name]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_frozen_weights_are_read_into_bf16_and_adapters_drawn(results, folder):
    model = build.load(folder / "experts-whole")
    frozen.store(model, "bf16", "bf16", torch.device("cpu"))
    lora.attach(model, Lora(rank=4), seed=7)
    expected, found = model.state_dict(), results["read", "adapters"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value.float()) for key, value in expected.items())


@pytest.mark.slow
def test_a_published_model_of_70_billion_is_read_within_a_shard_and_a_layer(tmp_path):
    """LLaMA 2 70B, all 80 layers, real tensors, as process 0 of 256: 138 GB on disk, of which this process reads its
    256th and the vectors, and its memory grows by 4 bytes for each of these, and at most a fifth of a layer."""
    recipe = load(ROOT / "recipes" / "llama-2-70b.yaml", ["pretrain.parallel={shard: full}"])
    stage, vocabulary = recipe.stages["pretrain"], families.Sized(recipe.stages["tokenizer"].vocab_size)
    model_config = model_block.full_config(stage.model, vocabulary, stage.sequence_length)
    total = sparse_model.write(model_config, tmp_path / "model")
    assert total > 137e9
    read, rows = [0], folder_weights.Files.rows

    def counting(*words):
        tensor = rows(*words)
        read[0] += tensor.nbytes
        return tensor

    with pytest.MonkeyPatch.context() as patch, simulated_fsdp.processes(256):
        patch.setattr(folder_weights.Files, "rows", counting)
        model, weights = build.skeleton(tmp_path / "model")
        before = resident_peak(reset=True)
        trainer = engine.build(model, lambda *_: None, stage.model_copy(update={"compile": False}), fill=weights)
        growth = resident_peak() - before
    count = sum(parameter.numel() for parameter in trainer.parameters)
    assert total / 2 / 256 < count < 1.01 * total / 2 / 256
    assert read[0] == 2 * count
    layer = 4 * 856e6
    assert 4 * count < growth < 4 * count + layer / 5


def resident_peak(reset: bool = False) -> int:
    """The most bytes that this process has had in memory, since the last reset."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would be used again, and nothing grow
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_two_processes_read_what_neither_has_memory_for(tmp_path):
    """Of 512 MB of weights, 256 MB in the files, each process keeps half; with 460 MB it can, and a complete copy
    cannot be made. ZeRO-3 holds half and one layer, 13 MB, while it is read."""
    sizes = {"hidden_size": 512, "num_hidden_layers": 40, "num_attention_heads": 8, "intermediate_size": 1408}
    block = {"family": "llama", "num_key_value_heads": 8, **sizes}
    config = model_block.full_config(block, fsdp_worker.Tokenizer(), 64)
    sparse_model.write(config, tmp_path / "model", most=25_000_000)
    found = launch(tmp_path, "limited reading")
    peak, kept = found["zero 3"]
    assert 0.49 * 512e6 < kept < 0.52 * 512e6
    assert peak < kept + 2 * 13e6
    count = int(found["fsdp"].split()[0])
    assert 0.49 * 128e6 < count < 0.52 * 128e6
    assert "allocate" in found["ddp"]


def test_models_that_are_only_read_are_split_and_put_together_again(results):
    """Each of two processes keeps half of every parameter, padded to equal lengths."""
    model, halves, complete = results["split"]
    assert complete.keys() == dict(model).keys() == halves.keys()
    assert any(value.numel() % 2 for value in complete.values())
    for name, value in complete.items():
        assert torch.equal(value, model[name].to(value.dtype)) and halves[name] == -(-value.numel() // 2)
    assert {value.dtype for value in complete.values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("name", ["llama", "experts"])
def test_models_that_are_only_read_are_read_in_parts(results, folder, name):
    """Values, types and buffers of a model that is read as a whole; of each matrix a process reads the rows, or the
    experts, that it keeps an element of."""
    found, halves, read = results["split read", name]
    expected = build.load(folder / f"{name}-whole")
    weights = dict(expected.state_dict()) | dict(expected.named_buffers())
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(found[key], value.to(found[key].dtype)), key
    assert {value.dtype for value in found.values()} == {torch.float32, torch.bfloat16}
    most = 0
    for key, part in halves.items():
        value = weights[key]
        width = value.numel() // len(value)
        most += -(-part // width) * width
    assert sum(halves.values()) <= read <= most


def test_a_model_that_is_gathered_in_bf16_computes_the_same(results):
    """For sampling and measuring, under autocast: equal to the bit to the model gathered in fp32."""
    for name in fsdp_worker.ROUNDED:
        rounded, exact, types = results["gathered", name]
        assert torch.equal(rounded, exact) and types == {torch.bfloat16, torch.float32}


@pytest.mark.slow
def test_two_processes_build_what_neither_has_memory_for(tmp_path):
    """Of 512 MB of weights each process keeps half; with 460 MB it can, and with DDP it cannot."""
    found = launch(tmp_path, "limited")
    count = int(found["fsdp"].split()[0])
    assert 0.49 * 128e6 < count < 0.52 * 128e6
    assert "allocate" in found["ddp"]


def test_what_cannot_be_combined_is_refused():
    for keys, message in (
        ({"shard": "full", "zero": 3}, "both split the model"),
        ({"shard": "full", "pipeline": 2}, "pipeline: 2 with shard: full"),
        ({"shard": "full", "shard_ranks": 2}, "only shard: hybrid has"),
        ({"shard": "full", "offload": True}, "offload needs zero"),
    ):
        with pytest.raises(ValidationError, match=message):
            Parallel(**keys)
    for parallel in ({"zero": 1}, {"pipeline": 2}):
        with pytest.raises(ValidationError, match="muon needs complete matrices, which DeepSpeed"):
            config(parallel=parallel, optimizer={"kind": "muon"})
    with pytest.raises(
        UserError, match="4 processes cannot be divided into groups of parallel.shard_ranks: 3; use 2 or 4"
    ):
        config(parallel={"shard": "hybrid", "shard_ranks": 3}).check(4)
