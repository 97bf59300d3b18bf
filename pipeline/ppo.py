"""Align a policy with a reward model by proximal policy optimisation (PPO), held near its start by a KL penalty.

    python pipeline/ppo.py recipes/quickstart.yaml                                      # one process
    accelerate launch --num_processes 8 pipeline/ppo.py recipes/llama-7b.yaml           # or torchrun, srun

An iteration (one `step`): sample a response to each of `batch_size` prompts, score it with the reward model, turn
scores and the KL to the reference into advantages (GAE), update policy and value model over `ppo.epochs` passes.
Sources: Schulman et al., 2017 (PPO); Ziegler et al., 2019 and Stiennon et al., 2020 (on language models); Huang et al.,
2024 (the details). docs/ppo.md has the checklist and its tests.
"""

import functools
import json
import math

from pydantic import Field, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.intervals import shares, warn
from pipeline.core.output import Output
from pipeline.core.plural import many
from pipeline.data.chat.chat_sources import PromptSource
from pipeline.data.dedup.decontaminate import Decontaminate
from pipeline.rl.config import Algorithm, LinearSchedule, PolicyOptimizer, Rollout, ValueOptimizer
from pipeline.rl.rules import Rule
from pipeline.train.config import TuningConfig

VERSION = 4
INPUTS = {"policy": ("sft", "dpo", "pretrain"), "reward": ("reward",)}


