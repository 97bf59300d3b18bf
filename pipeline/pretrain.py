"""Causal language model pretraining: DDP, DeepSpeed ZeRO 0-3, or a DeepSpeed pipeline, from one recipe.

    python pipeline/pretrain.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/pretrain.py recipes/llama-7b.yaml pretrain.parallel.zero=1
    torchrun --nproc-per-node 8 pipeline/pretrain.py recipes/llama-7b.yaml pretrain.parallel.pipeline=4

Reads packed tokens and their tokenizer; begins from initial weights, or goes on from another pretraining stage (inputs:
{model: pretrain}), from its model, or from one of its checkpoints (from_step).
Out: model/ (Hugging Face layout).
"""

import math
import shutil
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.config import EXECUTION, PlannedInput, PublishedModel, Strict, check_source_names, seconds_of
from pipeline.core.errors import Problems, UserError
from pipeline.core.intervals import warn
from pipeline.core.output import Output
from pipeline.core.terminal import many, say
from pipeline.data.tokens.fim import Fim
from pipeline.train import train_length
from pipeline.train.config import Schedule, TrainConfig
from pipeline.train.samples import Sampler, Samples

VERSION = 3  # 3: experts multiply in the type of `precision`, ends of generation are the parent's
INPUTS = {"tokens": ("pack",), "tokenizer": ("tokenizer",), "model?": ("pretrain",)}


class PretrainSchedule(Schedule):
    """Warmup may also be given in tokens."""

    warmup_tokens: int | None = Field(None, ge=1)
    """Tokens from 0 to the peak, rounded up to whole steps, in place of warmup_steps."""

    @model_validator(mode="after")
    def one_warmup(self):
        if self.warmup_tokens and self.warmup_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and warmup_tokens {self.warmup_tokens} both say how long the warmup"
                " is; keep one"
            )
        return self


def shares(mixture: dict[str, float] | None):
    """Check a mixture. Weights below 1 are meant as shares: 0.5, 0.3 and 0.15 are a slip of the pen, 2 and 1 are
    not. Raises ValueError."""
    for source, weight in (mixture or {}).items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{source} has the weight {weight}, expected 0 or more")
    total = sum((mixture or {}).values())
    if mixture is not None and total == 0:
        raise ValueError("no source has a weight above 0; give one, or leave mixture out")
    if mixture and max(mixture.values()) < 1 and abs(total - 1) > 0.005:
        raise ValueError(
            f"its shares add up to {total:.4g}, expected 1; mend them, or give numbers of another scale, such as 2"
            " and 1"
        )
    return mixture


class MixtureChange(Strict):
    """Another mixture from a point of the run on."""

    tokens: int = Field(ge=1)
    """From so many tokens of the data on: rows times sequence_length, rounded up to a whole row."""
    mixture: dict[str, float]
    """Source -> weight of its rows from there on."""

    _shares = field_validator("mixture")(shares)


