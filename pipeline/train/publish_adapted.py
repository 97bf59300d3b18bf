"""Publishing what a tuning stage has learned with adapters: the adapter alone, or the model that it started from with
the adapter merged into its weights."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.core import distributed
from pipeline.core.output import Output
from pipeline.core.terminal import say
from pipeline.models import build, frozen, lora
from pipeline.models.folder_weights import FolderWeights
from pipeline.models.model_parts import Parts
from pipeline.models.publish import can_publish_parts, publish, publish_adapter, publish_parts
from pipeline.train.finetune_config import FinetuneConfig

if TYPE_CHECKING:
    from pipeline.train.finetune import Parent


def publish_adapted(
    trained, weights: dict[str, torch.Tensor], config: FinetuneConfig, parent: "Parent", output: Output
) -> None:
    """Publish an adapter, or the parent's model with the adapter merged into its weights: those of the folder in fp32,
    or, where they were kept in 4 bits, what these are multiplied with."""
    folder, tokenizer_folder = output.path / "model", parent.tokenizer_files(config, output)
    head = build.head_of(trained)
    is_adapter = config.lora.publish == "adapter"
    if is_adapter or config.parallel.keeps_parts:
        model, base = parent.skeleton(head=head, config=copy.deepcopy(trained.config))
    else:
        model, base = parent.load(head=head, config=copy.deepcopy(trained.config)), None
    if base is None:
        frozen.round_like(trained, model, distributed.device())
    else:
        base.then.append(lambda part, name: frozen.round_like(trained, part, distributed.device(), name))
    lora.attach(model, config.lora, config.seed, trained.adapter.complete)
    if base is not None and not is_adapter:
        if can_publish_parts(model.config):
            _publish_merged_parts(model, base, weights, config, tokenizer_folder, folder, parent.folder)
            return
        Parts(model).materialise_all(base)
    lora.fill(model, weights)
    if is_adapter:
        publish_adapter(model, parent.folder, folder, tokenizer_folder, config.precision)
        return
    difference = lora.merge_and_compare(model, config.sequence_length)
    say(f"{config.kind}: adapter merged; logits differ by at most {difference:.1e} of the largest one")
    publish(model.state_dict(), model.config, tokenizer_folder, folder, parent.folder)


def _publish_merged_parts(
    model, base: FolderWeights, weights: dict[str, torch.Tensor], config, tokenizer_folder: Path, folder: Path, parent
) -> None:
    """Publish a model with its adapters merged, of which one part at a time is in memory. model: with adapters, on the
    meta device; weights: the trained ones."""
    parts, differences = Parts(model), [0.0]
    current: list[str] = []  # the part that has memory

    def gather(name: str) -> torch.Tensor:
        part = next(part for part in parts.names if name.startswith(f"{part}."))
        if current != [part]:
            for other in current:
                model.get_submodule(other).to("meta")
            current[:] = [part]
            parts.materialise(part, base)
            prefix = f"{part}."
            own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            lora.fill(model.get_submodule(part), own)
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if attribute != "weight" or not isinstance(module, lora.Adapted):
            return getattr(module, attribute).detach()
        merged, difference = lora.merged_and_compared(module)
        differences.append(difference)
        return merged

    publish_parts(gather, model.config, tokenizer_folder, folder, parent, alone=True)
    say(
        f"{config.kind}: adapter merged; outputs of a layer differ by at most {max(differences):.1e} of the largest one"
    )
