"""Process reward model: one score for each step of an answer, learned from steps that were judged right or wrong.

    python pipeline/prm.py recipe.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/prm.py recipe.yaml

The SFT model with a new layer of two scores per token, wrong and right, read at the last token of each step. Out:
model/ (AutoModelForTokenClassification, two labels), report.json (what became of each record).
"""

import functools

from pydantic import field_validator

from pipeline.core.artifact import Artifact
from pipeline.core.config import PlannedInput, PublishedModel
from pipeline.core.errors import Problems
from pipeline.core.intervals import change_of, mean_change, shares, wilson
from pipeline.core.output import Output
from pipeline.core.terminal import say
from pipeline.data.chat.chat_sources import StepSource
from pipeline.train.finetune_config import FinetuneConfig, ScoreOptimizer

VERSION = 4  # 4: thoughts that a template writes otherwise than its prompt, ids and ends of tool calls
INPUTS = {"model": ("sft", "pretrain")}


class Config(FinetuneConfig):
    """Process reward model."""

    MODEL = PublishedModel("model", "score")

    sources: dict[str, StepSource]
    """Answers with judged steps by name."""
    evaluate: dict[str, StepSource] = {}
    """Held-out answers by name, with metrics of their own (loss/NAME)."""
    separator: str = "\n"
    """What an answer has between its steps."""
    optimizer: ScoreOptimizer = ScoreOptimizer()
    """AdamW."""

    def between_steps(self) -> str:
        return self.separator

    @field_validator("separator")
    @classmethod
    def _separates(cls, value: str) -> str:
        if not value:
            raise ValueError("is empty; steps that follow each other without a break have no end that can be seen")
        return value

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        from pipeline.models.build import check_scores_tokens
        from pipeline.train import planned_model

        problems = Problems()
        with problems.gather():
            super().check_inputs(inputs)
        for model in self.input_models(inputs):
            config = planned_model.config_of(model)
            if config is not None:
                with problems.gather():
                    check_scores_tokens(config)
        problems.refuse()


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.train import finetune
    from pipeline.train.finetune_data import encode_once, heldout_sets
    from pipeline.train.loss_preference import read_steps, step_cross_entropy
    from pipeline.train.scores import initial_score
    from pipeline.train.step_data import encoded_steps, step_batch, step_counts, step_work

    # Load and encode
    parent = finetune.load_parent(config, inputs["model"], output.stage)
    encode = functools.partial(encoded_steps, config, config.separator, parent.chat, output)
    arrays, extra = encode_once(output, config, encode)
    sets = heldout_sets(config, arrays, len(arrays["heldout.ids"]))
    counts = step_counts(arrays, extra, sets)
    rows = finetune.shuffled_rows(config, arrays, arrays["train.ids"].lengths)
    config = finetune.in_steps(config, rows.per_epoch)
    say_balance(output, arrays["train.labels"].values)

    # Build
    model, weights = finetune.load_model(config, parent, head="steps")
    initial_score(model, config.seed, weights)
    finetune.adapt(config, parent, model, weights, complete=("score",))
    engine, text = finetune.build_engine(model, step_cross_entropy, config, step_work(config, arrays), weights=weights)
    finetune.say_counts(output, counts)
    finetune.say_sources(config, arrays, rows)
    collate = functools.partial(step_batch, arrays, parent.pad_id, length=config.fixed_length())

    def length(split: str, index: int) -> int:
        return len(arrays[f"{split}.ids"][index])

    # Fit and publish
    result = finetune.fit(
        engine, config, output, text, rows, sets, collate, unit="steps", read=read_steps, length=length
    )
    engine.model.config.alma_step_separator = config.separator
    finetune.publish_model(engine, config, parent, output)

    numbers = accuracies(result["before_rows"], result["after_rows"])
    measures, nothing = headline(result["before"]["accuracy"], result["after"]["accuracy"], numbers, counts.heldout)
    metrics = finetune.summarise(
        config, output, result, rows, counts, unit="steps", measures=measures, nothing=nothing, arrays=arrays
    )
    metrics |= {f"heldout_{name}": value for name, value in numbers.items()}
    metrics["train_judged_steps"] = len(arrays["train.ends"].values)
    return metrics


def say_balance(output: Output, is_right) -> None:
    """Warn of steps that are all alike."""
    right = int(is_right.sum())
    if right in (0, len(is_right)):
        only = "right" if right else "wrong"
        say(f"{output.stage}: WARNING: all {len(is_right):,} steps are {only} ones; the loss needs both kinds")


def accuracies(before: list, after: list) -> dict:
    """What the judgements of held-out answers are worth, from rows that `read_steps` gives.

    `accuracy_interval`: 95%, of the share of steps judged as their labels say; a bootstrap over answers, because the
    steps of one answer are alike. `majority`: what the more frequent label would reach. `chain_accuracy_before` and
    `_after`: share of answers whose first wrong step is found, with a Wilson interval. `judged_steps`: how many.
    """
    steps = sum(row[4] for row in after)
    right = sum(row[3] for row in after) / steps
    numbers = {"judged_steps": int(steps), "majority": max(right, 1 - right), "accuracy_interval": None}
    if len(after) > 1:  # the difference from zeros is the mean itself
        interval = mean_change([(0.0, row[4]) for row in after], [(row[1], row[4]) for row in after])
        if interval[0] == interval[1]:  # all answers are judged alike, and a bootstrap has no width
            interval = wilson(interval[0], len(after))
        numbers["accuracy_interval"] = list(interval)
    for when, rows in (("before", before), ("after", after)):
        numbers[f"chain_accuracy_{when}"] = sum(row[2] for row in rows) / len(rows)
    numbers["chain_accuracy_interval"] = list(wilson(numbers["chain_accuracy_after"], len(after)))
    change = change_of([(row[0], row[4]) for row in before], [(row[0], row[4]) for row in after])
    numbers["loss_change_interval"] = change and list(change)
    return numbers


def headline(before: float, after: float, numbers: dict, answers: int) -> tuple[list[str], list[str]]:
    """(parts of the closing line, those of them that show nothing learned). before, after: share of steps judged as
    their labels say. numbers: as `accuracies` has them."""
    interval = numbers["accuracy_interval"]
    words = f"95%: {interval[0]:.0%} to {interval[1]:.0%}, " if interval else ""
    steps = (
        f"held-out steps judged right {before:.0%} -> {after:.0%}"
        f" ({words}n={numbers['judged_steps']}; one label for all: {numbers['majority']:.0%})"
    )
    chains = shares(numbers["chain_accuracy_before"], numbers["chain_accuracy_after"], answers)
    is_better = (interval[0] if interval else after) > numbers["majority"]
    return [steps, f"first wrong step found {chains}"], [] if is_better else [steps]


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("prm")
