"""Supervised fine-tuning: a base model learns to answer, from conversations, with loss on the assistant's tokens only.

    python pipeline/sft.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/sft.py recipes/llama-7b.yaml

Conversations are written with the tokenizer's own chat template and packed, several to a row; no conversation sees
another. Out: model/ (Hugging Face layout), report.json (what became of each record).
"""

import functools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.config import EXECUTION, refuse_unused
from pipeline.core.intervals import change_of, shares, unchanged
from pipeline.core.output import Output
from pipeline.core.terminal import plural, say
from pipeline.data.chat.chat_sources import ChatSource
from pipeline.train.config import LossChunk
from pipeline.train.distillation import Distill
from pipeline.train.finetune_config import FinetuneConfig, FinetuneOptimizer

VERSION = 8  # 8: thoughts that a template writes otherwise than its prompt, ids and ends of tool calls
INPUTS = {"model": ("pretrain", "sft"), "teacher?": ("sft", "dpo", "kto", "ppo", "grpo", "pretrain")}


class SftOptimizer(FinetuneOptimizer):
    """AdamW for SFT: a tenth of pretraining's learning rate and no decay."""

    USUAL_LR = (1e-6, 2e-3)

    lr: float = Field(2e-5, gt=0)
    """Peak learning rate; 2e-5 is usual for 1B to 10B parameters, small models take 1e-4 to 1e-3."""


