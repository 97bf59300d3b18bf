"""Causal language model pretraining: DDP, DeepSpeed ZeRO 0-3, FSDP2, or a DeepSpeed pipeline, from one recipe.

    python pipeline/pretrain.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/pretrain.py recipes/llama-7b.yaml pretrain.parallel.zero=1
    torchrun --nproc-per-node 8 pipeline/pretrain.py recipes/llama-7b.yaml pretrain.parallel.shard=full
    torchrun --nproc-per-node 8 pipeline/pretrain.py recipes/llama-7b.yaml pretrain.parallel.pipeline=4

Reads packed tokens and their tokenizer. Starts from initial weights, from the model of another pretraining stage
(inputs: {model: pretrain}), or from one of its checkpoints (from_step).
Out: model/ (Hugging Face layout).
"""

import math
from collections.abc import Callable
from pathlib import Path

from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.intervals import warn
from pipeline.core.output import Output
from pipeline.core.terminal import plural, say
from pipeline.train.pretrain_config import Config

VERSION = 3  # 3: experts multiply in the type of `precision`, ends of generation are the parent's
INPUTS = {"tokens": ("pack",), "tokenizer": ("tokenizer",), "model?": ("pretrain",)}


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.core import distributed
    from pipeline.data.tokens.heldout_rows import heldout_rows
    from pipeline.models import cost
    from pipeline.train import layers, loop, train_length
    from pipeline.train.batches import heldout_batches, sampler_of
    from pipeline.train.samples import SampleWriter
    from pipeline.train.spike_report import describer

    # Data
    store, tokenizer = read_inputs(config, inputs)
    heldout = heldout_rows(store, config.sequence_length, config.heldout_rows)
    distributed.setup(config)
    check_rows(config, inputs, output, store, len(heldout))
    sampler = sampler_of(config, store, tokenizer, output)

    # Model
    branch = branch_checkpoint(config, inputs, output)
    model, fill = make_model(config, inputs, store, tokenizer)
    model_config, size = model.config, cost.count(model)
    recipe_config, config = config, train_length.in_steps(config, size.total)
    train_length.say_warnings(recipe_config, config)
    expected = print_plan(config, model, size, sampler, output)
    layers.prepare_rows(model, config, z_loss=config.z_loss)
    engine = build_engine(config, model, fill, store)

    # Training
    batches = batch_reader(config, engine, sampler, store)
    fixed_batches = heldout_batches(heldout, store, config, engine)
    samples = None
    if config.samples:
        samples = SampleWriter(config, engine, model_config, size.total, tokenizer, output)
    result = loop.fit(
        engine,
        config,
        output,
        batches,
        evaluate=lambda: evaluation(engine.evaluate(fixed_batches), heldout),
        expected=expected,
        branch=branch,
        sample=samples,
        describe=describer(engine, batches, store, sampler, tokenizer, config),
    )
    advice = engine.advice()
    if advice:
        say(advice)

    # Result
    publish_model(engine, model_config, inputs, output)
    metrics = metrics_of(output, result, heldout)
    metrics["steps"] = engine.step_count
    metrics["parameters"] = size.total
    metrics["flops"] = int(result["weight"]) * expected.flops.full
    metrics["summary"] = summary(sampler, size.total, result, heldout)
    return metrics


# ---- data ------------------------------------------------------------------------------------------------------------


