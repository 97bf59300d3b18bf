"""PPO. The parts against hand numbers, slow references and closed forms; then the stage, as a user runs it."""

import json
import math

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


# ---- KL --------------------------------------------------------------------------------------------------------------------


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
    """17: of k1 the expected gradient is 0, of k2 that of the KL itself; so k1 belongs into the reward and k2 into a loss."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    p = logits.softmax(-1)
    exact = torch.autograd.grad((p * (p.log() - q.log())).sum(), logits, retain_graph=True)[0]
    found = {}
    for name in ("k1", "k2", "k3"):
        found[name] = torch.autograd.grad((p.detach() * kl.estimate(p.log(), q.log(), name)).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(found["k1"], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found["k2"], exact)
    assert not torch.allclose(found["k3"], exact)


def test_kl_controller():
    """18: at twice the target the coefficient rises by 0.2 n / horizon, at the target it stays."""
    assert kl.adapted(0.1, 12.0, 6.0, 1000, 64) == pytest.approx(0.1 * (1 + 0.2 * 64 / 1000))
    assert kl.adapted(0.1, 6.0, 6.0, 1000, 64) == 0.1
    assert kl.adapted(0.1, 6.3, 6.0, 1000, 64) == pytest.approx(0.1 * (1 + 0.05 * 64 / 1000))
    assert kl.adapted(0.1, 0.0, 6.0, 1000, 64) == pytest.approx(0.1 * (1 - 0.2 * 64 / 1000))


# ---- rewards ---------------------------------------------------------------------------------------------------------------


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
    """15, 19: an outlier yields the clip value; a response without a stop token loses the penalty on top, others nothing."""
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


# ---- advantages ------------------------------------------------------------------------------------------------------------


def slow_gae(rewards_T, values_T, gamma, lambda_):
    """The definition: sum over later TD errors, O(T^2), one row without padding."""
    length = len(rewards_T)
    deltas = [rewards_T[t] + gamma * (values_T[t + 1] if t + 1 < length else 0.0) - values_T[t] for t in range(length)]
    return [sum((gamma * lambda_) ** (later - t) * deltas[later] for later in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma, lambda_", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_its_definition(gamma, lambda_):
    """21, 22: rows of different lengths, padding full of numbers that must not count; returns are advantages + values before whitening."""
    (rewards_BT, values_BT, _, _), mask, lengths = ragged()
    found, returns = advantages.gae(rewards_BT * mask, values_BT, mask, gamma=gamma, lambda_=lambda_)
    for row, length in enumerate(lengths.tolist()):
        wanted = slow_gae(rewards_BT[row, :length].tolist(), values_BT[row, :length].tolist(), gamma, lambda_)
        np.testing.assert_allclose(found[row, :length], wanted, atol=1e-12)
        np.testing.assert_allclose(returns[row, :length], np.array(wanted) + values_BT[row, :length].numpy(), atol=1e-12)
        if (gamma, lambda_) == (1.0, 1.0):
            np.testing.assert_allclose(returns[row, :length], np.cumsum(rewards_BT[row, :length].numpy()[::-1])[::-1], atol=1e-12)
        if lambda_ == 0.0:
            np.testing.assert_allclose(found[row, length - 1], rewards_BT[row, length - 1] - values_BT[row, length - 1], atol=1e-12)
    assert (found[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_gae_hand_numbers():
    found, returns = advantages.gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]]), torch.ones(1, 3), gamma=1.0, lambda_=0.5)
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


# ---- losses ----------------------------------------------------------------------------------------------------------------


def gradient(ratio, advantage, **changes):
    """Loss, gradient by the new log-probability, and metrics of one token."""
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    loss, metrics = losses.policy_loss(new, old, one * advantage, one, **{"clip": 0.2, **changes})
    return float(loss.detach()), float(torch.autograd.grad(loss, new)[0]), {key: float(value) for key, value in metrics.items()}


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
    loss, _ = losses.policy_loss(new, torch.tensor([[-1e4, 0.0]]), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), clip=0.2)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


def test_rows_with_wild_ratios_carry_no_loss():
    """35: counted in tokens, whatever the micro-batch; a number that is none is left for the engine to refuse."""
    new = torch.tensor([[3.0, 4.0], [0.1, 0.0]], requires_grad=True)
    loss, metrics = losses.policy_loss(new, torch.zeros(2, 2), -torch.ones(2, 2), torch.ones(2, 2), clip=0.2, ratio_limit=10.0)
    loss.backward()
    assert (new.grad[0] == 0).all() and (new.grad[1] != 0).all() and metrics["skipped_fraction"] == 2
    loss, _ = losses.policy_loss(new * math.nan, torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2), clip=0.2, ratio_limit=10.0)
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
    values, old, returns = torch.tensor([[1.0, 0.1, 9.0]]), torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 2.0, 0.0]])
    loss, metrics = losses.value_loss(values, old, returns, torch.tensor([[1.0, 1.0, 0.0]]), clip=0.2)
    assert float(loss) == pytest.approx(0.5 * (1.8**2 + 1.9**2)) and float(metrics["value_clip_fraction"]) == 1
    loss, metrics = losses.value_loss(values, old, returns, torch.tensor([[1.0, 1.0, 0.0]]), clip=None)
    assert float(loss) == pytest.approx(0.5 * (1.0 + 1.9**2)) and float(metrics["value_clip_fraction"]) == 0


def test_loss_sums_do_not_depend_on_how_rows_are_divided():
    """28: rows one by one give the same sum and gradient as together, of uneven lengths."""
    (new, old, advantage, values), mask, _ = ragged()
    for function in (
        lambda x, rows: losses.policy_loss(x[rows], old[rows], advantage[rows], mask[rows], clip=0.2, dual_clip=3.0, ratio_limit=10.0)[0],
        lambda x, rows: losses.value_loss(x[rows], old[rows], values[rows], mask[rows], clip=0.2)[0],
    ):
        whole, parts = new.clone().requires_grad_(), new.clone().requires_grad_()
        function(whole, slice(None)).backward()
        for row in range(len(new)):
            function(parts, slice(row, row + 1)).backward()
        torch.testing.assert_close(whole.grad, parts.grad, rtol=1e-12, atol=0)
        assert (whole.grad[mask == 0] == 0).all()


# ---- sequences -------------------------------------------------------------------------------------------------------------

VOCABULARY, PAD, STOP = 40, 0, 2


def tiny(kind="causal", **changes):
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    keys = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}
    config = LlamaConfig(**{**keys, "num_labels": 1, "pad_token_id": PAD, "eos_token_id": STOP, **changes})
    return (LlamaForCausalLM if kind == "causal" else LlamaForSequenceClassification)(config).eval()


def samples_of(lengths):
    source = np.random.default_rng(0)
    return [Sample(i, source.integers(3, VOCABULARY, size=a).tolist(), source.integers(3, VOCABULARY, size=b).tolist(), True, []) for i, (a, b) in enumerate(lengths)]


def test_layout_and_masks():
    """1, 3: by length alone. The pad id inside a response, and a stop id equal to the pad id, keep their weight."""
    batch = layout([Sample(0, [7, 8, 9], [5, PAD], False, []), Sample(1, [7], [5, 6, PAD], True, []), Sample(2, [7], [PAD], True, [])], pad_id=PAD)
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
            torch.testing.assert_close(logprobs[row, :n], distribution.log_prob(torch.tensor(sample.response_ids)), atol=1e-5, rtol=0)
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
    """8: in modules and in attention, though the model is in training mode; the config, which is published, keeps its numbers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    models = [tiny(attention_dropout=0.5), GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5))]
    batch = layout(samples_of([(5, 4), (1, 6)]), PAD)
    for model in models:
        model.train()
        first, second = model(**batch["inputs"]).logits, model(**batch["inputs"]).logits
        assert not torch.equal(first, second)
        disable_dropout(model)
        assert torch.equal(model(**batch["inputs"]).logits, model(**batch["inputs"]).logits)
    assert models[0].config.attention_dropout == 0.5


