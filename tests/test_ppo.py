"""PPO. The parts against hand numbers, slow references and closed forms; then the stage, as a user runs it."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import files_of, stage, succeed

from pipeline.rl import advantages, kl, losses, rewards
from pipeline.rl.responses import Sample, ValueModel, disable_dropout, layout, token_statistics


def ragged(seed=0, batch=5, length=7):
    """Random [B, T] tensors and a mask whose rows have 1 to T tokens."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, length, *torch.randint(1, length + 1, (batch - 2,), generator=source).tolist()])
    mask = (torch.arange(length) < lengths[:, None]).double()
    return [torch.randn(batch, length, generator=source, dtype=torch.float64) for _ in range(4)], mask, lengths


# ---- KL --------------------------------------------------------------------------------------------------------------


def test_kl_estimators_against_the_exact_value():
    """17: on a categorical over 5 tokens, 200,000 draws, within 4 standard errors; k2 within its bias."""
    source = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, generator=source, dtype=torch.float64) * 0.4).softmax(-1)
    exact = float((p * (p / q).log()).sum())
    draws = torch.multinomial(p, 200_000, replacement=True, generator=source)
    for name in ("k1", "k3"):
        values = kl.estimate(p.log()[draws], q.log()[draws], name)
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / math.sqrt(len(draws)), name
    assert abs(float(kl.estimate(p.log()[draws], q.log()[draws], "k2").mean()) - exact) < 0.3 * exact
    assert float(kl.estimate(p.log(), q.log(), "k3").min()) >= 0 > float(kl.estimate(p.log(), q.log(), "k1").min())
    assert torch.isfinite(kl.estimate(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), "k3")).all()