def read_inputs(config: Config, inputs: dict[str, Artifact]):
    """(packed tokens, their tokenizer). Raises UserError if they do not belong together, or if a sample's prompt does
    not fit into a row."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.data.tokens.store import TokenStore
    from pipeline.train.samples import encode_prompts

    store = TokenStore(inputs["tokens"].path)
    tokenizer = load_tokenizer(inputs["tokenizer"].path)
    if len(tokenizer) != store.vocab_size:
        raise UserError(
            f"inputs.tokenizer has {len(tokenizer)} tokens, inputs.tokens was packed with {store.vocab_size}; give the"
            " tokenizer that packed them"
        )
    encode_prompts(config, tokenizer)
    return store, tokenizer


def check_rows(config: Config, inputs: dict[str, Artifact], output: Output, store, num_heldout: int) -> None:
    """Raise UserError if there are fewer held-out rows than data ranks, or if tokens that were packed elsewhere are
    damaged. Collective."""
    from pipeline.core import distributed
    from pipeline.data.tokens.store import misfit

    ranks = config.parallel.data_ranks(distributed.world())
    if num_heldout < ranks:
        raise UserError(
            f"stage {config.kind}: {num_heldout} held-out rows cannot be shared by {ranks} processes; hold out more"
            " text in stage clean"
        )
    if inputs["tokens"].kind == "external":
        problem = distributed.from_main(misfit(store.folder) if output.is_main else None)
        if problem:
            raise UserError(f"inputs.tokens: {problem}")


def batch_reader(config: Config, engine, sampler, store) -> Callable[[int], list[dict]]:
    """batches(number) -> this process's micro-batches of a global batch."""
    from pipeline.train import row_trace
    from pipeline.train.batches import to_batch
    from pipeline.train.loop import share

    def read_row(step: int, index: int):
        row = sampler.row(index)
        row_trace.record(step, index, row.tokens)
        return row

    def batches(step: int) -> list[dict]:
        micro_batches = []
        for indices in share(config, engine, step):
            rows = [read_row(step, index) for index in indices]
            micro_batches.append(to_batch(rows, store, config.document_mask))
        return micro_batches

    return batches


# ---- model -----------------------------------------------------------------------------------------------------------


def branch_checkpoint(config: Config, inputs: dict[str, Artifact], output: Output) -> Path | None:
    """The checkpoint of another run from which this one continues. Collective."""
    from pipeline.train import checkpoints

    if config.from_step is None:
        return None
    subject = f"stage {output.stage}: from_step: {config.from_step}"
    return checkpoints.of_step(inputs["model"].path, config.from_step, subject)


def make_model(config: Config, inputs: dict[str, Artifact], store, tokenizer):
    """(the model that training starts from, what fills the part that a process keeps): new, or that of another stage or
    folder. Where a process keeps only a part the model is on the meta device. Raises UserError if it does not fit the
    tokens."""
    from pipeline.models import build, model_block, mup, vocabulary
    from pipeline.models.initial_values import initialise
    from pipeline.train.finetune_data import model_folder
    from pipeline.train.layouts import starts_in_parts

    is_whole = not starts_in_parts(config)
    if "model" not in inputs:
        model = build.new(config.model, tokenizer, config.sequence_length, config.seed, materialise=is_whole)
        return model, lambda part, global_name: initialise(part, config.seed, global_name, model)
    folder = model_folder(inputs["model"])
    pieces = new_tokens(config, folder, tokenizer)
    model_config = model_block.changed_config(folder, config.model_changes, config.sequence_length)
    if is_whole:
        model, weights = build.load(folder, config=model_config), None
    else:
        model, weights = build.skeleton(folder, config=model_config)
    vocabulary.add_rows(model, pieces)
    mup.scale_learning_rates(model)
    if weights is not None:
        weights.new_rows = pieces
        weights.then.append(lambda part, global_name: mup.scale_learning_rates(part, global_name, model))
    if config.document_mask:
        model_block.check_document_mask(model.config.model_type)
    if model.config.vocab_size < store.vocab_size:
        raise UserError(
            f"inputs.model has {model.config.vocab_size} tokens, inputs.tokens was packed with {store.vocab_size};"
            " they must share one tokenizer"
        )
    return model, weights


def new_tokens(config: Config, folder: Path, tokenizer) -> dict[int, list[int]]:
    """Tokens that were added to the tokenizer of the model in `folder` (stage tokenizer, `add_tokens`): id -> ids of
    the old tokens that spell it. Raises UserError if `tokenizer` is another one."""
    from pipeline.data.tokenizer.extension import new_pieces
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return {}
    pieces = new_pieces(load_tokenizer(folder).backend_tokenizer, tokenizer.backend_tokenizer)
    if pieces is None:
        raise UserError(
            f"inputs.tokenizer is not the tokenizer of inputs.model ({folder}): their tokens have other ids; pack"
            f" the text with the model's, as in inputs: {{tokenizer: {folder}}}, or with one that adds tokens to it"
            f" (tokenizer: {{adopt: {folder}, add_tokens: 8000}})"
        )
    if pieces and config.from_step is not None:
        raise UserError(
            f"stage {config.kind}: from_step: {config.from_step} continues a run whose model has no rows for the"
            f" {len(pieces):,} tokens that were added to its tokenizer; remove from_step"
        )
    if pieces:
        say(
            f"{config.kind}: {len(pieces):,} tokens were added to the tokenizer of {folder}; each starts as the mean of"
            " the tokens that spelled it"
        )
    return pieces


