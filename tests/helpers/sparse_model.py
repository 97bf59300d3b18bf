"""A model's folder of any size that takes no room: its files of weights have holes, which are read as zeros."""

import json
from pathlib import Path

import torch

FILE = 5_000_000_000  # bytes
WIDTHS = {torch.bfloat16: ("BF16", 2), torch.float32: ("F32", 4)}


def write(model_config, folder: Path, dtype: torch.dtype = torch.bfloat16, most: int = FILE) -> int:
    """Write config.json and weights of `dtype` in files of at most `most` bytes. Returns the bytes of the weights."""
    import transformers

    folder.mkdir(parents=True)
    model_config.architectures = [transformers.AutoModelForCausalLM._model_mapping[type(model_config)].__name__]
    model_config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config)
    name, width = WIDTHS[dtype]
    total, files, weight_map = 0, [{}], {}
    for key, value in model.state_dict().items():
        size = width * value.numel()
        end = max((entry["data_offsets"][1] for entry in files[-1].values()), default=0)
        if end and end + size > most:
            files.append({})
            end = 0
        files[-1][key] = {"dtype": name, "shape": list(value.shape), "data_offsets": [end, end + size]}
        total += size
    for number, entries in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / file, "wb") as handle:
            handle.write(len(header).to_bytes(8, "little") + header)
            handle.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
        weight_map |= dict.fromkeys(entries, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
