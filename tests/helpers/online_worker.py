"""Runs in both processes of one launch: what each reads and holds while the models of ppo, and a teacher, are built.
Results go to results.pt in the folder named on the command line.

    write(folder)       # before the launch: the models, and a recipe of ppo
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12}


def layer() -> int:
    """Parameters of a layer."""
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    return 4 * width**2 + 3 * width * inner + 2 * width


def total() -> int:
    """Parameters of a model, without its tables, which are a hundredth of a layer."""
    return SIZES["num_hidden_layers"] * layer() + SIZES["hidden_size"]


def write(folder: Path) -> None:
    from ppo_world import tiny, tokenizer_of, write_world

    write_world(folder)
    tokenizer = tokenizer_of()
    for name, kind in (("policy", "causal"), ("reward", "reward")):
        model = tiny(kind, vocab_size=len(tokenizer), initializer_range=0.02, **SIZES)
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder / name / "model")


@contextmanager
def counting() -> Iterator[dict]:
    """{"read": bytes that are read of files, "peak": the most bytes of tensors that operations have made and that are
    alive at a time}, at the end."""
    from unittest import mock

    from simulated_fsdp import Live

    from pipeline.models import folder_weights

    found, rows = {"read": 0}, folder_weights.Files.rows

    def reading(*words):
        tensor = rows(*words)
        found["read"] += tensor.nbytes
        return tensor

    with mock.patch.object(folder_weights.Files, "rows", reading), Live() as live:
        yield found
        found["peak"] = live.peak


def ppo_models(folder: Path, parallel: str, in_parts: bool = True) -> dict:
    from unittest import mock

    from ppo_world import inside

    from pipeline.train import finetune

    starts = finetune.starts_in_parts if in_parts else lambda config: False
    with mock.patch.object(finetune, "starts_in_parts", starts), counting() as found:
        models, *_ = inside(folder, folder, (f"ppo.parallel={parallel}",))
    kept = [part.nbytes for model in (models.reference, models.reward) for part in model.parts.values()]
    for engine in (models.policy, models.value):
        kept += [view.nbytes for view in engine.weight_views()]
    return found | {"kept": sum(kept)}


@torch.no_grad()
def teacher(folder: Path, parallel: dict) -> dict:
    from pipeline import sft
    from pipeline.core import distributed
    from pipeline.models import build
    from pipeline.train.distillation import Teacher

    config = sft.Config(
        kind="sft",
        inputs={"model": "./policy", "teacher": "./policy"},
        sources={"rows": {"path": "rows.jsonl"}},
        distill={},
        steps=1,
        batch_size=2,
        sequence_length=16,
        precision="fp32",
        parallel=parallel,
    )
    model, weights = build.skeleton(folder / "policy/model")
    with counting() as found:
        larger = Teacher(model.requires_grad_(False), config, weights)
        larger.place(distributed.device())
    kept = 0
    for parameter in model.parameters():
        kept += (parameter.to_local() if hasattr(parameter, "to_local") else parameter).nbytes
    return found | {"kept": kept, "logits": larger.logits(batch())}


def batch() -> dict:
    return {"inputs": {"input_ids": torch.arange(3, 19).view(2, 8)}}


def run(folder: Path) -> dict:
    from pipeline.models import build

    results: dict = {"logits": build.load(folder / "policy/model").eval()(**batch()["inputs"]).logits.detach()}
    for name, parallel in (("shard", {"shard": "full"}), ("zero 3", {"zero": 3})):
        results[f"teacher, {name}"] = teacher(folder, parallel)
    results["shard"] = ppo_models(folder, "{shard: full}")
    results["whole"] = ppo_models(folder, "{shard: full}", in_parts=False)
    results["zero 3"] = ppo_models(folder, "{zero: 3}")
    return results


if __name__ == "__main__":
    import warnings

    from pipeline.core import distributed

    warnings.simplefilter("ignore")
    distributed.setup()
    found = run(Path(sys.argv[1]))
    if distributed.is_main():
        torch.save(found, Path(sys.argv[1]) / "results.pt")
    distributed.barrier()
    distributed.shutdown()
