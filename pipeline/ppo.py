"""Align a policy with a reward model by proximal policy optimisation (PPO), held near its start by a KL penalty.

    python pipeline/ppo.py recipes/quickstart.yaml                                      # one process
    accelerate launch --num_processes 8 pipeline/ppo.py recipes/llama-7b.yaml           # or torchrun, srun

An iteration (one `step`): sample a response to each of `batch_size` prompts, score it with the reward model, turn
scores and the KL to the reference into advantages (GAE), update policy and value model over `ppo.epochs` passes.
Sources: Schulman et al., 2017 (PPO); Ziegler et al., 2019 and Stiennon et al., 2020 (on language models); Huang et al.,
2024 (the details). docs/ppo.md has the checklist and its tests.
"""

import copy
import functools
import json
import math

from pydantic import Field, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.config import refuse_unused
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.intervals import shares, warn
from pipeline.core.output import Output
from pipeline.core.terminal import plural
from pipeline.data.chat.chat_sources import PromptSource
from pipeline.rl.config import Algorithm, LinearSchedule, PolicyOptimizer, Rollout, ValueOptimizer
from pipeline.rl.rules import Rule
from pipeline.train.finetune_config import FinetuneConfig

VERSION = 5  # 5: reasoning, tools and weights of records are learned, not rejected
INPUTS = {"policy": ("sft", "dpo", "kto", "pretrain"), "reward": ("reward",)}


class Config(FinetuneConfig):
    """Keys of stage `ppo`. steps: iterations. epochs: passes over the prompts; those over an iteration's samples are
    `ppo.epochs`. batch_size: prompts of an iteration. sequence_length: tokens of a prompt with its response."""

    MODEL_INPUTS = ("policy", "reward")

    sources: dict[str, PromptSource]
    """Prompts, by name."""
    holdout: float = Field(0.05, gt=0, lt=1)
    """Share of the prompts kept for evaluation; the same records as in the other tuning stages."""
    rollout: Rollout = Rollout()
    """Sampling."""
    ppo: Algorithm = Algorithm()
    """The algorithm."""
    rule: Rule | None = None
    """How a response is compared with the prompt's `answer`: exact, contains or prefix; none: only the reward model
    judges."""
    optimizer: PolicyOptimizer = PolicyOptimizer()
    """AdamW of the policy."""
    value_optimizer: ValueOptimizer = ValueOptimizer()
    """AdamW of the value model."""
    schedule: LinearSchedule = LinearSchedule()
    """Schedule of both learning rates, over iterations."""
    evaluate_prompts: int = Field(128, ge=1)
    """Held-out prompts answered in an evaluation, once sampled and once greedily."""
    show: int = Field(8, ge=0)
    """How many of these are written to samples.jsonl."""

    @model_validator(mode="after")
    def consistent(self):
        refuse_unused(self, "evaluate", "is for sft, reward and dpo; hold out more prompts (holdout)")
        refuse_unused(self, "compile", "is for rows of one length, and answers have many")
        refuse_unused(self, "best", "is for sft, reward and dpo; use save.keep_best")
        refuse_unused(self, "mixture", "is for sft, reward and dpo; use `limit` or `part` of the sources")
        refuse_unused(self, "group_by_length", "is for sft, reward and dpo: here answers have no length yet")
        for key in ("chat_template", "chat_template_kwargs"):
            refuse_unused(self, key, "is for the stages that teach a template; policy and reward model have theirs")
        if self.rollout.max_new_tokens >= self.sequence_length:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} leaves no room for a prompt in sequence_length"
                f" {self.sequence_length}"
            )
        if self.steps is not None and self.ppo.critic_warmup > self.steps:
            raise ValueError(
                f"ppo.critic_warmup: {self.ppo.critic_warmup} is more than steps: {self.steps}, so that the policy"
                " would never be trained; use fewer"
            )
        if self.ppo.rule_coef and self.rule is None:
            raise ValueError("ppo.rule_coef needs `rule`: exact, contains or prefix")
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout: {self.lora.dropout:g} would make the ratio of two passes over the same tokens noise;"
                " remove it"
            )
        return self

    @classmethod
    def uses_peak(cls) -> bool:
        return False

    @classmethod
    def supports_shard(cls) -> bool:
        return False

    def sampled_rows(self) -> int:
        return self.rollout.batch

    def other_models(self) -> dict[str, bool]:
        copies = {"reference": False, "reward model": False} if self.lora is None else {}
        return {"value model": True} | copies

    def check_layout(self, world: int) -> None:
        super().check_layout(world)
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
    from pipeline.rl.experience import evaluate
    from pipeline.rl.iteration import Iterations
    from pipeline.rl.prompts import encoded_prompts, tasks_of
    from pipeline.train import finetune, loop
    from pipeline.train.finetune_data import encode_once

    # Load and encode
    policy, reward = (
        finetune.load_parent(config, inputs[key], f"{config.kind}, {key} model") for key in ("policy", "reward")
    )
    encode = functools.partial(encoded_prompts, config, policy.chat, reward.chat, output)
    _, extra = encode_once(output, config, encode)
    counts = extra["counts"]
    config = finetune.in_steps(config, counts["train_prompts"])

    # Build
    models = build_models(config, policy, reward, counts["train_prompts"])
    iterations = Iterations(models, tasks_of(extra, "train"))
    heldout = tasks_of(extra, "heldout")

    def measure() -> dict:
        numbers, rows = evaluate(models, heldout)
        when = "before" if iterations.step_count == 0 else "after"
        iterations.state["shown"][when] = rows
        return numbers

    # Fit and publish
    result = loop.run(iterations, config, output, loop.Hooks(evaluate=measure))
    finetune.publish_model(models.policy, config, policy, output)
    if output.is_main:
        write_samples(output, result["shown"])

    before, after = result["before"], result["after"]
    measured, nothing = headline(config, before, after, min(config.evaluate_prompts, len(heldout)))
    metrics = finetune.before_and_after(result)
    metrics["warnings"] = warn(output.stage, nothing)
    metrics["kl"] = after["kl"]
    metrics["kl_coef"] = result["kl_coef"]
    metrics["skipped_updates"] = result["skipped_updates"]
    metrics |= counts
    metrics["summary"] = {
        "input": plural(counts["train_prompts"], "prompt"),
        "output": f"{config.steps} x {config.batch_size} responses",
        "measure": measured,
    }
    return metrics


