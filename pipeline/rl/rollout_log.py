"""Responses of some iterations, token by token, to logs/rollouts.jsonl: what the policy sampled, and the reward, value,
KL and advantage of each token. `alma report` shows them.

They are written while an iteration learns from them, and are not part of what the stage publishes.
"""

import json
import math
from pathlib import Path

import torch

from pipeline.core import distributed
from pipeline.core.tracking import drop_lines
from pipeline.data.chat.token_view import texts_of
from pipeline.rl.responses import Sample

FILE = "logs/rollouts.jsonl"
ITERATIONS = 8  # of a run whose responses are written, the first and the last among them
MOST_TOKENS = 512  # of a response


class RolloutLog:
    """Writes the first `show` responses of ITERATIONS iterations of the run in `folder`."""

    def __init__(self, folder: Path, steps: int, show: int):
        self.path, self.show = folder / FILE, show
        self.steps = {1 + round(part * (steps - 1) / (ITERATIONS - 1)) for part in range(ITERATIONS)}

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`: a resumed run writes it again."""
        if distributed.is_main():
            drop_lines(self.path, after=step)

    def write(
        self, step: int, chat, samples: list[Sample], tokens: dict[str, torch.Tensor], signal: dict[str, torch.Tensor]
    ) -> None:
        """Write the responses of an iteration if they are due. tokens, signal: [B, longest], of `tensors_of` and of the
        algorithm."""
        if step not in self.steps or not self.show or not distributed.is_main():
            return
        numbers = numbers_of(tokens, signal)
        lines = []
        for row, sample in enumerate(samples[: self.show]):
            count = min(len(sample.response_ids), MOST_TOKENS)
            line = {
                "step": step,
                "prompt": chat.decode(sample.prompt_ids),
                "score": _rounded(sample.score),
                "stopped": sample.stopped,
                "length": len(sample.response_ids),
                "tokens": texts_of(chat, sample.response_ids[:count]),
            }
            if sample.insertions:
                line["inserted"] = [[after, chat.decode(ids)] for after, ids in sample.insertions if after <= count]
            for name, values in numbers.items():
                line[name] = [_rounded(value) for value in values[row, :count].tolist()]
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        self.path.parent.mkdir(exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write("".join(lines))


def numbers_of(tokens: dict[str, torch.Tensor], signal: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is written of each token, each [B, longest]: reward, advantage, logprob (of the policy before the
    iteration's updates), and as far as they are measured value and kl (log-probability less the reference's)."""
    logprobs = tokens["logprobs"] if "logprobs" in tokens else tokens["sampled_logprobs"]
    numbers = {"reward": signal["rewards"], "advantage": signal["advantages"], "logprob": logprobs}
    if "values" in tokens:
        numbers["value"] = tokens["values"]
    if "ref_logprobs" in tokens:
        numbers["kl"] = logprobs - tokens["ref_logprobs"]
    return numbers


def _rounded(value: float) -> float | None:
    """Four significant digits; JSON has no NaN and no infinity."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
