"""The score of each response: of the reward model, or the weighted sum of the rewards that the recipe names."""

from collections import Counter
from dataclasses import asdict

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.seeds import derive
from pipeline.core.terminal import show
from pipeline.rl.process_reward import COMBINE
from pipeline.rl.prompts import Task
from pipeline.rl.responses import Sample
from pipeline.rl.reward_config import GIVEN, MODEL, PROCESS, Reward, parameters_of
from pipeline.rl.reward_workers import Call
from pipeline.train import phases
from pipeline.train.scores import reward_scores


def add_scores(models, samples: list[Sample], tasks: list[Task]) -> None:
    """Set `score` of each of this process's samples, and `rewards` and `failures` if the recipe names rewards.
    models: of the run (experience.Models). Collective."""
    rewards = models.config.rewards
    of_model: list[float] = []
    if models.config.uses_reward_model():
        of_model = score(models, samples, tasks)
    if not rewards:
        for sample, value in zip(samples, of_model, strict=True):
            sample.score = value
        return
    of_process: list[list[float] | str] = []
    if models.process is not None:
        of_process = models.process.steps(models, samples, tasks)
    for name, reward in rewards.items():
        if reward.function == MODEL:
            for sample, value in zip(samples, of_model, strict=True):
                sample.rewards[name] = value
        elif reward.function == PROCESS:
            _combine(name, reward, samples, of_process)
        else:
            _call(models, name, reward, samples, tasks)
    for sample in samples:
        sample.score = sum(reward.weight * sample.rewards[name] for name, reward in rewards.items())


def score(models, samples: list[Sample], tasks: list[Task]) -> list[float]:
    """The reward model's score at the last token of each response, as published (calibrated by the reward stage on
    its own answers). Collective."""
    conversations = [_read_by_reward(models, sample, task) for sample, task in zip(samples, tasks, strict=True)]
    with models.as_reward() as reward, models.autocast():
        if not conversations:
            return []
        return reward_scores(reward, conversations, models.config.rollout.batch).tolist()


def _read_by_reward(models, sample: Sample, task: Task) -> list[int]:
    """What the reward model reads: the policy's own ids, or the same conversation in its own tokens. A response that
    was cut off gets no end of turn."""
    chat = models.reward_chat
    if chat is None:
        return sample.prompt_ids + sample.response_ids
    return chat.answered(task.dialogue, models.text(sample), sample.stopped)


def _combine(name: str, reward: Reward, samples: list[Sample], scores: list[list[float] | str]) -> None:
    """scores: of the steps of each sample, or why it has none."""
    for sample, steps in zip(samples, scores, strict=True):
        if isinstance(steps, str):
            sample.rewards[name], sample.failures[name] = reward.failed, ("unreadable", steps)
        else:
            sample.rewards[name] = COMBINE[reward.combine](steps)


def _call(models, name: str, reward: Reward, samples: list[Sample], tasks: list[Task]) -> None:
    parameters = parameters_of(reward, f"rewards.{name}")
    calls = []
    for sample, task in zip(samples, tasks, strict=True):
        known = dict(zip(GIVEN, (models.text(sample), task.dialogue.messages, sample.stopped), strict=True))
        if models.config.tools:
            known["calls"] = [asdict(call) for call in sample.calls]
        known |= task.fields | reward.arguments
        if task.answer is not None:
            known.setdefault("answer", task.answer)
        arguments = known
        if not parameters.takes_any:
            arguments = {key: value for key, value in known.items() if key in parameters.names}
        seed = derive(models.config.seed or 0, "reward", sample.index)
        calls.append(Call(reward.function, arguments, reward.seconds, reward.memory, seed))
    for sample, outcome in zip(samples, models.workers.run(calls), strict=True):
        phases.enter("rewards")  # so that the watchdog sees that a slow reward goes on
        sample.rewards[name] = reward.failed if outcome.value is None else outcome.value
        if outcome.failure:
            sample.failures[name] = (outcome.failure, outcome.message)


def import_functions(models) -> None:
    """Import the files of all functions once, so that a mistake in one is found before anything is sampled. Raises
    UserError."""
    functions = {f"tools.{name}": tool for name, tool in models.config.tools.items()}
    own = {name: reward for name, reward in models.config.rewards.items() if not reward.is_model}
    functions |= {f"rewards.{name}": reward for name, reward in own.items()}
    for key, each in functions.items():
        call = Call(each.function, {}, each.seconds, each.memory, 0, only_import=True)
        (outcome,) = models.workers.run([call])
        if outcome.value is None:
            raise UserError(
                f"stage {models.config.kind}: {key}: {each.function} cannot be imported: {outcome.failure}:"
                f" {outcome.message}"
            )


# ---- what became of the calls ----------------------------------------------------------------------------------------


def statistics(config, samples: list[Sample]) -> dict[str, float]:
    """Mean of each reward, and how many of its calls failed, for the log."""
    numbers = {}
    for name in config.rewards:
        numbers[f"reward/{name}"] = sum(sample.rewards[name] for sample in samples) / len(samples)
    return numbers | failures_of(config, samples)


def failures_of(config, samples: list[Sample]) -> dict[str, int]:
    """How many calls of each reward failed, for the log."""
    numbers = {}
    for name in config.fallible_rewards():
        numbers[f"reward_failures/{name}"] = sum(name in sample.failures for sample in samples)
    return numbers


def count_failures(config, samples: list[Sample], state: dict) -> None:
    """Add the failed calls of an iteration to state["reward_failures"], name -> kind -> number, and report each kind
    when it is first seen. Raises UserError if every call of a function has failed: there is nothing to learn from.
    The samples are those of all processes, so that all of them count and end alike."""
    counts = state.setdefault("reward_failures", {})
    for name in config.rewards:
        failures = [sample.failures[name] for sample in samples if name in sample.failures]
        before = counts.setdefault(name, {})
        for kind, number in Counter(kind for kind, _ in failures).items():
            message = next(message for other, message in failures if other == kind)
            if kind not in before and distributed.is_main():
                show(
                    f"{config.kind}: rewards.{name}: {number} of {len(samples)} calls failed: {kind}: {message};"
                    " further ones are counted in metrics.jsonl and in the stage's metrics"
                )
            before[kind] = before.get(kind, 0) + number
        if sum(kind != "processes" for kind, _ in failures) == len(samples):
            kind, message = failures[-1]
            advice = "correct the function, or raise seconds or memory"
            if config.rewards[name].is_model:
                advice = "give a process reward model whose chat template writes such answers"
            raise UserError(
                f"stage {config.kind}: rewards.{name}: all {len(samples)} calls of {config.rewards[name].function} of"
                f" an iteration failed, the last one: {kind}: {message}; {advice}"
            )
