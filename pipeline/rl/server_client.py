"""Plain HTTP to a vLLM server on this machine. Every call ends within its seconds: with an answer, a ServerError for
what may go away, or a UserError for what the server refuses.

    call(port, "/health", None, seconds=5)
    completion(port, Request(prompt_ids, seed), max_new_tokens=64, temperature=1.0, stop_ids=[2], seconds=300)
"""

import http.client
import json
import math
import time
from dataclasses import dataclass

from pipeline.core.errors import UserError
from pipeline.rl.rollout import Completion

NAME = "policy"  # of the model at the server


class ServerError(Exception):
    """A call without a usable answer. It may succeed when it is made again, or by another server."""


class Slow(ServerError):
    """No answer in time."""


@dataclass(frozen=True)
class Request:
    """One response to one prompt."""

    prompt_ids: list[int]
    seed: int


def call(port: int, path: str, body: dict | None, seconds: float):
    """The answer to GET path, or to POST path with a body, from JSON; None for an empty one."""
    try:
        status, content = _exchange(port, path, body, seconds)
    except TimeoutError:
        raise Slow(f"{path}: no answer within {seconds:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{path}: {type(error).__name__}: {error}") from None
    text = content.decode("utf-8", errors="replace")
    if status >= 500:
        raise ServerError(f"{path}: HTTP {status}: {text[:200]}")
    if status != 200:
        raise UserError(f"the rollout server refuses {path}: HTTP {status}: {text[:500]}")
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError:
        raise ServerError(f"{path}: its answer is not JSON: {text[:200]!r}") from None


def _exchange(port: int, path: str, body: dict | None, seconds: float) -> tuple[int, bytes]:
    """(status, content). The time is that of the whole exchange: each read waits for what is left of it."""
    deadline = time.monotonic() + seconds
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        stream = connection.sock
        response = connection.getresponse()
        parts = []
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            stream.settimeout(left)
            part = response.read1(1 << 20)
            if not part:
                break
            parts.append(part)
        if response.length:  # bytes that were announced and did not come
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        return response.status, b"".join(parts)
    finally:
        connection.close()


def completion(
    port: int, request: Request, *, max_new_tokens: int, temperature: float, stop_ids: list[int], seconds: float
) -> Completion:
    """One response from the whole distribution, with the log-probability of each token."""
    body = {
        "model": NAME,
        "prompt": request.prompt_ids,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": request.seed,
        "logprobs": 1,
        "return_token_ids": True,
        "stop_token_ids": stop_ids,
        "ignore_eos": True,  # stop_ids are all at which a response ends
        "skip_special_tokens": False,
    }
    answer = call(port, "/v1/completions", body, seconds)
    try:
        (choice,) = answer["choices"]
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        prompt_ids = choice["prompt_token_ids"]
    except (KeyError, TypeError, ValueError):
        raise ServerError(f"/v1/completions: no token ids or no log-probabilities in {answer!r:.300}") from None
    _check(request, prompt_ids, ids, logprobs, max_new_tokens, stop_ids)
    return Completion(ids, logprobs, ids[-1] in stop_ids)


def _check(request: Request, prompt_ids, ids, logprobs, max_new_tokens: int, stop_ids: list[int]) -> None:
    """Raise ServerError for an answer to another prompt, or one that is not complete."""
    if prompt_ids != request.prompt_ids:
        raise ServerError("/v1/completions: the answer is to another prompt than the one that was sent")
    if not ids or len(ids) != len(logprobs) or len(ids) > max_new_tokens:
        raise ServerError(f"/v1/completions: {len(ids)} tokens and {len(logprobs)} log-probabilities came back")
    if ids[-1] not in stop_ids and len(ids) < max_new_tokens:
        raise ServerError(f"/v1/completions: a response of {len(ids)} tokens ended without a stop token")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs):
        raise ServerError("/v1/completions: a log-probability is not a finite number")


def reload(port: int, seconds: float) -> None:
    """Have the server read the files of its model again, and forget what it has computed with the weights before."""
    call(port, "/collective_rpc", {"method": "reload_weights"}, seconds)
    call(port, "/reset_prefix_cache", {}, seconds)


def checksums(port: int, seconds: float) -> dict[str, str]:
    """SHA-256 of each weight as the server keeps it, by its own names."""
    answer = call(port, "/weight_checker", {"action": "checksum"}, seconds)
    try:
        return dict(answer["checksums"])
    except (KeyError, TypeError, ValueError):
        raise ServerError(f"/weight_checker: an answer without checksums: {answer!r:.300}") from None
