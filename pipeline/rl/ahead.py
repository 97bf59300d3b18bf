"""Sampling one step ahead (`rollout.ahead`): the next iteration's responses are sampled while the policy learns from
this one's.

    following = ahead.start(models, prompts, seeds, first)     # before the updates
    ...
    ahead.keep(models, following, state)                       # after them: the responses are in the checkpoint
    ...
    sampled = ahead.take(state, first)                         # in the next iteration

The schedule is fixed: each response but those of the first iteration is older by the updates of one iteration, however
fast the sampler is. Kept responses are part of the run's state, so that a resumed run learns from those that the killed
one had sampled.
"""

from dataclasses import dataclass

from pipeline.core import distributed
from pipeline.rl import sampling
from pipeline.rl.experience import Models, Sampled, share
from pipeline.rl.rollout import Completion
from pipeline.rl.sampling import Waiting


@dataclass(frozen=True)
class Following:
    """Responses that are being sampled for the next iteration."""

    waiting: Waiting
    first: int
    """Number of its first prompt in the run."""
    num_updates: int
    """Updates that the policy has had."""


def start(models: Models, prompts: list[list[int]], seeds: list[int], first: int) -> Following:
    """Begin to sample for the iteration whose prompts, over all processes, begin with number `first` of the run.
    Collective."""
    temperature = models.config.rollout.temperature
    with models.policy.gathered():
        waiting = sampling.start(models, share(prompts), share(seeds), temperature=temperature)
    return Following(waiting, first, models.num_updates)


def keep(following: Following, state: dict) -> None:
    """Wait for the responses, and put them into the run's state, as JSON. Collective."""
    completions = distributed.all_gather_lists(following.waiting())
    state["ahead"] = {
        "first": following.first,
        "num_updates": following.num_updates,
        "completions": [[each.ids, each.logprobs, each.stopped] for each in completions],
    }


def take(state: dict, first: int) -> Sampled | None:
    """The kept responses, if they are to the prompts from number `first` on: after a rollback other prompts follow."""
    kept = state.pop("ahead", None)
    if kept is None or kept["first"] != first:
        return None
    return Sampled([Completion(*each) for each in kept["completions"]], kept["num_updates"])