class Config(TuningConfig):
    """Keys of stage `ppo`. steps: iterations. batch_size: prompts of an iteration. sequence_length: tokens of a
    prompt with its response."""

    sources: dict[str, PromptSource]
    """Prompts, by name."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets whose text must not be trained on."""
    holdout: float = Field(0.05, gt=0, lt=1)
    """Share of the prompts kept for evaluation; the same records as in the other tuning stages."""
    rollout: Rollout = Rollout()
    """Sampling."""
    ppo: Algorithm = Algorithm()
    """The algorithm."""
    rule: Rule | None = None
    """How a response is compared with the prompt's `answer`: exact, contains or prefix; none: the reward model alone
    judges."""
    optimizer: PolicyOptimizer = PolicyOptimizer()
    """Of the policy."""
    value_optimizer: ValueOptimizer = ValueOptimizer()
    """Of the value model."""
    schedule: LinearSchedule = LinearSchedule()
    """Of both learning rates, over iterations."""
    evaluate_prompts: int = Field(128, ge=1)
    """Held-out prompts answered in an evaluation, once sampled and once greedily."""
    show: int = Field(8, ge=0)
    """Of these, how many are written to samples.jsonl."""

    @model_validator(mode="after")
    def consistent(self):
        if self.rollout.max_new_tokens >= self.sequence_length:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} leaves no room for a prompt in sequence_length"
                f" {self.sequence_length}"
            )
        if self.ppo.rule_coef and self.rule is None:
            raise ValueError("ppo.rule_coef needs `rule`: exact, contains or prefix")
        return self

    @classmethod
    def uses_peak(cls) -> bool:
        return False

    def check(self, world: int) -> None:
        super().check(world)
        part = self.ppo.minibatches * world
        if self.batch_size % part:
            near = max(1, round(self.batch_size / part)) * part
            raise UserError(
                f"stage {self.kind}: batch_size {self.batch_size} is not divisible by {self.ppo.minibatches}"
                f" minibatches x {world} processes; use {near}"
            )
        if self.micro_batch and (self.batch_size // part) % self.micro_batch:
            raise UserError(
                f"stage {self.kind}: a process's share of a minibatch, {self.batch_size // part} prompts, is not"
                f" divisible by micro_batch {self.micro_batch}"
            )


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.models.publish import publish
    from pipeline.rl.experience import evaluate
    from pipeline.rl.iteration import Iterations
    from pipeline.train import distributed, loop
    from pipeline.train.finetune_data import model_folder

    distributed.setup(config)
    models, pool, heldout, report = _prepare(config, inputs)
    iterations = Iterations(models, pool)

    def measured() -> dict:
        numbers, rows = evaluate(models, heldout)
        when = "before" if iterations.step_count == 0 else "after"
        iterations.state["shown"][when] = rows
        return numbers

    state = loop.run(iterations, config, output, loop.Hooks(evaluate=measured))

    weights = models.policy.consolidated()
    if output.is_main:
        publish(weights, models.policy.model.config, model_folder(inputs["policy"]), output.path / "model")
        lines = [
            json.dumps({"when": when, **row}, ensure_ascii=False, sort_keys=True)
            for when in ("before", "after")
            for row in state["shown"][when]
        ]
        write_atomic(output.path / "samples.jsonl", "".join(line + "\n" for line in lines))
        write_atomic(
            output.path / "report.json", json.dumps(report, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        )
    distributed.barrier()
    before, after = state["before"], state["after"]
    measure, nothing = headline(config, before, after, min(config.evaluate_prompts, len(heldout)))
    return {
        **{f"{key}_before": value for key, value in before.items()},
        **{f"{key}_after": value for key, value in after.items()},
        "warnings": warn(output.stage, nothing),
        "kl": after["kl"],
        "kl_coef": state["kl_coef"],
        "skipped_updates": state["skipped_updates"],
        **report["counts"],
        "summary": {
            "input": many(report["counts"]["train_prompts"], "prompt"),
            "output": f"{config.steps} x {config.batch_size} responses",
            "measure": measure,
        },
    }


def headline(config: Config, before: dict, after: dict, prompts: int) -> tuple[str, list[str]]:
    """(the closing line, what of it shows nothing learned): the reward's rise is held to the 95% interval of a
    difference of two means."""

    def mean(found: dict) -> str:
        return f"{found['reward']:.2f} ± {found['reward_half']:.2f}" if prompts > 1 else f"{found['reward']:.2f}"

    reward = f"held-out reward {mean(before)} -> {mean(after)} (95%, n={prompts})"
    rise = after["reward"] - before["reward"]
    shown = prompts > 1 and rise > math.hypot(before["reward_half"], after["reward_half"])
    nothing = [] if shown else [reward]
    rule = f", {config.rule} {shares(before['rule'], after['rule'], prompts)}" if config.rule else ""
    return f"{reward}{rule}, KL {round(after['kl'], 2) + 0.0:.2f}", nothing


def _prepare(config: Config, inputs: dict[str, Artifact]):
    """Models, training and held-out prompts, and a report of the prompts. Everything that can be refused is refused
    here."""
    from pipeline.data.chat.conversations import load_prompts
    from pipeline.models import build, cost
    from pipeline.rl.experience import Models, Task
    from pipeline.rl.iteration import policy_loss_fn, value_loss_fn
    from pipeline.rl.responses import ValueModel, disable_dropout
    from pipeline.train import engine
    from pipeline.train.finetune_data import announce, chat_of, model_folder, tokenizer_of
    from pipeline.train.run_summary import Work, schedule_text

    folders = {key: model_folder(inputs[key]) for key in ("policy", "reward")}
    chats = {
        key: chat_of(tokenizer_of(folder, config.sequence_length), config, f"{config.kind}, {key} model")
        for key, folder in folders.items()
    }
    same = chats["policy"].reads_like(chats["reward"])

    train, heldout, ledger = load_prompts(config.sources, config.holdout, config.decontaminate)
    heldout.sort(key=lambda prompt: prompt.id)  # a hash: the first of them are a mixture of all sources
    limit = config.sequence_length - config.rollout.max_new_tokens
    tasks = {"train": [], "heldout": []}
    too_long = 0
    for split, prompts in (("train", train), ("heldout", heldout)):
        for prompt in prompts:
            if config.rule and not (prompt.answer or "").strip():
                where = (
                    f"source {prompt.source} gives none ({prompt.place}); give `answer` for the source, or leave"
                    " `rule` out"
                )
                raise UserError(
                    f"stage {config.kind}: rule: {config.rule} needs an answer to compare with, but {where}"
                )
            try:
                ids = chats["policy"].prompt(prompt.messages)
                if not same:
                    chats["reward"].prompt(prompt.messages)
                reason = None
            except ValueError as error:  # text that a chat template cannot carry
                reason = str(error)
            if reason is None and len(ids) > limit:
                reason = f"longer than {limit} tokens (sequence_length - rollout.max_new_tokens)"
                too_long += 1
            if reason is None:
                tasks[split].append(Task(ids, prompt.messages, prompt.text, prompt.answer))
            else:
                ledger.withdraw(prompt, split, reason)
        if not tasks[split]:
            reasons = "; ".join(sorted({reason for entry in ledger.sources.values() for reason in entry["rejected"]}))
            raise UserError(f"stage {config.kind}: none of {len(prompts)} {split} prompts can be used: {reasons}")
    ledger.judge(config.max_bad)
    report = {
        **ledger.report(),
        "counts": {
            "train_prompts": len(tasks["train"]),
            "heldout_prompts": len(tasks["heldout"]),
            "prompts_too_long": too_long,
        },
    }

    policy, reference = build.load(folders["policy"]), build.load(folders["policy"])
    value, reward = (
        ValueModel(build.load(folders["reward"], head="judge")),
        build.load(folders["reward"], head="judge"),
    )
    for model in (policy, reference, value, reward):
        disable_dropout(model)
    for model in (reference, reward):
        model.requires_grad_(False).eval()

    count = len(tasks["train"])
    data = (
        f"{many(config.steps, 'iteration', ',')} x {many(config.batch_size, 'prompt')}, answered with at most"
        f" {config.rollout.max_new_tokens} tokens: {config.steps * config.batch_size / count:.3g} epochs of"
        f" {many(count, 'prompt', ',')}; {many(config.ppo.epochs, 'pass/passes')} over each iteration's answers, in"
        f" {many(config.ppo.minibatches, 'update')} each"
    )
    notes = (
        f"value      {cost.count(reward).total:,} parameters; {schedule_text(config.value_optimizer, config.schedule)}",
        "time       depends on how long the answers become; the progress line says how much is left",
    )
    announce(config, policy, Work(data, updates=config.ppo.minibatches, notes=notes))

    models = Models(
        policy=engine.build(policy, functools.partial(policy_loss_fn, config), config, name="policy"),
        value=engine.build(
            value,
            functools.partial(value_loss_fn, config),
            config.model_copy(update={"optimizer": config.value_optimizer}),
            name="value",
        ),
        reference=reference,
        reward=reward,
        chat=chats["policy"],
        reward_chat=None if same else chats["reward"],
        config=config,
    )
    reference.to(models.policy.device), reward.to(models.policy.device)
    return models, tasks["train"], tasks["heldout"], report


if __name__ == "__main__":
    from pipeline.core.chain import main

    main("ppo")
