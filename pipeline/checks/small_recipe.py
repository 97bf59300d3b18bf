"""A recipe's pretraining stage, small enough to be run a dozen times: the same family, the same ratios, the same
options. `Prepared.lines` tell the user what had to be changed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.checks import synthetic_tokens
from pipeline.checks.smaller_model import SHOWN, smaller
from pipeline.core import artifact, external_inputs
from pipeline.core.errors import UserError
from pipeline.core.graph import nodes
from pipeline.core.recipe import Recipe
from pipeline.core.run_config import Resources, RunConfig

PARAMETERS = 5_000_000  # larger models are made smaller: this size takes a third of a second per step on one CPU core
ROWS = 8  # of a batch, which can be divided into 2 data ranks x 4 micro-batches
TOKENS = 128  # of a row
VOCABULARY = 4096  # words of the synthetic tokenizer, at most: with 256,000 a small model computes little but logits


@dataclass
class Prepared:
    """A stage ready for a proof: its small config, the folders of its tokens and tokenizer, and what was changed and
    why."""

    name: str
    config: object
    tokens: Path
    tokenizer: Path
    lines: list[str]


def stage_of(recipe: Recipe, name: str | None) -> str:
    """The named stage of kind pretrain, or the first one. Raises UserError."""
    stages = [stage for stage, config in recipe.stages.items() if config.kind == "pretrain"]
    if not stages:
        raise UserError(f"recipe {recipe.name}: has no stage of kind pretrain; it has {', '.join(recipe.stages)}")
    if name is not None and name not in stages:
        raise UserError(
            f"recipe {recipe.name}: {name!r} is not a stage of kind pretrain; these are: {', '.join(stages)}"
        )
    return name or stages[0]


@contextmanager
def workplace(recipe: Recipe, proof: str, keep: bool) -> Iterator[Path]:
    """runs/NAME/verify/PROOF.work/: an empty folder for one proof, removed afterwards unless `keep` is set."""
    folder = recipe.root / "verify" / f"{proof}.work"
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
    """Tokens and a config of `stage` for a proof. Raises UserError for mistakes in the recipe."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import model_block
    from pipeline.train import train_length

    config = recipe.stages[stage]
    tokens, tokenizer_folder, origin = _tokens(recipe, stage, work, full)
    lines = [f"tokens     {origin}"]
    if config.model is None:
        raise UserError(f"stages.{stage}: has no model to prove anything of; give the recipe a top-level `model`")
    model_block.check(config.model)
    tokenizer = load_tokenizer(tokenizer_folder)
    block, length, line = _small_model(config, tokenizer, full, width, layers)
    lines.append(line)
    dropouts = _dropouts(block, tokenizer, length)
    if dropouts:
        lines.append(
            f"dropout    off ({', '.join(dropouts)}): each data rank draws its own masks, so layouts would differ"
        )
        block.update(dict.fromkeys(dropouts, 0.0))
    if config.optimizer.kind == "muon":
        lines.append("optimizer  AdamW instead of Muon, which ZeRO and pipelines do not have")
    if config.precision == "fp8":
        lines.append(
            "precision  bf16 instead of fp8, whose scales are those of a micro-batch, which layouts cut differently"
        )
    attention = config.attention
    if attention == "flash_attention_2":  # it needs bf16, which not every layout of a proof has
        attention = "auto"
        lines.append(f"attention  auto instead of {config.attention}, which fp32 does not have")
    # Changes of the mixture happen within the few steps, evenly, in their order.
    total = steps * ROWS * length
    changes = []
    for number, change in enumerate(config.mixture_changes, 1):
        at = total * number // (len(config.mixture_changes) + 1)
        changes.append(change.model_copy(update={"tokens": at}))
    if changes:
        lines.append(
            f"mixture    changes at {', '.join(f'{change.tokens:,}' for change in changes)} tokens of {total:,}"
        )
    fim = config.fim
    if fim and fim.prefix not in tokenizer.get_vocab():
        lines.append("fim        off: the synthetic tokenizer has no such tokens")
        fim = None
    update = dict.fromkeys(train_length.KINDS)
    update |= {
        "model": block,
        "inputs": {"tokens": str(tokens), "tokenizer": str(tokenizer_folder)},
        "model_changes": {},
        "from_step": None,
        "steps": steps,
        "schedule": type(config.schedule)(kind="constant"),
        "sequence_length": length,
        "batch_size": ROWS,
        "micro_batch": None,
        "precision": config.wide_precision,
        "optimizer": config.optimizer.model_copy(update={"kind": "adamw"}),
        "parallel": type(config.parallel)(),
        "attention": attention,
        "compile": False,
        "run": RunConfig(),
        "resources": Resources(),
        "log": type(config.log)(every_steps=1),
        "mixture_changes": changes,
        "fim": fim,
        "samples": None,  # prompts may be longer than the shortened rows
        # in so few steps, none may be both saved and evaluated
        "save": config.save.model_copy(update={"keep_best": False}),
    }
    return Prepared(stage, config.model_copy(update=update), tokens, tokenizer_folder, lines)