class Config(TrainConfig):
    """One step reads batch_size rows of sequence_length tokens."""

    MODEL = PublishedModel("model", "completion")

    steps: int | None = Field(None, ge=1)
    """Horizon in optimizer steps. Exactly one of steps, tokens, tokens_per_parameter and time is given."""
    tokens: int | None = Field(None, ge=1)
    """Horizon in tokens read, rounded up to whole steps."""
    tokens_per_parameter: float | None = Field(None, gt=0)
    """Horizon in tokens for each parameter of the model; 20 is Hoffmann et al.'s (2022) optimum of a fixed amount of
    compute."""
    time: str | None = None
    """Horizon in wall-clock time of this stage, such as 2h or 90m; becomes steps once the first 20 have been timed
    (docs/pretrain.md)."""
    schedule: PretrainSchedule = PretrainSchedule()
    """Learning rate over steps."""
    model: dict[str, Any] | None = None
    """Model to build; the recipe's top-level `model` unless given here. Not used when an input `model` is given."""
    model_changes: dict[str, Any] = {}
    """Keys of the input model's configuration that change as training goes on, such as rope_parameters for rows
    longer than it has seen."""
    from_step: int | None = Field(None, ge=1)
    """With an input `model`: go on from the checkpoint of this step that it kept, with moments, step count and place
    in the data, and not from its model alone. `steps` counts from that run's beginning; schedule and data are this
    stage's own. `save.keep_every` of the parent says which steps stay."""
    mixture: dict[str, float] | None = None
    """Source -> weight of its rows: shares that add up to 1, or numbers of any other scale, such as 2 and 1; none:
    in proportion to the sources' tokens."""
    mixture_changes: list[MixtureChange] = []
    """Changes of the mixture as the run goes on, in order. Sources go on where they were."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: rows are cut out of each source's stream of documents; best_fit: a document that fits into a row is
    never cut (Ding et al., 2024). document_mask keeps documents apart in both."""
    fim: Fim | None = None
    """Fill-in-the-middle for a share of the documents; needs best_fit and three special tokens."""
    document_mask: bool = False
    """Tokens see their own document only, and positions begin anew with each (Llama 3, section 3.1). Slower, since
    attention then needs a mask. FlashAttention-2 can do it with one row in a micro-batch alone."""
    heldout_rows: Annotated[int, EXECUTION] = Field(256, ge=1)
    """Fixed rows of held-out text on which bits per byte are measured."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of logsumexp(logits)^2 beside the cross-entropy, which keeps logits from drifting; PaLM (2022, section
    5) has 1e-4. Logged as z_loss, not part of `loss`."""
    loss_chunk: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)] | None, EXECUTION] = "auto"
    """Tokens whose logits exist at a time; none: all of a micro-batch. auto: in chunks where the family allows it
    (pipeline/train/chunked_loss.py)."""
    attention: Annotated[Literal["auto", "sdpa", "flash_attention_2", "eager"], EXECUTION] = "auto"
    """auto: FlashAttention-2 where it is installed and precision is bf16 on a GPU, but not with `document_mask` and
    more than one row in a micro-batch; else torch's scaled_dot_product_attention."""
    samples: Annotated[Samples | None, EXECUTION] = None
    """Texts that the model continues from time to time, to logs/samples.jsonl and the terminal; none: no samples."""
    compile: Annotated[bool, EXECUTION] = False
    """torch.compile each decoder layer and the loss: compiling takes tens of seconds, then there are more tokens a
    second (docs/performance.md). Not with zero: 3."""

    @model_validator(mode="after")
    def one_horizon(self):
        given = [key for key in train_length.KINDS if getattr(self, key) is not None]
        if len(given) != 1:
            found = (
                f"has {len(given)} horizons ({', '.join(given)}), which is one too many"
                if given
                else "does not say how long it is"
            )
            raise ValueError(
                f"stage {self.kind} {found}; give one of {', '.join(train_length.KINDS)} (key=~ takes one out)"
            )
        if self.time is not None:
            seconds_of(self.time)
        return self

    _shares = field_validator("mixture")(shares)

    @model_validator(mode="after")
    def rows_can_be_had(self):
        at = [change.tokens for change in self.mixture_changes]
        if at != sorted(set(at)):
            raise ValueError(f"mixture_changes: their tokens must grow, found {', '.join(map(str, at))}")
        total = self.tokens or (self.steps * self.batch_size * self.sequence_length if self.steps else None)
        if at and total and at[-1] >= total:
            raise ValueError(
                f"mixture_changes: the one at {at[-1]:,} tokens never comes, since this run reads {total:,}; leave"
                " it out"
            )
        if self.fim and self.packing != "best_fit":
            raise ValueError(
                "fim: needs packing: best_fit, which leaves room in a row for the three tokens that each piece is cut"
                " with; concatenated rows would lose text over it"
            )
        return self

    @classmethod
    def supports_pipeline(cls) -> bool:
        return True

    def last_step(self) -> int | None:
        if self.tokens is None:
            return self.steps
        return math.ceil(self.tokens / (self.batch_size * self.sequence_length))

    def planned_positions(self, inputs: dict[str, PlannedInput]) -> int | None:
        from pipeline.models import families
        from pipeline.train import planned_model

        if "model" in inputs:
            before = planned_model.num_positions(inputs["model"])
            return max(before, self.sequence_length) if before else None
        family = str((self.model or {}).get("family"))
        if families.FAMILIES.get(family, families.UNKNOWN).unlimited_positions:
            return None
        return self.sequence_length

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        from pipeline.data.tokens.store import planned_sources
        from pipeline.train import planned_model

        problems = Problems()
        sources = planned_sources(inputs["tokens"]) if "tokens" in inputs else None
        if sources:
            with problems.gather():
                check_source_names({"mixture": self.mixture or {}}, sources)
            for change in self.mixture_changes:
                with problems.gather():
                    check_source_names({"mixture_changes": change.mixture}, sources)
        if "model" in inputs and "rope_parameters" not in self.model_changes:
            advice = " (or scale positions, model_changes: {rope_parameters: ...})"
            with problems.gather():
                planned_model.check_positions([inputs["model"]], self.sequence_length, advice)
        problems.refuse()

    def check(self, world: int) -> None:
        super().check(world)
        if self.from_step is not None and "model" not in self.inputs:
            raise UserError(
                f"stage {self.kind}: from_step: {self.from_step} is a checkpoint of another pretraining stage; name"
                " that stage (inputs: {model: pretrain})"
            )
        if self.from_step is not None and self.steps is not None and self.from_step >= self.steps:
            raise UserError(
                f"stage {self.kind}: from_step: {self.from_step} leaves nothing to do in steps: {self.steps}, counted"
                " from the beginning of the other run"
            )
        if self.document_mask:
            from pipeline.models import attention

            where = f"stage {self.kind}: document_mask: with attention: {self.attention} it"
            attention.check_packed(self.attention, self.micro_rows(world), where)
        if self.compile and self.parallel.zero == 3:
            raise UserError(
                f"stage {self.kind}: compile: true does not go with zero: 3, which gathers weights module by module"
                " while a layer runs; use zero: 2, or leave compile out"
            )
        if self.compile and not (shutil.which("g++") or shutil.which("clang++")):
            raise UserError(
                f"stage {self.kind}: compile: true needs a C++ compiler (g++ or clang++), and this machine has none on"
                " its PATH; install one or leave compile out"
            )
        if "model" not in self.inputs:
            from pipeline.models import model_block

            if self.model_changes:
                raise UserError(
                    f"stage {self.kind}: model_changes are for a model that training goes on with (inputs: {{model:"
                    f" ...}}); write {', '.join(self.model_changes)} into the model block"
                )
            model_block.check(self.model)
            if self.parallel.pipeline > 1:
                from pipeline.models import pipeline_split

                pipeline_split.check_layers(model_block.block_config(self.model), self.parallel)
            if self.document_mask:
                model_block.check_document_mask(self.model["family"])


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.data.tokens.heldout_rows import heldout_rows
    from pipeline.models import cost
    from pipeline.models.initial_values import initialise
    from pipeline.models.publish import publish
    from pipeline.train import checkpoints, distributed, engine, layers, metrics, row_trace, run_summary, spike_report
    from pipeline.train.batches import heldout_batches, loss_of, sampler_of, to_batch
    from pipeline.train.finetune_data import model_folder
    from pipeline.train.loop import fit, share

    # Inputs
    store, tokenizer = read_inputs(config, inputs)
    heldout = heldout_rows(store, config.sequence_length, config.heldout_rows)
    distributed.setup(config)
    check_rows(config, inputs, output, store, len(heldout))
    sampler = sampler_of(config, store, tokenizer, output)

    # Model
    branch = None
    if config.from_step:
        asked_by = f"stage {output.stage}: from_step: {config.from_step}"
        branch = checkpoints.of_step(inputs["model"].path, config.from_step, asked_by)
    model = make_model(config, inputs, store, tokenizer)
    model_config, size = model.config, cost.count(model)
    flops = cost.training_flops(model, size, config.sequence_length)
    config = train_length.in_steps(config, size.total)
    peak = metrics.total_peak(config)
    for line in run_summary.lines(config, model_config, size, flops, peak, sampler, output.folder):
        say(line)
    layers.prepare(model, config)
    trainer = engine.build(
        model,
        loss_of(store.sources, config.z_loss),
        config,
        fill=lambda part, name: initialise(part, config.seed, name),
    )

    # Training
    def batches(step: int) -> list[dict]:
        return [
            to_batch([read(step, index) for index in rows], store, config.document_mask)
            for rows in share(config, trainer, step)
        ]

    def read(step: int, index: int):
        row = sampler.row(index)
        row_trace.note(step, index, row.tokens)
        return row

    fixed = heldout_batches(heldout, store, config, trainer)
    text = metrics.Text(sampler.epoch_tokens, flops, peak, run_summary.expected_seconds(config, flops, peak))
    result = fit(
        trainer,
        config,
        output,
        batches,
        evaluate=lambda: evaluation(trainer.evaluate(fixed), heldout),
        text=text,
        branch=branch,
        sample=Sampler(config, trainer, model_config, size.total, tokenizer, output) if config.samples else None,
        describe=spike_report.describer(trainer, batches, store, sampler, tokenizer, config),
    )
    if advice := trainer.advice():
        say(advice)

    # Result
    weights = trainer.consolidated()
    if output.is_main:
        parent = model_folder(inputs["model"]) if "model" in inputs else None
        publish(weights, model_config, inputs["tokenizer"].path, output.path / "model", parent)
    read_tokens = sum(store.num_tokens(source) for source in sampler.sources)
    return {
        **metrics_of(output, result, heldout),
        "steps": trainer.step_count,
        "parameters": size.total,
        "flops": int(result["weight"]) * flops.full,
        "summary": {
            "input": f"{read_tokens / 1e6:.2f}M tokens, {many(len(sampler.sources), 'source')}",
            "output": f"{size.total / 1e6:.1f}M parameters, {int(result['weight']) / 1e6:.2f}M tokens read",
            "measure": measured(result, heldout),
        },
    }


