"""Writing a model folder in the Hugging Face layout: weights, configuration, generation settings, tokenizer files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.data.tokenizer.tokenizer_folder import FILES as TOKENIZER_FILES
from pipeline.models.build import quiet
from pipeline.models.transformers_4 import add_older_keys

if TYPE_CHECKING:
    import torch

GENERATION = "generation_config.json"
LARGEST_FILE: int | str = "5GB"  # of weights


def publish(state_dict: dict, model_config, tokenizer_folder: Path, folder: Path, parent: Path | None = None) -> None:
    """Write a model folder. Equal inputs give equal bytes.

    `model_config.architectures` names the class. `parent` is the folder that training started from, by default that of
    the tokenizer: its generation_config.json is kept, and the end of a chat turn is added to its stop ids (`stop_ids`).
    """
    skeleton = _skeleton(model_config)
    tied = _tied_names(skeleton)
    weights = {name: value.contiguous() for name, value in state_dict.items() if name not in tied}
    _begin(folder)
    with quiet():
        skeleton.save_pretrained(folder, state_dict=weights, max_shard_size=LARGEST_FILE)
    add_older_keys(folder)
    _write_beside_weights(folder, tokenizer_folder, Path(parent or tokenizer_folder), skeleton.can_generate())


def publish_parts(
    gather: Callable[[str], "torch.Tensor"],
    model_config,
    tokenizer_folder: Path,
    folder: Path,
    parent: Path | None = None,
    alone: bool = False,
) -> None:
    """Write the model folder that `publish` would write, from weights that no process holds completely: they are
    gathered one after another, and each file is written by one process. gather(name): a complete parameter or buffer,
    on every process. Collective, unless the main process does it `alone`. `can_publish_parts` says for which models."""
    import torch
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    skeleton = _skeleton(model_config)
    weights = _weights(skeleton)
    # As split_torch_state_dict_into_shards, which knows no storages of the meta device: the experts of a layer are
    # views of one tensor and stay in one file.
    plan = split_state_dict_into_shards_factory(
        revert_weight_conversion(skeleton, weights),
        get_storage_size=lambda value: value.untyped_storage().nbytes(),
        get_storage_id=lambda value: value.untyped_storage()._cdata,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=LARGEST_FILE,
    )
    rank, world = (0, 1) if alone else (distributed.rank(), distributed.world())
    if rank == 0:
        _begin(folder)
        with quiet():
            skeleton.save_pretrained(folder, state_dict={})  # the configuration
        (folder / "model.safetensors").unlink(missing_ok=True)  # a file of no weights
    if world > 1:
        distributed.barrier()
    files = list(plan.filename_to_tensors)
    mine = set(files[rank::world])
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, empty in weights.items():
        stored_names = list(revert_weight_conversion(skeleton, {name: empty}))
        places = {stored: plan.tensor_to_filename[stored] for stored in stored_names}
        value = gather(name)
        if not mine & set(places.values()):
            continue
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        values = revert_weight_conversion(skeleton, {name: value.to("cpu", dtype, copy=True)})
        for stored, file in places.items():
            if file not in mine:
                continue
            part = parts.setdefault(file, {})
            part[stored] = values[stored].clone() if len(values) > 1 else values[stored].contiguous()
            if len(part) == len(plan.filename_to_tensors[file]):
                save_file(parts.pop(file), folder / file, metadata={"format": "pt"})
    assert not parts, "a file of weights is incomplete"
    if world > 1:
        distributed.barrier()
    if rank:
        return
    if plan.is_sharded:
        metadata = {"total_parameters": skeleton.num_parameters(), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    add_older_keys(folder)
    _write_beside_weights(folder, tokenizer_folder, Path(parent or tokenizer_folder), skeleton.can_generate())


def can_publish_parts(model_config) -> bool:
    """Whether what transformers writes of each weight depends on that weight alone: experts, which it writes one by
    one, yes; weights that it joins, no."""
    from transformers.core_model_loading import revert_weight_conversion

    skeleton = _skeleton(model_config)
    weights = _weights(skeleton)
    alone = {}
    for name, empty in weights.items():
        alone |= {stored: value.shape for stored, value in revert_weight_conversion(skeleton, {name: empty}).items()}
    together = revert_weight_conversion(skeleton, weights)
    return alone == {stored: value.shape for stored, value in together.items()}


def _weights(skeleton) -> dict[str, "torch.Tensor"]:
    """What a model's files are made of, by its own names: parameters and buffers without memory."""
    left_out = _tied_names(skeleton) | set(skeleton._keys_to_ignore_on_save or ())
    return {name: value for name, value in skeleton.state_dict().items() if name not in left_out}


