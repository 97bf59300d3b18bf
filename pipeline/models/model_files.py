"""What is in a model's folder, from its files alone: without torch, before anything is loaded.

Only safetensors are read. A pickle (pytorch_model.bin) can run code when it is loaded, and a repository's own Python
code (auto_map) is never run.
"""

import json
import struct
from pathlib import Path

from pipeline.core.errors import UserError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100_000_000  # bytes: the format's own limit


def belongs(name: str) -> bool:
    """Whether a repository's file is part of its model: weights, configuration, tokenizer, chat template. Folders in it
    have the same weights in other forms."""
    return "/" not in name and name.endswith(SUFFIXES)


def check(folder: Path) -> None:
    """Raise UserError for a folder that has no complete model or adapter, or one that cannot be loaded here."""
    if (folder / ADAPTER_CONFIG).is_file():
        check_adapter(folder)
        return
    config = read_config(folder)
    _check_config(folder, config)
    reason = missing_weights(folder)
    if reason:
        raise UserError(f"{folder}: {reason}")
    for path in weight_files(folder):
        tensors(path)


def check_tokenizer(folder: Path) -> None:
    """Raise UserError for a folder without a fast tokenizer."""
    from pipeline.data.tokenizer.tokenizer_folder import readable

    readable(folder, lambda: None)


def read_config(folder: Path) -> dict:
    """config.json of a model's folder. Raises UserError."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: contains no model (no config.json); expected a folder in the Hugging Face layout")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); copy the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: contains {type(config).__name__}, expected a JSON object; copy the model again")
    return config


def _check_config(folder: Path, config: dict) -> None:
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        needs = "its own Python code, which is never run" if "auto_map" in config else "a newer version of transformers"
        raise UserError(
            f"{folder}: model_type is {kind!r}, which the installed transformers does not have; it needs {needs}"
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise UserError(
            f"{folder}: its weights are quantised ({method}), and weights that are trained must not be; give the model"
            " that it was made from"
        )


def missing_weights(folder: Path) -> str | None:
    """What a folder's weights lack, or None."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{INDEX} cannot be read ({error!r}); copy the model again"
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            return f"lacks {missing[0]}, one of {len(names)} files of weights; copy the model again"
        return None
    if (folder / WEIGHTS).is_file():
        return None
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLES))
    if pickles:
        return (
            f"has its weights only as a pickle ({pickles[0]}), which can run code when it is loaded; save it with"
            " safetensors (save_pretrained), or give a revision that has them"
        )
    return f"contains no weights ({WEIGHTS}); copy the model again, or give another folder"


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, which `missing_weights` has found complete."""
    index = folder / INDEX
    if not index.is_file():
        return [folder / WEIGHTS]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]


def tensors(path: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in a safetensors file. Raises UserError for one that is damaged or cut off."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, MAX_HEADER):
                raise ValueError(f"its header would have {length:,} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: list(entry["shape"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path}: is not a safetensors file ({error}); copy it again") from None
    expected = 8 + length + end
    if size != expected:
        raise UserError(f"{path}: has {size:,} bytes, expected {expected:,}; copy it again")
    return shapes


def check_adapter(folder: Path) -> None:
    """Raise UserError for an adapter whose model is not here, or that belongs to another one."""
    from pipeline.models import lora

    base = lora.base_of(folder)
    check(base)
    read_config(folder)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder}: contains no {ADAPTER_WEIGHTS}; copy the adapter again")
    weights: dict[str, list[int]] = {}
    for path in weight_files(base):
        weights |= tensors(path)
    updates = {}
    for key, shape in tensors(folder / ADAPTER_WEIGHTS).items():
        updates[key.removeprefix(lora.PREFIX)] = shape
    difference = _difference(updates, weights)
    if difference:
        raise UserError(
            f"{folder}: is an adapter of another model than {base}: {difference}; give base_model_name_or_path in its"
            f" {ADAPTER_CONFIG} the model that it was trained from"
        )


def _difference(updates: dict[str, list[int]], weights: dict[str, list[int]]) -> str | None:
    """What shows that the matrices of an adapter are not for these weights, or None. Both are by name.

    Where no layer has the name that the adapter gives it, nothing is said: some families name their parts differently
    in files. lora.load compares once more, with the model itself.
    """
    missing, num_known = [], 0
    for key, shape in updates.items():
        layer, _, matrix = key.rpartition(".lora_")
        if matrix not in ("A.weight", "B.weight"):
            continue
        weight = weights.get(f"{layer}.weight") or weights.get(f"{layer.partition('.')[2]}.weight")
        if weight is None:
            missing.append(layer)
            continue
        num_known += 1
        size = shape[1] if matrix == "A.weight" else shape[0]
        if size not in weight:
            side = "inputs" if matrix == "A.weight" else "outputs"
            return f"it is for {size} {side} of {layer}, whose weight has the shape {weight}"
    if missing and num_known:
        return f"it is for {missing[0]}, and there is no such layer"
    return None
