"""Rows of new tokens, in the shapes that embeddings and output layers have."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models import build, vocabulary

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("family, keys", [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("phi", {})])
def test_new_rows_are_means_of_old_ones(family, keys, tmp_path):
    """In an output layer of its own, one that is the embedding, and one with a bias; ids below the rows that a model
    has are taken first. A saved model has them too."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **keys)).save_pretrained(tmp_path / "old")
    model, old = (build.load(tmp_path / "old") for _ in range(2))
    pieces = {60: [3, 4], 61: [7, 9, 11], 62: [5]}  # 60: a spare row, which no token had
    vocabulary.add_rows(model, pieces)
    model.save_pretrained(tmp_path / "new")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert again.config.vocab_size == 63 == len(again.get_input_embeddings().weight)
    for made in (model, again):
        for layer in ("get_input_embeddings", "get_output_embeddings"):
            rows, before = getattr(made, layer)(), getattr(old, layer)()
            assert torch.equal(rows.weight[:60], before.weight[:60])
            for index, parts in pieces.items():
                torch.testing.assert_close(rows.weight[index], before.weight[parts].mean(0))
                if family == "phi" and layer == "get_output_embeddings":
                    torch.testing.assert_close(rows.bias[index], before.bias[parts].mean())
        tied = made.get_input_embeddings().weight is made.get_output_embeddings().weight
        assert tied == bool(keys.get("tie_word_embeddings"))
