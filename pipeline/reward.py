"""Reward model: one score for an answer, learnt from pairs of answers of which one was preferred.

    python pipeline/reward.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/reward.py recipes/llama-7b.yaml

The SFT model with a new score layer, read at the end of the turn; Bradley-Terry loss. Out: model/
(AutoModelForSequenceClassification, one label, with the calibration in config.json), report.json (what became of each
record).
"""

import functools
from typing import Annotated

from pydantic import Field

from pipeline.core.artifact import Artifact
from pipeline.core.files import write_json
from pipeline.core.intervals import shares, warn, wilson
from pipeline.core.output import Output
from pipeline.core.plural import many
from pipeline.data.chat.chat_sources import PreferenceSource
from pipeline.data.dedup.decontaminate import Decontaminate
from pipeline.train.config import Optimizer, TuningConfig

VERSION = 4
INPUTS = {"model": ("sft", "pretrain")}


class RewardOptimizer(Optimizer):
    """AdamW for reward modelling."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate; small models take 1e-4 to 1e-3."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices."""


class Config(TuningConfig):
    """Reward model."""

    sources: dict[str, PreferenceSource]
    """Pairs by name."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets whose text must not be trained on."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of records, chosen by their own hash and so the same in every stage, that is only measured on."""
    centering: float = Field(0.0, ge=0)
    """Coefficient of (score of chosen + score of rejected)^2 in the loss; 0.01 in TRL's examples (Eisenstein et al.,
    2023)."""
    optimizer: RewardOptimizer = RewardOptimizer()
    """AdamW."""
    calibration_pairs: Annotated[int, Field(ge=2)] = 1024
    """Training pairs, drawn from the seed, on whose answers the published scores have mean 0 and standard deviation
    1."""


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.core.chain import say
    from pipeline.models.build import load
    from pipeline.models.publish import publish
    from pipeline.train.engine import build
    from pipeline.train.finetune_data import (
        announce,
        chat_of,
        heldout_share,
        model_folder,
        pair_batch,
        pair_work,
        row_at,
        shared,
        tokenizer_of,
    )
    from pipeline.train.loop import fit, share
    from pipeline.train.loss_preference import bradley_terry

    folder = model_folder(inputs["model"])
    tokenizer = tokenizer_of(folder, config.sequence_length)
    chat = chat_of(tokenizer, config, output.stage)
    arrays, extra = shared(output, config, functools.partial(rows_of, config, chat, output))
    count, heldout = len(arrays["train.start"]), len(arrays["heldout.start"])

    model = load(folder, head="reward")
    initial_score(model, config.seed)
    pad_id = padding(tokenizer, chat.end_id, model.get_input_embeddings().num_embeddings)
    model.config.pad_token_id = pad_id  # transformers finds a row's last token by it

    def loss(logits, batch: dict):
        return bradley_terry(logits.squeeze(-1), batch["margin"], config.centering)

    text = announce(config, model, pair_work(config, arrays))
    engine = build(model, loss, config)
    measured = [pair_batch(arrays, "heldout", rows, pad_id) for rows in heldout_share(heldout, config, engine)]
    say(
        f"{output.stage}: {many(count, 'pair')} to train on, {heldout} held out;"
        f" {many(extra['rejected'], 'record')} left out"
        " (report.json says why)"
    )

    def batches(step: int) -> list[dict]:
        chosen = [[row_at(config.seed, index, count) for index in indices] for indices in share(config, engine, step)]
        return [pair_batch(arrays, "train", rows, pad_id) for rows in chosen]

    result = fit(engine, config, output, batches, evaluate=lambda: engine.evaluate(measured), unit="pairs", text=text)
    mean, deviation = moments(engine, arrays, pad_id, config)
    weights = engine.consolidated()
    if output.is_main:
        model_config = engine.model.config
        model_config.alma_reward_gain, model_config.alma_reward_bias = 1 / deviation, -mean / deviation
        publish(weights, model_config, folder, output.path / "model")
        pad_with(output.path / "model", tokenizer, pad_id)
    before, after = result["before"], result["after"]
    low, high = wilson(after["accuracy"], heldout)
    measure = f"held-out pairs ranked right {shares(before['accuracy'], after['accuracy'], heldout)}"
    guessing = [f"{measure}, which guessing could give"] if low <= 0.5 else []
    return {
        **{
            f"heldout_{key}_{when}": value
            for when, found in (("before", before), ("after", after))
            for key, value in found.items()
            if key != "weight"
        },
        "heldout_accuracy_interval": [low, high],
        "warnings": warn(output.stage, guessing),
        "train_loss": result["last"]["loss"],
        "train_pairs": count,
        "heldout_pairs": heldout,
        "rejected": extra["rejected"],
        "epochs": config.steps * config.batch_size / count,
        "raw_score_mean": mean,
        "raw_score_deviation": deviation,
        "pairs_per_second": result["rate"],
        "summary": {
            "input": f"{many(len(config.sources), 'source')}, {many(count + heldout, 'pair')}",
            "output": f"model/, {many(config.steps, 'step')}",
            "measure": measure,
        },
    }


