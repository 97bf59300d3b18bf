"""Alarms over the numbers of an iteration: each has a healthy range, and an action for when a number leaves it.

    verdict = judge(config, state, stats)      # after every iteration

They are judged from the run's state and the iteration's numbers, which are equal on all processes, and what they
remember is in the checkpoint: a resumed run raises the alarms of one that was not killed. docs/ppo.md gives each range
and its source.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from pipeline.core import distributed
from pipeline.core.config import Strict, refuse_unused
from pipeline.core.terminal import plural, show

AlarmName = Literal[
    "kl",
    "kl_growth",
    "length",
    "repetition",
    "entropy",
    "eos_rate",
    "proxy_gap",
    "clip_fraction",
    "equal_groups",
    "reward_failures",
]
Action = Literal["off", "warn", "raise_beta", "lower_rate", "rollback", "stop"]

# Iterations whose mean is what a run began with, and iterations whose mean or median is where it is now.
WINDOW = 8


# How often an alarm may change kl_coef or the learning rates. 10 times the default factor of 1.5 is a factor of 58;
# what that does not cure is another fault, and without an end the rate would go to 0 and kl_coef to infinity.
CHANGES = 10


@dataclass(frozen=True)
class Healthy:
    """The range of a number in which nothing is wrong."""

    noun: str
    low: float = -math.inf
    high: float = math.inf


HEALTHY: dict[str, Healthy] = {
    "kl": Healthy("KL to the reference in nats per response", high=12.0),
    "kl_growth": Healthy(f"rise of the KL above its median of {WINDOW} iterations, in nats per response", high=4.0),
    "length": Healthy("mean length of the responses over that of the first iterations", 0.5, 2.0),
    "repetition": Healthy("share of repeated trigrams", high=0.3),
    "entropy": Healthy("entropy over that of the first iterations", low=0.1),
    "eos_rate": Healthy("share of responses that end by themselves", low=0.8),
    "proxy_gap": Healthy("fall of the rule since the first iterations, while the reward rose", high=0.1),
    "clip_fraction": Healthy("share of tokens whose ratio is clipped", high=0.3),
    "equal_groups": Healthy("share of groups whose scores are all equal", high=0.8),
    "reward_failures": Healthy("share of calls of a reward that fail", high=0.05),
}


class Alarm(Strict):
    """What is done when a number of the iterations is outside its healthy range (docs/ppo.md)."""

    action: Action = "warn"
    """warn: a line is printed; raise_beta: kl_coef is multiplied by `factor`; lower_rate: the learning rates are
    divided by it; rollback: return to the newest checkpoint and continue with other prompts, spikes.rollbacks times,
    then stop; stop: the run ends; off: nothing."""
    above: float | None = None
    """Upper end of the range; none: that of the healthy range."""
    below: float | None = None
    """Lower end of the range; none: that of the healthy range."""
    in_a_row: int = Field(2, ge=1)
    """Iterations outside the range, one after another, after which the alarm is raised."""
    factor: float = Field(1.5, gt=1)
    """Of raise_beta and lower_rate, which are repeated every `in_a_row` iterations outside the range, at most 10 times
    in a run; then the alarm only warns."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if self.action == "off":
            for key in ("above", "below", "in_a_row"):
                refuse_unused(self, key, "says when an alarm is raised, and action: off raises none")
        if self.action not in ("raise_beta", "lower_rate"):
            refuse_unused(self, "factor", f"is for raise_beta and lower_rate, and action is {self.action}")
        if self.above is not None and self.below is not None and self.above <= self.below:
            raise ValueError(f"above: {self.above:g} is not more than below: {self.below:g}")
        return self


def alarm_of(config, name: str) -> Alarm:
    """The alarm of a stage's config; those that it does not name warn."""
    return config.alarms.get(name, Alarm())


def range_of(config, name: str) -> tuple[float, float]:
    alarm, healthy = alarm_of(config, name), HEALTHY[name]
    low = healthy.low if alarm.below is None else alarm.below
    high = healthy.high if alarm.above is None else alarm.above
    return low, high


# ---- what a recipe may ask for ---------------------------------------------------------------------------------------


