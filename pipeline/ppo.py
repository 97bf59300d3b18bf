"""Align a policy with rewards by proximal policy optimisation (PPO), held near its start by a KL penalty.

    python pipeline/ppo.py recipes/quickstart.yaml                                      # one process
    accelerate launch --num_processes 8 pipeline/ppo.py recipes/llama-7b.yaml           # or torchrun, srun

An iteration (one `step`): sample a response to each of `batch_size` prompts, score it, turn scores and
the KL to the reference into advantages (GAE), update policy and value model over `ppo.epochs` passes.
Sources: Schulman et al., 2017 (PPO); Ziegler et al., 2019 and Stiennon et al., 2020 (on language models); Huang et al.,
2024 (the details). docs/ppo.md has the checklist and its tests.
"""

import functools

from pydantic import model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.output import Output
from pipeline.core.terminal import plural
from pipeline.rl.config import Algorithm, ValueOptimizer
from pipeline.rl.online_config import OnlineConfig
from pipeline.rl.prompts import Prompts

VERSION = 10  # 10: thoughts that a template writes otherwise than its prompt, ids and ends of tool calls
INPUTS = {"policy": ("sft", "dpo", "kto", "pretrain"), "reward": ("reward",), "process": ("prm",)}


class Config(OnlineConfig):
    """Keys of stage `ppo`. steps: iterations. epochs: passes over the prompts; those over an iteration's samples are
    `ppo.epochs`. batch_size: prompts of an iteration. sequence_length: tokens of a prompt with its response."""

    ppo: Algorithm = Algorithm()
    """The algorithm."""
    value_optimizer: ValueOptimizer = ValueOptimizer()
    """AdamW of the value model."""

    @model_validator(mode="after")
    def consistent(self):
        if self.steps is not None and self.ppo.critic_warmup > self.steps:
            raise ValueError(
                f"ppo.critic_warmup: {self.ppo.critic_warmup} is more than steps: {self.steps}, so that the policy"
                " would never be trained; use fewer"
            )
        if self.ppo.rule_coef and self.rule is None:
            raise ValueError("ppo.rule_coef needs `rule`: exact, contains or prefix")
        return self

    @property
    def updates(self) -> Algorithm:
        return self.ppo

    def value_only_steps(self) -> int:
        return self.ppo.critic_warmup

    def trains_on_rule(self) -> bool:
        return self.ppo.rule_coef > 0

    def scored_by(self) -> dict:
        return super().scored_by() | {"calibrate": self.ppo.calibrate}

    def adapts_kl_coef(self) -> bool:
        return self.ppo.kl_target is not None

    def other_models(self) -> dict[str, bool]:
        models = {"value model": True}
        if self.lora is None:
            models["reference"] = False
            if self.uses_reward_model():
                models["reward model"] = False
        if self.uses_process_model():
            models["process reward model"] = False
        return models


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.rl.online import align, load_parents

    return align(config, load_parents(config, inputs), output, build_models)


def build_models(config: Config, parents, prompts: Prompts):
    """All models of a run, from its parents. Collective."""
    from pipeline.models import cost, sampling_cost
    from pipeline.rl import rollout_memory
    from pipeline.rl.online import assemble, load_policy, load_process
    from pipeline.rl.ppo_objective import PPO, policy_loss_fn, value_loss_fn
    from pipeline.rl.responses import ValueModel
    from pipeline.train import engine, finetune
    from pipeline.train.run_summary import Work, schedule_text

    policy_model, policy_weights = load_policy(config, parents.policy)
    classifier, value_weights = load_classifier(config, parents)
    others = {}
    if config.lora is None:
        others["reference"] = sampling_cost.only_read(cost.count(policy_model))
        if config.uses_reward_model():
            others["reward model"] = sampling_cost.only_read(cost.count(classifier))
    process = load_process(config, parents, others)
    reference, reward_model = frozen_models(
        config, parents, (policy_model, policy_weights), (classifier, value_weights)
    )
    finetune.adapt(config, parents.policy, policy_model, policy_weights)
    finetune.adapt(config, parents.reward or parents.policy, classifier, value_weights, complete=("score",))
    others["value model"] = value_size = cost.count(classifier)
    value_model = ValueModel(classifier)

    data = (
        f"{plural(config.steps, 'iteration', ',')} x {plural(config.batch_size, 'prompt')}, answered with at most"
        f" {config.rollout.max_new_tokens} tokens: {config.steps * config.batch_size / prompts.count:.3g} epochs of"
        f" {plural(prompts.count, 'prompt', ',')}; {plural(config.ppo.epochs, 'pass/passes')} over each iteration's"
        f" answers, in {plural(config.ppo.minibatches, 'update')} each"
    )
    notes = (
        f"value      {value_size.total:,} parameters; {schedule_text(config.value_optimizer, config.schedule)}",
        *rollout_memory.describe(config, policy_model, others, prompts.longest),
        "time       depends on how long the answers become; the progress line shows how much is left",
    )
    work = Work(data, notes=notes, others=others)
    policy_loss = functools.partial(policy_loss_fn, config)
    policy_engine, _ = finetune.build_engine(
        policy_model, policy_loss, config, work, name="policy", weights=policy_weights
    )
    value_config = config.model_copy(update={"optimizer": config.value_optimizer})
    value_loss = functools.partial(value_loss_fn, config)
    value_fill = ValueModel.fills(value_weights)
    value_engine = engine.build(value_model, value_loss, value_config, name="value", fill=value_fill)
    if value_weights is not None and config.lora is not None:
        finetune.check_adapters(value_engine)
    return assemble(config, parents, PPO, policy_engine, value_engine, reference, reward_model, process)


def load_classifier(config: Config, parents):
    """What the value model starts from, and what fills it: the reward model. If all rewards are functions, nothing
    knows them yet: the policy's layers, with a value of 0 at every token."""
    from pipeline.rl.online import load_judge, prepare_to_compute
    from pipeline.train import finetune
    from pipeline.train.scores import zero_score

    if parents.reward is not None:
        return load_judge(config, parents.reward)
    classifier, weights = finetune.load_model(config, parents.policy, head="reward")
    zero_score(classifier, weights)
    prepare_to_compute(config, classifier)
    return classifier, weights


def frozen_models(config: Config, parents, policy, classifier):
    """(reference, reward model), which are never trained: copies of the two models that will be. policy, classifier:
    these, each with what fills it. With `lora` no copies are needed: the reference is None, for the policy without its
    adapter, and the reward model shares the value model's backbone. The reward model is None if all rewards are
    functions."""
    from pipeline.core import distributed
    from pipeline.rl.frozen_models import copy_to_read
    from pipeline.rl.online import load_judge, load_policy
    from pipeline.rl.responses import SharedReward

    if config.lora is not None:
        return None, SharedReward(*classifier).to(distributed.device()) if config.uses_reward_model() else None
    reference = copy_to_read(*policy, config, functools.partial(load_policy, config, parents.policy))
    if not config.uses_reward_model():
        return reference, None
    return reference, copy_to_read(*classifier, config, functools.partial(load_judge, config, parents.reward))


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("ppo")