def test_kl_estimators_differ_in_gradient():
    """17: of k1 the expected gradient is 0, of k2 that of the KL itself; so k1 belongs into the reward and k2 into a
    loss."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    p = logits.softmax(-1)
    exact = torch.autograd.grad((p * (p.log() - q.log())).sum(), logits, retain_graph=True)[0]
    found = {}
    for name in ("k1", "k2", "k3"):
        found[name] = torch.autograd.grad(
            (p.detach() * kl.estimate(p.log(), q.log(), name)).sum(), logits, retain_graph=True
        )[0]
    torch.testing.assert_close(found["k1"], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found["k2"], exact)
    assert not torch.allclose(found["k3"], exact)


def test_kl_controller():
    """18: at twice the target the coefficient rises by 0.2 n / horizon, at the target it stays."""
    assert kl.adapted(0.1, 12.0, 6.0, 1000, 64) == pytest.approx(0.1 * (1 + 0.2 * 64 / 1000))
    assert kl.adapted(0.1, 6.0, 6.0, 1000, 64) == 0.1
    assert kl.adapted(0.1, 6.3, 6.0, 1000, 64) == pytest.approx(0.1 * (1 + 0.05 * 64 / 1000))
    assert kl.adapted(0.1, 0.0, 6.0, 1000, 64) == pytest.approx(0.1 * (1 - 0.2 * 64 / 1000))


# ---- rewards ---------------------------------------------------------------------------------------------------------


def test_rewards_of_a_row_sum_to_score_minus_kl():
    """16."""
    (logprobs, ref, _, _), mask, lengths = ragged()
    scores = torch.linspace(-2, 2, 5, dtype=torch.float64)
    made = rewards.per_token(scores, logprobs, ref, mask, kl_coef=0.1, estimator="k1")
    torch.testing.assert_close(made.sum(1), scores - 0.1 * ((logprobs - ref) * mask).sum(1))
    assert (made[mask == 0] == 0).all()
    for row, length in enumerate(lengths):
        torch.testing.assert_close(made[row, : length - 1], -0.1 * (logprobs - ref)[row, : length - 1])


def test_clip_comes_before_the_penalties():
    """15, 19: an outlier yields the clip value; a response without a stop token loses the penalty on top, others
    nothing."""
    scores, stopped = torch.tensor([1e4, -1e4, 0.5, 0.5]), torch.tensor([True, True, True, False])
    assert rewards.shaped(scores, stopped, clip=5.0, missing_eos_penalty=1.0).tolist() == [5.0, -5.0, 0.5, -0.5]
    assert rewards.shaped(scores, stopped, clip=None, missing_eos_penalty=0.0).tolist() == scores.tolist()


def test_calibration_gives_mean_0_and_deviation_1():
    """13."""
    scores = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * 7 - 40).tolist()
    mean, deviation = rewards.calibration(scores)
    calibrated = (np.array(scores) - mean) / deviation
    assert abs(calibrated.mean()) < 1e-6 and abs(calibrated.std() - 1) < 1e-6
    assert rewards.calibration([3.0, 3.0]) == (3.0, 1.0)


# ---- advantages ------------------------------------------------------------------------------------------------------


def slow_gae(rewards_T, values_T, gamma, lambda_):
    """The definition: sum over later TD errors, O(T^2), one row without padding."""
    length = len(rewards_T)
    deltas = [rewards_T[t] + gamma * (values_T[t + 1] if t + 1 < length else 0.0) - values_T[t] for t in range(length)]
    return [sum((gamma * lambda_) ** (later - t) * deltas[later] for later in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma, lambda_", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_its_definition(gamma, lambda_):
    """21, 22: rows of different lengths, padding full of numbers that must not count; returns are advantages +
    values before whitening."""
    (rewards_BT, values_BT, _, _), mask, lengths = ragged()
    found, returns = advantages.gae(rewards_BT * mask, values_BT, mask, gamma=gamma, lambda_=lambda_)
    for row, length in enumerate(lengths.tolist()):
        wanted = slow_gae(rewards_BT[row, :length].tolist(), values_BT[row, :length].tolist(), gamma, lambda_)
        np.testing.assert_allclose(found[row, :length], wanted, atol=1e-12)
        np.testing.assert_allclose(
            returns[row, :length], np.array(wanted) + values_BT[row, :length].numpy(), atol=1e-12
        )
        if (gamma, lambda_) == (1.0, 1.0):
            np.testing.assert_allclose(
                returns[row, :length], np.cumsum(rewards_BT[row, :length].numpy()[::-1])[::-1], atol=1e-12
            )
        if lambda_ == 0.0:
            np.testing.assert_allclose(
                found[row, length - 1], rewards_BT[row, length - 1] - values_BT[row, length - 1], atol=1e-12
            )
    assert (found[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_gae_hand_numbers():
    found, returns = advantages.gae(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]]), torch.ones(1, 3), gamma=1.0, lambda_=0.5
    )
    # TD errors -0.25, 0.5, 0.25
    torch.testing.assert_close(found, torch.tensor([[-0.25 + 0.5 * (0.5 + 0.125), 0.5 + 0.125, 0.25]]))
    torch.testing.assert_close(returns, found + torch.tensor([[0.5, 0.25, 0.75]]))


def test_whitening():
    """20: over the tokens under the mask; advantages lose their mean, rewards keep it."""
    (values, _, _, _), mask, _ = ragged()
    whitened = advantages.whiten(values + 3, mask)
    kept = whitened[mask.bool()]
    assert abs(kept.mean()) < 1e-9 and abs(kept.var(correction=0) - 1) < 1e-6 and (whitened[mask == 0] == 0).all()
    shifted = advantages.whiten(values + 3, mask, shift_mean=False)[mask.bool()]
    torch.testing.assert_close(shifted.mean(), (values + 3)[mask.bool()].mean())
    torch.testing.assert_close(advantages.whiten(values * 0 + 2, mask), values * 0)


def test_explained_variance():
    (values, _, _, _), mask, _ = ragged()
    assert advantages.explained_variance(values, values, mask) == 1
    assert advantages.explained_variance(values * 0, values, mask) == pytest.approx(0)
    assert advantages.explained_variance(-values, values, mask) < -1
    assert advantages.explained_variance(values, values * 0, mask) == 0


# ---- losses ----------------------------------------------------------------------------------------------------------


def gradient(ratio, advantage, **changes):
    """Loss, gradient by the new log-probability, and metrics of one token."""
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    loss, metrics = losses.policy_loss(new, old, one * advantage, one, **{"clip": 0.2, **changes})
    return (
        float(loss.detach()),
        float(torch.autograd.grad(loss, new)[0]),
        {key: float(value) for key, value in metrics.items()},
    )


def test_policy_loss_hand_numbers():
    """24, 26: d(loss)/d(logprob) = -A * ratio inside, exactly 0 in the clipped region."""
    assert gradient(1.1, 2.0)[:2] == pytest.approx((-2.2, -2.2))
    assert gradient(1.5, 2.0)[:2] == pytest.approx((-2.4, 0.0)) and gradient(1.5, 2.0)[1] == 0
    assert gradient(0.5, 2.0)[:2] == pytest.approx((-1.0, -1.0))
    assert gradient(0.5, -2.0)[:2] == pytest.approx((1.6, 0.0)) and gradient(0.5, -2.0)[1] == 0
    assert gradient(1.5, -2.0)[:2] == pytest.approx((3.0, 3.0))
    assert gradient(1.25, 2.0, clip_high=0.28)[:2] == pytest.approx((-2.5, -2.5))
    assert gradient(1.5, 2.0)[2]["clip_fraction"] == 1 and gradient(1.1, 2.0)[2]["clip_fraction"] == 0
    assert gradient(1.5, 2.0)[2]["ratio_mean"] == pytest.approx(1.5)
    assert gradient(1.5, 2.0)[2]["approx_kl"] == pytest.approx(0.5 - math.log(1.5))


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    """26: only where the advantage is negative."""
    assert gradient(10.0, -2.0)[0] == pytest.approx(20.0)
    assert gradient(10.0, -2.0, dual_clip=3.0)[:2] == pytest.approx((6.0, 0.0))
    assert gradient(10.0, 2.0, dual_clip=3.0)[:2] == gradient(10.0, 2.0)[:2]
    assert gradient(2.0, -2.0, dual_clip=3.0)[:2] == gradient(2.0, -2.0)[:2]


def test_log_ratios_are_bounded():
    """25."""
    new = torch.tensor([[0.0, -1e4]], requires_grad=True)
    loss, _ = losses.policy_loss(
        new, torch.tensor([[-1e4, 0.0]]), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), clip=0.2
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


def test_rows_with_wild_ratios_carry_no_loss():
    """35: counted in tokens, whatever the micro-batch; a number that is none is left for the engine to refuse."""
    new = torch.tensor([[3.0, 4.0], [0.1, 0.0]], requires_grad=True)
    loss, metrics = losses.policy_loss(
        new, torch.zeros(2, 2), -torch.ones(2, 2), torch.ones(2, 2), clip=0.2, ratio_limit=10.0
    )
    loss.backward()
    assert (new.grad[0] == 0).all() and (new.grad[1] != 0).all() and metrics["skipped_fraction"] == 2
    loss, _ = losses.policy_loss(
        new * math.nan, torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2), clip=0.2, ratio_limit=10.0
    )
    assert loss.isnan()


def test_importance_weights_are_bounded():
    """37: a sampler of another precision is corrected token by token, up to a cap."""
    weights = losses.importance(torch.tensor([[0.0, -1.0, 5.0]]), torch.tensor([[0.0, -1.5, 0.0]]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.exp(0.5), 2.0]]))
    one = torch.ones(1, 3)
    loss, _ = losses.policy_loss(one * 0, one * 0, one, one, clip=0.2, weights=weights)
    assert float(loss) == pytest.approx(-float(weights.sum()))


def test_value_loss_hand_numbers():
    """27: half the larger of two squares."""
    values, old, returns = (
        torch.tensor([[1.0, 0.1, 9.0]]),
        torch.tensor([[0.0, 0.0, 0.0]]),
        torch.tensor([[2.0, 2.0, 0.0]]),
    )
    loss, metrics = losses.value_loss(values, old, returns, torch.tensor([[1.0, 1.0, 0.0]]), clip=0.2)
    assert float(loss) == pytest.approx(0.5 * (1.8**2 + 1.9**2)) and float(metrics["value_clip_fraction"]) == 1
    loss, metrics = losses.value_loss(values, old, returns, torch.tensor([[1.0, 1.0, 0.0]]), clip=None)
    assert float(loss) == pytest.approx(0.5 * (1.0 + 1.9**2)) and float(metrics["value_clip_fraction"]) == 0


def test_loss_sums_do_not_depend_on_how_rows_are_divided():
    """28: rows one by one give the same sum and gradient as together, of uneven lengths."""
    (new, old, advantage, values), mask, _ = ragged()
    for function in (
        lambda x, rows: losses.policy_loss(
            x[rows], old[rows], advantage[rows], mask[rows], clip=0.2, dual_clip=3.0, ratio_limit=10.0
        )[0],
        lambda x, rows: losses.value_loss(x[rows], old[rows], values[rows], mask[rows], clip=0.2)[0],
    ):
        whole, parts = new.clone().requires_grad_(), new.clone().requires_grad_()
        function(whole, slice(None)).backward()
        for row in range(len(new)):
            function(parts, slice(row, row + 1)).backward()
        torch.testing.assert_close(whole.grad, parts.grad, rtol=1e-12, atol=0)
        assert (whole.grad[mask == 0] == 0).all()


# ---- sequences -------------------------------------------------------------------------------------------------------

VOCABULARY, PAD, STOP = 40, 0, 2


def tiny(kind="causal", **changes):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    keys = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    config = LlamaConfig(**{**keys, "num_labels": 1, "pad_token_id": PAD, "eos_token_id": STOP, **changes})
    return (LlamaForCausalLM if kind == "causal" else LlamaForSequenceClassification)(config).eval()


def samples_of(lengths):
    source = np.random.default_rng(0)
    return [
        Sample(i, source.integers(3, 35, size=a).tolist(), source.integers(3, 35, size=b).tolist(), True, [])
        for i, (a, b) in enumerate(lengths)
    ]


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


# ---- the stage -------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz \n?"
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{"
    " m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(letters=LETTERS):
    """A token for each letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "<|unk|>", *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    names = {
        "pad_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "unk_token": "<|unk|>",
        "extra_special_tokens": SPECIAL[3:],
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=TEMPLATE, clean_up_tokenization_spaces=False, **names
    )