def obstacle(config, name: str) -> str | None:
    """Why a stage cannot have this alarm, in words, or None."""
    if name in ("kl", "kl_growth") and not config.measures_kl():
        return "needs the KL, which is not measured with kl_coef: 0"
    if name == "proxy_gap" and not rules_of(config):
        return "needs a rule that is not trained on: `rule`, or a reward with weight: 0"
    if name == "equal_groups" and config.responses_per_prompt() == 1:
        return "is about the responses to one prompt, and each prompt has one"
    if name == "reward_failures" and not config.fallible_rewards():
        return "counts calls of reward functions, and there are none"
    return None


def check(config) -> None:
    """Raises ValueError for an alarm that could never be raised, or could do nothing."""
    for name, alarm in config.alarms.items():
        why = obstacle(config, name)
        if why is not None:
            raise ValueError(f"alarms.{name} {why}; remove it")
        if alarm.action != "raise_beta":
            continue
        if not config.measures_kl() or config.updates.kl_coef == 0:
            raise ValueError(f"alarms.{name}.action: raise_beta multiplies kl_coef, which is 0; give kl_coef")
        if config.adapts_kl_coef():
            raise ValueError(
                f"alarms.{name}.action: raise_beta changes kl_coef, which kl_target adapts already; remove one"
            )


def rules_of(config) -> list[str]:
    """Names, in an iteration's numbers, of what measures the task and is not trained on."""
    rules = ["rule"] if config.rule is not None and config.trains_on_rule() is False else []
    return rules + [f"reward/{name}" for name, reward in config.rewards.items() if reward.weight == 0]


# ---- measuring -------------------------------------------------------------------------------------------------------


def _kl_growth(config, memory: dict, stats: dict) -> float | None:
    earlier = memory["last"].get("kl", [])
    return stats["kl"] - statistics.median(earlier) if len(earlier) == WINDOW else None


def _relative(key: str) -> Callable[[object, dict, dict], float | None]:
    def relative(config, memory: dict, stats: dict) -> float | None:
        first = memory["first"].get(key, [])
        if len(first) < WINDOW or not math.fsum(first):
            return None
        return stats[key] / (math.fsum(first) / WINDOW)

    return relative


def _proxy_gap(config, memory: dict, stats: dict) -> float | None:
    """The largest fall of a rule; 0 if the reward has not risen."""

    def is_known(key: str) -> bool:
        return all(len(memory[when].get(key, [])) == WINDOW for when in ("first", "last"))

    def rise(key: str) -> float:
        return (math.fsum(memory["last"][key]) - math.fsum(memory["first"][key])) / WINDOW

    rules = [rule for rule in rules_of(config) if is_known(rule)]
    if memory["iterations"] < 2 * WINDOW or not is_known("reward") or not rules:
        return None
    if rise("reward") <= 0:
        return 0.0
    return max(-rise(rule) for rule in rules)


def _failures(config, memory: dict, stats: dict) -> float:
    failed = max(stats[f"reward_failures/{name}"] for name in config.fallible_rewards())
    return failed / stats["reward_calls"]


def _plain(key: str) -> Callable[[object, dict, dict], float | None]:
    return lambda config, memory, stats: stats.get(key)


MEASURES: dict[str, Callable[[object, dict, dict], float | None]] = {
    "kl": _plain("kl"),
    "kl_growth": _kl_growth,
    "length": _relative("length_mean"),
    "repetition": _plain("repetition"),
    "entropy": _relative("entropy"),
    "eos_rate": _plain("eos_rate"),
    "proxy_gap": _proxy_gap,
    "clip_fraction": _plain("clip_fraction"),
    "equal_groups": _plain("equal_groups"),
    "reward_failures": _failures,
}


def _remember(config, memory: dict, stats: dict) -> None:
    memory["iterations"] += 1
    for key in ("kl", "length_mean", "entropy", "reward", *rules_of(config)):
        if not math.isfinite(stats.get(key, math.nan)):
            continue
        memory["last"][key] = [*memory["last"].get(key, []), stats[key]][-WINDOW:]
        if len(memory["first"].setdefault(key, [])) < WINDOW:
            memory["first"][key].append(stats[key])