def print_plan(config: Config, model, size, sampler, output: Output):
    """Print what follows from the recipe (run_summary.py). Returns what the metrics are related to. Collective."""
    from pipeline.models import cost
    from pipeline.train import run_summary
    from pipeline.train.metrics import Expected, total_peak

    flops = cost.training_flops(model, size, config.sequence_length)
    peak = total_peak(config)
    for line in run_summary.pretraining_lines(config, model, size, flops, peak, sampler, output.folder):
        say(line)
    return Expected(sampler.epoch_tokens, flops, peak, run_summary.expected_seconds(config, flops, peak))


def build_engine(config: Config, model, fill, store):
    from pipeline.train import engine
    from pipeline.train.batches import loss_of

    return engine.build(model, loss_of(store.sources, config.z_loss), config, fill=fill)


def publish_model(engine, model_config, inputs: dict[str, Artifact], output: Output) -> None:
    """Write model/. Collective."""
    from pipeline.train.finetune_data import model_folder

    parent = model_folder(inputs["model"]) if "model" in inputs else None
    engine.publish(model_config, inputs["tokenizer"].path, output.path / "model", parent)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def evaluation(means: dict, heldout: list) -> dict:
    """Loss and bits per byte on held-out rows, all together and, if there are several sources, by source.

    means: what the engine's evaluation returned. heldout: the rows of all ranks.
    """
    from pipeline.train.loss import Tally

    weight, total_bytes = means["weight"], sum(row.bytes for row in heldout)
    numbers = {"loss": means["loss"], "bits_per_byte": means["loss"] * weight / math.log(2) / total_bytes}
    sources = sorted({row.source for row in heldout})
    if len(sources) > 1:
        for source in sources:
            num_bytes = sum(row.bytes for row in heldout if row.source == source)
            numbers[f"bits_per_byte/{source}"] = means[Tally("nats", source)] * weight / math.log(2) / num_bytes
    return numbers


def improvement(result: dict, heldout: list) -> str:
    """Held-out bits per byte before and after, in words."""
    before, after = result["before"]["bits_per_byte"], result["after"]["bits_per_byte"]
    return f"held-out bits per byte {before:.2f} -> {after:.2f} (n={plural(len(heldout), 'row')})"


def metrics_of(output: Output, result: dict, heldout: list) -> dict:
    """What the manifest keeps of a training; result is what `fit` returned."""
    before, after = result["before"], result["after"]
    by_source = {key.partition("/")[2]: value for key, value in after.items() if "/" in key}
    nothing_learned = after["bits_per_byte"] >= before["bits_per_byte"]
    return {
        "bits_per_byte_before": before["bits_per_byte"],
        "bits_per_byte_after": after["bits_per_byte"],
        "bits_per_byte_sources": by_source or {heldout[0].source: after["bits_per_byte"]},
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "warnings": warn(output.stage, [improvement(result, heldout)] if nothing_learned else []),
        "train_loss": result["last"]["loss"],
        "tokens": int(result["weight"]),
        "tokens_sources": result["sources"],
        "tokens_per_second": round(result["rate"], 1) or None,  # none: only publishing was left to do
        "skipped_steps": result["skipped"],
        "spikes": result["spikes"]["count"],
        "rollbacks": result["spikes"]["rollbacks"],
    }


def summary(sampler, num_parameters: int, result: dict, heldout: list) -> dict:
    """The stage's line at the end of a chain."""
    available = sum(sampler.store.num_tokens(source) for source in sampler.sources)
    return {
        "input": f"{available / 1e6:.2f}M tokens, {plural(len(sampler.sources), 'source')}",
        "output": f"{num_parameters / 1e6:.1f}M parameters, {int(result['weight']) / 1e6:.2f}M tokens read",
        "measure": improvement(result, heldout),
    }


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("pretrain")