def read_inputs(config: Config, inputs: dict[str, Artifact]):
    """(packed tokens, their tokenizer). Raises UserError if they do not belong together, or a sample's prompt does not
    fit into a row."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.data.tokens.store import TokenStore
    from pipeline.train import samples

    store = TokenStore(inputs["tokens"].path)
    tokenizer = load_tokenizer(inputs["tokenizer"].path)
    if len(tokenizer) != store.vocab_size:
        raise UserError(
            f"inputs.tokenizer has {len(tokenizer)} tokens, inputs.tokens was packed with {store.vocab_size}; give the"
            " tokenizer that packed them"
        )
    samples.encoded(config, tokenizer)
    return store, tokenizer


def check_rows(config: Config, inputs: dict[str, Artifact], output: Output, store, num_heldout: int) -> None:
    """Raise UserError if there are fewer held-out rows than data ranks, or if tokens that were packed elsewhere are
    damaged. Collective."""
    from pipeline.data.tokens.store import misfit
    from pipeline.train import distributed

    ranks = distributed.world() // config.parallel.pipeline
    if num_heldout < ranks:
        raise UserError(
            f"stage {config.kind}: {num_heldout} held-out rows cannot be shared by {ranks} processes; hold out more"
            " text in stage clean"
        )
    if inputs["tokens"].kind == "external":
        wrong = distributed.from_main(misfit(store.folder) if output.is_main else None)
        if wrong:
            raise UserError(f"inputs.tokens: {wrong}")


def make_model(config: Config, inputs: dict[str, Artifact], store, tokenizer):
    """The model that training starts from: new, or that of another stage or folder. Raises UserError for one that
    does not fit the tokens."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import build, model_block, mup
    from pipeline.train.finetune_data import model_folder

    if "model" not in inputs:
        whole = config.parallel.pipeline == 1
        return build.new(config.model, tokenizer, config.sequence_length, config.seed, materialise=whole)
    folder = model_folder(inputs["model"])
    model_config = model_block.changed_config(folder, config.model_changes, config.sequence_length)
    model = build.load(folder, config=model_config)
    mup.scale_learning_rates(model)
    if config.document_mask:
        model_block.check_document_mask(model.config.model_type)
    if model.config.vocab_size < store.vocab_size:
        raise UserError(
            f"inputs.model has {model.config.vocab_size} tokens, inputs.tokens was packed with {store.vocab_size};"
            " they must share one tokenizer"
        )
    if (folder / "tokenizer_config.json").is_file() and load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"inputs.tokenizer is not the tokenizer of inputs.model ({folder}): their tokens have other ids; pack"
            f" the text with the model's, as in inputs: {{tokenizer: {folder}}}"
        )
    return model


