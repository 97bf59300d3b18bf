"""NEFTune (Jain et al., 2023): uniform noise on the embeddings of what is trained on.

    noise = attach(model, alpha=5)
    noise.expect([[[(seed, 12), (seed, 30)]]])     # one micro-batch of one row of two conversations
    model.train()(input_ids)

A conversation of L tokens gets noise between -alpha / sqrt(L * width) and alpha / sqrt(L * width), from a seed of its
own: it does not depend on micro-batches, on processes, or on what else is in a row.
"""

import math

import torch

Row = list[tuple[int, int]]
"""(seed, tokens) of each conversation of a row, in order."""


class Noise:
    """The hook of a model's embedding. It does nothing outside of training."""

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.queue: list[list[Row]] = []

    def expect(self, micro_batches: list[list[Row]]) -> None:
        """The rows of the micro-batches that will be trained on next, in order."""
        self.queue = list(micro_batches)

    def __call__(self, module, inputs, embedded_BTD: torch.Tensor) -> torch.Tensor | None:
        if not module.training or not self.queue:
            return None
        noise_BTD = torch.zeros_like(embedded_BTD)
        generator = torch.Generator(embedded_BTD.device)
        for row, conversations in enumerate(self.queue.pop(0)):
            start = 0
            for seed, length in conversations:
                bound = self.alpha / math.sqrt(length * embedded_BTD.shape[-1])
                part = noise_BTD[row, start : start + length]
                part.uniform_(-bound, bound, generator=generator.manual_seed(seed))
                start += length
        return embedded_BTD + noise_BTD


def attach(model, alpha: float) -> Noise:
    noise = Noise(alpha)
    model.get_input_embeddings().register_forward_hook(noise)
    return noise
