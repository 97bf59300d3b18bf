"""Align a policy without a value model: a prompt is answered several times, and the answers are compared.

    python pipeline/grpo.py recipe.yaml                                                  # one process
    accelerate launch --num_processes 8 pipeline/grpo.py recipe.yaml                     # or torchrun, srun

`algorithm` chooses between GRPO, Dr. GRPO, RLOO and REINFORCE++; keys of `update` add what DAPO and GSPO change. An
iteration (one `step`): sample `samples` responses to each of `batch_size` prompts, score them, turn the scores of a
group into advantages, update the policy. docs/grpo.md has the papers and the measurements.
"""

import functools

from pydantic import Field, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.config import refuse_unused
from pipeline.core.output import Output
from pipeline.core.terminal import plural
from pipeline.rl.config import AlgorithmName, GroupUpdates, Overlong
from pipeline.rl.online_config import OnlineConfig
from pipeline.rl.prompts import Prompts

VERSION = 6  # 6: thoughts that a template writes otherwise than its prompt, ids and ends of tool calls
INPUTS = {"policy": ("sft", "dpo", "kto", "pretrain"), "reward": ("reward",), "process": ("prm",)}


class Config(OnlineConfig):
    """Keys of stage `grpo`. steps: iterations. epochs: passes over the prompts; those over an iteration's samples are
    `update.epochs`. batch_size: prompts of an iteration, each answered `samples` times. micro_batch: responses.
    sequence_length: tokens of a prompt with its response."""

    algorithm: AlgorithmName = "grpo"
    """How rewards become advantages: grpo, dr_grpo (no division by the deviation), rloo (leave one out, whole responses
    as actions), reinforce_pp (normalised over the batch)."""
    samples: int = Field(8, ge=1)
    """Responses to each prompt."""
    update: GroupUpdates = GroupUpdates()
    """The update of the policy."""
    overlong: Overlong | None = None
    """Penalty for long responses; none: length costs nothing."""
    resample: int = Field(0, ge=0)
    """Rounds of further prompts that replace those whose responses all have the same reward, from which nothing is
    learned (DAPO's dynamic sampling); 0: none are replaced."""

    @model_validator(mode="after")
    def consistent(self):
        if self.samples == 1 and self.algorithm != "reinforce_pp":
            raise ValueError(
                f"samples: 1 leaves nothing to compare a response with; algorithm: {self.algorithm} needs 2 or more"
                " (reinforce_pp takes 1)"
            )
        if self.samples == 1:
            refuse_unused(self, "resample", "replaces groups of equal rewards, and samples: 1 makes no groups")
        if self.algorithm == "rloo":
            if self.update.kl_in == "loss":
                raise ValueError("update.kl_in: loss is not for rloo, whose reward has the KL; remove it")
            refuse_unused(self.update, "ratio", "is not for rloo, whose ratio is that of the whole response")
            if self.update.average not in (None, "response"):
                raise ValueError(
                    f"update.average: {self.update.average} is not for rloo, whose actions are whole responses; remove"
                    " it"
                )
        if self.update.ratio == "sequence" and self.algorithm != "grpo":
            raise ValueError(f"update.ratio: sequence (GSPO) is for algorithm: grpo, not {self.algorithm}")
        if self.overlong is not None and self.overlong.buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"overlong.buffer: {self.overlong.buffer} is more than rollout.max_new_tokens:"
                f" {self.rollout.max_new_tokens}; use fewer"
            )
        return self

    @property
    def updates(self) -> GroupUpdates:
        return self.update

    def responses_per_prompt(self) -> int:
        return self.samples

    def resample_rounds(self) -> int:
        return self.resample

    def measures_kl(self) -> bool:
        return self.update.kl_coef > 0

    def measures_policy(self) -> bool:
        """Not for one update per iteration: its own forward pass is that of the policy that sampled."""
        several = self.update.epochs * self.update.minibatches > 1
        return several or self.measures_kl() or self.update.importance_cap is not None

    def other_models(self) -> dict[str, bool]:
        models = {"reward model": False} if self.uses_reward_model() else {}
        if self.measures_kl() and self.lora is None:
            models["reference"] = False
        if self.uses_process_model():
            models["process reward model"] = False
        return models


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.rl.online import align, load_parents

    return align(config, load_parents(config, inputs), output, build_models)


def build_models(config: Config, parents, prompts: Prompts):
    """The policy, its reference if the KL counts, and the reward model if one judges. Collective."""
    from pipeline.models import cost, sampling_cost
    from pipeline.rl import rollout_memory
    from pipeline.rl.frozen_models import copy_to_read, read_only
    from pipeline.rl.group_objective import GROUPS, policy_loss_fn
    from pipeline.rl.online import assemble, load_judge, load_policy, load_process
    from pipeline.train import finetune
    from pipeline.train.run_summary import Work

    policy_model, weights = load_policy(config, parents.policy)
    others, reward_model = {}, None
    if parents.reward is not None:
        reward_model, reward_weights = load_judge(config, parents.reward)
        others["reward model"] = sampling_cost.only_read(cost.count(reward_model))
        load = functools.partial(load_judge, config, parents.reward)
        reward_model = read_only(reward_model, reward_weights, config, load)
    process = load_process(config, parents, others)
    reference = None
    if config.measures_kl() and config.lora is None:
        others["reference"] = sampling_cost.only_read(cost.count(policy_model))
        load = functools.partial(load_policy, config, parents.policy)
        reference = copy_to_read(policy_model, weights, config, load)
    finetune.adapt(config, parents.policy, policy_model, weights)

    data = (
        f"{plural(config.steps, 'iteration', ',')} x {plural(config.batch_size, 'prompt')}, each answered"
        f" {config.samples} times with at most {config.rollout.max_new_tokens} tokens:"
        f" {config.steps * config.batch_size / prompts.count:.3g} epochs of {plural(prompts.count, 'prompt', ',')};"
        f" {plural(config.update.epochs, 'pass/passes')} over each iteration's answers, in"
        f" {plural(config.update.minibatches, 'update')} each"
    )
    notes = (
        *rollout_memory.describe(config, policy_model, others, prompts.longest),
        "time       depends on how long the answers become; the progress line shows how much is left",
    )
    work = Work(data, notes=notes, others=others)
    policy_loss = functools.partial(policy_loss_fn, config)
    engine, _ = finetune.build_engine(policy_model, policy_loss, config, work, name="policy", weights=weights)
    return assemble(config, parents, GROUPS, engine, None, reference, reward_model, process)


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("grpo")
