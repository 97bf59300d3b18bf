"""Reward model: one score for an answer, learned from pairs of answers of which one was preferred.

    python pipeline/reward.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/reward.py recipes/llama-7b.yaml

The SFT model with a new score layer, read at the end of the turn; Bradley-Terry loss. Out: model/
(AutoModelForSequenceClassification, one label, with the calibration in config.json), report.json (what became of each
record).
"""

import functools
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.core.artifact import Artifact
from pipeline.core.config import PublishedModel
from pipeline.core.files import write_json
from pipeline.core.intervals import shares, wilson
from pipeline.core.output import Output
from pipeline.data.chat.chat_sources import PreferenceSource
from pipeline.train.finetune_config import FinetuneConfig, ScoreOptimizer

VERSION = 9  # 9: thoughts that a template writes otherwise than its prompt, ids and ends of tool calls
INPUTS = {"model": ("sft", "pretrain")}


class Config(FinetuneConfig):
    """Reward model."""

    MODEL = PublishedModel("model", "score")

    sources: dict[str, PreferenceSource]
    """Pairs by name."""
    evaluate: dict[str, PreferenceSource] = {}
    """Held-out pairs by name, with metrics of their own (loss/NAME)."""
    centering: float = Field(0.0, ge=0)
    """Coefficient of (score of chosen + score of rejected)^2 in the loss; 0.01 in TRL's examples (Eisenstein et al.,
    2023)."""
    optimizer: ScoreOptimizer = ScoreOptimizer()
    """AdamW."""
    calibration_pairs: Annotated[int, Field(ge=2)] = 1024
    """Training pairs, drawn from the seed, on whose answers the published scores have mean 0 and standard deviation
    1."""

    def sequences_per_row(self) -> int:
        return 2


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.train import finetune
    from pipeline.train.finetune_data import encode_once, heldout_sets
    from pipeline.train.loss_preference import bradley_terry
    from pipeline.train.preference_data import (
        encoded_pairs,
        pair_batch,
        pair_counts,
        pair_length,
        pair_lengths,
        pair_work,
    )
    from pipeline.train.scores import initial_score

    # Load and encode
    parent = finetune.load_parent(config, inputs["model"], output.stage)
    encode = functools.partial(encoded_pairs, config, parent.chat, output, margins=True)
    arrays, extra = encode_once(output, config, encode)
    sets = heldout_sets(config, arrays, len(arrays["heldout.start"]))
    counts = pair_counts(arrays, extra, sets)
    rows = finetune.shuffled_rows(config, arrays, pair_lengths(arrays))
    config = finetune.in_steps(config, rows.per_epoch)

    # Build
    model, weights = finetune.load_model(config, parent, head="reward")
    initial_score(model, config.seed, weights)
    pad_id = padding(parent.tokenizer, parent.chat.end_id, model.get_input_embeddings().num_embeddings)
    model.config.pad_token_id = pad_id  # transformers finds a row's last token by it
    finetune.adapt(config, parent, model, weights, complete=("score",))
    collate = functools.partial(pair_batch, arrays, pad_id, length=config.fixed_length())

    def loss(logits, batch: dict):
        return bradley_terry(logits.squeeze(-1), batch["margin"], config.centering)

    engine, text = finetune.build_engine(model, loss, config, pair_work(config, arrays), weights=weights)
    finetune.say_counts(output, counts)
    finetune.say_sources(config, arrays, rows)

    # Fit, calibrate and publish
    length = functools.partial(pair_length, arrays)
    result = finetune.fit(engine, config, output, text, rows, sets, collate, unit="pairs", length=length)
    mean, deviation = moments(engine, counts.train, collate, config)
    model_config = engine.model.config
    model_config.alma_reward_gain, model_config.alma_reward_bias = 1 / deviation, -mean / deviation
    folder = finetune.publish_model(engine, config, parent, output)
    if output.is_main:
        pad_with(folder, parent.tokenizer, pad_id)

    accuracy = result["after"]["accuracy"]
    interval = wilson(accuracy, counts.heldout)
    measure = f"held-out pairs ranked right {shares(result['before']['accuracy'], accuracy, counts.heldout)}"
    nothing = [f"{measure}, which guessing could give"] if interval[0] <= 0.5 else []
    metrics = finetune.summarise(
        config, output, result, rows, counts, unit="pairs", measures=[measure], nothing=nothing, arrays=arrays
    )
    metrics["heldout_accuracy_interval"] = list(interval)
    metrics["raw_score_mean"] = mean
    metrics["raw_score_deviation"] = deviation
    return metrics


def padding(tokenizer, end_id: int, num_embeddings: int) -> int:
    """The token to pad with: the tokenizer's own, unless it is what ends an answer. transformers reads a score at a
    row's last token that is not padding, so the two must differ; a special token is taken, because text has none."""
    special = [index for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special, 0, 1]
    return next(index for index in candidates if index is not None and index != end_id and index < num_embeddings)


def pad_with(folder: Path, tokenizer, pad_id: int) -> None:
    """Make the published tokenizer pad with the token that the published model's config names."""
    from pipeline.data.tokenizer.tokenizer_folder import CONFIG, content_of, read_object

    token = tokenizer.convert_ids_to_tokens(pad_id)
    config = read_object(folder / CONFIG)
    if pad_id in tokenizer.added_tokens_decoder and content_of(config.get("pad_token")) != token:
        config["pad_token"] = token
        write_json(folder / CONFIG, config)


def moments(engine, count: int, collate, config: Config) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores of both answers of training pairs, equal on all processes.
    Collective."""
    import torch

    from pipeline.core.distributed import all_reduce_sum
    from pipeline.train.finetune_data import chunks, micro_batch_rows
    from pipeline.train.record_order import permutation

    pairs = permutation(config.seed, 0, count)[: config.calibration_pairs]
    mine, counted = pairs[engine.data_rank :: engine.data_world], 1.0
    if not len(mine):  # more processes than pairs: forward passes are collective, so score one and count none
        mine, counted = pairs[:1], 0.0
    batches = [collate("train", part) for part in chunks(mine, micro_batch_rows(config, engine))]
    scores = torch.cat(engine.forward(batches, lambda logits, _: logits.squeeze(-1))).double()
    sums = [float(scores.sum()), float((scores**2).sum()), float(len(scores))]
    total, squares, number = all_reduce_sum([counted * value for value in sums])
    mean = total / number
    deviation = max(squares / number - mean**2, 0.0) ** 0.5
    return mean, deviation if deviation > 1e-6 else 1.0  # a model that scores all answers alike keeps its scale


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("reward")
