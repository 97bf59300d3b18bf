"""Keys that ppo and grpo share: stages that learn from their own answers. Their steps are in online.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from pipeline.core.config import EXECUTION, ExternalFiles, Name, PlannedInput, SourceBlock, refuse_unused
from pipeline.core.errors import Problems, UserError
from pipeline.data.chat.chat_sources import RewardedSource
from pipeline.rl import sentinel, user_functions
from pipeline.rl.config import MICRO_BATCH_TOKENS, LinearSchedule, PolicyOptimizer, Rollout, Updates
from pipeline.rl.reward_config import MODEL, PROCESS, Reward, check_calls, check_packages, step_separator
from pipeline.rl.rules import Rule
from pipeline.rl.sentinel import Alarm, AlarmName
from pipeline.rl.tool_config import Tool, Toolbox
from pipeline.train.finetune_config import FinetuneConfig

if TYPE_CHECKING:
    from pipeline.data.chat.template import Chat
    from pipeline.models.sampling_cost import Sampling


class OnlineConfig(FinetuneConfig):
    """A stage that samples answers to prompts, scores them and learns from the scores."""

    MODEL_INPUTS = ("policy", "reward", "process")

    sources: dict[str, RewardedSource]
    """Prompts, by name."""
    holdout: float = Field(0.05, gt=0, lt=1)
    """Share of the prompts kept for evaluation; the same records as in the other tuning stages."""
    rollout: Rollout = Rollout()
    """Sampling."""
    rule: Rule | None = None
    """How a response is compared with the prompt's `answer`: exact, contains or prefix; none: only the reward model
    judges."""
    rewards: dict[Name, Reward] = {}
    """What the score of a response is made of, by name; none: the reward model."""
    tools: dict[Name, Tool] = {}
    """Functions that the policy may call while it answers, by the name that it calls them by."""
    tool_calls: int = Field(4, ge=1)
    """Most calls of tools in a response; one that calls more ends there."""
    reward_workers: Annotated[int, EXECUTION] = Field(2, ge=1)
    """Processes per rank that compute rewards which are functions, and tools."""
    alarms: dict[AlarmName, Alarm] = {}
    """What is done when a number of the iterations leaves its healthy range; those that are not named warn."""
    optimizer: PolicyOptimizer = PolicyOptimizer()
    """AdamW of the policy."""
    schedule: LinearSchedule = LinearSchedule()
    """Schedule of the learning rates, over iterations."""
    micro_batch: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Responses in memory at a time on one process; none: as many of its share of an update as have 8,192 tokens with
    their prompts. Gradients are accumulated."""
    on_demand: Annotated[bool, EXECUTION] = False
    """Read reference and reward models from their files when they are used, and drop them afterwards; else they stay in
    memory."""
    evaluate_prompts: int = Field(128, ge=1)
    """Held-out prompts answered in an evaluation, once sampled and once greedily."""
    show: int = Field(8, ge=0)
    """How many of these are written to samples.jsonl."""

    @model_validator(mode="after")
    def online_keys(self):
        refuse_unused(self, "evaluate", "is for sft, reward and dpo; hold out more prompts (holdout)")
        refuse_unused(self, "compile", "is for rows of one length, and answers have many")
        refuse_unused(self, "best", "is for sft, reward and dpo; use save.keep_best")
        refuse_unused(self, "average", "is for sft, reward, prm, dpo and kto, whose models have a held-out loss")
        refuse_unused(self, "mixture", "is for sft, reward and dpo; use `limit` or `part` of the sources")
        refuse_unused(self, "group_by_length", "is for sft, reward and dpo: here answers have no length yet")
        for key in ("chat_template", "chat_template_kwargs"):
            refuse_unused(self, key, "is for the stages that teach a template; policy and reward model have theirs")
        if self.rollout.max_new_tokens >= self.sequence_length:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} leaves no room for a prompt in sequence_length"
                f" {self.sequence_length}"
            )
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout: {self.lora.dropout:g} would make the ratio of two passes over the same tokens noise;"
                " remove it"
            )
        if not self.tools:
            refuse_unused(self, "tool_calls", "limits the calls of tools, and there are none")
        for name, source in self.sources.items():
            if self.tools and "calls" in source.reward_fields:
                raise ValueError(
                    f"sources.{name}.reward_fields: 'calls' is what rewards are given of the tools; rename the field"
                )
        if not self.rewards and not self.tools:
            refuse_unused(self, "reward_workers", "compute rewards that are functions, and there are none")
            for name, source in self.sources.items():
                if source.reward_fields:
                    raise ValueError(
                        f"sources.{name}.reward_fields: there are no rewards that could get them; remove it"
                    )
        if "reward" in self.inputs and not self.uses_reward_model():
            raise ValueError(
                f"inputs.reward: {self.inputs['reward']} is not read, because no entry of rewards has function:"
                f" {MODEL}; remove it, or add such an entry"
            )
        if "process" in self.inputs and not self.uses_process_model():
            raise ValueError(
                f"inputs.process: {self.inputs['process']} is not read, because no entry of rewards has function:"
                f" {PROCESS}; remove it, or add such an entry"
            )
        if self.tools and self.uses_process_model():
            raise ValueError(
                f"tools: function: {PROCESS} judges the steps of one text, and an answer with tools has several, with"
                " results between them; remove one of the two"
            )
        if self.on_demand and all(self.other_models().values()):
            raise ValueError("on_demand: true reads reference and reward models, and the stage has none; remove it")
        sentinel.check(self)
        self._check_rollout()
        return self

    def _check_rollout(self) -> None:
        """Raises ValueError for sampling that an update cannot learn from, or for a limit that has no use."""
        rollout, updates = self.rollout, self.updates
        if self.tools and (rollout.ahead or rollout.engine == "vllm"):
            key = "ahead: true" if rollout.ahead else "engine: vllm"
            raise ValueError(
                f"tools: answers in several turns are sampled by the policy's own module, and not with rollout.{key};"
                " remove one of the two"
            )
        if updates.importance_cap is None:
            why = None
            if rollout.ahead:
                why = "ahead: true: responses are sampled with other weights than those that learn from them"
            elif rollout.engine == "vllm":
                why = "engine: vllm: a server computes other log-probabilities than the trainer"
            if why is not None:
                raise ValueError(
                    f"rollout.{why}, which importance_cap corrects; give importance_cap: 2 (truncated importance"
                    " sampling)"
                )
        if rollout.engine == "vllm" and self.lora is not None and self.lora.base == "nf4":
            raise ValueError(
                "lora.base: nf4 keeps weights in 4 bits, and rollout.engine: vllm samples with the merged ones, which"
                " are others; use base: bf16"
            )
        if rollout.engine == "vllm":
            server = rollout.server_options()
            seconds = (server.restarts + 1) * server.start
            if seconds > self.watch.start:
                raise ValueError(
                    f"rollout.server: {server.restarts + 1} starts of {server.start:g} s each are more than"
                    f" watch.start: {self.watch.start:g}, after which the run would be ended as one that hangs; raise"
                    " watch.start, or give less"
                )
        oldest, limit = updates.epochs * updates.minibatches, rollout.max_staleness
        if limit is None:
            return
        if limit >= oldest:
            raise ValueError(
                f"rollout.max_staleness: {limit}: no response is older than the {oldest} updates of an iteration; give"
                " less, or remove it"
            )
        if updates.target_kl is None and not self.resample_rounds():
            raise ValueError(
                f"rollout.max_staleness: {limit} would drop every response but those of the first iteration, for all"
                f" are {oldest} updates old; it is for target_kl and resample, with which some are younger; remove it"
            )

    def uses_reward_model(self) -> bool:
        return not self.rewards or any(reward.function == MODEL for reward in self.rewards.values())

    def uses_process_model(self) -> bool:
        return any(reward.function == PROCESS for reward in self.rewards.values())

    def fallible_rewards(self) -> list[str]:
        """Names of the rewards that may have no value for a response: functions, which may fail, and the process reward
        model, whose chat template may not write it."""
        return [name for name, reward in self.rewards.items() if reward.function != MODEL]

    def unread(self) -> set[str]:
        used = {"reward": self.uses_reward_model(), "process": self.uses_process_model()}
        return {name for name, is_used in used.items() if not is_used}

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        from pipeline.train import planned_model

        problems = Problems()
        with problems.gather():
            super().check_inputs(inputs)
        process = inputs.get("process")
        if process is not None and process.config is None:
            config = planned_model.config_of(process)
            with problems.gather():
                if config is not None:
                    step_separator(config, f"inputs.process: {process.name}")
        problems.refuse()

    @classmethod
    def external(cls) -> list[SourceBlock | ExternalFiles]:
        own = [("rewards", cls.reward_files), ("tools", cls.tool_files)]
        return [*super().external(), *(ExternalFiles(key, files, drop_key=False) for key, files in own)]

    def tool_files(self) -> list[Path]:
        """Files of the tools. Raises Absent if one does not exist."""
        return user_functions.files_of([tool.function for tool in self.tools.values()], "tools")

    def reward_files(self) -> list[Path]:
        """Files of the user's own reward functions. Raises Absent if one does not exist."""
        own = [reward.function for reward in self.rewards.values() if reward.is_own]
        return user_functions.files_of(own, "rewards")

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        from pipeline.train import planned_model

        problems = Problems()
        with problems.gather():
            super().check_records(inputs)
        with problems.gather():
            self.check_rewards()
        with problems.gather():
            self.check_tools(None)
        problems.refuse()
        if self.tools:
            self.check_tools(planned_model.chat_of([inputs["policy"]], self, problems))

    def check_rewards(self) -> None:
        """Check that every reward function exists and gets what it needs. Raises UserError."""
        given = {}
        for name, source in self.sources.items():
            given[name] = {*source.reward_fields, *({"answer"} if source.answer is not None else ())}
            if self.tools:
                given[name].add("calls")
        check_calls(self.rewards, given)

    def check_tools(self, chat: "Chat | None") -> None:
        """Check that every tool exists and gets what it needs, and that the policy's chat template, where it is known,
        writes calls that can be read. Raises UserError."""
        fields = {name: source.reward_fields for name, source in self.sources.items()}
        Toolbox(self.tools).check(fields)
        if not self.tools or chat is None:
            return
        try:
            chat.check_tools()
        except ValueError as error:
            raise UserError(
                f"stage {self.kind}: tools: {error}; use a model whose template has tools, or teach one to it"
                " (sft.chat_template: qwen3)"
            ) from None

    def check_machine(self) -> None:
        super().check_machine()
        check_packages(self.rewards)
        if self.rollout.engine == "vllm":
            from pipeline.rl import server_process

            server_process.require(self.rollout.server_options(), self.kind)

    @property
    def updates(self) -> Updates:
        """How the policy is updated."""
        raise NotImplementedError

    def responses_per_prompt(self) -> int:
        return 1

    def resample_rounds(self) -> int:
        """Further rounds of prompts that replace those whose responses all have the same score."""
        return 0

    def value_only_steps(self) -> int:
        """First iterations in which only the value model is trained."""
        return 0

    def measures_kl(self) -> bool:
        """Whether a reference is needed."""
        return True

    def measures_policy(self) -> bool:
        """Whether the policy's log-probabilities are needed before an update."""
        return True

    def trains_on_rule(self) -> bool:
        """Whether `rule` is part of the score."""
        return False

    def scored_by(self) -> dict:
        """What the scores of equal responses depend on, besides the inputs; for JSON."""
        rewards = {name: reward.model_dump(mode="json") for name, reward in self.rewards.items()}
        return {"rewards": rewards, "rule": self.rule}

    def adapts_kl_coef(self) -> bool:
        """Whether the algorithm changes the KL's weight."""
        return False

    def rolls_back(self) -> bool:
        return super().rolls_back() or any(alarm.action == "rollback" for alarm in self.alarms.values())

    def rows_of_step(self) -> int:
        return self.batch_size * self.responses_per_prompt()

    def rows_of_update(self) -> int:
        return self.rows_of_step() // self.updates.minibatches

    @classmethod
    def uses_peak(cls) -> bool:
        return False

    def sampling(self, world: int) -> "Sampling":
        from pipeline.models.sampling_cost import Sampling

        most = max(self.rows_of_step(), self.evaluate_prompts)
        rows = min(self.rollout.batch, -(-most // world))
        return Sampling(rows, self.rollout.max_new_tokens, on_demand=self.on_demand)

    def with_fewer_samples(self) -> list[Self]:
        configs: list[Self] = [self]
        while configs[-1].rollout.batch > 1:
            rollout = self.rollout.model_copy(update={"batch": configs[-1].rollout.batch // 2})
            configs.append(self.model_copy(update={"rollout": rollout}))
        return configs

    def loss_tokens(self) -> int:
        return self.rollout.max_new_tokens + 1

    def micro_rows(self, world: int) -> int:
        if self.micro_batch:
            return self.micro_batch
        share = self.rows_of_update() // world
        return min(share, max(1, MICRO_BATCH_TOKENS // self.sequence_length))

    def check_layout(self, world: int) -> None:
        super().check_layout(world)
        minibatches, samples = self.updates.minibatches, self.responses_per_prompt()
        part, rows = minibatches * world, self.rows_of_step()
        each = f" x {samples} samples" if samples > 1 else ""
        if rows % part:
            near = self.batch_size
            while near * samples % part:
                near += 1
            raise UserError(
                f"stage {self.kind}: batch_size {self.batch_size}{each} is not divisible by {minibatches} minibatches x"
                f" {world} processes; use {near}"
            )
        if self.micro_batch and (rows // part) % self.micro_batch:
            raise UserError(
                f"stage {self.kind}: a process's share of a minibatch, {rows // part} responses, is not divisible by"
                f" micro_batch {self.micro_batch}"
            )
