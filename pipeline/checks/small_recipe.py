"""A recipe's pretraining stage, small enough to be run a dozen times: the same family, the same ratios, the same
options.

What a proof must change it says: `lines` of `prepare` are for the user.
"""

import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.checks import synthetic_tokens
from pipeline.core import artifact
from pipeline.core.config import RunConfig
from pipeline.core.errors import UserError
from pipeline.core.graph import nodes
from pipeline.core.recipe import Recipe

PARAMETERS = 5_000_000  # a larger model is shrunk: this one takes a third of a second a step on one CPU core
VOCABULARY = 4096
ROWS, TOKENS = 8, 128  # of a row; 8 rows can be cut into 2 data ranks x 4 micro-batches
# Keys by which transformers' families say how large a model is, by what they must keep to each other.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size")
INNER = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "q_lora_rank",
    "kv_lora_rank",
)
HEADS = ("num_attention_heads", "n_head", "num_heads")
HEAD_SIZES = ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass
class Prepared:
    """A stage ready to be proven: its small config, where its tokens and tokenizer are, and what was changed and
    why."""

    name: str
    config: object
    tokens: Path
    tokenizer: Path
    lines: list[str]


def stage_of(recipe: Recipe, name: str | None) -> str:
    """The stage of kind pretrain that is meant. Raises UserError."""
    same = [stage for stage, config in recipe.stages.items() if config.kind == "pretrain"]
    if not same:
        raise UserError(f"recipe {recipe.name}: has no stage of kind pretrain; it has {', '.join(recipe.stages)}")
    if name is not None and name not in same:
        raise UserError(f"recipe {recipe.name}: {name!r} is no stage of kind pretrain; these are: {', '.join(same)}")
    return name or same[0]


@contextmanager
def workplace(recipe: Recipe, what: str, keep: bool):
    """runs/NAME/verify/WHAT.work/: an empty folder for one proof, removed afterwards unless it is to be kept."""
    folder = recipe.root / "verify" / f"{what}.work"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        yield folder.resolve()
    finally:
        if not keep:
            shutil.rmtree(folder)


