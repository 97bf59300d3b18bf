"""Functions of the task files in assessment/tasks, as lm-eval calls them. Who changes what one computes raises the
version of the task (its metadata), by which it counts."""

import functools

from pipeline.rl.verifiers import FENCE


def with_whole_answers(dataset):
    """The questions whose answer is a whole number."""
    return dataset.filter(lambda doc: str(doc["answer"]).lstrip("-").isdigit())


def passes_tests(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether a function of HumanEval, as a model has completed or rewritten it, passes its tests."""
    from pipeline.rl.reward_workers import Call

    answer = results[0]
    blocks = FENCE.findall(answer)
    program = doc["prompt"] + answer
    if blocks:  # a chat model writes the whole function; imports above it are the question's
        program = doc["prompt"].partition(f"def {doc['entry_point']}")[0] + blocks[-1][1]
    tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
    arguments = {"response": program, "tests": tests, "seconds": 10.0}
    [outcome] = _workers().run([Call("code", arguments, seconds=30.0, memory=4.0, seed=0)])
    return {"pass_at_1": outcome.value or 0.0}


@functools.cache
def _workers():
    from pipeline.rl.reward_workers import RewardWorkers

    return RewardWorkers(1)
