"""Parameters, FLOPs and memory by arithmetic, against counters and measurements of torch."""

import pytest
import tiny_engine
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.models import cost
from pipeline.train import engine, muon, peak_flops

LLAMA = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
    "vocab_size": 512,
}
MODELS = {
    "llama": ("llama", LLAMA),
    "llama tied": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3 wide heads": ("qwen3", {**LLAMA, "head_dim": 64}),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 128,
            "n_layer": 3,
            "n_head": 4,
            "vocab_size": 512,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}


def built(family: str, keys: dict, attention: str = "sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, max_position_embeddings=256, **keys),
        attn_implementation=attention,
        dtype=torch.float32,
    )


def test_a_known_model():
    """Llama 2 7B: 6.74B parameters, 6.61B without the embedding look-up; attention adds 12 x 32 x 4096 x 4096 a
    token at length 4096."""
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
            )
        )
    size = cost.count(model)
    assert (size.total, size.embedding, size.active) == (6_738_415_616, 2 * 32000 * 4096, 6_738_415_616)
    flops = cost.training_flops(model, size, 4096)
    assert flops.full == 6 * (6_738_415_616 - 32000 * 4096) + 12 * 32 * 4096 * 4096
    assert flops.causal == 6 * (6_738_415_616 - 32000 * 4096) + 6 * 32 * 4096 * 4096


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_what_torch_counts(name):
    """Of a forward and backward pass with eager attention, which computes every score; to 1% (norms and biases are
    parameters that hardly multiply)."""
    model = built(*MODELS[name], attention="eager")
    ids = torch.randint(0, 512, (2, 256), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.float().sum().backward()
    expected = cost.training_flops(model, cost.count(model), 256).full * ids.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_flops_of_adapters_are_what_torch_counts():
    """To 5%: the first layer's inputs need no gradient, which the estimate does not know."""
    from pipeline.models import lora
    from pipeline.models.lora_config import Lora

    model = built(*MODELS["llama"], attention="eager")
    full = cost.training_flops(model, cost.count(model), 256).full
    lora.attach(model, Lora(rank=8), seed=0)
    size = cost.count(model)
    assert size.total - size.frozen == sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids = torch.randint(0, 512, (2, 256), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.float().sum().backward()
    expected = cost.training_flops(model, size, 256).full
    assert counter.get_total_flops() == pytest.approx(expected * ids.numel(), rel=0.05) and expected < 0.9 * full


@pytest.mark.parametrize(
    "family, keys",
    [("mixtral", {"num_local_experts": 4}), ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 96})],
)
def test_active_parameters_of_a_mixture_of_experts(family, keys):
    """What differs between two numbers of chosen experts is one expert of each layer; with all of them chosen every
    parameter is active."""
    sizes = [cost.count(built(family, {**LLAMA, **keys, "num_experts_per_tok": chosen})) for chosen in (1, 2, 4)]
    inner = keys.get("moe_intermediate_size", 352)
    assert sizes[1].active - sizes[0].active == 3 * 3 * 128 * inner and sizes[2].active == sizes[2].total


