"""Keys that sft, reward, dpo and ppo share. The steps they share are in train/finetune.py."""

from typing import Annotated

from pydantic import Field

from pipeline.core.config import EXECUTION
from pipeline.data.chat.chat_sources import TuningSource
from pipeline.data.dedup.decontaminate import Decontaminate
from pipeline.train.config import Date, Optimizer, TrainConfig


class FinetuneOptimizer(Optimizer):
    """AdamW for finetuning: a published model is not decayed towards zero."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices."""


class FinetuneConfig(TrainConfig):
    """A stage that starts from a published model and learns from records with a chat template."""

    sources: dict[str, TuningSource]
    """Records by name."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets whose text must not be trained on."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of records, chosen by their own hash and so the same in every stage, that is only measured on."""
    optimizer: FinetuneOptimizer = FinetuneOptimizer()
    """AdamW."""
    max_bad: Annotated[float, EXECUTION] = Field(0.05, ge=0, le=1)
    """Largest share of a source's records that may be unusable. Duplicates, rows like a held-out one and rows that are
    too long do not count. The stage ends if there are more, because then the source is not what the recipe says."""
    date: Date = None
    """Date that a chat template gets if it asks for today's, as YYYY-MM-DD; by default 2024-07-26, the fallback of
    Llama 3.2's own template."""
