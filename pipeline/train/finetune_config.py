"""Keys that sft, reward, dpo, kto and ppo share. The steps they share are in train/finetune.py."""

import math
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from pipeline.core import accelerators
from pipeline.core.config import EXECUTION, ExternalFiles, PlannedInput, PublishedModel, SourceBlock, refuse_unused
from pipeline.core.errors import Absent, Problems, UserError
from pipeline.core.terminal import plural
from pipeline.data.chat.chat_sources import TuningSource
from pipeline.data.chat.record_accounting import EVALUATE
from pipeline.data.dedup.decontaminate import SETS, Decontaminate
from pipeline.models.lora_config import Lora
from pipeline.train.average import Average
from pipeline.train.best import Best
from pipeline.train.config import Date, Optimizer, Schedule, TrainConfig, check_mixture


class FinetuneOptimizer(Optimizer):
    """AdamW for finetuning: a published model is not decayed towards zero."""

    USUAL_LR: ClassVar[tuple[float, float]] = (1e-7, 1e-3)
    """Learning rates that are in use for all weights: from large models to small ones. Adapters take about ten times as
    much (`lora` of each stage's page)."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices."""


class ScoreOptimizer(FinetuneOptimizer):
    """AdamW for models that score answers or their steps."""

    USUAL_LR = (1e-6, 1e-3)

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate; small models take 1e-4 to 1e-3."""


class FinetuneSchedule(Schedule):
    """Learning rate over steps: warmup, then decay to `min_ratio` of the peak."""

    warmup_ratio: float | None = Field(None, gt=0, le=1)
    """Warmup as a share of all steps, rounded up; instead of warmup_steps."""

    @model_validator(mode="after")
    def one_warmup(self):
        if self.warmup_ratio is not None:
            refuse_unused(self, "warmup_steps", "and warmup_ratio both say how long the warmup is")
        return self


class FinetuneConfig(TrainConfig):
    """A stage that starts from a published model and learns from records with a chat template."""

    MODEL = PublishedModel("model", "chat")

    steps: int | None = Field(None, ge=1)
    """Optimizer steps. Exactly one of steps and epochs is given."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training rows, each in another order; rounded up to whole steps, so that the last one may begin
    another pass."""
    sources: dict[str, TuningSource]
    """Records by name."""
    mixture: dict[str, float] | None = None
    """Source -> weight of its records: shares that sum to 1, or relative weights such as 2 and 1; none: each record
    once per epoch. With weights an epoch is as many records as there are, and small sources are repeated."""
    group_by_length: bool = False
    """Batches of rows of like length, so that little is padded: rows are sorted by length within every 50 batches."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets whose text must not be trained on."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of records, chosen by their own hash and so the same in every stage, that is only measured on. 0 needs
    `evaluate`."""
    evaluate: dict[str, TuningSource] = {}
    """Held-out files by name: records that are only measured on, with metrics of their own (loss/NAME), in addition to
    the held-out share of the sources. Records of the sources that are like them are not trained on."""
    optimizer: FinetuneOptimizer = FinetuneOptimizer()
    """AdamW."""
    schedule: FinetuneSchedule = FinetuneSchedule()
    """Learning rate over steps."""
    lora: Lora | None = None
    """Train low-rank adapters in place of the whole model; none: all weights."""
    best: Best | None = None
    """Publish the checkpoint with the best held-out metric, and stop early; none: the last one."""
    average: Average | None = None
    """Publish the average of the last checkpoints, if its held-out loss is lower than that of the last one."""
    max_bad: Annotated[float, EXECUTION] = Field(0.05, ge=0, le=1)
    """Largest share of a source's records that may be unusable. Duplicates, rows like a held-out one and rows that are
    too long do not count. The stage ends if there are more, because then the source is not what the recipe says."""
    chat_template: str | None = None
    """Chat template to use instead of the model's own: a name (alpaca, chatml, gemma, llama3, mistral, phi3, qwen3,
    zephyr), a file, or a model's folder. The published model keeps it. Tokens that it needs and the tokenizer lacks are
    added."""
    chat_template_kwargs: dict[str, bool | int | float | str] = {}
    """Variables of the chat template, such as enable_thinking. The published model's template has them as defaults."""
    date: Date = None
    """Date that a chat template gets if it asks for today's, as YYYY-MM-DD; by default 2024-07-26, the fallback of
    Llama 3.2's own template."""

    _mixture = field_validator("mixture")(check_mixture)

    @model_validator(mode="after")
    def something_is_held_out(self):
        if not self.holdout and not self.evaluate:
            raise ValueError("holdout: 0 leaves nothing to measure on; give held-out files (evaluate), or a share")
        for name in self.sources:
            if name.startswith(EVALUATE):
                raise ValueError(f"sources: {name}: names that begin with {EVALUATE!r} are those of held-out files")
        return self

    @model_validator(mode="after")
    def mixture_of_sources(self):
        if self.mixture is None:
            return self
        for name in self.mixture:
            if name not in self.sources:
                raise ValueError(f"mixture: there is no source {name!r}; expected {', '.join(self.sources)}")
        missing = [name for name in self.sources if name not in self.mixture]
        if missing:
            raise ValueError(f"mixture: gives no weight to {', '.join(missing)}; 0 means not to train on a source")
        return self

    @model_validator(mode="after")
    def one_length(self):
        if self.steps is None and self.epochs is None:
            raise ValueError("the length of the run is missing; give steps or epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps: {self.steps} and epochs: {self.epochs:g} both say how long the run is; remove one (on the"
                " command line: KEY=~)"
            )
        return self

    @classmethod
    def balances_experts(cls) -> bool:
        return False

    def warmup_steps(self) -> int | None:
        ratio = self.schedule.warmup_ratio
        if ratio is None:
            return self.schedule.warmup_steps
        return None if self.steps is None else _ceil(ratio * self.steps)

    def obstacle_on(self, kind: str) -> str | None:
        if kind in accelerators.UNTESTED and self.lora is not None and self.lora.base == "nf4":
            return "lora.base: nf4"  # kernels of bitsandbytes
        return super().obstacle_on(kind)

    def check(self, world: int) -> None:
        if self.best is not None:
            self._check_best(self.best)
        if self.average is not None:
            self._check_average(self.average)
        super().check(world)

    def _check_average(self, average: Average) -> None:
        if self.best is not None or self.save.keep_best:
            key = "save.keep_best" if self.best is None else "best"
            raise UserError(f"stage {self.kind}: average and {key} both say what is published; remove one of the two")
        if self.steps is not None:
            average.check(self.steps, f"stage {self.kind}")

    def _check_best(self, best: Best) -> None:
        if self.save.keep_best:
            raise UserError(
                f"stage {self.kind}: save.keep_best and best both say which checkpoint is the best one; remove"
                " save.keep_best"
            )
        if self.steps is not None and best.every_steps > self.steps:
            raise UserError(
                f"stage {self.kind}: best.every_steps: {best.every_steps} is more than the"
                f" {plural(self.steps, 'step')} of the run, so that there is only one checkpoint to choose from"
            )

    def warnings(self) -> list[str]:
        warnings = super().warnings()
        lr = self.optimizer.lr
        low, high = self.optimizer.USUAL_LR
        trained = "all weights"
        if self.lora is not None:
            low, high, trained = 10 * low, 10 * high, "adapters"
        if not low <= lr <= high:
            warnings.append(
                f"optimizer.lr: {lr:g} is outside of the usual {low:.0e} to {high:.0e} for {trained} in a stage of kind"
                f" {self.kind}"
            )
        elif self.lora is not None and "lr" not in self.optimizer.model_fields_set:
            warnings.append(
                f"optimizer.lr: {lr:g} is the default for training all weights; adapters usually take about ten times"
                f" as much, {10 * lr:g}"
            )
        return warnings

    def fixed_length(self) -> int | None:
        """Tokens to which all rows are padded, so that compiled layers see one shape; None: as many as the longest row
        of a micro-batch."""
        return self.sequence_length if self.compile else None

    def in_steps(self, rows: int) -> Self:
        """This config with `steps` and `schedule.warmup_steps`, where the recipe gives epochs of `rows` rows and a
        ratio of the steps."""
        steps = self.steps
        if self.epochs is not None:
            steps = max(1, _ceil(self.epochs * rows / self.batch_size))
        config = self.model_copy(update={"steps": steps, "epochs": None})
        warmup = {"warmup_steps": config.warmup_steps(), "warmup_ratio": None}
        return config.model_copy(update={"schedule": self.schedule.model_copy(update=warmup)})

    def check_layout(self, world: int) -> None:
        super().check_layout(world)
        base = "fp32" if self.lora is None else self.lora.base
        if base == "bf16" and self.precision == "fp32":
            raise UserError(
                f"stage {self.kind}: lora.base: bf16 cannot be combined with precision: fp32, which multiplies fp32"
                " weights; use precision: bf16, or base: fp32"
            )

    def check_machine(self) -> None:
        from pipeline.models import frozen

        problems = Problems()
        with problems.gather():
            super().check_machine()
        with problems.gather():
            if self.lora is not None:
                frozen.require(self.lora.base, f"stage {self.kind}: lora.base")
        problems.refuse()

    @classmethod
    def external(cls) -> list[SourceBlock | ExternalFiles]:
        return [
            SourceBlock("sources", lambda config: config.sources),
            SourceBlock("evaluate", lambda config: config.evaluate, prefix=EVALUATE),
            SETS,
            ExternalFiles("chat_template", cls.template_files, drop_key=False),
        ]

    def template_files(self) -> list[Path]:
        """The file of a chat template that is not one of ours. Raises Absent if it does not exist."""
        from pipeline.data.chat.named_templates import template_file

        if self.chat_template is None:
            return []
        try:
            path = template_file(self.chat_template)
        except UserError as error:
            raise Absent(str(error)) from None
        return [] if path is None else [path]

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        from pipeline.train import planned_model

        problems = Problems()
        with problems.gather():
            planned_model.check_files({key: inputs[key] for key in self.MODEL_INPUTS if key in inputs})
        with problems.gather():
            planned_model.check_positions(self.input_models(inputs), self.sequence_length)
        problems.refuse()

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        from pipeline.data.chat.record_checks import check_chat_records
        from pipeline.train import planned_model

        problems = Problems()
        chat = planned_model.chat_of(self.input_models(inputs), self, problems)
        with problems.gather():
            check_chat_records(self.records(), self.holdout, chat, separator=self.between_steps())
        problems.refuse()

    def between_steps(self) -> str | None:
        """What an answer has between its judged steps; None for a stage whose records have no steps."""
        return None

    def records(self) -> dict[str, TuningSource]:
        """The sources, and the held-out files as evaluate.NAME."""
        return self.sources | {f"{EVALUATE}{name}": source for name, source in self.evaluate.items()}


def _ceil(value: float) -> int:
    """Rounded up, but for the error of a float: 1.1 * 100 / 10 is 11."""
    return math.ceil(value - 1e-9)