def write_models(folder, letters=LETTERS, reward_letters=LETTERS):
    """policy/model: random weights. reward/model: weights by hand, whose score grows with the share of `z` among all
    tokens read so far."""
    policy_tokenizer, reward_tokenizer = tokenizer_of(letters), tokenizer_of(reward_letters)
    policy = tiny(
        vocab_size=len(policy_tokenizer),
        initializer_range=0.05,
        eos_token_id=SPECIAL.index("<|eos|>"),
        attention_dropout=0.1,
    )
    reward = tiny(
        "reward",
        vocab_size=len(reward_tokenizer),
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=SPECIAL.index("<|eos|>"),
    )
    with torch.no_grad():
        for name, parameter in reward.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embedding, layer = reward.model.embed_tokens.weight, reward.model.layers[0]
        embedding[:, 1] = 1.0
        embedding[reward_tokenizer.convert_tokens_to_ids("z"), :2] = torch.tensor([1.0, 0.0])
        # queries and keys are 0: attention is the mean
        layer.self_attn.v_proj.weight[0, 0] = layer.self_attn.o_proj.weight[2, 0] = 1.0
        reward.score.weight[0, 2] = 1.0
    reward.config.alma_reward_gain, reward.config.alma_reward_bias = 2.0, -1.0
    for name, model, tokenizer in (("policy", policy, policy_tokenizer), ("reward", reward, reward_tokenizer)):
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")


