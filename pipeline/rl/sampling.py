"""Responses of a stage's policy, whatever samples them: its own module, or a vLLM server (`rollout.engine`).

    completions = sample(models, prompts, seeds, temperature=1.0)
    waiting = start(models, prompts, seeds, temperature=1.0)      # the same in two steps
    ...                                                           # something else, such as updates of the policy
    completions = waiting()

`prompts` and `seeds` are this process's, and so are the completions. A completion of the policy's own module is a
function of the weights, its prompt and its seed; one of a server depends also on what else the server computes at that
moment, by rounding. The policy must have its complete parameters (Engine.gathered).
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.rl.responses import Sample, layout, predict, token_statistics
from pipeline.rl.rollout import Completion, generate
from pipeline.rl.server import RolloutServer
from pipeline.rl.server_client import Request
from pipeline.train import phases

Waiting = Callable[[], list[Completion]]

# After new weights, a server's log-probabilities are compared with the trainer's: so many responses of so many tokens.
PROBES, PROBE_TOKENS = 4, 8


def sample(models, prompts: list[list[int]], seeds: list[int], *, temperature: float) -> list[Completion]:
    """Sample a completion for each prompt with the policy as it is now. models: of the run (experience.Models).
    Collective. Raises UserError if a server cannot be made to answer."""
    return start(models, prompts, seeds, temperature=temperature)()


def start(models, prompts: list[list[int]], seeds: list[int], *, temperature: float) -> Waiting:
    """Begin to sample with the policy as it is now; what is returned waits for the completions. Collective, and so is
    waiting. The policy's own module samples at once."""
    config = models.config
    if models.server is None:
        sampler = own_sampler(models, temperature)
        completions = sampler(prompts, seeds=seeds, max_new_tokens=config.rollout.max_new_tokens)
        return lambda: completions
    requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    parts = distributed.all_gather_object(requests)
    every = [request for part in parts for request in part]
    _synchronise(models, every)
    future = None
    if distributed.is_main():
        pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        options = {"max_new_tokens": config.rollout.max_new_tokens, "temperature": temperature}
        future = pool.submit(models.server.complete, every, **options)
        pool.shutdown(wait=False)
    first = sum(len(part) for part in parts[: distributed.rank()])
    return lambda: _result(models.server, future)[first : first + len(prompts)]


def own_sampler(models, temperature: float) -> Callable[..., list[Completion]]:
    """(prompts, seeds=, max_new_tokens=) -> completions of the policy's own module (rollout.generate), which computes
    as the trainer does. Around all tokens, autocast rounds each weight once."""

    def sampler(prompts: list[list[int]], **options) -> list[Completion]:
        with models.autocast():
            return generate(
                models.policy.model,
                prompts,
                temperature=temperature,
                stop_ids=models.stop_ids,
                pad_id=models.pad_id,
                batch=models.config.rollout.batch,
                **options,
            )

    return sampler


def _result(server: RolloutServer, future: Future | None) -> list[Completion]:
    """What the main process has waited for. Collective."""
    outcome = None
    if future is not None:
        progress = server.progress()
        while not wait([future], timeout=1).done:
            if server.progress() != progress:  # so that the watchdog sees that the server works
                progress = server.progress()
                phases.enter("rollout")
        try:
            outcome = future.result(), None
        except UserError as error:
            outcome = None, str(error)
    completions, problem = distributed.from_main(outcome)
    if problem:
        raise UserError(problem)
    return completions


def _synchronise(models, requests: list[Request]) -> None:
    """Give the server the policy's weights, if it has others, and prove that it has them. Collective."""
    server = models.server
    if server.num_updates == models.num_updates:
        return
    problem = None
    if distributed.is_main():
        try:
            server.update(models.policy.model)
            _compare_logprobs(models, requests[:PROBES])
        except UserError as error:
            problem = str(error)
    problem = distributed.from_main(problem)
    if problem:
        raise UserError(problem)
    server.num_updates = models.num_updates


def _compare_logprobs(models, requests: list[Request]) -> None:
    """Compare log-probabilities of a few responses at the server with the trainer's; a server that differs too much is
    started again once. Raises UserError if that does not help."""
    server, config = models.server, models.config
    tokens = min(PROBE_TOKENS, config.rollout.max_new_tokens)
    for is_last in (False, True):
        answers = server.complete(requests, max_new_tokens=tokens, temperature=config.rollout.temperature)
        server.difference = _difference(models, requests, answers)
        if server.difference <= server.options.tolerance:
            return
        found = (
            f"with new weights, its log-probabilities differ by {server.difference:.2g} nats per token from those of"
            f" the trainer, more than rollout.server.tolerance {server.options.tolerance:g}"
        )
        if not is_last:
            server.start_again(found)
    raise UserError(
        f"stage {config.kind}: the rollout server: {found}, also after a start; if that is what its arithmetic gives,"
        " raise the tolerance, or use precision: fp32"
    )


@torch.no_grad()
def _difference(models, requests: list[Request], answers: list[Completion]) -> float:
    """Mean absolute difference of log-probabilities over all tokens of the answers."""
    samples = []
    for request, answer in zip(requests, answers, strict=True):
        samples.append(Sample(0, request.prompt_ids, answer.ids, answer.stopped, answer.logprobs))
    model = models.policy.model
    batch = layout(samples, models.pad_id, next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with models.autocast():
            logprobs, _ = token_statistics(predict(model, batch), batch["labels"], models.config.rollout.temperature)
    finally:
        model.train(training)
    theirs = torch.tensor([value for sample in samples for value in sample.sampled_logprobs])
    return float((logprobs[batch["mask"].bool()].float().cpu() - theirs).abs().mean())
