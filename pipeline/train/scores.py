"""Scores of a reward model: one number for a conversation, read at its last token and calibrated; those of a process
reward model: one for each step; and the layer that gives them, at the start."""

import functools
from collections.abc import Callable, Iterator

import torch

from pipeline.core.seeds import derive
from pipeline.data.chat.template import Encoded
from pipeline.models.folder_weights import FolderWeights

RIGHT = 1  # label of a process reward model: this step is right


def initial_score(model, seed: int, weights: FolderWeights | None = None) -> None:
    """The score layer ~ N(0, 1 / sqrt(width + 1)): scores of about 1 at the start, whatever the width (Stiennon et
    al., 2020, appendix B; Huang et al., 2024). A bias is 0. weights: what a model on the meta device will be filled
    with; the layer is drawn after that."""
    _set_score(model, functools.partial(_draw, seed=seed), weights)


def zero_score(model, weights: FolderWeights | None = None) -> None:
    """The score layer that gives 0 for every text: where nothing is known of the scores. weights: as above."""
    _set_score(model, lambda layer: torch.nn.init.zeros_(layer.weight), weights)


def _set_score(model, change: Callable[[torch.nn.Module], None], weights: FolderWeights | None) -> None:
    if weights is None:
        change(model.score)
        return

    def after_reading(part, _) -> None:
        if part is model.score:
            change(part)

    weights.then.append(after_reading)


def _draw(layer, seed: int) -> None:
    weight, bias = layer.weight, layer.bias
    with torch.no_grad():
        weight.normal_(0, (weight.shape[1] + 1) ** -0.5, generator=torch.Generator().manual_seed(derive(seed, "score")))
        if bias is not None:
            bias.zero_()


def calibrated(model, logits: torch.Tensor) -> torch.Tensor:
    """Raw scores on a scale on which the answers that the reward model was trained on have mean 0 and standard
    deviation 1 (Ziegler et al., 2019).

    Gain and bias are in config.json, not in the weights: the score layer has no bias that could take the offset.
    """
    gain = getattr(model.config, "alma_reward_gain", 1.0)
    bias = getattr(model.config, "alma_reward_bias", 0.0)
    return logits.float() * gain + bias


@torch.no_grad()
def reward_scores(model, rows: list[list[int]], batch: int = 64) -> torch.Tensor:
    """Calibrated scores [N], fp32 on the CPU, of N conversations as token ids (prompt, answer, end of turn), without
    padding.

    `model` is an AutoModelForSequenceClassification with one label; rows must come from its own tokenizer. The last
    token of a row is found by its length, so no padding token is needed and any token can pad.
    """
    assert all(rows), "an empty row has no last token"
    scores = torch.zeros(len(rows))
    for chunk, hidden_BTD in _read(model, rows, batch):
        # By length: transformers reads at the last id that is not the pad id, and a policy may sample that id too.
        last = torch.tensor([len(rows[row]) - 1 for row in chunk], device=hidden_BTD.device)
        logits = model.score(hidden_BTD[torch.arange(len(chunk), device=last.device), last]).squeeze(-1)
        scores[torch.tensor(chunk)] = calibrated(model, logits).cpu()
    return scores


@torch.no_grad()
def step_scores(model, answers: list[Encoded], batch: int = 64) -> list[list[float]]:
    """The probability that each step of each answer is right. model: an AutoModelForTokenClassification that stage prm
    has trained; answers: of `Chat.steps` with its tokenizer."""
    found: list[list[float]] = [[]] * len(answers)
    for chunk, hidden_BTD in _read(model, [answer.ids for answer in answers], batch):
        for place, row in enumerate(chunk):
            logits = model.score(hidden_BTD[place, list(answers[row].ends)])
            found[row] = logits.float().softmax(-1)[:, RIGHT].tolist()
    return found


def _read(model, rows: list[list[int]], batch: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(numbers of rows, their last hidden states [B, T, D]), by turns until all rows were read; shortest first, padded
    on the right."""
    device, pad_id = next(model.parameters()).device, 0
    training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda row: (len(rows[row]), row))
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        longest = len(rows[chunk[-1]])
        padded, mask = [], []
        for row in chunk:
            missing = longest - len(rows[row])
            padded.append(list(rows[row]) + [pad_id] * missing)
            mask.append([1] * len(rows[row]) + [0] * missing)
        input_ids, mask_BT = torch.tensor(padded, device=device), torch.tensor(mask, device=device)
        states = model.base_model(input_ids=input_ids, attention_mask=mask_BT, use_cache=False)
        yield chunk, states.last_hidden_state
    model.train(training)