class Config(FinetuneConfig):
    """Supervised fine-tuning."""

    MODEL_INPUTS = ("model", "teacher")

    sources: dict[str, ChatSource]
    """Conversations by name."""
    evaluate: dict[str, ChatSource] = {}
    """Held-out conversations by name, with metrics of their own (loss/NAME)."""
    packing: bool = True
    """Several conversations in a row, each with its own positions and attention. If false, one per row, padded."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of a conversation longer than sequence_length: dropped, or cut at its end."""
    loss_chunk: LossChunk = "auto"
    """Answer tokens whose logits exist at a time; none: all logits of a micro-batch. auto: in chunks if the family
    allows it."""
    neftune: float | None = Field(None, gt=0)
    """Strength (alpha) of uniform noise on the embeddings in training, divided by sqrt(tokens of the conversation x
    width); 5 to 15 in Jain et al. (2023); none: no noise."""
    distill: Distill | None = None
    """Learn from the probabilities of a larger model (input `teacher`) instead of, or next to, the answers' tokens."""
    optimizer: SftOptimizer = SftOptimizer()
    """AdamW."""
    max_prompts: Annotated[int, EXECUTION] = Field(64, ge=0)
    """Held-out prompts that are answered greedily at each evaluation; 0 for none."""
    max_new_tokens: Annotated[int, EXECUTION] = Field(64, ge=1)
    """Maximum length of these answers."""

    def head_chunk(self) -> Literal["auto"] | int | None:
        return None if self.distill else self.loss_chunk

    def other_models(self) -> dict[str, bool]:
        return {"teacher": False} if self.distill else {}

    def packed_rows(self, world: int) -> int:
        return self.micro_rows(world) if self.packing else 1

    @model_validator(mode="after")
    def a_teacher_is_used(self):
        if self.distill is None:
            if "teacher" in self.inputs:
                raise ValueError("inputs.teacher is read with `distill` only; give it, or remove the input")
            return self
        if "teacher" not in self.inputs:
            raise ValueError("distill needs a model to learn from: give `inputs: {teacher: STAGE}`")
        refuse_unused(self, "loss_chunk", "has no effect with distill, which needs all logits of a micro-batch")
        return self

    @model_validator(mode="after")
    def groups_are_padded(self):
        if self.packing:
            refuse_unused(self, "group_by_length", "has no effect on packed rows, which are full anyway")
        return self


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.models import cost
    from pipeline.models.families import family_of
    from pipeline.train import distillation, finetune
    from pipeline.train.conversation_data import (
        check_packing,
        conversation_batch,
        conversation_losses,
        encoded_conversations,
    )
    from pipeline.train.finetune_data import PackedRows, encode_once, heldout_sets, pack
    from pipeline.train.record_order import Groups, permutation
    from pipeline.train.run_summary import Work

    # Load and encode
    parent = finetune.load_parent(config, inputs["model"], output.stage)
    encode = functools.partial(encoded_conversations, config, parent.chat, output)
    arrays, extra = encode_once(output, config, encode)
    ids, heldout_ids = arrays["train.ids"], arrays["heldout.ids"]
    count = extra["conversations"]
    counts = finetune.Counts("conversation", count["train"], count["heldout"], extra["rejected"])

    # Rows: in each epoch the conversations are packed in another order
    capacity = config.sequence_length if config.packing else None
    records = finetune.records_of(config, arrays, len(ids))
    groups = None
    if config.group_by_length:
        groups = Groups(lambda row: int(ids.lengths[row[0]]), config.batch_size)
    rows = PackedRows(config.seed, ids.lengths, capacity, records, groups)
    config = finetune.in_steps(config, rows.per_epoch)
    sets = heldout_sets(config, arrays, len(heldout_ids))
    heldout_rows = {}
    for name, own in sets.items():
        order = own.start + permutation(0, 0, len(own)) if config.packing else own
        heldout_rows[name] = pack(heldout_ids.lengths, capacity, order)
    collate = functools.partial(conversation_batch, arrays, parent.pad_id, length=config.fixed_length())

    # Build
    model, weights = finetune.load_model(config, parent)
    if config.packing and not (weights and family_of(model.config).document_mask):
        if weights:  # a family that nobody has checked, and a model that cannot compute yet
            model, weights = parent.load(), None
        check_packing(model, parent.chat.end_id)
    finetune.adapt(config, parent, model, weights)
    objective, read, others = loss, conversation_losses, {}
    if config.distill is not None:
        teacher = distillation.Teacher.load(config, inputs["teacher"], parent)
        objective, read = distillation.objective(config.distill, teacher)
        others["teacher"] = cost.count(teacher.model)
    noise = None if config.neftune is None else noise_of(model, config, ids.lengths)
    epochs = config.steps * config.batch_size / rows.per_epoch
    kind = "packed rows" if config.packing else "conversations"
    work = Work(
        f"{plural(config.steps, 'step', ',')} x {config.batch_size} {kind} of at most {config.sequence_length} tokens:"
        f" {epochs:.3g} epochs of {plural(rows.per_epoch, 'row', ',')}",
        tokens=epochs * len(ids.values),
        others=others,
    )
    engine, text = finetune.build_engine(model, objective, config, work, weights=weights, selects=True)
    if config.distill is not None:
        teacher.place(engine.device)
    fill = float(ids.lengths.sum() / (rows.per_epoch * config.sequence_length))
    finetune.say_counts(output, counts, f" in {plural(rows.per_epoch, 'row')}, {fill:.0%} filled")
    if len(ids) > counts.train:
        say(
            f"{output.stage}: {plural(counts.train, 'conversation', ',')} to train on are {len(ids):,} sequences: the"
            " chat template writes an earlier answer differently from the last one, so that such a conversation is"
            " learned answer by answer, as inference will show it"
        )
    finetune.say_sources(config, arrays, rows)

    # Fit and publish
    measure = functools.partial(answers, engine, parent.chat, heldout_ids, len(sets[""]), extra, config)
    result = finetune.fit(
        engine, config, output, text, rows, heldout_rows, collate, read=read, measure=measure, before_step=noise
    )
    finetune.publish_model(engine, config, parent, output)

    change = change_of(result.get("before_rows"), result.get("after_rows"))
    measures, nothing = headline(result["before"], result["after"], change, counts.heldout)
    metrics = finetune.summarise(
        config, output, result, rows, counts, unit="tokens", measures=measures, nothing=nothing, arrays=arrays
    )
    metrics["heldout_loss_change_interval"] = change and list(change)
    metrics["packing_fill"] = fill
    metrics["trained_tokens"] = result["weight"]
    metrics["summary"]["output"] += f", {result['weight'] / 1e3:.0f}k answer tokens"
    return metrics


