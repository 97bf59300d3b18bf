"""Keys of a pretraining stage (pipeline/pretrain.py)."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.config import EXECUTION, PlannedInput, PublishedModel, Strict, check_source_names
from pipeline.core.errors import Problems, UserError
from pipeline.core.run_config import seconds_of
from pipeline.data.tokens.fim import Fim
from pipeline.train import train_length
from pipeline.train.config import LossChunk, Schedule, TrainConfig, check_mixture
from pipeline.train.samples import Samples


class PretrainSchedule(Schedule):
    """Warmup may also be given in tokens."""

    warmup_tokens: int | None = Field(None, ge=1)
    """Tokens from 0 to the peak, rounded up to whole steps; instead of warmup_steps."""

    @model_validator(mode="after")
    def one_warmup(self):
        if self.warmup_tokens and self.warmup_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and warmup_tokens {self.warmup_tokens} both give the length of the"
                " warmup; keep one"
            )
        return self


class MixtureChange(Strict):
    """Another mixture from a point of the run on."""

    tokens: int = Field(ge=1)
    """From this many tokens of the data on: rows times sequence_length, rounded up to a whole row."""
    mixture: dict[str, float]
    """Source -> weight of its rows from there on."""

    _mixture = field_validator("mixture")(check_mixture)


class Config(TrainConfig):
    """One step reads batch_size rows of sequence_length tokens."""

    MODEL = PublishedModel("model", "completion")

    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """bf16: autocast with fp32 master weights and fp32 accumulation; fp32: everything in fp32; fp8: like bf16, with the
    linear layers inside decoder layers in 8-bit floats, by torchao on GPUs that have them (docs/pretrain.md)."""
    steps: int | None = Field(None, ge=1)
    """Training length in optimizer steps. Exactly one of steps, tokens, tokens_per_parameter and time is given."""
    tokens: int | None = Field(None, ge=1)
    """Training length in tokens read, rounded up to whole steps."""
    tokens_per_parameter: float | None = Field(None, gt=0)
    """Training length in tokens per parameter of the model; 20 is the optimum of Hoffmann et al. (2022) for a fixed
    amount of compute."""
    time: str | None = None
    """Training length in wall-clock time of this stage, such as 2h or 90m; becomes steps once the first 20 have been
    timed (docs/pretrain.md)."""
    schedule: PretrainSchedule = PretrainSchedule()
    """Learning rate over steps."""
    model: dict[str, Any] | None = None
    """Model to build; the recipe's top-level `model` unless given here. Not used when an input `model` is given."""
    model_changes: dict[str, Any] = {}
    """Keys of the input model's configuration that change for this stage, such as rope_parameters for rows longer than
    those it was trained on."""
    from_step: int | None = Field(None, ge=1)
    """With an input `model`: continue from its checkpoint of this step, with moments, step count and position in the
    data, and not only from its weights. `steps` counts from the beginning of that run; schedule and data are this
    stage's own. `save.keep_every` of the parent decides which steps are kept."""
    mixture: dict[str, float] | None = None
    """Source -> weight of its rows: shares that sum to 1, or relative weights such as 2 and 1; none: in proportion to
    the sources' tokens."""
    mixture_changes: list[MixtureChange] = []
    """Changes of the mixture during the run, in order. Sources continue where they were."""
    packing: Literal["concat", "best_fit"] = "concat"
    """concat: rows are cut out of each source's stream of documents; best_fit: a document that fits into a row is
    never cut (Ding et al., 2024). document_mask keeps documents apart in both."""
    fim: Fim | None = None
    """Fill-in-the-middle for a share of the documents; needs best_fit and three special tokens."""
    document_mask: bool = False
    """Tokens see only their own document, and positions restart with each document (Llama 3, section 3.1). Slower,
    because attention then needs a mask. FlashAttention-2 supports it only for micro-batches of one row."""
    heldout_rows: Annotated[int, EXECUTION] = Field(256, ge=1)
    """Number of fixed rows of held-out text on which bits per byte are measured."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of logsumexp(logits)^2 in addition to the cross-entropy, which keeps logits from drifting; PaLM (2022,
    section 5) has 1e-4. Logged as z_loss, not part of `loss`."""
    loss_chunk: LossChunk = "auto"
    """Tokens whose logits exist at a time; none: all of a micro-batch. auto: in chunks if the family allows it
    (pipeline/train/chunked_loss.py)."""
    samples: Annotated[Samples | None, EXECUTION] = None
    """Prompts that the model continues at intervals, written to logs/samples.jsonl and the terminal; none: no samples.
    """

    _mixture = field_validator("mixture")(check_mixture)

    @model_validator(mode="after")
    def one_length(self):
        lengths = {"steps": self.steps, "tokens": self.tokens, "tokens_per_parameter": self.tokens_per_parameter}
        lengths["time"] = self.time
        given = [key for key, value in lengths.items() if value is not None]
        if len(given) != 1:
            problem = "does not say how long it is"
            if given:
                problem = f"has {len(given)} training lengths ({', '.join(given)}), which is one too many"
            raise ValueError(
                f"stage {self.kind} {problem}; give one of {', '.join(train_length.KINDS)} (key=~ removes one)"
            )
        if self.time is not None:
            seconds_of(self.time)
        return self

    @model_validator(mode="after")
    def rows_are_possible(self):
        starts = [change.tokens for change in self.mixture_changes]
        if starts != sorted(set(starts)):
            raise ValueError(f"mixture_changes: their tokens must increase, found {', '.join(map(str, starts))}")
        total = self.tokens
        if total is None and self.steps:
            total = self.steps * self.batch_size * self.sequence_length
        if starts and total and starts[-1] >= total:
            raise ValueError(
                f"mixture_changes: the one at {starts[-1]:,} tokens is never reached, because this run reads {total:,};"
                " remove it"
            )
        if self.fim and self.packing != "best_fit":
            raise ValueError(
                "fim: needs packing: best_fit, which leaves room in a row for the three tokens that mark the parts of"
                " each document; in concatenated rows they would displace text"
            )
        return self

    @model_validator(mode="after")
    def fp8_where_it_was_tried(self):
        if self.precision == "fp8" and self.parallel.needs_deepspeed:
            raise ValueError(
                "precision: fp8 is for one process, DDP and shard, and was not tried with DeepSpeed (zero, pipeline);"
                " use shard: full, or precision: bf16"
            )
        for key, size in (("tensor", self.parallel.tensor), ("context", self.parallel.context)):
            if self.precision == "fp8" and size > 1:
                raise ValueError(
                    f"precision: fp8 was not tried with {key}: {size}; use shard: full without {key}, or precision:"
                    " bf16"
                )
        return self

    @property
    def wide_precision(self) -> Literal["fp32", "bf16"]:
        return "bf16" if self.precision == "fp8" else self.precision

    def check_machine(self) -> None:
        problems = Problems()
        with problems.gather():
            super().check_machine()
        if self.precision == "fp8":
            from pipeline.train import fp8

            with problems.gather():
                fp8.check_package(f"stage {self.kind}")
        problems.refuse()

    def check_device(self) -> None:
        if self.precision == "fp8":
            from pipeline.train import fp8

            fp8.check_device(f"stage {self.kind}")

    def warnings(self) -> list[str]:
        found = super().warnings()
        if self.precision == "fp8" and not self.compile:
            found.append(
                "precision: fp8 without compile: true rounds numbers in many small kernels, which may take longer than"
                " its products save; add compile: true"
            )
        return found

    def check_layout(self, world: int) -> None:
        super().check_layout(world)
        tokens = self.micro_rows(world) * self.sequence_length
        if self.precision == "fp8" and tokens % 16:
            raise UserError(
                f"stage {self.kind}: precision: fp8 needs micro-batches whose tokens are divisible by 16, and"
                f" {self.micro_rows(world)} rows of {self.sequence_length} are {tokens:,}; change sequence_length or"
                " micro_batch, or use precision: bf16"
            )

    def packed_rows(self, world: int) -> int:
        return self.micro_rows(world) if self.document_mask else 1

    def head_chunk(self) -> Literal["auto"] | int | None:
        return self.loss_chunk

    @classmethod
    def supports_pipeline(cls) -> bool:
        return True

    @classmethod
    def supports_row_groups(cls) -> bool:
        return True

    def last_step(self) -> int | None:
        if self.tokens is None:
            return self.steps
        return math.ceil(self.tokens / (self.batch_size * self.sequence_length))

    def warmup_steps(self) -> int | None:
        tokens = self.schedule.warmup_tokens
        return self.schedule.warmup_steps if tokens is None else math.ceil(tokens / self.step_tokens)

    def planned_tokens(self) -> int | None:
        return None if self.steps is None and self.tokens is None else self.last_step() * self.step_tokens

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.sequence_length

    def planned_model_config(self, inputs: dict[str, PlannedInput]) -> Any:
        from pipeline.models import model_block
        from pipeline.train import planned_model

        if "model" in inputs:
            return super().planned_model_config(inputs)
        vocabulary = planned_model.vocabulary_of(inputs["tokens"])
        if vocabulary is None:
            return None
        return model_block.full_config(self.model, planned_model.Vocabulary(vocabulary), self.sequence_length)

    def planned_vocabulary(self, inputs: dict[str, PlannedInput]) -> int | None:
        from pipeline.train import planned_model

        return planned_model.vocabulary_of(inputs["tokens"])

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
        with problems.gather():
            planned_model.check_files({key: inputs[key] for key in ("model",) if key in inputs}, tokenizer=False)
        if "model" in inputs and "rope_parameters" not in self.model_changes:
            advice = " (or scale positions, model_changes: {rope_parameters: ...})"
            with problems.gather():
                planned_model.check_positions([inputs["model"]], self.sequence_length, advice)
        problems.refuse()

    def check(self, world: int) -> None:
        super().check(world)
        self._check_from_step()
        if "model" not in self.inputs:
            self._check_model_block()

    def _check_from_step(self) -> None:
        if self.from_step is None:
            return
        if "model" not in self.inputs:
            raise UserError(
                f"stage {self.kind}: from_step: {self.from_step} is a checkpoint of another pretraining stage; name"
                " that stage (inputs: {model: pretrain})"
            )
        if self.steps is not None and self.from_step >= self.steps:
            raise UserError(
                f"stage {self.kind}: from_step: {self.from_step} leaves nothing to do in steps: {self.steps}, counted"
                " from the beginning of the other run"
            )

    def _check_model_block(self) -> None:
        from pipeline.models import model_block, pipeline_split

        if self.model_changes:
            raise UserError(
                f"stage {self.kind}: model_changes are for a model from another stage or folder (inputs: {{model:"
                f" ...}}); write {', '.join(self.model_changes)} into the model block"
            )
        model_block.check(self.model)
        if self.parallel.pipeline > 1:
            pipeline_split.check_layers(model_block.block_config(self.model), self.parallel)
        if self.parallel.tensor > 1 or self.parallel.context > 1:
            from pipeline.train import context_parallel, tensor_parallel

            model_config = model_block.block_config(self.model)
            tensor_parallel.check(model_config, self.parallel.tensor)
            context_parallel.check(model_config, self.parallel.context)
        if self.document_mask:
            model_block.check_document_mask(self.model["family"])
