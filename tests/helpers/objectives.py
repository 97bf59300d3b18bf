"""The gradient of one step of each finetuning objective, by the functions that the stages train with, on eight records
of uneven length. Also run by two processes (`python objectives.py RESULTS` under torchrun)."""

import sys

import numpy as np
import torch

PAIR_LOSSES = {
    "sigmoid": {"label_smoothing": 0.1},
    "sigmoid_norm": {},
    "robust": {"label_smoothing": 0.2},
    "ipo": {},
    "hinge": {},
    "apo_zero": {},
    "apo_down": {},
    "simpo": {},
    "orpo": {},
    "mixed": {"loss": {"sigmoid": 1.0, "orpo": 0.5, "sft": 0.2}},
}
OBJECTIVES = ("sft", "sft weighted", "distill", "reward", "prm", "kto", "apo_zero_unpaired", *PAIR_LOSSES)
KEYS = {"sources": {"s": {"path": "x"}}, "batch_size": 8, "sequence_length": 64, "steps": 1, "seed": 5}


def _ragged(source, count: int, lengths: list[int]):
    from tiny_engine import VOCABULARY

    from pipeline.train.finetune_data import Ragged

    return Ragged.of([source.integers(1, VOCABULARY, length) for length in lengths[:count]], np.int32)


def arrays_of() -> dict:
    """Rows of all stages under their names: eight records of 6 to 41 tokens, with prompts of 1 to 5."""
    from pipeline.train.finetune_data import Ragged

    source, lengths = np.random.default_rng(0), [6, 41, 9, 23, 12, 35, 7, 18]
    ids = _ragged(source, 8, lengths)
    trained = Ragged.of([np.arange(length) >= 1 + index % 5 for index, length in enumerate(lengths)], np.bool_)
    weights = Ragged.of([trained[index] * (1.0 + index) for index in range(8)], np.float32)
    start = 1 + np.arange(8) % 5
    prompts = [ids[index][: start[index]] for index in range(8)]
    rejected = _ragged(source, 8, lengths[::-1])
    rejected = Ragged.of([[*prompts[index], *rejected[index]] for index in range(8)], np.int32)
    return {
        "train.ids": ids,
        "train.trained": trained,
        "train.weights": weights,
        "train.chosen": ids,
        "train.rejected": rejected,
        "train.start": start,
        "train.margin": np.linspace(0, 1, 8).astype(np.float32),
        "train.label": np.arange(8) % 3 != 1,
        "train.ends": Ragged.of([np.arange(4 + index % 3, lengths[index], 3) for index in range(8)], np.int64),
        "train.labels": Ragged.of(
            [np.arange(4 + index % 3, lengths[index], 3) % 2 == 0 for index in range(8)], np.bool_
        ),
    }


def model_of(name: str, adapted: bool):
    from tiny_engine import VOCABULARY, tiny
    from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

    from pipeline.models import lora
    from pipeline.models.initial_values import initialise
    from pipeline.models.lora_config import Lora
    from pipeline.train import chunked_loss

    scores = name in ("reward", "prm")
    if scores:
        keys = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        labels = 1 if name == "reward" else 2
        config = LlamaConfig(vocab_size=VOCABULARY, num_labels=labels, pad_token_id=0, classifier_dropout=0.0, **keys)
        model = (LlamaForSequenceClassification if name == "reward" else LlamaForTokenClassification)(config)
        initialise(model, seed=0)
    else:
        model = tiny(num_hidden_layers=2)
    if adapted:
        lora.attach(model, Lora(rank=4), 0, ("score",) if scores else ())
        source = torch.Generator().manual_seed(1)
        for layer in lora.adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=source)
    if not scores and name != "distill":
        chunked_loss.install(model, chunk=7, per_token=not name.startswith("sft"), selects=True)
    return model