def noise_of(model, config: Config, lengths):
    """NEFTune: what must be called with the rows of each step before it is made. lengths: of all conversations."""
    from pipeline.core.seeds import derive
    from pipeline.train import neftune

    noise = neftune.attach(model, config.neftune)

    def before_step(parts: list[list[tuple[int, list[int]]]]) -> None:
        micro_batches = []
        for part in parts:
            rows = []
            for index, row in part:
                seeds = [derive(config.seed, "neftune", index, place) for place in range(len(row))]
                rows.append(list(zip(seeds, lengths[row].tolist(), strict=True)))
            micro_batches.append(rows)
        noise.expect(micro_batches)

    return before_step


def loss(outputs, batch: dict):
    """Cross-entropy of the answers' tokens. outputs: TokenLosses, or logits [B, T, V]."""
    from pipeline.train.chunked_loss import TokenLosses
    from pipeline.train.loss import cross_entropy_sum, weighted_cross_entropy_sum

    if isinstance(outputs, TokenLosses):
        return outputs.total, {}
    if "label_weights" in batch:
        return weighted_cross_entropy_sum(outputs, batch["labels"], batch["label_weights"]), {}
    return cross_entropy_sum(outputs, batch["labels"]), {}


def headline(
    before: dict, after: dict, change: tuple[float, float] | None, conversations: int
) -> tuple[list[str], list[str]]:
    """(parts of the closing line, those of them that show nothing learned). change: interval of that of the loss."""
    interval = f"95% of the change: {change[0]:+.3f} to {change[1]:+.3f}, " if change else ""
    measures = [f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f} ({interval}n={conversations})"]
    has_fallen = change[1] < 0 if change else after["loss"] < before["loss"]
    nothing = [] if has_fallen else measures[:]
    for key, count, words in (("eos_rate", "answered", "ends its turn"), ("rule", "checked", "right")):
        if key in after:
            part = f"{words} {shares(before[key], after[key], int(after[count]))}"
            measures.append(part)
            if unchanged(before[key], after[key]):
                nothing.append(part)
    return measures, nothing


def answers(engine, chat, heldout_ids, count: int, extra: dict, config: Config) -> dict:
    """Greedy answers to some of the first `count` held-out prompts: the share that end their turn, and the mean score
    by rule where the answer is known; `answered` and `checked` are the numbers of answers behind them. Collective."""
    import torch

    from pipeline.core.distributed import all_reduce_sum
    from pipeline.rl.rollout import generate
    from pipeline.rl.rules import score
    from pipeline.train.record_order import permutation

    positions = getattr(engine.model.config, "max_position_embeddings", None) or 1 << 30
    asked = []
    for index in permutation(0, 0, count).tolist():
        if extra["starts"][index] + config.max_new_tokens <= positions:
            asked.append(index)
    mine, counts = asked[: config.max_prompts], 1.0
    if engine.samples_together:
        counts = float(engine.data_rank == 0)
    else:
        mine = mine[engine.data_rank :: engine.data_world]
    prompts = [heldout_ids[index][: extra["starts"][index]].tolist() for index in mine]
    in_bf16 = engine.samples_together and config.precision == "bf16"  # matrices are gathered in bf16
    with (
        engine.sampling() if engine.samples_together else engine.gathered(),
        torch.autocast(engine.device.type, dtype=torch.bfloat16, enabled=in_bf16),
        torch.compiler.set_stance("force_eager"),  # every length of a cache would be compiled again
    ):
        completions = generate(
            engine.model,
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=0,
            stop_ids=chat.end_ids,
            pad_id=chat.tokenizer.pad_token_id,
            seeds=[0] * len(prompts),
        )
    ended, right, checked = 0.0, 0.0, 0.0
    for index, completion in zip(mine, completions, strict=True):
        ended += completion.stopped
        rule, answer = extra["answers"][index]
        if answer is not None:
            checked += 1
            right += score(rule, chat.tokenizer.decode(completion.ids, skip_special_tokens=True), answer)
    own = [ended, right, checked, float(len(mine))]
    ended, right, checked, answered = all_reduce_sum([counts * value for value in own])
    numbers = {}
    if answered:
        numbers |= {"eos_rate": ended / answered, "answered": answered}
    if checked:
        numbers |= {"rule": right / checked, "checked": checked}
    return numbers


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("sft")