def saved_bytes(model, ids, precision: str) -> int:
    """Bytes of distinct storages that autograd keeps for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # the tensor is held, so that its address is not given again
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(size for size, _ in kept.values())


def kept_bytes(model, ids, precision: str) -> int:
    """Of these, without the copies of weights: what activations are."""
    weights = 0
    if precision == "bf16":
        matrices = [p for p in model.base_model.parameters() if p.dim() == 2]
        weights = 2 * (sum(p.numel() for p in matrices) - model.get_input_embeddings().weight.numel())
    return saved_bytes(model, ids, precision) - weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name, precision):
    """Within 20%, over layers; the embedding's and last norm's few tensors are in what is measured."""
    model = built(*MODELS[name]).train()
    ids = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(0))
    layout = cost.Layout(micro=4, precision=precision)
    kept, _ = cost.layer_bytes(model.config, cost.count(model), 256, layout)
    assert kept * ids.numel() * model.config.num_hidden_layers == pytest.approx(
        kept_bytes(model, ids, precision), rel=0.2
    )


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_of_adapters_are_what_autograd_keeps(name, base):
    """Within 20%, copies for autocast included: a frozen weight in bf16 or 4 bits has none."""
    from pipeline.models import frozen, lora
    from pipeline.models.lora_config import Lora

    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    model = built(*MODELS[name]).train()
    frozen.store(model, base, "bf16", torch.device("cpu"))
    lora.attach(model, Lora(rank=8, base=base), seed=0)
    ids = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(0))
    parts = cost.memory(model.config, cost.count(model), 256, cost.Layout(micro=4, precision="bf16"))
    ends = cost.ENDS * model.config.hidden_size * ids.numel()  # made of gradients and of the logits' inputs
    assert parts["activations"] - ends + parts["temporary"] == pytest.approx(saved_bytes(model, ids, "bf16"), rel=0.2)


@pytest.mark.parametrize("base, bytes_per_weight", [("fp32", 4), ("bf16", 2), ("nf4", 0.516)])
def test_memory_of_a_model_with_adapters(base, bytes_per_weight):
    """Llama 2 7B on the meta device: the frozen weights, and 16 bytes for each of the 40 M numbers of the adapters."""
    from pipeline.models import frozen, lora
    from pipeline.models.lora_config import Lora

    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32))
        frozen.store(model, base, "bf16", torch.device("meta"))
        lora.attach(model, Lora(rank=16, base=base), seed=0)
    size = cost.count(model)
    assert (size.trained, size.frozen) == (39_976_960, 6_738_415_616)
    linear, rest = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096
    kept = bytes_per_weight * linear + (4 if base == "fp32" else 2) * rest
    parts = cost.memory(model.config, size, 2048, cost.Layout())
    assert parts["weights"] == pytest.approx(kept + 4 * size.trained, rel=1e-3)
    assert parts["gradients"] + parts["optimizer"] == 12 * size.trained
    assert cost.checkpoint_bytes(size) == 12 * size.trained


def test_memory_of_a_known_layout():
    """Llama 2 7B, 32 GPUs as 4 stages x 8 ranks: the first stage has 8 of 32 layers and the embedding, weights and
    gradients in fp32, and an eighth of its moments and masters."""
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
            )
        )
    size = cost.count(model)
    parts = cost.memory(model.config, size, 2048, cost.Layout(ranks=8, depth=4, zero=1, micro=1, accumulation=64))
    own = size.body / 4 + 32000 * 4096
    assert parts["weights"] == parts["gradients"] == pytest.approx(4 * own)
    assert parts["optimizer"] == pytest.approx(12 * own / 8)
    full = cost.memory(
        model.config, size, 2048, cost.Layout(ranks=8, depth=4, zero=1, micro=1, accumulation=64, checkpointing="full")
    )
    assert full["activations"] < parts["activations"] / 6, (
        "4 micro-batches of 8 layers are kept, or their inputs and one layer"
    )
    assert cost.memory(model.config, size, 2048, cost.Layout(ranks=32, zero=3))["weights"] == 4 * size.total / 32
    assert cost.checkpoint_bytes(size) == 12 * size.total


def test_peak_rates_of_devices():
    """NVIDIA's and AMD's data sheets; a name that is not in the table exactly has none."""
    for name, rate in [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
    ]:
        assert peak_flops.known(name, "bf16") == rate * 1e12, name
    assert (
        peak_flops.known("NVIDIA A100 80GB PCIe", "fp32") == 19.5e12
        and peak_flops.known("NVIDIA GeForce RTX 4090", "tf32") == 82.6e12
    )
    for name in (
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A1000",
        "Tesla V100-SXM2-16GB",
        "cpu",
    ):
        assert peak_flops.known(name, "bf16") is None, name


def test_a_measured_peak_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    assert 1e9 < peak_flops.measured("fp32", torch.device("cpu"), seconds=0.0) < 1e14
    assert (
        torch.equal(state, torch.random.get_rng_state())
        and peak_flops.peak(12, "bf16", torch.device("cpu")) == 12e12
        and peak_flops.peak(None, "bf16", torch.device("cpu")) is None
    )


def test_muon_has_one_moment_for_matrices_and_room_to_multiply_them():
    """Counted by the engine's optimizer itself. Of FSDP's 8 processes each orthogonalises at most a bucket at a time."""
    model = tiny_engine.tiny(hidden_size=64, intermediate_size=128)
    size = cost.count(model)
    names = muon.matrix_names(model)
    sizes = [parameter.numel() for name, parameter in model.named_parameters() if name in names]
    assert (size.matrices, size.largest_matrix) == (sum(sizes), max(sizes))
    trainer = engine.build(model, tiny_engine.loss_fn, tiny_engine.config(optimizer={"kind": "muon"}))
    trainer.step([tiny_engine.batch_of(0, range(8))])
    moments = sum(
        value.nbytes
        for part in trainer.optimizer.parts
        for state in part.state.values()
        for value in state.values()
        if value.dim()
    )
    layout = cost.Layout(optimizer="muon")
    assert cost.state_bytes(size, layout)["optimizer"] == moments
    assert cost.checkpoint_bytes(size, "muon") == trainer.state_bytes()
    small = cost.memory(model.config, size, 1, cost.Layout(optimizer="muon", shard=8, ranks=8))
    assert small["temporary"] + small["activations"] + small["logits"] >= cost.MUON_BYTES * size.matrices / 8
