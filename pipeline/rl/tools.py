"""Tools in a response: the policy calls one, reads what it returns, and goes on.

A call is what the policy wrote as its chat template writes calls. The function runs in a process with a deadline, as a
reward does; its result becomes the text that the template has between a call and the next answer. The ids that were
sampled stay as they are, nothing is written again, and what tools say is read but not learned.

A call that fails is answered by a sentence that says so, and the policy goes on. Kinds of failure: those of a function
(reward_workers.Outcome), `unknown` (there is no such tool), `arguments` (it has not got these), `unreadable` (not JSON
of the expected form), `most` (more calls than `tool_calls`, which end the response).
"""

from collections.abc import Callable
from dataclasses import replace

from pipeline.core import distributed
from pipeline.core.seeds import derive
from pipeline.core.terminal import show
from pipeline.rl.prompts import Task
from pipeline.rl.responses import Sample, ToolCall, row_ids, size_of
from pipeline.rl.reward_workers import Call
from pipeline.rl.rollout import Completion
from pipeline.rl.tool_config import Toolbox
from pipeline.train import phases

# Where failures are counted that are not of a tool: no tool has this name.
NO_TOOL = "(none)"

Sampler = Callable[..., list[Completion]]
"""(prompts, seeds=, max_new_tokens=) -> completions: of sampling.own_sampler."""


def use(models, samples: list[Sample], tasks: list[Task], seeds: list[int], sampler: Sampler) -> None:
    """Answer the calls in the samples of one process, and have the policy go on after the results, until no response
    calls anything. models: of the run (experience.Models)."""
    config, toolbox = models.config, Toolbox(models.config.tools)
    open_samples = [number for number, sample in enumerate(samples) if sample.stopped]
    for turn in range(1, config.tool_calls + 2):
        calls = _calls(models, samples, open_samples)
        answers = _answers(models, toolbox, samples, tasks, calls)
        open_samples = [number for number in calls if _insert(models, samples[number], answers[number])]
        if not open_samples:
            break
        phases.enter("rollout")
        # The random numbers of a turn are its own, so that they do not depend on how long the turns before are.
        completions = sampler(
            [row_ids(samples[number]) for number in open_samples],
            seeds=[derive(seeds[number], "turn", turn) for number in open_samples],
            max_new_tokens=[_room(models, samples[number]) for number in open_samples],
        )
        for number, completion in zip(open_samples, completions, strict=True):
            sample = samples[number]
            sample.response_ids = sample.response_ids + completion.ids
            sample.sampled_logprobs = sample.sampled_logprobs + completion.logprobs
            sample.stopped = completion.stopped
        open_samples = [number for number in open_samples if samples[number].stopped]


def _room(models, sample: Sample) -> int:
    """Tokens that a response may still have, results of tools included."""
    return models.config.rollout.max_new_tokens - (size_of(sample) - len(sample.prompt_ids))


def _calls(models, samples: list[Sample], numbers: list[int]) -> dict[int, list[ToolCall]]:
    """The calls, without results, in the last turn of each response that calls something and may do so."""
    found = {}
    for number in numbers:
        sample = samples[number]
        try:
            calls = [ToolCall(call["name"], call["arguments"], "") for call in models.chat.calls(sample.last_turn)]
        except ValueError as error:
            calls = [ToolCall("", {}, f"error: the call cannot be read: {error}", "unreadable")]
        if len(sample.calls) + len(calls) > models.config.tool_calls:
            sample.calls += [replace(call, failure="most") for call in calls]
        elif calls:
            found[number] = calls
    return found


def _answers(
    models, toolbox: Toolbox, samples: list[Sample], tasks: list[Task], calls: dict[int, list[ToolCall]]
) -> dict[int, list[ToolCall]]:
    """The same calls with their results. All functions of a turn run at the same time, as far as there are
    processes."""
    planned: list[tuple[int, int, Call]] = []
    answers = {number: list(own) for number, own in calls.items()}
    for number, own in calls.items():
        for place, call in enumerate(own):
            if call.failure:
                continue
            tool = models.config.tools.get(call.name)
            try:
                if tool is None:
                    raise LookupError(f"there is no tool {call.name!r}; there is {', '.join(models.config.tools)}")
                arguments = toolbox.arguments(call.name, tasks[number].fields, call.arguments)
            except (LookupError, ValueError) as error:
                kind = "unknown" if tool is None else "arguments"
                answers[number][place] = replace(call, result=f"error: {error.args[0]}", failure=kind)
                continue
            seed = derive(models.config.seed or 0, "tool", samples[number].index, len(samples[number].calls) + place)
            planned.append((number, place, Call(tool.function, arguments, tool.seconds, tool.memory, seed, text=True)))
    outcomes = models.workers.run([call for _, _, call in planned])
    for (number, place, _), outcome in zip(planned, outcomes, strict=True):
        phases.enter("tools")  # so that the watchdog sees that a slow tool goes on
        call = answers[number][place]
        if outcome.value is None:
            result = f"error: {outcome.message}"
        else:
            result = outcome.value[: models.config.tools[call.name].characters]
        answers[number][place] = replace(call, result=result, failure=outcome.failure)
    return answers


def _insert(models, sample: Sample, calls: list[ToolCall]) -> bool:
    """Put the results of a response's last turn behind it; whether there is room to go on."""
    try:
        ids = models.chat.results([call.name for call in calls], [call.result for call in calls])
    except ValueError as error:
        calls = [replace(call, result=f"error: {error}", failure=call.failure or "value") for call in calls]
        ids = models.chat.results([""] * len(calls), [call.result for call in calls])
    sample.calls += calls
    if len(ids) >= _room(models, sample):
        sample.stopped = False  # cut off
        return False
    sample.insertions += [(len(sample.response_ids), ids)]
    return True


# ---- what became of the calls ----------------------------------------------------------------------------------------


def statistics(config, samples: list[Sample]) -> dict[str, float]:
    """Calls of a response and calls that failed, for the log; nothing without tools."""
    if not config.tools:
        return {}
    calls = [call for sample in samples for call in sample.calls]
    return {"tool_calls": len(calls) / len(samples), "tool_failures": sum(bool(call.failure) for call in calls)}


def count_failures(config, samples: list[Sample], state: dict) -> None:
    """Add the failed calls of an iteration to state["tool_failures"], tool -> kind -> number, and report each kind when
    it is first seen. The samples are those of all processes."""
    if not config.tools:
        return
    counts = state.setdefault("tool_failures", {})
    failed = [call for sample in samples for call in sample.calls if call.failure]
    for call in failed:
        name = call.name if call.name in config.tools else NO_TOOL
        kinds = counts.setdefault(name, {})
        if call.failure not in kinds and distributed.is_main():
            reason = call.result or f"more than tool_calls: {config.tool_calls} in a response"
            show(
                f"{config.kind}: tools: a call of {name} failed ({call.failure}): {reason}; further ones are counted in"
                " metrics.jsonl and in the stage's metrics"
            )
        kinds[call.failure] = kinds.get(call.failure, 0) + 1
