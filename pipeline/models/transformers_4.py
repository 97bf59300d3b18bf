"""The names under which transformers 4 reads a configuration that transformers 5 wrote.

transformers 5 keeps everything about rotary positions in `rope_parameters`. Version 4 does not know that key and uses
its default base without a warning. So both sets of names are written, with equal values; version 5 reads either.
"""

import json
from pathlib import Path

# Families for which version 4 reads the base and the rotated share of a head under names of their own.
OWN_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
# Families for which version 4 accepts a scaling only with `type` and these keys.
STRICT_SCALING = {"phi3": ("short_factor", "long_factor"), "olmo2": ("factor",)}


def add_older_keys(folder: Path) -> None:
    """Add the older names to the config.json of a model folder."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(older_keys(config))
    path.write_text(json.dumps(_plain_floats(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_keys(config: dict) -> dict:
    """What version 4 reads under other names: base, rotated share of a head and scaling of rotary positions, and the
    number of experts."""
    family = config.get("model_type")
    parameters = config.get("rope_parameters") or {}
    keys = {}
    if family == "qwen3_moe":
        keys["num_experts"] = config["num_local_experts"]
    if "full_attention" in parameters:  # one entry per kind of layer (gemma 3, olmo 3)
        local = parameters.get("sliding_attention") or {}
        if family.startswith("gemma3") and "rope_theta" in local:
            keys["rope_local_base_freq"] = local["rope_theta"]
        parameters = parameters["full_attention"]
    base_name, share_name = OWN_NAMES.get(family, ("rope_theta", "partial_rotary_factor"))
    if "rope_theta" in parameters:
        keys[base_name] = parameters["rope_theta"]
    if parameters.get("partial_rotary_factor") is not None:
        keys[share_name] = parameters["partial_rotary_factor"]
    if parameters.get("rope_type", "default") != "default":
        keys["rope_scaling"] = _scaling(family, parameters)
    return keys


def _scaling(family: str, parameters: dict) -> dict:
    """`rope_scaling`. Version 5 prefers it to `rope_parameters`, so it must be complete: what a strict family has no
    keys for is written anyway, and version 4 refuses it."""
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    allowed = STRICT_SCALING.get(family)
    if allowed is None:
        return scaling
    keys = set(scaling)
    if family == "phi3":
        keys -= {"original_max_position_embeddings"}  # a key of its own in config.json
    if keys != {"rope_type", *allowed}:
        return scaling
    strict = {"type": parameters["rope_type"]}
    for key in allowed:
        strict[key] = parameters[key]
    return strict


def _plain_floats(value):
    """Without version 5's {"__float__": "Infinity"} (mamba2), which version 4 takes for a mapping."""
    if isinstance(value, list):
        return [_plain_floats(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"}:
        return float(value["__float__"])
    return {key: _plain_floats(entry) for key, entry in value.items()}