# ---- judging ---------------------------------------------------------------------------------------------------------


def judge(config, state: dict, stats: dict) -> tuple[str, str] | None:
    """Judge an iteration by its numbers. Raises alarms: prints them, counts them in state["alarms"], changes kl_coef
    and lr_scale of the state, and adds `alarm/NAME` to the numbers. Returns ("rollback" or "stop", why) if an alarm
    asks for it. Collective."""
    memory = state.setdefault("alarms", _memory())
    verdicts = []
    # One process measures: a number that rounding puts on either side of a limit must not part the others.
    values = distributed.from_main(_values(config, memory, stats) if distributed.is_main() else None)
    for name, value in values.items():
        low, high = range_of(config, name)
        if low <= value <= high:
            memory["outside"][name] = 0
            continue
        memory["outside"][name] = memory["outside"].get(name, 0) + 1
        alarm = alarm_of(config, name)
        is_used_up = memory["changes"].get(name, 0) == CHANGES
        action = "warn" if is_used_up else alarm.action
        if _is_raised(action, alarm.in_a_row, memory["outside"][name]):
            memory["raised"][name] = memory["raised"].get(name, 0) + 1
            stats[f"alarm/{name}"] = value
            reason = f"alarm {name}: {HEALTHY[name].noun}: {value:.3g} {_outside(value, low, high)}"
            if alarm.in_a_row > 1:
                reason += f" for {plural(memory['outside'][name], 'iteration')}"
            if action in ("rollback", "stop"):
                verdicts.append((action, reason))
                continue
            if action != "warn":
                reason += _change(state, alarm)
                memory["changes"][name] = memory["changes"].get(name, 0) + 1
                if memory["changes"][name] == CHANGES:
                    reason += f"; that was the last of {CHANGES} changes, this alarm only warns from now on"
            if distributed.is_main():
                show(f"{config.kind}: step {state['step']}: {reason}")
    _remember(config, memory, stats)
    verdicts.sort(key=lambda verdict: verdict[0] != "stop")
    return verdicts[0] if verdicts else None


def _memory() -> dict:
    """What a run begins with: iterations judged so far, the first and last WINDOW values of each number, and by alarm
    the iterations outside its range in a row, how often it was raised, and how often it changed kl_coef or rates."""
    return {"iterations": 0, "first": {}, "last": {}, "outside": {}, "raised": {}, "changes": {}}


def _values(config, memory: dict, stats: dict) -> dict[str, float]:
    """The number of each alarm that is on and can be judged in this iteration."""
    values = {}
    for name, measure in MEASURES.items():
        if alarm_of(config, name).action == "off" or obstacle(config, name) is not None:
            continue
        value = measure(config, memory, stats)
        if value is not None:
            values[name] = value
    return values


def _is_raised(action: str, in_a_row: int, outside: int) -> bool:
    """A warning is given once until the number has been inside its range again; the other actions are repeated."""
    if action == "warn":
        return outside == in_a_row
    return outside % in_a_row == 0


def _outside(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "is not a number"
    return f"is above {high:g}" if value > high else f"is below {low:g}"


def _change(state: dict, alarm: Alarm) -> str:
    """Change kl_coef or the scale of the learning rates. Returns the end of the sentence that says so."""
    if alarm.action == "raise_beta":
        state["kl_coef"] *= alarm.factor
        return f"; kl_coef is now {state['kl_coef']:.3g}"
    state["lr_scale"] = state.get("lr_scale", 1.0) / alarm.factor
    return f"; learning rates are now {state['lr_scale']:.3g} of the schedule's"


def carry(before: dict, state: dict) -> None:
    """After a rollback to a checkpoint's `state`: keep how often each alarm was raised, and count the iterations
    outside a range from 0, because those that led to the alarm are undone. before: the state before the rollback."""
    memory = state.setdefault("alarms", _memory())
    memory["raised"] = dict(before["alarms"]["raised"])
    memory["outside"] = {}


def summary_of(state: dict) -> str:
    """How often each alarm was raised, in words; empty if none was."""
    raised = state.get("alarms", {}).get("raised", {})
    return ", ".join(f"{name} {count}" for name, count in sorted(raised.items()))