# ---- the stage -------------------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz \n?"
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(letters=LETTERS):
    """A token for each letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, "<|unk|>", *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    names = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": "<|unk|>", "extra_special_tokens": SPECIAL[3:]}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, clean_up_tokenization_spaces=False, **names)


def write_models(folder, letters=LETTERS, reward_letters=LETTERS, policy_changes={}):
    """policy/model: random weights. reward/model: weights by hand, whose score grows with the share of `z` among all tokens read so far."""
    policy_tokenizer, reward_tokenizer = tokenizer_of(letters), tokenizer_of(reward_letters)
    policy = tiny(vocab_size=len(policy_tokenizer), initializer_range=0.05, eos_token_id=SPECIAL.index("<|eos|>"), **policy_changes)
    reward = tiny("reward", vocab_size=len(reward_tokenizer), num_hidden_layers=1, num_attention_heads=1, eos_token_id=SPECIAL.index("<|eos|>"))
    with torch.no_grad():
        for name, parameter in reward.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embedding, layer = reward.model.embed_tokens.weight, reward.model.layers[0]
        embedding[:, 1] = 1.0
        embedding[reward_tokenizer.convert_tokens_to_ids("z"), :2] = torch.tensor([1.0, 0.0])
        layer.self_attn.v_proj.weight[0, 0] = layer.self_attn.o_proj.weight[2, 0] = 1.0  # queries and keys are 0: attention is the mean
        reward.score.weight[0, 2] = 1.0
    for name, model, tokenizer in (("policy", policy, policy_tokenizer), ("reward", reward, reward_tokenizer)):
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")


RECIPE = """
name: t
stages:
  ppo:
    inputs: {policy: ./policy, reward: ./reward}
    sources: {words: {path: prompts.jsonl, prompt: "{word}", answer: z}}
    holdout: 0.3
    rule: prefix
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


def test_the_stage(world, plain):
    found, metrics, _ = plain
    assert metrics["prompts_too_long"] == 1