def prepare(
    recipe: Recipe, stage: str, work: Path, steps: int, *, full: bool = False, width: int = 64, layers: int = 4
) -> Prepared:
    """Tokens and a config of `stage` for a proof. Raises UserError for what the recipe says wrong."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import build, cost, model_block
    from pipeline.train import train_length

    config = recipe.stages[stage]
    lines = []
    tokens, tokenizer, origin = _tokens(recipe, stage, work, full)
    lines.append(f"tokens     {origin}")
    if config.model is None:
        raise UserError(f"stages.{stage}: has no model block to prove anything of; give the recipe a top-level `model`")
    model_block.check(config.model)
    reader = load_tokenizer(tokenizer)
    block = dict(config.model)
    size = cost.count(build.new(block, reader, config.sequence_length, 0, materialise=False)).total
    length = config.sequence_length
    if full or size <= PARAMETERS:
        lines.append(f"model      {block['family']}, {size / 1e6:.1f} M parameters, as the recipe has it")
    else:
        block, length = shrunk(block, width, layers), min(length, TOKENS)
        small = cost.count(build.new(block, reader, length, 0, materialise=False)).total
        shape = ", ".join(
            f"{key} {block[key]}"
            for key in (*LAYERS, *WIDTHS, *HEADS, "num_key_value_heads", *INNER, *EXPERTS)
            if block.get(key) is not None
        )
        lines.append(
            f"model      {block['family']}, shrunk from {size / 1e6:.1f} M to {small / 1e6:.1f} M parameters ({shape},"
            f" rows of {length} tokens); --full takes it as it is"
        )
    dropped = [
        key
        for key, value in model_block.full_config(block, reader, length).to_dict().items()
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float) and value > 0
    ]
    if dropped:
        lines.append(
            f"dropout    off ({', '.join(dropped)}): its masks are drawn on each data rank, so layouts must differ"
        )
    block.update(dict.fromkeys(dropped, 0.0))
    if config.optimizer.kind == "muon":
        lines.append("optimizer  AdamW in Muon's place, which needs whole matrices and so has no ZeRO and no pipeline")
    attention = config.attention
    if attention == "flash_attention_2":  # it needs bf16, which not every layout of a proof has
        attention = "auto"
        lines.append(f"attention  auto in place of {config.attention}, which fp32 does not have")
    # Changes of the mixture come inside the few steps, evenly, in their order.
    total = steps * ROWS * length
    changes = [
        change.model_copy(update={"tokens": total * number // (len(config.mixture_changes) + 1)})
        for number, change in enumerate(config.mixture_changes, 1)
    ]
    if changes:
        lines.append(
            f"mixture    changes at {', '.join(f'{change.tokens:,}' for change in changes)} tokens of {total:,}"
        )
    fim = config.fim
    if fim and fim.prefix not in reader.get_vocab():
        lines.append("fim        off: the synthetic tokenizer has no such tokens")
        fim = None
    settings = config.model_copy(
        update={
            "model": block,
            "inputs": {"tokens": str(tokens), "tokenizer": str(tokenizer)},
            "model_changes": {},
            "from_step": None,
            **dict.fromkeys(train_length.KINDS),
            "steps": steps,
            "schedule": type(config.schedule)(kind="constant"),
            "sequence_length": length,
            "batch_size": ROWS,
            "micro_batch": None,
            "optimizer": config.optimizer.model_copy(update={"kind": "adamw"}),
            "parallel": type(config.parallel)(),
            "attention": attention,
            "compile": False,
            "run": RunConfig(),
            "log": type(config.log)(every_steps=1),
            "mixture_changes": changes,
            "fim": fim,
            "samples": None,  # prompts may be longer than the shortened rows
            # among so few steps none may be both saved and evaluated
            "save": config.save.model_copy(update={"keep_best": False}),
        }
    )
    return Prepared(stage, settings, tokens, tokenizer, lines)


def shrunk(block: dict, width: int, layers: int) -> dict:
    """A model block of at most `width` and `layers`, with the ratios of the given one: inner sizes to width, heads
    to key-value heads."""
    from transformers import AutoConfig

    from pipeline.models.model_block import OWN_KEYS

    whole = AutoConfig.for_model(block["family"], **{key: value for key, value in block.items() if key not in OWN_KEYS})
    # n_embd for hidden_size, where a family says so
    names = {value: key for key, value in getattr(whole, "attribute_map", {}).items()}
    had = {key: value for key, value in whole.to_dict().items() if value is not None}
    small = dict(block)

    def put(key: str, value: int) -> None:
        if key in block or names.get(key) not in block:
            small[key] = value

    old = next(had[key] for key in WIDTHS if key in had)
    new = min(width, old)
    share = new / old
    for key in WIDTHS:
        if key in had:
            put(key, max(8, round(had[key] * share / 8) * 8))
    for key in INNER:
        if isinstance(had.get(key), int):
            put(key, max(8, round(had[key] * share / 8) * 8))
    for key in LAYERS:
        if key in had:
            put(key, min(layers, had[key]))
    if heads := next((had[key] for key in HEADS if key in had), None):
        groups = had.get("num_key_value_heads", heads)
        ratio = max(1, heads // groups)
        kept = min(groups, 2)
        while kept > 1 and ratio * kept > new // 8:
            kept -= 1
        many = min(ratio * kept, max(1, new // 8))
        many = 2 ** int(math.log2(many))  # divides the width, which is a multiple of 8
        for key in HEADS:
            if key in had:
                put(key, many)
        if "num_key_value_heads" in had:
            put("num_key_value_heads", max(1, many // ratio))
        for key in HEAD_SIZES:
            if isinstance(had.get(key), int) and had[key] * heads != old:
                put(key, max(4, round(had[key] * heads * share / many / 2) * 2))
            elif key in block:
                put(key, new // many)
    for key in EXPERTS:
        if isinstance(had.get(key), int):
            put(key, min(had[key], 4))
    # DeepSeek-V3's groups of experts are among these
    for key, most in (("num_experts_per_tok", 2), ("n_group", 2), ("topk_group", 1)):
        if isinstance(had.get(key), int):
            put(key, min(had[key], most))
    if block.get("mup"):
        small["mup"] = {**block["mup"], "base_width": max(8, round(block["mup"]["base_width"] * share / 8) * 8)}
    for key in ("layer_types", "mlp_layer_types"):
        if key in block:
            small[key] = block[key][:layers]
    return small


def _tokens(recipe: Recipe, stage: str, work: Path, full: bool) -> tuple[Path, Path, str]:
    """Folders of packed tokens and of their tokenizer, and where they come from. Unless `full`, a vocabulary made here
    has at most VOCABULARY words: a small model with 256,000 of them computes logits and little else."""
    node = nodes(recipe)[stage]
    found = {}
    for key in ("tokens", "tokenizer"):
        source = node.parents[key]
        if source in recipe.stages:
            published = artifact.current(recipe.root / source)
            found[key] = published.path if published and not published.damage() else None
        else:
            found[key] = Path(source).resolve() if Path(source).is_dir() else None
    if all(found.values()):
        return found["tokens"], found["tokenizer"], f"the recipe's own, from {node.parents['tokens']}"
    tokenizer = recipe.stages.get(node.parents["tokenizer"])
    config = recipe.stages[stage]
    vocabulary = getattr(tokenizer, "vocab_size", VOCABULARY)
    if not full:
        vocabulary = min(vocabulary, VOCABULARY)
    sources = sorted(
        {
            source
            for mixture in (config.mixture or {"synthetic": 1}, *(change.mixture for change in config.mixture_changes))
            for source in mixture
        }
    )
    synthetic_tokens.write(
        work / "synthetic", vocabulary, sources, max(60_000, 30 * config.sequence_length), recipe.seed
    )
    missing = " and ".join(node.parents[key] for key, path in found.items() if path is None)
    return (
        work / "synthetic" / "tokens",
        work / "synthetic" / "tokenizer",
        f"synthetic, vocabulary of {vocabulary}: {missing} of this recipe has not been run",
    )