def evaluation(sums: dict, heldout: list) -> dict:
    """Loss and bits per byte on held-out rows, all together and, if there are several, by source.

    sums: what the engine's evaluation returned. heldout: the rows, whose `bytes` are of all ranks' shares.
    """
    from pipeline.train.loss import Tally

    weight, bits = sums["weight"], math.log(2)
    numbers = {"loss": sums["loss"], "bits_per_byte": sums["loss"] * weight / bits / sum(row.bytes for row in heldout)}
    sources = sorted({row.source for row in heldout})
    for source in sources if len(sources) > 1 else []:
        num_bytes = sum(row.bytes for row in heldout if row.source == source)
        numbers[f"bits_per_byte/{source}"] = sums[Tally("nats", source)] * weight / bits / num_bytes
    return numbers


def measured(result: dict, heldout: list) -> str:
    """Held-out bits per byte before and after, in words."""
    before, after = result["before"]["bits_per_byte"], result["after"]["bits_per_byte"]
    return f"held-out bits per byte {before:.2f} -> {after:.2f} (n={many(len(heldout), 'row')})"


def metrics_of(output: Output, result: dict, heldout: list) -> dict:
    """What the manifest keeps of a training: result is what `fit` returned."""
    before, after = result["before"], result["after"]
    by_source = {key.partition("/")[2]: value for key, value in after.items() if "/" in key}
    nothing_learned = after["bits_per_byte"] >= before["bits_per_byte"]
    return {
        "bits_per_byte_before": before["bits_per_byte"],
        "bits_per_byte_after": after["bits_per_byte"],
        "bits_per_byte_sources": by_source or {heldout[0].source: after["bits_per_byte"]},
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "warnings": warn(output.stage, [measured(result, heldout)] if nothing_learned else []),
        "train_loss": result["last"]["loss"],
        "tokens": int(result["weight"]),
        "tokens_sources": result["sources"],
        "tokens_per_second": round(result["rate"], 1) or None,  # none: a start that had nothing left but to publish
        "skipped_steps": result["skipped"],
        "spikes": result["spikes"]["count"],
        "rollbacks": result["spikes"]["rollbacks"],
    }


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("pretrain")