def build_models(config: Config, policy, reward, prompts: int):
    """All models of a run, from its two parents. prompts: how many are trained on, for the header. Collective."""
    from pipeline.models import attention, build, cost
    from pipeline.rl.experience import Models
    from pipeline.rl.iteration import policy_loss_fn, value_loss_fn
    from pipeline.rl.responses import ValueModel, disable_dropout
    from pipeline.train import engine, finetune
    from pipeline.train.run_summary import Work, schedule_text

    policy_model, classifier = build.load(policy.folder), build.load(reward.folder, head="judge")
    for model in (policy_model, classifier):
        attention.choose(model, config.attention, config.precision)
    disable_dropout(policy_model)
    disable_dropout(classifier)
    reference, reward_model = frozen_models(config, policy_model, classifier)
    others = {}
    if reference is not None:
        others = {"reference": cost.count(reference), "reward model": cost.count(reward_model)}
    finetune.adapt(config, policy, policy_model)
    finetune.adapt(config, reward, classifier, complete=("score",))
    others["value model"] = value_size = cost.count(classifier)
    value_model = ValueModel(classifier)

    data = (
        f"{plural(config.steps, 'iteration', ',')} x {plural(config.batch_size, 'prompt')}, answered with at most"
        f" {config.rollout.max_new_tokens} tokens: {config.steps * config.batch_size / prompts:.3g} epochs of"
        f" {plural(prompts, 'prompt', ',')}; {plural(config.ppo.epochs, 'pass/passes')} over each iteration's answers,"
        f" in {plural(config.ppo.minibatches, 'update')} each"
    )
    notes = (
        f"value      {value_size.total:,} parameters; {schedule_text(config.value_optimizer, config.schedule)}",
        "time       depends on how long the answers become; the progress line shows how much is left",
    )
    work = Work(data, updates=config.ppo.minibatches, notes=notes, others=others, sampled_rows=config.rollout.batch)
    policy_loss = functools.partial(policy_loss_fn, config)
    policy_engine, _ = finetune.build_engine(policy_model, policy_loss, config, work, name="policy")
    value_config = config.model_copy(update={"optimizer": config.value_optimizer})
    value_engine = engine.build(value_model, functools.partial(value_loss_fn, config), value_config, name="value")
    if reference is not None:
        reference.to(policy_engine.device)
    return Models(
        policy=policy_engine,
        value=value_engine,
        reference=reference,
        reward=reward_model.to(policy_engine.device),
        chat=policy.chat,
        reward_chat=None if policy.chat.reads_like(reward.chat) else reward.chat,
        config=config,
    )


def frozen_models(config: Config, policy_model, classifier):
    """(reference, reward model), which are never trained: copies of the two models that will be. With `lora` no copies
    are needed: the reference is None, for the policy without its adapter, and the reward model shares the value model's
    backbone."""
    from pipeline.rl.responses import SharedReward

    if config.lora is not None:
        return None, SharedReward(classifier)
    reference, reward_model = copy.deepcopy(policy_model), copy.deepcopy(classifier)
    for model in (reference, reward_model):
        model.requires_grad_(False).eval()
    return reference, reward_model


def write_samples(output: Output, shown: dict[str, list[dict]]) -> None:
    """samples.jsonl: held-out prompts with their answers before and after."""
    lines = []
    for when in ("before", "after"):
        for row in shown[when]:
            lines.append(json.dumps({"when": when, **row}, ensure_ascii=False, sort_keys=True) + "\n")
    write_atomic(output.path / "samples.jsonl", "".join(lines))


def headline(config: Config, before: dict, after: dict, prompts: int) -> tuple[str, list[str]]:
    """(the closing line, what of it shows nothing learned). The rise of the reward must exceed the 95% interval of a
    difference of two means."""

    def mean(numbers: dict) -> str:
        interval = f" ± {numbers['reward_half']:.2f}" if prompts > 1 else ""
        return f"{numbers['reward']:.2f}{interval}"

    reward = f"held-out reward {mean(before)} -> {mean(after)} (95%, n={prompts})"
    rise = after["reward"] - before["reward"]
    significant = prompts > 1 and rise > math.hypot(before["reward_half"], after["reward_half"])
    rule = f", {config.rule} {shares(before['rule'], after['rule'], prompts)}" if config.rule else ""
    divergence = round(after["kl"], 2) + 0.0  # no minus sign before a zero
    return f"{reward}{rule}, KL {divergence:.2f}", [] if significant else [reward]


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("ppo")