def _skeleton(model_config):
    """The model without weights."""
    import torch
    import transformers

    model_class = getattr(transformers, model_config.architectures[0])
    with torch.device("meta"):
        skeleton = model_class._from_config(model_config)
    if skeleton.can_generate():
        # What transformers derives from config.json may contain values that it then refuses to save.
        skeleton.generation_config = transformers.GenerationConfig()
    return skeleton


def _tied_names(skeleton) -> set[str]:
    """Names of parameters that are another one's."""
    if not skeleton.config.tie_word_embeddings:
        return set()
    return set(getattr(skeleton, "_tied_weights_keys", None) or ())


def _begin(folder: Path) -> None:
    if folder.exists():  # of a run that was killed while writing
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def publish_adapter(model, parent: Path, folder: Path, tokenizer_folder: Path, precision: str) -> None:
    """Write the adapter of a model (models/lora.py) in peft's format, with configuration, generation settings and
    tokenizer files, so that the folder can be used wherever a model folder is expected. `parent` is the folder of the
    complete model, which must stay. precision: in which the adapter was trained."""
    from pipeline.models import lora

    if folder.exists():  # of a run that was killed while writing
        shutil.rmtree(folder)
    lora.save(model, folder, parent.resolve(), precision)
    with quiet():
        model.config.save_pretrained(folder)
    add_older_keys(folder)
    _write_beside_weights(folder, tokenizer_folder, parent, model.can_generate())


def _write_beside_weights(folder: Path, tokenizer_folder: Path, parent: Path, can_generate: bool) -> None:
    """Generation settings and tokenizer files."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    if can_generate:
        settings = generation_settings(parent, load_tokenizer(tokenizer_folder))
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / GENERATION).write_text(text, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_folder) / name).is_file():
            shutil.copyfile(Path(tokenizer_folder) / name, folder / name)


def generation_settings(folder: Path, tokenizer) -> dict:
    """generation_config.json for a model that was trained from the one in `folder`: that model's settings unchanged,
    and what they lack of stop ids (`stop_ids`), beginning and padding."""
    import transformers

    settings = _read_json(folder / GENERATION)
    # This key tells transformers to derive the settings from config.json again, which has other stop ids.
    settings.pop("_from_model_config", None)
    ids = stop_ids(folder, tokenizer)
    if ids and ids != _as_list(settings.get("eos_token_id")):
        settings["eos_token_id"] = ids
    for key, value in (("bos_token_id", tokenizer.bos_token_id), ("pad_token_id", tokenizer.pad_token_id)):
        if value is not None and settings.get(key) is None:
            settings[key] = value
    settings.setdefault("transformers_version", transformers.__version__)
    return dict(sorted(settings.items()))


def stop_ids(folder: Path, tokenizer) -> list[int]:
    """Ids at which generation with the model in `folder` ends, each once: those of its generation_config.json, or else
    of its config.json, or else the tokenizer's end of text; and the ends of turns that the chat template teaches. May
    be empty."""
    from pipeline.data.chat.answers import ends_of_turn

    candidates = [_read_json(folder / name).get("eos_token_id") for name in (GENERATION, "config.json")]
    candidates.append(tokenizer.eos_token_id)
    first = next((value for value in candidates if value is not None), None)
    return list(dict.fromkeys([*_as_list(first), *ends_of_turn(tokenizer)]))


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict:
    """A JSON object, or an empty one if there is no file. Raises UserError for a damaged file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); copy the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: contains {type(content).__name__}, expected a JSON object; copy the model again")
    return content
