"""Prompts with their sampled responses, as tensors: layout of a batch, log-probabilities and values at response
tokens."""

import copy
import inspect
from dataclasses import dataclass, field

import torch

from pipeline.models import lora
from pipeline.rl.rollout import left_pad
from pipeline.train.scores import calibrated

# Attributes by which transformers' attention and MLP modules keep a dropout rate that is not in an nn.Dropout.
DROPOUT_RATES = ("attention_dropout", "dropout", "activation_dropout", "resid_dropout", "hidden_dropout")


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


def layout(samples: list[Sample], pad_id: int, device=None) -> dict:
    """{"inputs", "responses" [B, R], "mask" [B, R] float}: prompts padded on the left and responses on the right, so
    that responses are in the same columns.

    Padding is known by length, never by token id: a pad id that equals a stop id does no harm.
    """
    input_ids, mask, _ = left_pad([sample.prompt_ids for sample in samples], pad_id, device)
    lengths = torch.tensor([len(sample.response_ids) for sample in samples], device=device)
    responses = rows([sample.response_ids for sample in samples], pad_id, device)
    response_mask = torch.arange(responses.shape[1], device=device) < lengths[:, None]
    mask = torch.cat([mask, response_mask.long()], 1)
    inputs = {
        "input_ids": torch.cat([input_ids, responses], 1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    return {"inputs": inputs, "responses": responses, "mask": response_mask.float()}


def accepted(model: torch.nn.Module, inputs: dict) -> dict:
    """The keyword inputs that the model's forward has: families without absolute positions take no position_ids."""
    parameters = inspect.signature(model.forward).parameters
    return {key: value for key, value in inputs.items() if key in parameters}


def policy_inputs(model: torch.nn.Module, batch: dict) -> dict:
    """Inputs of a causal LM. Logits are computed for the response's tokens only, where the family can do that."""
    inputs = dict(batch["inputs"])
    inputs["use_cache"] = False
    inputs["logits_to_keep"] = batch["responses"].shape[1] + 1
    return accepted(model, inputs)


def rows(values: list[list], fill, device=None) -> torch.Tensor:
    """Lists of different lengths -> [B, longest], filled on the right."""
    longest = max(len(row) for row in values)
    return torch.tensor([list(row) + [fill] * (longest - len(row)) for row in values], device=device)


def at_responses(outputs: torch.Tensor, length: int) -> torch.Tensor:
    """The part of a model's outputs [B, T, ...] that predicts the `length` last tokens: an output at one token is about
    the next one."""
    return outputs[:, -length - 1 : -1]


def token_statistics(
    logits: torch.Tensor, responses: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability of each response token, entropy there), each [B, R], at the temperature at which they were
    sampled. `logits` is [B, T, V]."""
    logprobs_BRV = (at_responses(logits, responses.shape[1]).float() / temperature).log_softmax(-1)
    chosen = logprobs_BRV.gather(-1, responses[..., None])[..., 0]
    with torch.no_grad():
        entropy = -(logprobs_BRV.exp() * logprobs_BRV).sum(-1)
    return chosen, entropy


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

    def __init__(self, classifier):
        super().__init__()
        self.score = copy.deepcopy(classifier.score).requires_grad_(False)
        self.config = classifier.config
        self._classifier = [classifier]  # in a list, so that its parameters are not this module's

    def base_model(self, **inputs):
        classifier = self._classifier[0]
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
        self.set_units(0.0, 1.0)

    def set_units(self, mean: float, deviation: float) -> None:
        """Constants of the run (rewards.calibration), set once and kept in the checkpoint's state."""
        self.mean, self.deviation = mean, deviation

    def forward(self, **inputs):
        from transformers.modeling_outputs import TokenClassifierOutput

        backbone = self.classifier.base_model
        inputs["use_cache"] = False
        hidden = backbone(**accepted(backbone, inputs)).last_hidden_state
        scores = calibrated(self.classifier, self.classifier.score(hidden))
        return TokenClassifierOutput(logits=(scores - self.mean) / self.deviation)