def stage_of(name: str, arrays: dict, micro: int | None):
    """(config, loss function, collate(part), what is called with the engine to prepare a step, length of a row)."""
    from tiny_engine import tiny

    from pipeline import dpo, kto, prm, reward, sft
    from pipeline.train import distillation
    from pipeline.train.conversation_data import conversation_batch
    from pipeline.train.labelled_data import labelled_batch
    from pipeline.train.loss_preference import bradley_terry, step_cross_entropy
    from pipeline.train.preference_data import pair_batch, pair_length
    from pipeline.train.step_data import step_batch

    keys = KEYS | {"precision": "fp32", "micro_batch": micro, "optimizer": {"lr": 1e-3, "max_grad_norm": 1e9}}
    references = torch.randn(8, 2, generator=torch.Generator().manual_seed(2)) - 60
    if name.startswith("sft"):
        own = {key: value for key, value in arrays.items() if "weights" not in key or name.endswith("weighted")}
        config = sft.Config(kind="sft", **keys)
        return config, sft.loss, lambda part: conversation_batch(own, 0, "train", [[i] for i in part]), None, None
    if name == "distill":
        own = {key: value for key, value in arrays.items() if "weights" not in key}
        options = {"weight": 0.7, "divergence": "reverse", "temperature": 1.5}
        config = sft.Config(kind="sft", distill=options, inputs={"teacher": "larger"}, **keys)
        teacher = distillation.Teacher(tiny(num_hidden_layers=4, hidden_size=48).eval(), config)
        loss = distillation.objective(config.distill, teacher)[0]
        return config, loss, lambda part: conversation_batch(own, 0, "train", [[i] for i in part]), None, None
    if name == "reward":
        config = reward.Config(kind="reward", centering=0.1, **keys)

        def loss(logits, batch):
            return bradley_terry(logits.squeeze(-1), batch["margin"], config.centering)

        return config, loss, lambda part: pair_batch(arrays, 0, "train", part), None, None
    if name == "prm":
        config = prm.Config(kind="prm", **keys)
        return config, step_cross_entropy, lambda part: step_batch(arrays, 0, "train", part), None, None
    if name in PAIR_LOSSES:
        config = dpo.Config(kind="dpo", **({"loss": name} | PAIR_LOSSES[name]), **keys)

        def pairs(part):
            batch = pair_batch(arrays, 0, "train", part)
            return batch | {"reference": references[part].T.flatten()}

        return config, dpo.objective(config)[0], pairs, None, lambda index: pair_length(arrays, "train", index)
    config = kto.Config(kind="kto", loss=name, desirable_weight=1.3, **keys)

    def judged(part):
        return labelled_batch(arrays, 0, "train", part) | {"reference": references[part, 0]}

    def prepare(engine):
        return kto.baseline(engine, config, arrays, {"train": references}, 0)

    return config, kto.objective(config)[0], judged, prepare, lambda index: len(arrays["train.ids"][index])


def gradients(name: str, adapted: bool, micro: int | None) -> tuple[dict, dict]:
    """(numbers of the step, gradient of each trained parameter) of one step over the eight records. Collective."""
    from pipeline.train import engine as engines
    from pipeline.train import loop
    from pipeline.train.finetune_data import by_length

    arrays = arrays_of()
    config, loss, collate, prepare, length = stage_of(name, arrays, micro)
    engine = engines.build(model_of(name, adapted), loss, config)
    parts = [list(part) for part in loop.share(config, engine, 0)]
    if length is not None:
        parts = by_length(parts, length)
    batches = [collate(part) for part in parts]
    if prepare is not None:
        prepare(engine)("train", parts, batches)
    found: dict[str, torch.Tensor] = {}

    def keep(*_) -> bool:
        for key, parameter in engine.named.items():
            if parameter.grad is not None:
                found[key] = parameter.grad.clone()
        return False

    return engine.step(batches, accept=keep), found


if __name__ == "__main__":
    from pipeline.core import distributed

    distributed.setup()
    results = {}
    for objective in OBJECTIVES:
        for with_adapter in (False, True):
            results[objective, with_adapter] = gradients(objective, with_adapter, 1)
    if distributed.is_main():
        torch.save(results, sys.argv[1])
    distributed.barrier()
    distributed.shutdown()
