"""What rounding a model's weights costs: bits per byte of held-out text, and how many of its greedy tokens it keeps."""

import math
from dataclasses import dataclass

from pipeline.assessment.continuations import greedy_continuations
from pipeline.core.intervals import proportion

PREFIX, CONTINUATION, MOST_TEXTS, BATCH = 16, 32, 32, 8  # tokens, tokens, texts, rows at a time


@dataclass(frozen=True)
class Reference:
    """What a model does before its weights are rounded."""

    rows: list
    """Held-out rows (data/tokens/heldout_rows.py); empty without packed tokens."""
    texts: object
    """Ids [texts, PREFIX + CONTINUATION]: beginnings, and the model's greedy continuations."""
    bits_per_byte: float | None


def reference(model, beginnings: list[list[int]], rows: list) -> Reference:
    """beginnings: of PREFIX tokens each."""
    import torch

    from pipeline.assessment.measures import text_loss

    continuations = greedy_continuations(model, beginnings, CONTINUATION, BATCH)
    texts = [begin + continuation for begin, continuation in zip(beginnings, continuations, strict=True)]
    bits = text_loss(model, rows, BATCH)["bits_per_byte"] if rows else None
    return Reference(rows, torch.tensor(texts), bits)


def loss_of(model, before: Reference) -> dict:
    """Of a model with rounded weights: bits per byte before and after, the share of places of the reference's greedy
    continuations at which it takes the same token, and of continuations that it would write unchanged."""
    import torch

    from pipeline.assessment.measures import text_loss

    with torch.no_grad():
        taken = torch.cat([model(input_ids=part[:, :-1]).logits.argmax(-1) for part in before.texts.split(BATCH)])
    same = (taken == before.texts[:, 1:])[:, PREFIX - 1 :]
    figures = {
        "greedy_tokens": proportion(int(same.sum()), same.numel()),
        # The first other token changes all that follow, so a text is unchanged exactly if every token is the same.
        "unchanged_texts": proportion(int(same.all(-1).sum()), len(same)),
    }
    if before.bits_per_byte is not None:
        after = text_loss(model, before.rows, BATCH)["bits_per_byte"]
        figures["bits_per_byte"] = {"before": before.bits_per_byte, "after": after}
    return figures


def sentence(figures: dict) -> str:
    """For the card."""
    share, texts = figures["greedy_tokens"], figures["unchanged_texts"]
    text = (
        f"{share['rate']:.1%} of {share['n']} greedy tokens are the model's (95%: {share['low']:.1%} to"
        f" {share['high']:.1%}), {texts['rate']:.0%} of {texts['n']} continuations of {CONTINUATION} tokens are"
        " unchanged"
    )
    bits = figures.get("bits_per_byte")
    if bits:
        change = bits["after"] / bits["before"] - 1 if bits["before"] else math.nan
        text += f"; held-out bits per byte {bits['before']:.4f} before and {bits['after']:.4f} after ({change:+.2%})"
    return text
