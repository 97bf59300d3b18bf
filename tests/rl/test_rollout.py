"""Sampling against transformers' own generate and a plain forward pass, and the scores by rule."""

import numpy as np
import pytest
import torch

from pipeline.rl.rollout import choose, generate, left_pad, uniform
from pipeline.rl.rules import score

VOCABULARY, PAD, STOPS = 61, 0, [2, 5]


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    keys = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**keys, "initializer_range": 0.3, **changes}))


def gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            **{
                "vocab_size": VOCABULARY,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 64,
                "initializer_range": 0.3,
                **changes,
            }
        )
    )


def prompts_of(count, longest=12):
    source = np.random.default_rng(1)
    return [source.integers(6, VOCABULARY, size=source.integers(1, longest)).tolist() for _ in range(count)]


def sample(model, prompts, seeds=None, **changes):
    keys = {"max_new_tokens": 10, "temperature": 1.0, "stop_ids": STOPS, "pad_id": PAD}
    return generate(model, prompts, seeds=list(range(len(prompts))) if seeds is None else seeds, **{**keys, **changes})


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_a_row_does_not_depend_on_its_batch(build, temperature):
    model, prompts = build(), prompts_of(40)
    whole = sample(model, prompts, temperature=temperature)
    assert {c.stopped for c in whole} == {True, False} and len({len(c.ids) for c in whole}) > 3
    for batch in (1, 7):
        parts = sample(model, prompts, temperature=temperature, batch=batch)
        assert [c.ids for c in parts] == [c.ids for c in whole]
        for one, other in zip(parts, whole, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    back = sample(model, prompts[::-1], list(range(40))[::-1], temperature=temperature)
    assert [c.ids for c in back] == [c.ids for c in whole][::-1]


def test_equal_prompts_are_read_once_and_answered_each_by_its_seed(monkeypatch):
    model, prompts = llama(), prompts_of(5) * 4
    alone = sample(model, prompts, batch=1)
    forward, read = model.forward, []
    monkeypatch.setattr(model, "forward", lambda **inputs: read.append(len(inputs["input_ids"])) or forward(**inputs))
    whole = sample(model, prompts)
    assert read[:2] == [5, 20] and len({tuple(completion.ids) for completion in whole}) > 15
    for one, other in zip(alone, whole, strict=True):
        assert one.ids == other.ids and one.stopped == other.stopped
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_greedy_is_what_transformers_generates():
    model, prompts = llama().eval(), prompts_of(12)
    for prompt, completion in zip(prompts, sample(model, prompts, temperature=0), strict=True):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=STOPS, pad_token_id=PAD
        )
        assert completion.ids == wanted[0, len(prompt) :].tolist()
        assert completion.stopped == (completion.ids[-1] in STOPS)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_a_forward_pass(temperature):
    """Checklist 2: of each row alone, though it was sampled left-padded, with dropout in the model."""
    model, prompts = llama(attention_dropout=0.1), prompts_of(20)
    model.train()
    completions = sample(model, prompts, temperature=temperature)
    assert model.training
    model.eval()
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
        wanted = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
        # rounding of other batch shapes; one processor gave 1.05e-5
        np.testing.assert_allclose(completion.logprobs, wanted.detach(), atol=2e-5)


def test_completions_end_with_the_first_stop_token():
    completions = sample(llama(), prompts_of(200, 4), max_new_tokens=20)
    for completion in completions:
        assert 1 <= len(completion.ids) <= 20 and len(completion.ids) == len(completion.logprobs)
        assert not set(completion.ids[:-1]) & set(STOPS)
        assert completion.stopped or len(completion.ids) == 20
    assert len({tuple(c.ids) for c in completions}) > 190  # rows with different seeds differ


def test_a_model_that_wants_to_stop_is_not_made_to_go_on():
    """Checklist 7: no silent minimum length."""
    model = llama()
    bias = torch.nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        bias.weight.zero_(), bias.bias.zero_()
        bias.bias[2] = 30.0
    model.lm_head = bias
    assert [c.ids for c in sample(model, prompts_of(5))] == [[2]] * 5


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_have_the_distribution_of_the_model(temperature):
    """Pearson's chi-square of 40,000 draws over 12 tokens; 31.3 is its 99.9% quantile with 11 degrees of freedom."""
    logits = torch.linspace(-2, 1, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    draws = torch.from_numpy(uniform(list(range(10_000)), 4)).reshape(-1)
    chosen, logprobs = choose(logits.expand(len(draws), -1), temperature, draws)
    expected = (logits / temperature).softmax(-1).double() * len(draws)
    counts = torch.bincount(chosen, minlength=12)
    assert ((counts - expected) ** 2 / expected).sum() < 31.3
    torch.testing.assert_close(logprobs, (logits / temperature).log_softmax(-1)[chosen])


def test_random_numbers_are_uniform_and_uncorrelated():
    numbers = uniform([7 + 1000 * i for i in range(5000)], 8)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005 and abs(numbers.var() - 1 / 12) < 0.001
    correlation = np.corrcoef(numbers, rowvar=False) - np.eye(8)
    assert abs(correlation).max() < 0.06  # 4 standard errors of 5000 pairs
    np.testing.assert_array_equal(uniform([7], 3), numbers[:1, :3])


def test_left_padding_keeps_positions():
    input_ids, mask, positions = left_pad([[9], [7, 8, 9]], PAD)
    assert (
        input_ids.tolist() == [[0, 0, 9], [7, 8, 9]]
        and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
        and positions.tolist() == [[0, 0, 0], [0, 1, 2]]
    )


@pytest.mark.parametrize(
    "rule, response, answer, wanted",
    [
        ("exact", " Paris\n", "Paris", 1),
        ("exact", "new  york", "new york", 1),
        ("exact", "Paris.", "Paris", 0),
        ("exact", "paris", "Paris", 0),
        ("prefix", "12, because", "12", 1),
        ("prefix", "120", "12", 0),
        ("prefix", "the 12", "12", 0),
        ("contains", "It is 12.", "12", 1),
        ("contains", "It is 120 or 512.", "12", 0),
        ("contains", "It is 120, no, 12", "12", 1),
        ("contains", "答案是北京。", "北京", 1),
        ("contains", "a (b) c", "(b)", 1),
        ("exact", "", "x", 0),
    ],
)
def test_rules(rule, response, answer, wanted):
    assert score(rule, response, answer) == wanted


def test_equal_prompts_without_a_cache_whose_rows_can_be_selected(monkeypatch):
    """Such a family reads each of them, and samples the same."""
    from transformers.cache_utils import Cache, DynamicCache

    model, prompts = llama(), [[3, 4, 5], [6, 7], [3, 4, 5], [6, 7], [3, 4, 5]]
    wanted = sample(model, prompts)
    for kind in (Cache, DynamicCache):
        monkeypatch.delattr(kind, "batch_select_indices", raising=False)
    found = sample(model, prompts)
    assert [completion.ids for completion in found] == [completion.ids for completion in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