def _small_model(config, tokenizer, full: bool, width: int, layers: int) -> tuple[dict, int, str]:
    """(model block, tokens of a row, line for the user)."""
    block, length = dict(config.model), config.sequence_length
    size = _parameters(block, tokenizer, length)
    if full or size <= PARAMETERS:
        line = f"model      {block['family']}, {size / 1e6:.1f} M parameters, as the recipe has it"
        return block, length, line
    block, length = smaller(block, width, layers), min(length, TOKENS)
    small_size = _parameters(block, tokenizer, length)
    sizes = ", ".join(f"{key} {block[key]}" for key in SHOWN if block.get(key) is not None)
    line = (
        f"model      {block['family']}, reduced from {size / 1e6:.1f} M to {small_size / 1e6:.1f} M parameters"
        f" ({sizes}, rows of {length} tokens); --full keeps it as it is"
    )
    return block, length, line


def _parameters(block: dict, tokenizer, length: int) -> int:
    from pipeline.models import build, cost

    return cost.count(build.new(block, tokenizer, length, 0, materialise=False)).total


def _dropouts(block: dict, tokenizer, length: int) -> list[str]:
    """Keys of the model with a dropout above 0."""
    from pipeline.models import model_block

    keys = []
    for key, value in model_block.full_config(block, tokenizer, length).to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float) and value > 0:
            keys.append(key)
    return keys


def _tokens(recipe: Recipe, stage: str, work: Path, full: bool) -> tuple[Path, Path, str]:
    """Folders of packed tokens and of their tokenizer, and where they come from. A synthetic tokenizer has at most
    VOCABULARY words unless `full` is set."""
    node = nodes(recipe)[stage]
    folders = {key: _existing(recipe, node.parents[key]) for key in ("tokens", "tokenizer")}
    missing = [node.parents[key] for key, folder in folders.items() if folder is None]
    if not missing:
        return folders["tokens"], folders["tokenizer"], f"the recipe's own, from {node.parents['tokens']}"
    config = recipe.stages[stage]
    vocab_size = VOCABULARY
    tokenizer_stage = recipe.stages.get(node.parents["tokenizer"])
    if tokenizer_stage is not None and tokenizer_stage.vocab_size is not None:  # None: it adopts a tokenizer
        vocab_size = tokenizer_stage.vocab_size
        if not full:
            vocab_size = min(vocab_size, VOCABULARY)
    sources = set(config.mixture or {"synthetic": 1})
    for change in config.mixture_changes:
        sources |= set(change.mixture)
    num_tokens = max(60_000, 30 * config.sequence_length)
    folder = work / "synthetic"
    synthetic_tokens.write(folder, vocab_size, sorted(sources), num_tokens, recipe.seed)
    reason = f"{' and '.join(missing)} of this recipe has not been run"
    return folder / "tokens", folder / "tokenizer", f"synthetic, vocabulary of {vocab_size}: {reason}"


def _existing(recipe: Recipe, source: str) -> Path | None:
    """The folder of an input, a stage of the recipe or a path, if it is there and complete."""
    if source in recipe.stages:
        output = artifact.current(recipe.root / source)
        return output.path if output and not output.damage() else None
    folder = external_inputs.folder_of(source)
    return folder.resolve() if folder and folder.is_dir() else None