def rows_of(config, chat, output: Output, margins: bool = True) -> tuple[dict, dict]:
    """Token rows of both splits; report.json. Runs on the main process. DPO reads its pairs with it too, without
    margins."""
    from pipeline.data.chat.conversations import load_pairs
    from pipeline.train.finetune_data import encode_pairs

    train, heldout, ledger = load_pairs(config.sources, config.holdout, config.decontaminate)
    arrays = {}
    for split, pairs in (("train", train), ("heldout", heldout)):
        arrays |= encode_pairs(pairs, split, chat, config.sequence_length, ledger, margins)
    ledger.check(config.holdout)
    report = output.path / "report.json"
    write_json(report, ledger.report())
    ledger.judge(config.max_bad, report)
    return arrays, {"rejected": ledger.rejected()}


def padding(tokenizer, end_id: int, rows: int) -> int:
    """The token to pad with: the tokenizer's own, unless it is what ends an answer. transformers reads a score at a
    row's last token that is not padding, so the two must differ; a special token is taken, for text has none. `rows`:
    tokens that the model has an embedding for."""
    special = [index for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    likely = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special, 0, 1]
    return next(index for index in likely if index is not None and index != end_id and index < rows)


def pad_with(folder, tokenizer, pad_id: int) -> None:
    """Let the published tokenizer pad with the token that the published model is told of, if it is another one than
    it had."""
    from pipeline.data.tokenizer.tokenizer_folder import CONFIG, content_of, read_object

    token = tokenizer.convert_ids_to_tokens(pad_id)
    config = read_object(folder / CONFIG)
    if pad_id in tokenizer.added_tokens_decoder and content_of(config.get("pad_token")) != token:
        write_json(folder / CONFIG, {**config, "pad_token": token})


def initial_score(model, seed: int) -> None:
    """The score layer ~ N(0, 1 / sqrt(width + 1)): scores of about 1 at the start, whatever the width (Stiennon et
    al., 2020, appendix B; Huang et al., 2024)."""
    import torch

    from pipeline.core.seeds import derive

    weight = model.score.weight
    with torch.no_grad():
        weight.normal_(0, (weight.shape[1] + 1) ** -0.5, generator=torch.Generator().manual_seed(derive(seed, "score")))


def moments(engine, arrays: dict, pad_id: int, config: Config) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores of both answers of training pairs, equal on all processes."""
    import torch

    from pipeline.train.distributed import all_reduce_sum
    from pipeline.train.finetune_data import pair_batch, permutation

    chosen = permutation(config.seed, 0, len(arrays["train.start"]))[: config.calibration_pairs]
    mine = chosen[engine.data_rank :: engine.data_world]
    if not len(mine):  # more processes than pairs: forward passes are collective, so score one and count none
        mine, counted = chosen[:1], 0.0
    else:
        counted = 1.0
    micro = config.micro_batch or config.batch_size // engine.data_world
    batches = [pair_batch(arrays, "train", mine[start : start + micro], pad_id) for start in range(0, len(mine), micro)]
    scores = torch.cat(engine.forward(batches, lambda logits, _: logits.squeeze(-1))).double()
    total, squares, number = all_reduce_sum(
        [counted * float(scores.sum()), counted * float((scores**2).sum()), counted * len(scores)]
    )
    mean = total / number
    deviation = max(squares / number - mean**2, 0.0) ** 0.5
    return mean, deviation if deviation > 1e-6 else 1.0  # a model that scores all answers alike keeps its scale


if __name__ == "__main__":
    from pipeline.core.chain import main

    main("reward")
