"""Texts that are judged by the rules, and prose to judge."""

import dataclasses
import random

from pipeline.data.cleaning.outcomes import Document, Outcome
from pipeline.data.cleaning.steps import Steps, clean_batch

ZH = "这座桥是一百年前修的，如今已经没有人走了。河水改了道，村里的人也搬到了别的地方，只有老人还记得它原来的样子。"


def judged(texts: list[str], **blocks) -> list[dict]:
    documents = [Document(Outcome("f:1"), text) for text in texts]
    clean_batch(documents, Steps(**blocks))
    return [dataclasses.asdict(document.outcome) for document in documents]


def article(rng: random.Random, base: str, number: int) -> str:
    """Prose whose sentences differ: words of `base` in another order each."""
    if base == ZH:
        signs = [c for c in ZH if c not in "，。"]
        return "\n".join(
            "".join(rng.sample(signs, 30)) + "，" + "".join(rng.sample(signs, 9)) + "。" for _ in range(number)
        )
    words = base.replace(",", "").replace(".", "").lower().split()
    return "\n".join(
        f"{rng.choice(words).title()} "
        + " ".join(rng.choice(words) + rng.choice(["s", "ed", "ing", ""]) for _ in range(14))
        + f", {rng.choice(words)} the {rng.choice(words)}."
        for _ in range(number)
    )
