"""Layout of responses, and log-probabilities, entropies and values at their tokens."""

import math

import pytest
import torch
from ppo_world import PAD, VOCABULARY, samples_of, tiny

from pipeline.rl.responses import Sample, ValueModel, disable_dropout, layout, token_statistics


def test_layout_and_masks():
    """1, 3: by length alone. The pad id inside a response, and a stop id equal to the pad id, keep their weight."""
    batch = layout(
        [
            Sample(0, [7, 8, 9], [5, PAD], False, []),
            Sample(1, [7], [5, 6, PAD], True, []),
            Sample(2, [7], [PAD], True, []),
        ],
        pad_id=PAD,
    )
    assert batch["mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch["inputs"]["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]]
    assert batch["inputs"]["position_ids"][1].tolist() == [0, 0, 0, 1, 2, 3]
    assert batch["responses"].tolist() == [[5, PAD, PAD], [5, 6, PAD], [PAD, PAD, PAD]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_row_alone_and_in_a_batch(temperature):
    """2, 9: log-probabilities, entropies and values, against a plain forward pass over the row without padding."""
    policy, value = tiny(), ValueModel(tiny("reward"))
    made = samples_of([(5, 4), (1, 6), (9, 1)])
    batch = layout(made, PAD)
    with torch.no_grad():
        logprobs, entropy = token_statistics(policy(**batch["inputs"]).logits, batch["responses"], temperature)
        values = value(**batch["inputs"]).logits[:, -batch["responses"].shape[1] - 1 : -1, 0]
        for row, sample in enumerate(made):
            ids, n = torch.tensor([sample.prompt_ids + sample.response_ids]), len(sample.response_ids)
            distribution = torch.distributions.Categorical(logits=policy(ids).logits[0, -n - 1 : -1] / temperature)
            torch.testing.assert_close(
                logprobs[row, :n], distribution.log_prob(torch.tensor(sample.response_ids)), atol=1e-5, rtol=0
            )
            torch.testing.assert_close(entropy[row, :n], distribution.entropy(), atol=1e-5, rtol=0)
            # 11: what the reward model scores when the sequence ends at each token
            for t in range(n):
                prefix = torch.tensor([sample.prompt_ids + sample.response_ids[:t]])
                torch.testing.assert_close(values[row, t], value.classifier(prefix).logits[0, 0], atol=1e-5, rtol=0)


def test_entropy_of_a_uniform_model():
    """30."""
    _, entropy = token_statistics(torch.zeros(2, 5, VOCABULARY), torch.zeros(2, 3, dtype=torch.long), 1.0)
    torch.testing.assert_close(entropy, torch.full((2, 3), math.log(VOCABULARY)))


def test_values_in_calibrated_units():
    """11, 13: the value model's shift and scale are those of the rewards."""
    value = ValueModel(tiny("reward"))
    batch = layout(samples_of([(4, 3)]), PAD)
    with torch.no_grad():
        plain = value(**batch["inputs"]).logits
        value.mean, value.deviation = 3.0, 2.0
        torch.testing.assert_close(value(**batch["inputs"]).logits, (plain - 3) / 2)


def test_dropout_is_off():
    """8: in modules and in attention, though the model is in training mode; the config, which is published, keeps
    its numbers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    models = [
        tiny(attention_dropout=0.5),
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                resid_pdrop=0.5,
                embd_pdrop=0.5,
                attn_pdrop=0.5,
            )
        ),
    ]
    batch = layout(samples_of([(5, 4), (1, 6)]), PAD)
    for model in models:
        model.train()
        first, second = model(**batch["inputs"]).logits, model(**batch["inputs"]).logits
        assert not torch.equal(first, second)
        disable_dropout(model)
        assert torch.equal(model(**batch["inputs"]).logits, model(**batch["inputs"]).logits)
    assert models[0].config.attention_dropout == 0.5
