"""Runs in both processes of one torchrun launch: what is particular to the FSDP engine. Results go to the file named on
the command line."""

import ctypes
import resource
import sys
from pathlib import Path

import torch
from counted import Counted

VOCABULARY = 61
MODELS = {
    "llama": {"family": "llama", "num_key_value_heads": 2, "init": "depth"},
    "mup": {"family": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False, "mup": {"base_width": 16}},
    "gpt2": {"family": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "deep": {"family": "llama", "num_key_value_heads": 2, "num_hidden_layers": 12},
    "experts": {
        "family": "qwen3_moe",
        "num_experts": 3,  # not divisible by two processes: split by another dimension
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "router_aux_loss_coef": 0.01,
        "head_dim": 16,
    },
}
# Models in bf16, and whether their output layer computes the losses in chunks.
ROUNDED = {"llama": True, "mup": False, "experts": True}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}


class Tokenizer:
    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __len__(self) -> int:
        return VOCABULARY


def made(name: str, materialise: bool):
    from pipeline.models import build

    sizes = SIZES | ({"num_key_value_heads": 2} if "llama" not in name else {})
    block = {
        key: value for key, value in sizes.items() if name != "gpt2" or "key_value" not in key and "inter" not in key
    }
    return build.new(block | MODELS[name], Tokenizer(), 64, 3, materialise=materialise)


def engine_of(name: str, precision: str = "fp32", chunks: bool = False, **changes):
    """An engine whose model was never complete here."""
    from tiny_engine import config, loss_fn

    from pipeline.models.initial_values import initialise
    from pipeline.train import chunked_loss, engine

    settings = config(parallel={"shard": "full"}, micro_batch=2, precision=precision, **changes)
    model = made(name, materialise=False)
    if chunks:
        chunked_loss.install(model, chunk=20)
    return engine.build(
        model, loss_fn, settings, fill=lambda part, global_name: initialise(part, 3, global_name, model)
    )


def read_engine(where: Path, adapters: bool = False):
    """An engine of the model in a folder, of which each process reads its part."""
    from tiny_engine import config, loss_fn

    from pipeline.models import build, frozen, lora
    from pipeline.models.lora_config import Lora
    from pipeline.train import engine

    model, weights = build.skeleton(where)
    if adapters:
        frozen.store(model, "bf16", "bf16", torch.device("cpu"))
        lora.attach(model, Lora(rank=4), seed=7)
        weights.then.append(lambda part, global_name: lora.initialise(part, 7, global_name))
    settings = config(parallel={"shard": "full"}, micro_batch=2, precision="bf16" if adapters else "fp32")
    return engine.build(model, loss_fn, settings, fill=weights)


def numbers(trainer, steps: int = 3) -> list[dict]:
    from parallel_worker import micro_batches

    return [trainer.step(micro_batches(trainer.config, trainer, step)) for step in range(trainer.step_count, steps)]


def observed(trainer) -> dict:
    """What one step shows inside of the layers: the type of the matrices, of the norms, and how many layers were
    complete at a time."""
    from parallel_worker import micro_batches
    from torch.distributed.tensor import DTensor

    found = trainer.model.model.layers
    types, complete = set(), []

    def note_types(layer, _):
        types.add((str(layer.self_attn.q_proj.weight.dtype), str(layer.input_layernorm.weight.dtype)))

    def count(*_):
        complete.append(sum(not isinstance(other.self_attn.q_proj.weight, DTensor) for other in found))

    handles = []
    for layer in found:
        handles.append(layer.register_forward_pre_hook(note_types))
        handles += [layer.register_forward_pre_hook(count), layer.register_full_backward_pre_hook(count)]
    batches = micro_batches(trainer.config, trainer, 0)
    with Counted() as counted:
        trainer.step(batches)
    for handle in handles:
        handle.remove()
    sent, products = dict(counted.bytes), counted.products
    return {"types": types, "complete": max(complete), "sent": sent, "products": products, "reads": counted.reads}


