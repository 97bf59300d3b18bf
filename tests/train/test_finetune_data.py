"""Token rows of the finetuning stages: their order and packing; and that padding is masked by position, so that which
token pads changes nothing (correctness 40)."""

import json
from pathlib import Path

import numpy as np
import pytest
import tuned
from harness import succeed

from pipeline.core.errors import UserError
from pipeline.train.finetune_data import PackedRows, ShuffledRows, best_fit, permutation

# ---- order and packing ------------------------------------------------------------------------------------------------


def test_best_fit():
    source = np.random.default_rng(0)
    for capacity, count in ((50, 300), (64, 37), (10, 1)):
        lengths = source.integers(1, capacity + 1, count)
        rows = best_fit(lengths, capacity, np.arange(count))
        assert sorted(item for row in rows for item in row) == list(range(count))
        assert all(lengths[row].sum() <= capacity for row in rows)
        assert (
            len(rows) <= 11 / 9 * np.ceil(lengths.sum() / capacity) + 4 or len(rows) == (lengths > capacity / 2).sum()
        )
        assert len(rows) == len(best_fit(lengths, capacity, source.permutation(count)))
    hand = best_fit(np.array([6, 5, 4, 3, 2]), 10, np.arange(5))  # 6 + 4, 5 + 3 + 2
    assert sorted(map(sorted, hand)) == [[0, 2], [1, 3, 4]]


def test_shuffled_rows_are_a_function_of_seed_and_index():
    rows = ShuffledRows(7, 10)
    order = [rows.at(index) for index in range(25)]
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    permutation.cache_clear()
    assert [rows.at(index) for index in reversed(range(25))] == order[::-1]
    assert [ShuffledRows(8, 10).at(index) for index in range(10)] != order[:10]


def test_packed_rows_are_a_function_of_seed_and_index():
    """Each epoch has every conversation once, in other rows; where a run begins does not matter."""
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    rows = PackedRows(7, lengths, 32)
    per_epoch = rows.per_epoch
    epochs = []
    for epoch in range(3):
        epochs.append([rows.at(index) for index in range(epoch * per_epoch, (epoch + 1) * per_epoch)])
    for packed in epochs:
        assert sorted(item for row in packed for item in row) == list(range(40))
        assert max(lengths[row].sum() for row in packed) <= 32
    assert epochs[0] != epochs[1] != epochs[2]
    resumed = PackedRows(7, lengths, 32)
    assert [resumed.at(2 * per_epoch + place) for place in range(per_epoch)] == epochs[2]
    assert resumed.at(0) == epochs[0][0]


# ---- padding ----------------------------------------------------------------------------------------------------------

FEW = {
    "sft": ("steps=4", "max_prompts=4", "packing=false"),
    "reward": ("steps=4",),
    "dpo": ("steps=4", "inputs={model: ./base}"),
}


def changed(folder: Path, pad: str | None) -> None:
    """Another padding token for the tokenizer of the base model; "[PAD]" is one that a user added without resizing."""
    path = folder / "base/model/tokenizer_config.json"
    config = json.loads(path.read_text())
    config["pad_token"] = pad
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def weights(folder: Path, stage: str) -> bytes:
    words = [f"{stage}.{word}" for word in (*FEW[stage], "inputs={model: ./base}")]
    succeed(stage, "tiny.yaml", *dict.fromkeys(words), cwd=folder)
    return (folder / "runs/tiny" / stage / "current/model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tuned.world(tmp_path_factory.mktemp("usual"))
    return {stage: weights(folder, stage) for stage in FEW}


@pytest.mark.parametrize(
    "stage, pad", [("sft", "<|im_end|>"), ("sft", "[PAD]"), ("reward", "<|im_end|>"), ("dpo", "<|eos|>"), ("dpo", None)]
)
def test_the_padding_token_changes_no_weight(stage, pad, usual, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    folder = tuned.world(tmp_path)
    changed(folder, pad)
    assert weights(folder, stage) == usual[stage]
    if stage == "reward":  # what transformers, TRL and others read: the score at the end of the answer
        published = folder / "runs/tiny/reward/current/model"
        tokenizer = load_tokenizer(published)
        model = AutoModelForSequenceClassification.from_pretrained(published)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert model.config.pad_token_id == tokenizer.pad_token_id != end
        rows = [[20, 21, end], [22, 23, 24, 25, end]]
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        alone = [model(input_ids=padded["input_ids"][row : row + 1, : len(rows[row])]).logits.item() for row in (0, 1)]
        assert model(**padded).logits.flatten().tolist() == pytest.approx(alone, abs=1e-5)


def test_a_token_that_ends_text_and_pads_is_learned(tmp_path):
    """transformers gives the embedding of config.pad_token_id no gradient, and zeros at the start."""
    import torch

    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import build
    from pipeline.models.publish import publish

    folder = tuned.tokenizer(tmp_path / "tokenizer").name_or_path
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = tokenizer.eos_token
    block = {
        "family": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    model = build.new(block, tokenizer, 16, seed=1)
    assert model.get_input_embeddings().weight[tokenizer.eos_token_id].abs().sum() > 0
    model.config.pad_token_id = tokenizer.eos_token_id  # a folder made elsewhere
    publish(model.state_dict(), model.config, Path(folder), tmp_path / "model")
    for head in ("causal", "reward"):
        loaded = build.load(tmp_path / "model", head=head)
        ids = torch.tensor([[7, tokenizer.eos_token_id, 9]])
        loaded(input_ids=ids).logits.square().sum().backward()
        assert loaded.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0, head


def test_tokens_of_rows_that_the_model_has_no_embedding_for_are_refused(tmp_path):
    """A mark that the chat template writes, added without resizing the model."""
    from pipeline.train.finetune import tokenizer_of

    folder = tuned.base(tmp_path)
    place = folder / "model/tokenizer_config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps({**config, "additional_special_tokens": ["<|unwritten|>"]}))
    assert "<|unwritten|>" in tokenizer_of(folder / "model", 64).get_vocab()
    place.write_text(json.dumps({**config, "additional_special_tokens": ["<|tool|>"]}))
    template = folder / "model/chat_template.jinja"
    template.write_text(template.read_text() + "{#- <|tool|> -#}")
    with pytest.raises(UserError, match=r"'<\|tool\|>' with id 380, and the model's embedding has 380 rows"):
        tokenizer_of(folder / "model", 64)
