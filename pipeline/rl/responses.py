"""Prompts with their sampled responses, as tensors: layout of a batch, log-probabilities and values at response
tokens."""

import inspect
from dataclasses import dataclass, field

import torch

from pipeline.rl.rollout import left_pad
from pipeline.train.scores import calibrated


@dataclass
class Sample:
    """One prompt of an iteration and what was sampled after it. Token ids are kept from the sampler to the loss;
    nothing is decoded and encoded again."""

    index: int
    """Number of this sample in the whole run: what its seed is derived from."""
    prompt_ids: list[int]
    response_ids: list[int]
    stopped: bool
    sampled_logprobs: list[float]
    logprobs: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    score: float = 0.0
    """The reward model's, as it comes."""
    rule: float = 0.0
    """By the task's rule, 0 without one."""


def layout(samples: list[Sample], pad_id: int, device=None) -> dict:
    """{"inputs", "responses" [B, R], "mask" [B, R] float}: prompts padded on the left and responses on the right, so
    that responses stand in the same columns.

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
    """Of the keyword inputs those that the model's forward knows: families without absolute positions take no
    position_ids."""
    known = inspect.signature(model.forward).parameters
    return {key: value for key, value in inputs.items() if key in known}


def policy_inputs(model: torch.nn.Module, batch: dict) -> dict:
    """Inputs of a causal LM, with logits for the response's tokens alone where the family can leave the prompt's
    out."""
    return accepted(model, {**batch["inputs"], "use_cache": False, "logits_to_keep": batch["responses"].shape[1] + 1})


def rows(values: list[list], fill, device=None) -> torch.Tensor:
    """Lists of different lengths -> [B, longest], filled on the right."""
    longest = max(len(row) for row in values)
    return torch.tensor([list(row) + [fill] * (longest - len(row)) for row in values], device=device)


def at_responses(outputs: torch.Tensor, length: int) -> torch.Tensor:
    """Of a model's outputs [B, T, ...] those that predict the `length` last tokens: what stands at a token speaks of
    the next."""
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
        # attention takes its rate from a number, not a module
        for name in ("attention_dropout", "dropout", "activation_dropout", "resid_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


class ValueModel(torch.nn.Module):
    """A value at each token from a reward model: its backbone and head, in the units of the run's rewards. At the
    start it says what the reward model would score if the text ended there (Stiennon et al., 2020: initialised from
    the reward model)."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier
        # constants of the run (rewards.calibration), set once and kept in the checkpoint's state
        self.mean, self.deviation = 0.0, 1.0
        self.config = classifier.config

    def forward(self, **inputs):
        from transformers.modeling_outputs import TokenClassifierOutput

        backbone = self.classifier.base_model
        hidden = backbone(**accepted(backbone, {**inputs, "use_cache": False})).last_hidden_state
        scores = calibrated(self.classifier, self.classifier.score(hidden))
        return TokenClassifierOutput(logits=(scores - self.mean) / self.deviation)
