"""The steps that ppo and grpo share: load the parents, encode prompts, build, iterate, publish, report."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from pipeline.core import distributed
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.intervals import shares, warn
from pipeline.core.output import Output
from pipeline.core.terminal import plural
from pipeline.data.chat.template import Chat
from pipeline.models import attention, cost, fused_norm, sampling_cost, short_attention
from pipeline.models.cost import Size
from pipeline.models.folder_weights import FolderWeights
from pipeline.rl import sentinel
from pipeline.rl.experience import Models, evaluate
from pipeline.rl.frozen_models import Frozen, read_only
from pipeline.rl.iteration import Iterations
from pipeline.rl.objective import Objective
from pipeline.rl.online_config import OnlineConfig
from pipeline.rl.process_reward import ProcessReward
from pipeline.rl.prompts import Prompts, encoded_prompts, tasks_of
from pipeline.rl.responses import disable_dropout, predict_at_labels
from pipeline.rl.reward_config import step_separator
from pipeline.rl.reward_workers import RewardWorkers
from pipeline.rl.rollout_log import RolloutLog
from pipeline.rl.scoring import import_functions
from pipeline.rl.server import RolloutServer
from pipeline.train import finetune, loop
from pipeline.train.engine import Engine
from pipeline.train.finetune import Parent
from pipeline.train.finetune_data import encode_once


@dataclass(frozen=True)
class Parents:
    """The models that a stage starts from."""

    policy: Parent
    reward: Parent | None
    """None: the rewards are functions."""
    process: Parent | None = None
    """The process reward model; None: no reward is its."""

    @property
    def reward_chat(self) -> Chat | None:
        """How the reward model reads text, if it does not read it as the policy writes it."""
        if self.reward is None or self.policy.chat.reads_like(self.reward.chat):
            return None
        return self.reward.chat

    @property
    def judges(self) -> list[Chat]:
        """How the models that score responses read text."""
        return [parent.chat for parent in (self.reward, self.process) if parent is not None]


def load_parents(config: OnlineConfig, inputs: dict[str, Artifact]) -> Parents:
    """The policy, and the models that score responses, as far as the recipe uses them. Raises UserError for rewards and
    tools that cannot be called."""
    config.check_rewards()
    config.check_tools(None)
    policy = finetune.load_parent(config, inputs["policy"], f"{config.kind}, policy model")
    config.check_tools(policy.chat)
    reward = None
    if config.uses_reward_model():
        reward = finetune.load_parent(config, inputs["reward"], f"{config.kind}, reward model")
    process = None
    if config.uses_process_model():
        process = finetune.load_parent(config, inputs["process"], f"{config.kind}, process reward model")
    parents = Parents(policy, reward, process)
    if config.tools and not all(policy.chat.reads_like(chat) for chat in parents.judges):
        raise UserError(
            f"stage {config.kind}: tools need a reward model with the policy's tokenizer and chat template; use"
            " rewards that are functions, or train the reward model from the same base"
        )
    return parents


def load_policy(config: OnlineConfig, parent: Parent) -> tuple[Any, FolderWeights | None]:
    """The policy or its reference, as it samples and measures, and what fills it (finetune.load_model)."""
    model, weights = finetune.load_model(config, parent)
    prepare_to_compute(config, model)
    predict_at_labels(model, config.rollout.temperature)
    return model, weights


def prepare_to_compute(config: OnlineConfig, model) -> None:
    """Without dropout, with the attention of the recipe, and on a CPU in bf16 with what is fast there on short rows."""
    attention.choose(model, config.attention, config.precision)
    if config.precision == "bf16" and distributed.device().type == "cpu":
        short_attention.install(model)
        fused_norm.install(model)
    disable_dropout(model)


def load_judge(config: OnlineConfig, parent: Parent) -> tuple[Any, FolderWeights | None]:
    """The reward model, and what fills it."""
    model, weights = finetune.load_model(config, parent, head="judge")
    prepare_to_compute(config, model)
    return model, weights


def load_process(config: OnlineConfig, parents: Parents, others: dict[str, Size]) -> ProcessReward | None:
    """The process reward model, if a reward is its. others: sizes of further models by name, to which its is added.
    Collective."""
    parent = parents.process
    if parent is None:
        return None
    separator = step_separator(AutoConfig.from_pretrained(parent.folder, local_files_only=True), str(parent.folder))
    load = functools.partial(_load_steps, config, parent)
    model, weights = load()
    others["process reward model"] = sampling_cost.only_read(cost.count(model))
    return ProcessReward(read_only(model, weights, config, load), parent.chat, separator)


def _load_steps(config: OnlineConfig, parent: Parent) -> tuple[Any, FolderWeights | None]:
    model, weights = finetune.load_model(config, parent, head="steps")
    attention.choose(model, config.attention, config.precision)
    return model, weights


def assemble(
    config: OnlineConfig,
    parents: Parents,
    objective: Objective,
    policy: Engine,
    value: Engine | None,
    reference: Frozen | None,
    reward: Frozen | None,
    process: ProcessReward | None,
) -> Models:
    """The models of a run. reference, reward: on the device (frozen_models.only_read)."""
    return Models(
        policy=policy,
        value=value,
        reference=reference,
        reward=reward,
        chat=parents.policy.chat,
        reward_chat=parents.reward_chat,
        config=config,
        objective=objective,
        workers=RewardWorkers(config.reward_workers),
        process=process,
    )


def align(
    config: OnlineConfig,
    parents: Parents,
    output: Output,
    build_models: Callable[[OnlineConfig, Parents, Prompts], Models],
) -> dict:
    """Train a policy on its own answers, publish it, and return the stage's metrics. build_models is called once the
    length of the run is known. Collective."""
    encode = functools.partial(encoded_prompts, config, parents.policy.chat, parents.judges, output)
    _, extra = encode_once(output, config, encode)
    counts = extra["counts"]
    config = finetune.in_steps(config, counts["train_prompts"])

    tasks = {split: tasks_of(extra, split) for split in ("train", "heldout")}
    prompts = Prompts(len(tasks["train"]), max(len(task.ids) for split in tasks.values() for task in split))
    models = build_models(config, parents, prompts)
    if config.rollout.engine == "vllm":
        work = output.path / "work" / "rollout"
        models.server = RolloutServer(config, models.stop_ids, parents.policy.folder, work)
    rollouts = RolloutLog(output.path, config.steps, config.show)
    iterations, heldout = Iterations(models, tasks["train"], rollouts), tasks["heldout"]

    def measure() -> dict:
        numbers, rows = evaluate(models, heldout)
        when = "before" if iterations.state["before"] is None else "after"
        iterations.state["shown"][when] = rows
        return numbers

    try:
        import_functions(models)
        result = loop.run(iterations, config, output, loop.Hooks(evaluate=measure))
    finally:
        models.close()
    finetune.publish_model(models.policy, config, parents.policy, output)
    if output.is_main:
        write_samples(output, result["shown"])
    return summary(config, output, result, counts, min(config.evaluate_prompts, len(heldout)))


def summary(config: OnlineConfig, output: Output, result: dict, counts: dict, evaluated: int) -> dict:
    """The metrics of a stage. evaluated: number of held-out prompts that were answered."""
    before, after = result["before"], result["after"]
    measured, nothing = headline(config, before, after, evaluated)
    for noun in ("reward", "tool"):
        failed = sum(sum(kinds.values()) for kinds in result.get(f"{noun}_failures", {}).values())
        if failed:
            measured += f", {plural(failed, 'call', ',')} of {noun}s failed"
    alarms = sentinel.summary_of(result)
    if alarms:
        measured += f", alarms: {alarms}"
    metrics = finetune.before_and_after(result)
    metrics["warnings"] = warn(output.stage, nothing)
    if "kl" in after:
        metrics["kl"] = after["kl"]
        metrics["kl_coef"] = result["kl_coef"]
    metrics["skipped_updates"] = result["skipped_updates"]
    metrics["alarms"] = result.get("alarms", {}).get("raised", {})
    if config.tools:
        metrics["tool_failures"] = result["tool_failures"]
    if config.rewards:
        metrics["reward_failures"] = result["reward_failures"]
    metrics |= counts
    metrics["summary"] = {
        "input": plural(counts["train_prompts"], "prompt"),
        "output": f"{config.steps} x {config.rows_of_step()} responses",
        "measure": measured,
    }
    return metrics


def write_samples(output: Output, shown: dict[str, list[dict]]) -> None:
    """samples.jsonl: held-out prompts with their answers before and after."""
    lines = []
    for when in ("before", "after"):
        for row in shown[when]:
            lines.append(json.dumps({"when": when, **row}, ensure_ascii=False, sort_keys=True) + "\n")
    write_atomic(output.path / "samples.jsonl", "".join(lines))


def headline(config, before: dict, after: dict, prompts: int) -> tuple[str, list[str]]:
    """(the closing line, what of it shows nothing learned). The rise of the reward must exceed the 95% interval of a
    difference of two means."""

    def mean(numbers: dict) -> str:
        interval = f" ± {numbers['reward_half']:.2f}" if prompts > 1 else ""
        return f"{numbers['reward']:.2f}{interval}"

    reward = f"held-out reward {mean(before)} -> {mean(after)} (95%, n={prompts})"
    rise = after["reward"] - before["reward"]
    significant = prompts > 1 and rise > math.hypot(before["reward_half"], after["reward_half"])
    parts = [reward]
    if config.rule:
        parts.append(f"{config.rule} {shares(before['rule'], after['rule'], prompts)}")
    if "kl" in after:
        divergence = round(after["kl"], 2) + 0.0  # no minus sign before a zero
        parts.append(f"KL {divergence:.2f}")
    return ", ".join(parts), [] if significant else [reward]
