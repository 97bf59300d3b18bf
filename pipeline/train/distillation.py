"""Distillation: a model learns the probabilities that a larger one, its teacher, gives to each token of an answer. The
key `distill` of sft.

    teacher = Teacher.load(config, inputs["teacher"], parent)
    teacher.place(engine.device)
    logits_BTV = teacher.logits(batch)

Where the layout splits the weights of the model that is trained (`shard`, `zero: 3`), torch's fully_shard splits the
teacher's too, whatever engine trains: a layer is gathered while the teacher computes it.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.core.artifact import Artifact
from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.terminal import say

if TYPE_CHECKING:
    import torch

    from pipeline.models.folder_weights import FolderWeights
    from pipeline.sft import Config
    from pipeline.train.finetune import Parent


class Distill(Strict):
    """Learn from the probabilities of a teacher, a model with the same tokenizer (`inputs: {teacher: ...}`)."""

    weight: float = Field(1.0, gt=0, le=1)
    """Share of the divergence from the teacher in the loss; the rest is the cross-entropy of the answers' tokens."""
    divergence: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || student), all that the teacher may say becomes likely (Hinton et al., 2015); reverse:
    KL(student || teacher), only what the teacher says is likely (MiniLLM: Gu et al., 2024)."""
    temperature: float = Field(1.0, gt=0)
    """Of both models' probabilities; above 1 the unlikely tokens count more."""


class Teacher:
    """A frozen model that reads the same micro-batches as the one that is trained. weights: what fills a model on the
    meta device."""

    def __init__(self, model, config: "Config", weights: "FolderWeights | None" = None):
        self.model, self.config, self.weights = model, config, weights
        self._is_split = False
        self._batch: dict | None = None
        self._logits: torch.Tensor | None = None

    @classmethod
    def load(cls, config: "Config", artifact: Artifact, parent: "Parent") -> "Teacher":
        """parent: of the model that is trained. The keys `chat_template` and `chat_template_kwargs` are about that
        model: the teacher knows the tokens and the template of its own folder. Raises UserError for a teacher with
        other tokens, or one that lets packed conversations see each other."""
        from pipeline.core import distributed
        from pipeline.models import attention, build, frozen
        from pipeline.models.families import family_of
        from pipeline.train import finetune
        from pipeline.train.conversation_data import check_packing
        from pipeline.train.finetune_data import model_folder
        from pipeline.train.layouts import starts_in_parts

        folder = model_folder(artifact)
        tokenizer = finetune.tokenizer_of(folder, config.sequence_length)
        check_tokens(config, folder, tokenizer, parent)
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if template != parent.tokenizer.chat_template:
            other = "its chat template is another one" if template else "it has no chat template"
            say(
                f"{config.kind}, teacher: WARNING: {other}; it reads conversations as the trained model's template"
                " writes them"
            )
        model, weights = build.skeleton(folder) if starts_in_parts(config) else (build.load(folder), None)
        if config.packing and weights is not None and not family_of(model.config).document_mask:
            model, weights = build.load(folder), None  # a family that has to be tried
        model.requires_grad_(False).eval()
        attention.choose(model, config.attention, config.precision, config.packed_rows(distributed.world()))
        if config.packing and weights is None:
            check_packing(model, parent.chat.end_id)
        # With autocast the products are the same, and half of the memory is enough.
        frozen.store(model, config.precision, config.precision, distributed.device())
        return cls(model, config, weights)

    def place(self, device: "torch.device") -> None:
        """Read the weights and put them on the device; with a layout that splits weights, this process's part of them.
        Collective."""
        from pipeline.models.model_parts import Parts
        from pipeline.train.fsdp import mesh_of
        from pipeline.train.fsdp_sharding import Sharder

        if self.config.parallel.splits_weights:
            sharder = Sharder(self.model, mesh_of(self.config.parallel, device), device, self.config.precision)
            sharder.shard(self.weights)
            self._is_split = True
            return
        if self.weights is not None:
            Parts(self.model).materialise_all(self.weights, device)
        self.model.to(device)

    def logits(self, batch: dict, again: bool = False) -> "torch.Tensor":
        """Its logits for a micro-batch, [B, T, V]. Collective with a layout that splits weights. again: they will be
        read a second time, without `again`. What is kept is used once, so that every process computes as often as the
        others, although those with fewer micro-batches than others give the same one twice."""
        import torch

        from pipeline.train.engine import autocast

        if batch is self._batch:
            logits, self._batch, self._logits = self._logits, None, None
            return logits
        inputs = batch["inputs"]
        with torch.no_grad(), autocast(self.config, inputs["input_ids"].device):
            logits = self.model(**({"use_cache": False} | inputs)).logits
        if self._is_split:
            self.model.reshard()  # the root keeps what it gathered until a backward pass, and there is none
        if again:
            self._batch, self._logits = batch, logits
        return logits


def check_tokens(config: "Config", folder: Path, tokenizer, parent: "Parent") -> None:
    """Raise UserError if a teacher, in `folder` with its own tokenizer, has other tokens than the model that is
    trained."""
    own, vocabulary = tokenizer.get_vocab(), parent.tokenizer.get_vocab()
    if own == vocabulary:
        return
    new = {token: index for token, index in vocabulary.items() if index in parent.new_tokens and token not in own}
    if new and own == {token: index for token, index in vocabulary.items() if token not in new}:
        raise UserError(
            f"stage {config.kind}: chat_template: {config.chat_template} adds the tokens {', '.join(sorted(new))},"
            f" which the teacher, {folder}, does not have and has not learned; remove chat_template, or train the"
            " teacher with it first"
        )
    raise UserError(
        f"stage {config.kind}: inputs.teacher: {folder} has another tokenizer than the model that is trained"
        f" ({len(tokenizer):,} and {len(parent.tokenizer):,} tokens), so that its probabilities are of other tokens;"
        " give a teacher of the same family, or train on answers that it writes (docs/sft.md)"
    )


def token_losses(options: Distill, teacher: Teacher, logits, batch: dict, again: bool = False) -> tuple:
    """(loss of each token, its divergence from the teacher, its cross-entropy), each [B, T], without weights. again:
    see Teacher.logits."""
    from pipeline.train.loss import divergence, token_logprobs

    labels_BT = batch["labels"]
    apart_BT = divergence(logits, teacher.logits(batch, again), labels_BT, options.divergence, options.temperature)
    nll_BT = -token_logprobs(logits, labels_BT)
    return options.weight * apart_BT + (1 - options.weight) * nll_BT, apart_BT, nll_BT


def objective(options: Distill, teacher: Teacher):
    """(loss function of an engine, function that reads (loss, weight) of each conversation), both of logits and a batch
    as stage sft makes them."""
    from pipeline.train.conversation_data import conversation_sums, weights_of

    losses = functools.partial(token_losses, options, teacher)

    def loss(logits, batch: dict):
        weights_BT = weights_of(batch)
        total_BT, apart_BT, nll_BT = losses(logits, batch)
        sums = {"kl": (apart_BT.detach() * weights_BT).sum(), "cross_entropy": (nll_BT.detach() * weights_BT).sum()}
        return (total_BT * weights_BT).sum(), sums

    def read(logits, batch: dict):
        return conversation_sums(losses(logits, batch, again=True)[0], batch)  # `loss` follows (engine.evaluate)

    return loss, read
