"""A vLLM server that samples a stage's responses: it gets the policy's weights, and is asked for completions.

    server = RolloutServer(config, stop_ids, tokenizer_folder, work_folder)
    server.update(weights, model_config)       # new weights, proved equal by their checksums
    completions = server.complete(requests, max_new_tokens=64, temperature=1.0)
    server.close()

Weights travel as files: the folder that the server serves is written again, and vLLM's `reload_weights` reads it. What
is lost, too slow or has other weights is started again, `rollout.server.restarts` times in a run; then the run ends
with a UserError. No call waits longer than its seconds.
"""

import hashlib
import re
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from pipeline.core.errors import UserError
from pipeline.core.terminal import plural, show
from pipeline.models import lora, publish
from pipeline.rl import server_client
from pipeline.rl.rollout import Completion
from pipeline.rl.server_client import NAME, Request, ServerError, Slow
from pipeline.rl.server_process import ServerProcess

NORM = re.compile(r"norm|(^|\.)ln_")  # in the name of a weight

# Tries of a request at a server that says that it is well, before it is started again.
TRIES = 3


class RolloutServer:
    """The server of a stage; for its main process. `num_updates`: of the policy whose weights it has; None: none."""

    def __init__(self, config, stop_ids: list[int], tokenizer_folder: Path, work: Path):
        """work: a folder for the weights and the server's log."""
        self.kind, self.rollout, self.stop_ids = config.kind, config.rollout, stop_ids
        self.options = config.rollout.server_options()
        self.tokenizer_folder, self.weights = tokenizer_folder, work / "weights"
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        words = ["--served-model-name", NAME, "--dtype", str(self.dtype).removeprefix("torch.")]
        words += ["--max-model-len", str(config.sequence_length), "--generation-config", "vllm"]
        words += ["--logprobs-mode", "processed_logprobs"]
        self.process = ServerProcess(self.options, self.weights, words, work / "server.log")
        self.num_updates: int | None = None
        self.num_restarts = 0
        self.num_answers = 0
        self.expected: dict[str, str] = {}
        self.difference: float | None = None
        """Mean difference of its log-probabilities from the trainer's after the last new weights, in nats per token."""
        self.is_closed = False

    def progress(self) -> int:
        """A number that grows while it works, or is started again."""
        return self.num_answers + self.num_restarts

    def numbers(self) -> dict[str, float]:
        """For the log."""
        return {"sync_difference": self.difference, "server_restarts": self.num_restarts}

    # ---- weights -----------------------------------------------------------------------------------------------------

    def update(self, model) -> None:
        """Give it the weights of a complete model. Raises UserError if it cannot be made to have them."""
        weights = served_weights(model, self.dtype)
        self.expected = checksums_of(weights)
        publish.publish(weights, model.config, self.tokenizer_folder, self.weights)
        if self.process.process is None:
            self.start_again(None)
            return
        try:
            server_client.reload(self.process.port, self.options.answer)
            self._compare_checksums()
        except ServerError as error:
            self.start_again(str(error))

    def start_again(self, reason: str | None) -> None:
        """Start it with the weights that it was given last. reason: why the one before is not used any more; None for
        the first one. Raises UserError after too many times."""
        while True:
            if reason is not None:
                self._count_restart(reason)
            try:
                self.process.start()
                self._compare_checksums()
            except ServerError as error:
                reason = str(error)
            else:
                return

    def _count_restart(self, reason: str) -> None:
        if self.is_closed:
            raise UserError(f"stage {self.kind}: the rollout server was ended with its stage")
        if self.num_restarts == self.options.restarts:
            raise UserError(
                f"stage {self.kind}: the rollout server was lost"
                f" {plural(self.num_restarts + 1, 'time')}, more than rollout.server.restarts allows; the last time:"
                f" {reason}{self._log_of(reason)}"
            )
        self.num_restarts += 1
        show(
            f"{self.kind}: the rollout server is started again ({self.num_restarts} of {self.options.restarts}):"
            f" {reason}"
        )

    def _log_of(self, reason: str) -> str:
        return "" if str(self.process.log) in reason else self.process.last_lines()

    def _compare_checksums(self) -> None:
        """Raise ServerError if a tensor that it keeps as it was given has another checksum."""
        found = server_client.checksums(self.process.port, self.options.answer)
        compared = 0
        for name, checksum in found.items():
            own = name.rpartition(":")[2]  # after the ranks that hold it
            if own not in self.expected:
                continue
            compared += 1
            if checksum != self.expected[own]:
                raise ServerError(f"its weights are not those that it was given: {own} has another checksum")
        if not compared:
            raise UserError(
                f"stage {self.kind}: none of the rollout server's {len(found)} weights has the name of one of the"
                f" model's norms, so that its weights cannot be proved equal; its first is {next(iter(found), None)}"
            )

    # ---- completions -------------------------------------------------------------------------------------------------

    def complete(self, requests: list[Request], *, max_new_tokens: int, temperature: float) -> list[Completion]:
        """A completion of each request, in their order. Requests that fail are made again; at a server that was lost,
        by another one. Raises UserError."""
        completions: dict[int, Completion] = {}
        failures = 0
        while len(completions) < len(requests):
            missing = [index for index in range(len(requests)) if index not in completions]
            failure = self._attempt(requests, missing, completions, max_new_tokens, temperature)
            if failure is None:
                continue
            failures += 1
            is_well = not isinstance(failure, Slow) and self.process.is_healthy()
            if not is_well or failures % TRIES == 0:
                self.start_again(str(failure))
        return [completions[index] for index in range(len(requests))]

    def _attempt(
        self,
        requests: list[Request],
        missing: list[int],
        completions: dict[int, Completion],
        max_new_tokens: int,
        temperature: float,
    ) -> ServerError | None:
        """Make the missing requests, `rollout.batch` at a time, and add what comes back. Returns a failure, if there
        was one."""

        def ask(index: int) -> Completion:
            return server_client.completion(
                self.process.port,
                requests[index],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_ids=self.stop_ids,
                seconds=self.options.answer,
            )

        failure: ServerError | None = None
        with ThreadPoolExecutor(min(self.rollout.batch, len(missing)), thread_name_prefix="rollout") as pool:
            waiting: dict[Future, int] = {pool.submit(ask, index): index for index in missing}
            while waiting:
                done, _ = wait(waiting, timeout=self.options.answer + 5, return_when=FIRST_COMPLETED)
                if not done:  # a call that has outlived its own deadline
                    failure = Slow(f"no response within {self.options.answer:g} s")
                for future in done:
                    index = waiting.pop(future)
                    try:
                        completions[index] = future.result()
                        self.num_answers += 1
                    except ServerError as error:
                        failure = error
                if isinstance(failure, Slow):
                    self.process.end()  # so that the other calls end
                    pool.shutdown(wait=True, cancel_futures=True)
                    break
        return failure

    def close(self) -> None:
        """End it and remove the weights. Another thread that waits for completions gets a UserError."""
        self.is_closed = True
        self.process.end()
        shutil.rmtree(self.weights, ignore_errors=True)


@torch.no_grad()
def served_weights(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights with which a model computes, adapters merged, on the CPU."""
    merged = {f"{name}.weight": layer for name, layer in lora.adapted_layers(model).items()}
    weights = {}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[2] in lora.PARAMETERS:
            continue
        if name in merged:
            value = merged[name].merged_weight()
        if value.is_floating_point():
            value = value.to(dtype)
        weights[name] = value.detach().to("cpu", copy=True)
    return weights


def checksums_of(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each vector of a norm. A server joins, splits and pads matrices and biases, but keeps norms as they
    are; the log-probabilities show what matrices it has."""
    checksums = {}
    for name, value in weights.items():
        if value.ndim == 1 and NORM.search(name):
            data = value.contiguous().view(torch.uint8).numpy()
            checksums[name] = hashlib.sha256(data.data).hexdigest()
    return checksums
