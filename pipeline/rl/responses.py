"""Prompts with their sampled responses, as tensors: layout of a batch, log-probabilities and values at response
tokens."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from pipeline.models import lora
from pipeline.models.folder_weights import Fill
from pipeline.train import chunked_loss
from pipeline.train.chunked_loss import IGNORE, TokenLosses
from pipeline.train.scores import calibrated

# Attributes by which transformers' attention and MLP modules keep a dropout rate that is not in an nn.Dropout.
DROPOUT_RATES = ("attention_dropout", "dropout", "activation_dropout", "resid_dropout", "hidden_dropout")


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, as the policy wrote it, and what came of it."""

    name: str
    arguments: dict
    result: str
    """What the policy read."""
    failure: str = ""
    """Why it failed (tools.py); empty if it did not."""


@dataclass
class Sample:
    """One prompt of an iteration and what was sampled after it. Token ids are kept from the sampler to the loss;
    nothing is decoded and encoded again."""

    index: int
    """Number of this sample in the whole run; its seed is derived from it."""
    prompt_ids: list[int]
    response_ids: list[int]
    stopped: bool
    """The response ended with a stop token."""
    sampled_logprobs: list[float]
    """Log-probability of each response token, as the sampler computed it."""
    num_updates: int = 0
    """Updates that the policy had had when it was sampled."""
    logprobs: list[float] = field(default_factory=list)
    """The same under the policy, as the trainer computes it before the first update."""
    ref_logprobs: list[float] = field(default_factory=list)
    """The same under the reference."""
    entropies: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    score: float = 0.0
    """Of the reward model, as published, or the weighted sum of the rewards."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Value of each reward of the recipe."""
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of each reward whose function failed: kind and message (reward_workers.Outcome)."""
    rule: float = 0.0
    """By the task's rule; 0 without one."""
    insertions: list[tuple[int, list[int]]] = field(default_factory=list)
    """What tools said between the policy's turns: after how many tokens of the response, and which ids. They are read,
    not learned, and nothing is measured at them."""
    calls: list[ToolCall] = field(default_factory=list)
    """Calls of tools in the response, in their order."""

    @property
    def last_turn(self) -> list[int]:
        """Token ids of the response after the last result of a tool."""
        return self.response_ids[self.insertions[-1][0] :] if self.insertions else self.response_ids


def row_ids(sample: Sample) -> list[int]:
    """Token ids of a prompt with its response, results of tools included."""
    ids, begin = list(sample.prompt_ids), 0
    for after, inserted in sample.insertions:
        ids += sample.response_ids[begin:after] + inserted
        begin = after
    return ids + sample.response_ids[begin:]


def layout(samples: list[Sample], pad_id: int, device=None) -> dict:
    """{"inputs", "labels" [B, T], "mask" [B, T] float}: prompts with their responses, padded on the right. A response's
    tokens are labels at the positions that predict them; elsewhere, also at results of tools, labels are -100 and the
    mask is 0.

    Padding is known by length, never by token id: a pad id that equals a stop id does no harm. There is no attention
    mask: a causal model sees padding on the right only from padding.
    """
    input_ids = rows([row_ids(sample) for sample in samples], pad_id)
    labels = torch.full_like(input_ids, IGNORE)
    for row, sample in enumerate(samples):
        labels[row, places(sample)] = torch.tensor(sample.response_ids)
    input_ids, labels = input_ids.to(device), labels.to(device)
    return {"inputs": {"input_ids": input_ids}, "labels": labels, "mask": (labels != IGNORE).float()}


def places(sample: Sample) -> list[int]:
    """Where in its row each token of a sample's response is predicted."""
    places, begin, shift = [], 0, len(sample.prompt_ids) - 1
    for after, inserted in sample.insertions:
        places += range(begin + shift, after + shift)
        begin, shift = after, shift + len(inserted)
    return [*places, *range(begin + shift, len(sample.response_ids) + shift)]