def expected_bytes(name: str) -> dict[tuple[str, str], int]:
    """What a step of two micro-batches in bf16 sends, in bytes of complete tensors. Of each micro-batch: matrices of
    layers in bf16 for the forward and the backward pass; the embedding in fp32 for the forward pass; the output layer
    likewise if it computes its losses in chunks, else as a layer; all gradients in fp32. At the end the vectors'
    gradients. 61 rows of a table are sent as 62, the next number that two processes share evenly, and 3 rows of a router
    as 4."""
    sizes = {key: value.numel() for key, value in made(name, materialise=False).named_parameters()}
    sizes |= {key: size // 3 * 4 for key, size in sizes.items() if key.endswith("mlp.gate.weight")}
    shapes = {key: value.dim() for key, value in made(name, materialise=False).named_parameters()}
    table, micro_batches = 62 * SIZES["hidden_size"], 2
    layers = sum(size for key, size in sizes.items() if ".layers." in key and shapes[key] > 1)
    vectors = sum(size for key, size in sizes.items() if shapes[key] == 1)
    twice = layers if ROUNDED[name] else layers + table
    once = 2 * table if ROUNDED[name] else table
    return {
        ("allgather", "bfloat16"): micro_batches * 2 * 2 * twice,
        ("allgather", "float32"): micro_batches * 4 * once,
        ("reduce_scatter", "float32"): micro_batches * 4 * (layers + 2 * table),
        ("allreduce", "float32"): 4 * vectors,
    }


@torch.no_grad()
def gathered(trainer) -> tuple[torch.Tensor, torch.Tensor, set[torch.dtype]]:
    """Logits of a model that is gathered for sampling, those of the model in fp32, and the types of the first one's
    weights."""
    ids = torch.arange(24).view(2, 12)
    logits, types = [], set()
    for exact in (False, True):
        if exact:
            trainer.gathered_in = lambda name: None
        with trainer.gathered(), torch.autocast("cpu", torch.bfloat16):
            trainer.model.eval()
            logits.append(trainer.model(ids).logits)
            if not exact:
                types = {parameter.dtype for parameter in trainer.model.parameters()}
    return *logits, types


@torch.no_grad()
def peaks(trainer, where: Path, texts: Path) -> dict[str, int]:
    """The most bytes that were alive at a time, in addition to what the engine keeps: while a model is published, and
    while it samples."""
    from simulated_fsdp import Live

    with Live() as publishing:
        trainer.publish(trainer.skeleton.config, texts, where)
    ids = torch.tensor([[5, 6, 7]])
    with Live() as sampling, trainer.sampling() as model:
        model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return {"publishing": publishing.peak, "sampling": sampling.peak}


def split_read(where: Path) -> tuple[dict, dict, int]:
    """A model in a folder that is only read: its weights put together, this process's parts, and the elements that it
    has read."""
    from pipeline.models import build, folder_weights
    from pipeline.rl.frozen_models import SplitModel

    read, rows = [0], folder_weights.Files.rows

    def counting(*words):
        tensor = rows(*words)
        read[0] += tensor.numel()
        return tensor

    model, weights = build.skeleton(where)
    folder_weights.Files.rows = counting
    frozen = SplitModel(model, "bf16", torch.device("cpu"), weights)
    folder_weights.Files.rows = rows
    with frozen.complete() as complete:
        weights = {name: value.detach().clone() for name, value in complete.state_dict().items()}
        weights |= {name: value.clone() for name, value in complete.named_buffers()}
    return weights, {name: part.numel() for name, part in frozen.parts.items()}, read[0]


def run(folder: Path) -> dict:
    from tuned import tokenizer

    from pipeline.core import distributed
    from pipeline.models import publish
    from pipeline.rl.frozen_models import SplitModel
    from pipeline.train import fsdp_sharding
    from pipeline.train.engine import Engine

    results: dict = {}
    for name in MODELS:
        results["initial", name] = engine_of(name).consolidated()
    if distributed.is_main():
        (folder / "experts").mkdir()
        (folder / "tokenizer").mkdir()
        tokenizer(folder / "tokenizer")
    distributed.barrier()
    trainer = engine_of("experts")
    numbers(trainer, 2)
    trainer.save(folder / "experts")
    distributed.barrier()
    results["saved", "experts"] = trainer.consolidated()
    dtype = fsdp_sharding.gathered_dtype
    for name, chunks in ROUNDED.items():
        trainer = engine_of(name, "bf16", chunks)
        results["bf16 gathers", name] = numbers(trainer), trainer.consolidated()
        results["observed", name] = observed(trainer)
        fsdp_sharding.gathered_dtype = lambda model, precision: None
        trainer = engine_of(name, "bf16", chunks)
        results["fp32 gathers", name] = numbers(trainer), trainer.consolidated()
        fsdp_sharding.gathered_dtype = dtype
    for name in ("llama", "mup", "experts"):
        trainer = engine_of(name)
        publish.LARGEST_FILE = 20_000
        config, texts = trainer.skeleton.config, folder / "tokenizer"
        trainer.publish(config, texts, folder / f"{name}-parts")
        Engine.publish(trainer, config, texts, folder / f"{name}-whole")
    results["peaks"] = peaks(engine_of("deep"), folder / "deep-parts", folder / "tokenizer")
    for name in ("llama", "mup", "experts"):
        results["read", name] = read_engine(folder / f"{name}-whole").consolidated()
    adapted = read_engine(folder / "experts-whole", adapters=True)
    results["read", "adapters"] = adapted.consolidated()
    model = made("gpt2", materialise=True)
    model.odd = torch.nn.Parameter(torch.arange(7.0))  # not divisible by two processes
    frozen = SplitModel(model, "bf16", trainer.device)
    with frozen.complete() as complete:
        weights = {name: value.detach().clone() for name, value in complete.named_parameters()}
    results["split"] = (
        dict(model.named_parameters()),
        {name: part.numel() for name, part in frozen.parts.items()},
        weights,
    )
    for name in ("llama", "experts"):
        results["split read", name] = split_read(folder / f"{name}-whole")
    for name in ROUNDED:
        results["gathered", name] = gathered(engine_of(name, "bf16"))
    trainer = engine_of("experts")
    results["placements"] = {name: value.placements[0].dim for name, value in trainer.sharded.items()}
    return results


M_ARENA_MAX = -8  # malloc.h of glibc
LIMIT = 460_000_000  # bytes: more than half of a model and its largest parts, less than a complete one


def limit_addresses() -> None:
    """From here on this process may take LIMIT more than it has."""
    # Each thread that allocates reserves 64 MB of addresses for an arena of its own, which the limit counts.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, resource.RLIM_INFINITY))


def limited() -> dict[str, str]:
    """A model of 128M parameters, 512 MB, built by two engines in a process that may take LIMIT more than it has."""
    from tiny_engine import config, loss_fn

    from pipeline.core import distributed
    from pipeline.models import build
    from pipeline.models.initial_values import initialise
    from pipeline.train import engine

    sizes = {"hidden_size": 512, "num_hidden_layers": 40, "num_attention_heads": 8, "intermediate_size": 1408}
    block = {"family": "llama", "num_key_value_heads": 8, **sizes}
    limit_addresses()
    found = {}
    for name, parallel in (("fsdp", {"shard": "full"}), ("ddp", {})):
        try:
            model = build.new(block, Tokenizer(), 64, 3, materialise=not parallel)

            def fill(part, global_name, model=model) -> None:
                initialise(part, 3, global_name, model)

            trainer = engine.build(model, loss_fn, config(parallel=parallel, micro_batch=2), fill=fill)
            found[name] = f"{sum(parameter.numel() for parameter in trainer.parameters)} parameters"
            del trainer, model
        except (MemoryError, RuntimeError) as error:
            found[name] = str(error).splitlines()[0]
        distributed.barrier()
    return found


def limited_reading(where: Path) -> dict:
    """The model in a folder, 256 MB in bf16 and 512 MB in fp32: the most bytes of tensors while ZeRO-3 splits it, and
    two engines of it in a process that may take LIMIT more than it has."""
    from simulated_fsdp import Live
    from tiny_engine import config, loss_fn

    from pipeline.core import distributed
    from pipeline.models import build
    from pipeline.train import engine, sharded

    model, weights = build.skeleton(where)
    sharded.start()
    with Live() as live:
        options = sharded.settings(config(parallel={"zero": 3}, micro_batch=2), 1, 1, distributed.world())
        sharded.split_parameters(model, weights, options)
    kept = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())
    del model, weights
    limit_addresses()
    found: dict = {"zero 3": (live.peak, kept)}
    for name, parallel in (("fsdp", {"shard": "full"}), ("ddp", {})):
        try:
            model, weights = build.skeleton(where) if parallel else (build.load(where), None)
            trainer = engine.build(model, loss_fn, config(parallel=parallel, micro_batch=2), fill=weights)
            found[name] = f"{sum(parameter.numel() for parameter in trainer.parameters)} parameters"
            del trainer, model, weights
        except (MemoryError, RuntimeError, OSError) as error:
            found[name] = str(error).splitlines()[0]
        distributed.barrier()
    return found


if __name__ == "__main__":
    import warnings

    from pipeline.core import distributed

    warnings.simplefilter("ignore")
    distributed.setup()
    path = Path(sys.argv[1])
    if sys.argv[2:] == ["limited"]:
        results = limited()
    elif sys.argv[2:] == ["limited reading"]:
        results = limited_reading(path.parent / "model")
    else:
        results = run(path.parent)
    if distributed.is_main():
        torch.save(results, path)
    distributed.barrier()
    distributed.shutdown()
