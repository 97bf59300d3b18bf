"""Runs in both processes of one torchrun launch: what is particular to the FSDP engine. Results go to the file named on
the command line."""

import sys
from pathlib import Path

import torch

VOCABULARY = 61
MODELS = {
    "llama": {"family": "llama", "num_key_value_heads": 2, "init": "depth"},
    "mup": {"family": "llama", "num_key_value_heads": 2, "tie_word_embeddings": False, "mup": {"base_width": 16}},
    "gpt2": {"family": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
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
    trainer.step(micro_batches(trainer.config, trainer, 0))
    for handle in handles:
        handle.remove()
    return {"types": types, "complete": max(complete)}


def run(folder: Path) -> dict:
    from tuned import tokenizer

    from pipeline.models import publish
    from pipeline.train import distributed, fsdp_sharding
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
    trainer = engine_of("experts")
    results["placements"] = {name: value.placements[0].dim for name, value in trainer.sharded.items()}
    return results


def limited() -> dict[str, str]:
    """A model of 128M parameters, 512 MB, built by two engines in a process that may take 400 MB more than it has."""
    import resource

    from tiny_engine import config, loss_fn

    from pipeline.models import build
    from pipeline.models.initial_values import initialise
    from pipeline.train import distributed, engine

    sizes = {"hidden_size": 512, "num_hidden_layers": 40, "num_attention_heads": 8, "intermediate_size": 1408}
    block = {"family": "llama", "num_key_value_heads": 8, **sizes}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, resource.RLIM_INFINITY))
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


if __name__ == "__main__":
    import warnings

    from pipeline.train import distributed

    warnings.simplefilter("ignore")
    distributed.setup()
    path = Path(sys.argv[1])
    results = limited() if sys.argv[2:] == ["limited"] else run(path.parent)
    if distributed.is_main():
        torch.save(results, path)
    distributed.barrier()
    distributed.shutdown()
