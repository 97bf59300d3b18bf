"""Layout of responses, and log-probabilities, entropies and values at their tokens."""

import math

import pytest
import torch
from ppo_world import PAD, VOCABULARY, samples_of, tiny

from pipeline.rl.responses import (
    Sample,
    ValueModel,
    disable_dropout,
    layout,
    places,
    predict,
    predict_at_labels,
    spread,
    token_statistics,
)


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
    assert batch["inputs"]["input_ids"].tolist() == [[7, 8, 9, 5, PAD], [7, 5, 6, PAD, PAD], [7, PAD, PAD, PAD, PAD]]
    assert batch["mask"].tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    none = -100
    labels = [[none, none, 5, PAD, none], [5, 6, PAD, none, none], [PAD, none, none, none, none]]
    assert batch["labels"].tolist() == labels
    values = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [6.0, 0.0, 0.0]])
    placed = spread(values, torch.tensor([2, 3, 1]), batch["mask"])
    assert placed.tolist() == [[0, 0, 1, 2, 0], [3, 4, 5, 0, 0], [6, 0, 0, 0, 0]]


@pytest.mark.parametrize("chunk", [None, 4, 100])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_row_alone_and_in_a_batch(temperature, chunk):
    """2, 9: log-probabilities, entropies and values, against a plain forward pass over the row without padding; and
    gradients, of output layers that compute the response's tokens only (in several chunks, in one) and of those that
    compute all."""
    policy, plain, value = tiny(), tiny(), ValueModel(tiny("reward"))
    if chunk is not None:
        predict_at_labels(policy, temperature)
        policy.get_output_embeddings().chunk = chunk
    made = samples_of([(5, 4), (1, 6), (9, 1)])
    batch = layout(made, PAD)
    logprobs, entropy = token_statistics(predict(policy, batch), batch["labels"], temperature)
    values = value(**batch["inputs"]).logits[..., 0].detach()
    wanted = []
    for row, sample in enumerate(made):
        ids, n, own = torch.tensor([sample.prompt_ids + sample.response_ids]), len(sample.response_ids), places(sample)
        distribution = torch.distributions.Categorical(logits=plain(ids).logits[0, -n - 1 : -1] / temperature)
        wanted.append(distribution.log_prob(torch.tensor(sample.response_ids)))
        torch.testing.assert_close(logprobs[row, own], wanted[-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[row, own], distribution.entropy().detach(), atol=1e-5, rtol=0)
        # 11: what the reward model scores when the sequence ends at each token
        for t in range(n):
            prefix = torch.tensor([sample.prompt_ids + sample.response_ids[:t]])
            expected = value.classifier(prefix).logits[0, 0].detach()
            torch.testing.assert_close(values[row, own][t], expected, atol=1e-5, rtol=0)
    assert (logprobs[batch["mask"] == 0] == 0).all() and (entropy[batch["mask"] == 0] == 0).all()
    factors = torch.linspace(-1, 2, int(batch["mask"].sum()))
    (logprobs[batch["mask"].bool()] * factors).sum().backward()
    (torch.cat(wanted) * factors).sum().backward()
    for found, expected in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-4)


def test_entropy_of_a_uniform_model():
    """30."""
    labels = torch.tensor([[0, 0, -100], [0, -100, -100]])
    _, entropy = token_statistics(torch.zeros(2, 3, VOCABULARY), labels, 1.0)
    torch.testing.assert_close(entropy, (labels == 0) * math.log(VOCABULARY))


def test_values_in_calibrated_units():
    """11, 13: the value model's shift and scale are those of the rewards."""
    value = ValueModel(tiny("reward"))
    batch = layout(samples_of([(4, 3)]), PAD)
    with torch.no_grad():
        plain = value(**batch["inputs"]).logits
        value.set_units(3.0, 2.0)
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