RECIPE = """
name: t
stages:
  ppo:
    inputs: {policy: ./policy, reward: ./reward}
    sources: {words: {path: prompts.jsonl, prompt: "{word}", answer: zzzzzz}}
    holdout: 0.3
    rule: exact
    steps: 3
    batch_size: 8
    sequence_length: 48
    precision: fp32
    rollout: {max_new_tokens: 6, temperature: 0.7}
    ppo: {epochs: 2, minibatches: 2, calibrate: 16, kl_target: 0.1, kl_horizon: 100}
    optimizer: {lr: 3e-3}
    value_optimizer: {lr: 3e-3}
    evaluate_prompts: 12
    save: {every_steps: 1}
    log: {every_steps: 1}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    write_models(folder)
    source = np.random.default_rng(0)
    words = ["".join(source.choice(list(LETTERS[:25]), size=source.integers(3, 9))) for _ in range(60)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in [*words, "q" * 60]))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def ppo(folder, *words, output="runs", **options):
    text = succeed("ppo", "recipe.yaml", f"output={output}", *words, cwd=folder, **options)
    found = (folder / output / "t" / "ppo" / "current").resolve()
    return found, json.loads((found / "manifest.json").read_text())["metrics"], text


def logged(found):
    return [line for line in map(json.loads, (found / "metrics.jsonl").read_text().splitlines())]


@pytest.fixture(scope="module")
def plain(world):
    """The uninterrupted run that others are compared with."""
    return ppo(world, output="plain")


def weights(found):
    from safetensors.torch import load_file

    return load_file(found / "model" / "model.safetensors")


def test_the_stage(world, plain):
    """8, 9, 18, 24, 31, 36, 37, 43: three iterations at temperature 0.7 of a policy whose config asks for dropout."""
    found, metrics, _ = plain
    assert metrics["prompts_too_long"] == 1 and metrics["train_prompts"] + metrics["heldout_prompts"] == 60  # 6
    assert metrics["summary"]["measure"].startswith("held-out reward -1.00 ± 0.00 -> ")
    sources = json.loads((found / "report.json").read_text())["sources"]["words"]
    assert sources["train"] + sources["heldout"] == 60 and [
        (reason["count"], len(reason["first"])) for reason in sources["rejected"].values()
    ] == [(1, 1)]
    lines = logged(found)
    iterations = [line for line in lines if "policy_loss" in line]
    names = (
        "reward score kl rlhf_reward rule entropy entropy_update approx_kl clip_fraction value_loss explained_variance"
        " ratio_mean ratio_variance length_mean length_max eos_rate repetition value_clip_fraction"
        " rollout_difference_max skipped_fraction seconds_rollout seconds_measure seconds_score seconds_update"
        " tok_per_second lr value_lr grad_norm value_grad_norm"
    )
    assert [line["step"] for line in iterations] == [1, 2, 3] and not set(names.split()) - set(iterations[0])
    assert iterations[0]["kl"] == 0 and abs(metrics["kl_before"]) < 1e-5 and metrics["kl_after"] > 0.01
    for line in iterations:
        assert line["first_approx_kl"] < 1e-10  # all ratios of the first minibatch are 1
        assert line["rollout_difference_max"] < 1e-5  # the sampler has the trainer's weights
        assert line["policy_updates"] == line["value_updates"] == 4
        assert line["rlhf_reward"] == pytest.approx(line["score"] - line["kl_coef"] * line["kl"])
    np.testing.assert_allclose([line["lr"] for line in iterations], [3e-3, 2e-3, 1e-3])
    coefficients = [line["kl_coef"] for line in iterations] + [metrics["kl_coef"]]
    for before, after, line in zip(coefficients, coefficients[1:], iterations, strict=False):
        assert after == pytest.approx(before * (1 + min(max(line["kl"] / 0.1 - 1, -0.2), 0.2) * 8 / 100))
    rows = [json.loads(line) for line in (found / "samples.jsonl").read_text().splitlines()]
    assert [row["when"] for row in rows] == ["before"] * 8 + ["after"] * 8 and rows[0]["prompt"] == rows[8]["prompt"]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(found / "model"),
        AutoTokenizer.from_pretrained(found / "model"),
    )
    assert model.config.attention_dropout == 0.1 and len(tokenizer) == model.config.vocab_size
    # greedy samples are what transformers generates with the published model, and their score is that of the published
    # reward model
    from transformers import AutoModelForSequenceClassification

    reward = AutoModelForSequenceClassification.from_pretrained(world / "reward" / "model")
    for row in rows[8:]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).input_ids
        made = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) == row["greedy"]
        assert 2 * reward(made).logits.item() - 1 == pytest.approx(row["greedy_reward"], abs=1e-4)


def test_killed_anywhere_it_ends_with_the_same_bytes(world, plain):
    """39, 40: after a step, inside a save, at a random moment, twice while publishing; weights, samples and curve of
    the uninterrupted run."""
    code, _ = stage("ppo", "recipe.yaml", "output=killed", cwd=world, kill_after=random.Random(0).uniform(0.5, 1.5))
    assert code in (-9, 0)  # a fast machine may be done
    assert files_of(ppo(world, output="killed")[0]) == files_of(plain[0])
    for fault in ("work:1", "save:2", "work:2", "publish:1", "publish:2"):
        code, text = stage("ppo", "recipe.yaml", "output=faults", cwd=world, fault=fault)
        assert code == -9, text
    found, metrics, _ = ppo(world, output="faults")
    assert files_of(found) == files_of(plain[0])
    timed = {"time", "tok_per_second", "peak_memory_gb", "data_wait_share"}
    curves = [
        [
            {key: value for key, value in line.items() if key not in timed and not key.startswith("seconds")}
            for line in logged(run)
        ]
        for run in (found, plain[0])
    ]
    assert curves[0] == curves[1]
    assert metrics == plain[1]


def test_stopped_by_a_signal_it_saves_and_goes_on(world, plain):
    code, text = stage(
        "ppo", "recipe.yaml", "output=stopped", "ppo.save.every_steps=100", cwd=world, fault="work:1:SIGTERM"
    )
    assert code == 75, text
    assert (
        list(world.glob("stopped/t/ppo/*.partial/checkpoints/step-*/complete.json"))
        and (world / "stopped/t/ppo/requeue.json").exists()
    )
    found, _, text = ppo(world, "ppo.save.every_steps=100", output="stopped")
    assert "resuming from step-" in text and files_of(found) == files_of(plain[0])


def close(found, other, **tolerance):
    wanted = weights(other)
    for name, tensor in weights(found).items():
        torch.testing.assert_close(tensor, wanted[name], **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


def test_micro_batches_do_not_change_the_result(world, plain):
    """20, 28: rows one at a time, of uneven lengths. Adam divides by small second moments, so float noise is visible
    in weights as 1e-5."""
    found, metrics, _ = ppo(world, "ppo.micro_batch=1", "ppo.rollout.batch=3", output="micro")
    close(found, plain[0])
    assert metrics["reward_after"] == pytest.approx(plain[1]["reward_after"], abs=1e-4)


def ranks(world, *words, output):
    """Two processes as a launcher starts them."""
    import socket
    from concurrent.futures import ThreadPoolExecutor

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(rank):
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return stage("ppo", "recipe.yaml", f"output={output}", *words, cwd=world, env=env)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(one, range(2)))
    assert [code for code, _ in answers] == [0, 0], answers
    found = (world / output / "t" / "ppo" / "current").resolve()
    return found, json.loads((found / "manifest.json").read_text())["metrics"]


@pytest.mark.parametrize("zero", ["null", pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_processes_make_the_run_of_one(world, zero):
    """20, 28, 32, 38: the same samples, whitening and updates, and the same early stop, which only the reduced KL
    decides."""
    words = ["ppo.ppo.target_kl=0.02", "ppo.ppo.epochs=3", "ppo.steps=2"]
    alone, _, _ = ppo(world, *words, output="alone")
    found, _ = ranks(world, *words, f"ppo.parallel.zero={zero}", output=f"zero-{zero}")
    close(found, alone)
    lines, wanted = logged(found), logged(alone)
    assert [line.get("policy_updates") for line in lines] == [line.get("policy_updates") for line in wanted]
    assert min(line["policy_updates"] for line in wanted if "policy_updates" in line) < 6
    for key in (
        "reward",
        "kl",
        "eos_rate",
        "length_mean",
        "grad_norm",
        "value_grad_norm",
        "approx_kl",
        "explained_variance",
    ):
        np.testing.assert_allclose(
            [line[key] for line in lines if key in line],
            [line[key] for line in wanted if key in line],
            rtol=1e-3,
            atol=1e-5,
        )
    assert (found / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()


def test_the_two_models_learn_apart(world):
    """33, 34, 39: a value model gone wild leaves the policy's first iteration alone; in critic warmup only the value
    model moves; another seed, other samples."""
    words = ["ppo.steps=1", "ppo.schedule.kind=constant"]
    calm, _, _ = ppo(world, *words, output="calm")
    wild, _, _ = ppo(world, *words, "ppo.value_optimizer.lr=10", "ppo.value_optimizer.max_grad_norm=1e6", output="wild")
    assert files_of(wild)["model/model.safetensors"] == files_of(calm)["model/model.safetensors"]
    assert (
        logged(wild)[1]["grad_norm"] == logged(calm)[1]["grad_norm"]
        and logged(wild)[1]["value_loss"] > 10 * logged(calm)[1]["value_loss"]
    )
    warm, _, _ = ppo(world, *words, "ppo.ppo.critic_warmup=1", output="warm")
    start = weights(world / "policy")
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(warm).items())
    assert logged(warm)[1]["value_updates"] == 4 and logged(warm)[1]["policy_updates"] == 0
    seeded, _, _ = ppo(world, *words, "ppo.seed=1", output="seeded")
    assert logged(seeded)[1]["kl"] != 0 or logged(seeded)[1]["reward"] != logged(calm)[1]["reward"]


def test_a_sampler_of_another_precision_is_seen(world):
    """37: here the trainer is the one in bf16. The difference is logged; the first ratio is still 1 up to the
    rounding of other batch shapes."""
    found, _, _ = ppo(world, "ppo.steps=1", "ppo.precision=bf16", "ppo.ppo.importance_cap=2", output="bf16")
    line = logged(found)[1]
    assert 1e-4 < line["rollout_difference"] < 0.05 and line["first_approx_kl"] < 1e-4


def test_a_reward_model_with_its_own_tokenizer_reads_text(world, tmp_path):
    """14: the same letters under other ids give the same rewards and so the same policy."""
    write_models(tmp_path, reward_letters=LETTERS[::-1])
    (tmp_path / "prompts.jsonl").write_bytes((world / "prompts.jsonl").read_bytes())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    _, metrics, _ = ppo(tmp_path, "ppo.ppo.epochs=1", "ppo.value_optimizer.lr=1e-9")
    _, wanted, _ = ppo(world, "ppo.ppo.epochs=1", "ppo.value_optimizer.lr=1e-9", output="shared")
    assert metrics["reward_before"] == wanted["reward_before"] and metrics["reward_greedy_after"] == pytest.approx(
        wanted["reward_greedy_after"], abs=1e-4
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["ppo.batch_size=6", "ppo.ppo.minibatches=4"],
            "batch_size 6 is not divisible by 4 minibatches x 1 processes; use 8",
        ),
        (
            ["ppo.micro_batch=4", "ppo.ppo.minibatches=4"],
            "share of a minibatch, 2 prompts, is not divisible by micro_batch 4",
        ),
        (["ppo.sequence_length=65"], "sequence_length: 65 is more than the 64 positions"),
        (
            ["ppo.rollout.max_new_tokens=48"],
            "rollout.max_new_tokens 48 leaves no room for a prompt in sequence_length 48",
        ),
        (["ppo.sources.words.answer=null"], "rule: exact needs an answer to compare with"),
        (["ppo.ppo.gamma=1.5"], "gamma is 1.5, expected less than or equal to 1"),
        (["ppo.rollout.temperature=0"], "temperature is 0, expected greater than 0"),
        (["ppo.rule=null", "ppo.ppo.rule_coef=1"], "ppo.rule_coef needs `rule`"),
        (["ppo.rollout.max_new_tokens=40"], "none of 36 train prompts can be used: longer than 8 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(world, words, message):
    code, text = stage("ppo", "recipe.yaml", *words, "output=refused", cwd=world)
    assert code == 2 and message in text, text


SPIKES = ("ppo.spikes.sigma=0.5", "ppo.spikes.window=4", "ppo.steps=5")


def test_spikes_are_refused_update_by_update(world):
    """One loop for all stages: PPO's updates are judged as pretraining's are, the best checkpoint stays, and a killed
    run ends as one that was not."""
    words = (*SPIKES, "ppo.spikes.policy=skip", "ppo.save.keep=1", "ppo.save.keep_best=true", "ppo.evaluate_every=1")
    found, metrics, said = ppo(world, *words, output="spiky")
    lines = [line for line in logged(found) if "policy_loss" in line]
    refused = [line["step"] for line in lines if line.get("refused")]
    assert refused and all(not line["applied"] for line in lines if line["step"] in refused)
    assert "deviations above the median" in said and metrics["skipped_updates"] >= len(refused)
    rewards_by_step = {line["step"]: line["heldout_reward"] for line in logged(found) if "heldout_reward" in line}
    best = max((step for step in rewards_by_step if step > 0), key=lambda step: rewards_by_step[step])
    losses = json.loads((found / "checkpoints" / "losses.json").read_text())
    assert losses[str(best)] == -rewards_by_step[best] == min(losses.values())
    assert {path.name for path in (found / "checkpoints").glob("step-*")} == {f"step-{best:06d}", "step-000005"}
    code, text = stage("ppo", "recipe.yaml", "output=spiky-killed", *words, cwd=world, fault="work:3")
    assert code == -9, text
    assert files_of(ppo(world, *words, output="spiky-killed")[0]) == files_of(found)


def test_a_spike_rolls_back_and_the_next_one_stops(world):
    words = (*SPIKES, "ppo.spikes.policy=rollback", "ppo.spikes.rollbacks=1", "output=rolled")
    code, text = stage("ppo", "recipe.yaml", *words, cwd=world)
    assert code == 2 and "Traceback" not in text, text
    assert "back to step" in text and "rows" in text and "The newest checkpoint is from before it" in text


# ---- inside one process ----------------------------------------------------------------------------------------------


@pytest.fixture
def inside(world, monkeypatch, tmp_path):
    """Models, prompts and state as the stage has them before its first iteration."""
    from pipeline import ppo as module
    from pipeline.core import artifact
    from pipeline.core.recipe import load
    from pipeline.rl.prompts import encoded_prompts, tasks_of
    from pipeline.train import finetune

    monkeypatch.chdir(world)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = load("recipe.yaml", ["ppo.steps=4"]).stages["ppo"]
    policy, reward = (
        finetune.load_parent(config, artifact.external(key, world / key), key) for key in ("policy", "reward")
    )
    _, extra = encoded_prompts(config, policy.chat, reward.chat, SimpleNamespace(path=tmp_path))
    pool, heldout = tasks_of(extra, "train"), tasks_of(extra, "heldout")
    models = module.build_models(config, policy, reward, len(pool))
    return models, pool, heldout, {"step": 0, "kl_coef": 0.05, "calibration": (0.0, 1.0), "skipped_updates": 0}


def test_the_reference_and_the_reward_model_stay(inside):
    """38, 41: bitwise, over five updates; neither has gradients or an optimizer."""
    from pipeline.rl.iteration import iterate

    models, pool, _, state = inside
    frozen = {
        name: {key: value.clone() for key, value in model.state_dict().items()}
        for name, model in (("reference", models.reference), ("reward", models.reward))
    }
    start = {key: value.clone() for key, value in models.policy.model.state_dict().items()}
    for state["step"] in range(2):
        iterate(models, pool, state)
    for name, model in (("reference", models.reference), ("reward", models.reward)):
        assert all(torch.equal(value, frozen[name][key]) for key, value in model.state_dict().items())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not all(torch.equal(value, start[key]) for key, value in models.policy.model.state_dict().items())


def test_each_sample_once_an_epoch_in_a_fresh_order(inside, monkeypatch):
    """29, 4: and the ids that are trained on are the ids that were sampled, though their text would be read back as
    others."""
    from pipeline.rl import experience, iteration

    models, pool, _, state = inside
    seen, sampled = [], []
    monkeypatch.setattr(
        models.value,
        "step",
        lambda batches, lr: (
            seen.append(batches)
            or {"loss": 0.0, "grad_norm": 0.0, "value_clip_fraction": 0.0, "value_mean": 0.0, "applied": True}
        ),
    )
    collect = experience.collect
    monkeypatch.setattr(iteration, "collect", lambda *a, **k: sampled.extend(collect(*a, **k)) or sampled)
    iteration.iterate(models, pool, state)
    wanted = sorted((sample.prompt_ids, sample.response_ids) for sample in sampled)
    orders = []
    for epoch in range(2):
        rows = []
        for batches in seen[2 * epoch : 2 * epoch + 2]:
            for batch in batches:
                length = batch["mask"].shape[1]
                for ids, attended, mask in zip(
                    batch["inputs"]["input_ids"],
                    batch["inputs"]["attention_mask"].bool(),
                    batch["mask"].bool(),
                    strict=True,
                ):
                    prompt, response = slice(None, -length), slice(-length, None)
                    rows.append((ids[prompt][attended[prompt]].tolist(), ids[response][mask].tolist()))
        assert sorted(rows) == wanted
        orders.append(rows)
    assert orders[0] != orders[1]


def test_an_update_that_is_no_number_is_skipped_and_counted(inside, monkeypatch):
    """35: weights of the policy untouched, the value model goes on."""
    from pipeline.rl import advantages as module
    from pipeline.rl.iteration import iterate

    models, pool, _, state = inside
    start = {key: value.clone() for key, value in models.policy.model.state_dict().items()}
    monkeypatch.setattr(module, "whiten", lambda values, mask, shift_mean=True: values * math.nan)
    stats = iterate(models, pool, state)
    assert state["skipped_updates"] == stats["skipped_updates"] == stats["policy_updates"] == 4
    assert all(torch.equal(value, start[key]) for key, value in models.policy.model.state_dict().items())


def test_scores_do_not_depend_on_padding(inside):
    """5, 12: against the reward model alone on each row; responses whose last token is the pad id are read at that
    token all the same."""
    from pipeline.rl.experience import score

    models, *_ = inside
    made = samples_of([(5, 4), (1, 6), (9, 1), (3, 5)])
    made[3].response_ids[-1] = PAD
    models.config = models.config.model_copy(update={"rollout": models.config.rollout.model_copy(update={"batch": 3})})
    scores = score(models, made, [None] * 4)
    with torch.no_grad():
        for sample, found in zip(made, scores, strict=True):
            hidden = models.reward.model(torch.tensor([sample.prompt_ids + sample.response_ids])).last_hidden_state[
                0, -1
            ]
            assert found == pytest.approx(2 * models.reward.score(hidden).item() - 1, abs=1e-6)


def test_prompts_are_drawn_once_a_pass():
    """39: a pure function of (seed, index)."""
    from pipeline.rl.experience import draw

    passes = [[draw(0, index, 10) for index in range(10 * k, 10 * k + 10)] for k in range(2)]
    assert [sorted(drawn) for drawn in passes] == [list(range(10))] * 2 and passes[0] != passes[1]
    assert [draw(1, index, 10) for index in range(10)] != passes[0]


def test_defaults():
    """23, 31."""
    from pipeline.rl.config import Algorithm, PolicyOptimizer, ValueOptimizer

    assert (
        PolicyOptimizer().eps == ValueOptimizer().eps == 1e-5
        and Algorithm().gamma == 1.0
        and Algorithm().lambda_ == 0.95
    )


# ---- learning --------------------------------------------------------------------------------------------------------

LEARN = [
    *(
        "ppo.steps=16",
        "ppo.batch_size=32",
        "ppo.rollout.temperature=1",
        "ppo.ppo.kl_target=null",
        "ppo.ppo.kl_horizon=10000",
        "ppo.ppo.epochs=4",
        "ppo.ppo.calibrate=64",
        "ppo.ppo.missing_eos_penalty=0",
    ),
    *("ppo.ppo.reward_clip=null", "ppo.save.every_steps=100", "ppo.show=24", "ppo.evaluate_prompts=24"),
]


def share_of_z(found, when):
    rows = [json.loads(line) for line in (found / "samples.jsonl").read_text().splitlines()]
    text = "".join(row["sampled"] for row in rows if row["when"] == when)
    return text.count("z") / len(text)


def test_it_learns_what_is_rewarded(world):
    """42: the share of one letter of 29 in held-out answers rises from about 1/29 to above 0.8, KL below that of
    always the letter (6 log 35)."""
    found, metrics, _ = ppo(world, *LEARN, "ppo.ppo.kl_coef=0.01", output="learns")
    assert share_of_z(found, "before") < 0.15 and share_of_z(found, "after") > 0.8, metrics
    assert (
        metrics["reward_after"] > metrics["reward_before"] + 2
        and metrics["rule_after"] > 0.3
        and 0 < metrics["kl_after"] < 6 * math.log(35)
    )


def test_a_large_kl_coefficient_holds_it_back(world):
    found, metrics, _ = ppo(world, *LEARN, "ppo.steps=12", "ppo.ppo.kl_coef=10", output="held")
    assert share_of_z(found, "after") < 0.2 and metrics["kl_after"] < 0.5
