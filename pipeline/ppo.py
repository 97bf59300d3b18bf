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

from pydantic import model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.output import Output
from pipeline.core.terminal import plural
from pipeline.rl.config import Algorithm, ValueOptimizer
from pipeline.rl.online_config import OnlineConfig

VERSION = 5  # 5: reasoning, tools and weights of records are learned, not rejected
INPUTS = {"policy": ("sft", "dpo", "kto", "pretrain"), "reward": ("reward",)}


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

    def other_models(self) -> dict[str, bool]:
        copies = {"reference": False, "reward model": False} if self.lora is None else {}
        return {"value model": True} | copies


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.rl.online import Parents, align
    from pipeline.train import finetune

    policy, reward = (
        finetune.load_parent(config, inputs[key], f"{config.kind}, {key} model") for key in ("policy", "reward")
    )
    return align(config, Parents(policy, reward), output, build_models)


def build_models(config: Config, parents, prompts: int):
    """All models of a run, from its two parents. prompts: how many are trained on, for the header. Collective."""
    from pipeline.models import attention, build, cost
    from pipeline.rl.experience import Models
    from pipeline.rl.ppo_objective import PPO, policy_loss_fn, value_loss_fn
    from pipeline.rl.responses import ValueModel, disable_dropout
    from pipeline.train import engine, finetune
    from pipeline.train.run_summary import Work, schedule_text

    policy, reward = parents.policy, parents.reward
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
        objective=PPO,
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


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("ppo")