def spread(values_BR: torch.Tensor, lengths_B: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Numbers of the first `lengths` tokens of each response, at their places in a layout; 0 elsewhere."""
    counted_BR = torch.arange(values_BR.shape[1]) < lengths_B[:, None]
    return torch.zeros_like(mask_BT).masked_scatter_(mask_BT.bool(), values_BR[counted_BR])


def by_length(indices: list[int], samples: list[Sample]) -> list[int]:
    """Indices of samples, shortest first, so that those that are padded together are of similar length."""
    return sorted(indices, key=lambda index: (size_of(samples[index]), index))


def size_of(sample: Sample) -> int:
    """Tokens of a prompt with its response, results of tools included."""
    inserted = sum(len(ids) for _, ids in sample.insertions)
    return len(sample.prompt_ids) + len(sample.response_ids) + inserted


def accepted(model: torch.nn.Module, inputs: dict) -> dict:
    """The keyword inputs that the model's forward has: families without absolute positions take no position_ids."""
    parameters = inspect.signature(model.forward).parameters
    return {key: value for key, value in inputs.items() if key in parameters}


def rows(values: list[list], fill) -> torch.Tensor:
    """Lists of different lengths -> [B, longest], filled on the right."""
    longest = max(len(row) for row in values)
    return torch.tensor([list(row) + [fill] * (longest - len(row)) for row in values])


def predict_at_labels(model: torch.nn.Module, temperature: float) -> None:
    """Have a policy or reference compute statistics of response tokens only, and in chunks, where its family can."""
    if chunked_loss.can_install(model):
        chunked_loss.install(model, per_token=True, selects=True, temperature=temperature, entropies=True)


def predict(model: torch.nn.Module, batch: dict):
    """What a policy or reference gives for a layout, for `token_statistics`."""
    head = chunked_loss.installed(model)
    if head is not None:
        head.expect([batch])
    return model(**batch["inputs"], use_cache=False).logits


def token_statistics(outputs, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of each response token, entropy there), each [B, T] and 0 without a label, at the temperature at
    which they were sampled. outputs: TokenLosses, or logits [B, T, V]."""
    if isinstance(outputs, TokenLosses):
        return -outputs.nll_BT, outputs.entropy_BT
    counted = labels != IGNORE
    logprobs_NV = (outputs[counted].float() / temperature).log_softmax(-1)
    chosen = logprobs_NV.gather(-1, labels[counted][:, None])[:, 0]
    with torch.no_grad():
        entropy = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    zeros = chosen.new_zeros(labels.shape)
    return zeros.masked_scatter(counted, chosen), zeros.masked_scatter(counted, entropy)


def disable_dropout(model: torch.nn.Module) -> None:
    """PPO's ratio compares two passes over the same tokens; with dropout it would be noise (Huang et al., 2024,
    detail 8: SFT and RL without dropout)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in DROPOUT_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


class SharedReward(torch.nn.Module):
    """The reward model inside a value model that is trained through adapters: the same backbone with its adapters off,
    and a copy of the score layer as it was."""

    def __init__(self, classifier, weights: Fill | None = None):
        """weights: what fills a classifier on the meta device."""
        super().__init__()
        self.score = copy.deepcopy(classifier.score).requires_grad_(False)
        if weights is not None:
            self.score.to_empty(device="cpu")
            weights(self.score, "score.{}".format)
        self.config = classifier.config
        self._classifiers = []  # in a list, so that its parameters are not this module's

    @contextlib.contextmanager
    def inside(self, classifier) -> Iterator["SharedReward"]:
        """Inside, it can be called. classifier: the value model's, complete."""
        self._classifiers.append(classifier)
        try:
            yield self
        finally:
            self._classifiers.clear()

    def base_model(self, **inputs):
        (classifier,) = self._classifiers
        training = classifier.training
        classifier.eval()
        try:
            with lora.disabled(classifier):
                return classifier.base_model(**inputs)
        finally:
            classifier.train(training)


class ValueModel(torch.nn.Module):
    """A value at each token, from a reward model: its backbone and head, in the units of the run's rewards. At the
    start it is what the reward model would score if the text ended there (Stiennon et al., 2020: initialised from the
    reward model)."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier
        self.config = classifier.config
        # Buffers, because an engine that splits a model reads them when it puts the complete model together.
        self.register_buffer("mean", torch.tensor(0.0), persistent=False)
        self.register_buffer("deviation", torch.tensor(1.0), persistent=False)

    @staticmethod
    def fills(weights: Fill | None) -> Fill | None:
        """What gives a part of a value model its values, of what gives them to its classifier."""
        if weights is None:
            return None
        return lambda part, global_name: weights(part, lambda inner: global_name(inner).removeprefix("classifier."))

    def set_units(self, mean: float, deviation: float) -> None:
        """Constants of the run (rewards.calibration), set once and kept in the checkpoint's state."""
        self.mean.fill_(mean)
        self.deviation.fill_(deviation)

    def forward(self, **inputs):
        from transformers.modeling_outputs import TokenClassifierOutput

        backbone = self.classifier.base_model
        inputs["use_cache"] = False
        hidden = backbone(**accepted(backbone, inputs)).last_hidden_state
        scores = calibrated(self.classifier, self.classifier.score(hidden))
        return TokenClassifierOutput(logits=(scores - self.mean) / self.deviation)
