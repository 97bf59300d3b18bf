"""The names by which transformers 4 reads a configuration that transformers 5 wrote.

transformers 5 keeps what belongs to rotary positions in `rope_parameters`. Version 4 does not know that key and takes
its default base without a warning. Both sets of names are written, with the same values; version 5 reads either.
"""

import json
from pathlib import Path

# families whose own names version 4 reads for the base and for the share of a head that is rotated
OWN_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
# families whose scaling version 4 accepts with `type` and these keys only
STRICT_SCALING = {"phi3": ("short_factor", "long_factor"), "olmo2": ("factor",)}


def add_older_keys(folder: Path) -> None:
    """Add the older names to the config.json of a model folder."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = _finite({**config, **older_keys(config)})
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_keys(config: dict) -> dict:
    """What version 4 reads under other names: base, rotated share of a head and scaling of rotary positions, and the
    number of experts."""
    parameters = config.get("rope_parameters") or {}
    found = {}
    if config.get("model_type") == "qwen3_moe":
        found["num_experts"] = config["num_local_experts"]
    if "full_attention" in parameters:  # one entry per kind of layer (gemma 3, olmo 3)
        local = parameters.get("sliding_attention") or {}
        if config["model_type"].startswith("gemma3") and "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        parameters = parameters["full_attention"]
    base, share = OWN_NAMES.get(config.get("model_type"), ("rope_theta", "partial_rotary_factor"))
    if "rope_theta" in parameters:
        found[base] = parameters["rope_theta"]
    if parameters.get("partial_rotary_factor") is not None:
        found[share] = parameters["partial_rotary_factor"]
    if parameters.get("rope_type", "default") != "default":
        found["rope_scaling"] = _scaling(config["model_type"], parameters)
    return found


def _scaling(family: str, parameters: dict) -> dict:
    """`rope_scaling`. Version 5 prefers it to `rope_parameters`, so nothing may be lost in it: what a strict family has
    no keys for is written all the same, and version 4 refuses it."""
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    wanted = STRICT_SCALING.get(family)
    elsewhere = {"original_max_position_embeddings"} if family == "phi3" else set()  # a key of its own in config.json
    if wanted is None or set(scaling) - elsewhere != {"rope_type", *wanted}:
        return scaling
    return {"type": parameters["rope_type"], **{key: parameters[key] for key in wanted}}


def _finite(value):
    """Without version 5's {"__float__": "Infinity"} (mamba2), which version 4 takes for a mapping."""
    if isinstance(value, dict):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _finite(v) for k, v in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value
