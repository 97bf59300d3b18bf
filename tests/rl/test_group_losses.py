"""GRPO, Dr. GRPO, DAPO, GSPO and RLOO against TRL's trainers: on the responses, rewards and weights of a trainer of TRL,
equal advantages, loss and gradients. REINFORCE++ against its definition. One file, for TRL takes seconds to import."""

import numpy as np
import pytest
import torch
from ppo_world import tiny, tokenizer_of
from ragged import ragged

from pipeline.grpo import Config
from pipeline.rl import group_objective, grpo, reinforce_pp, rloo
from pipeline.rl.responses import Sample

TOLERANCE = 1e-5  # absolute, fp32
PROMPTS, SAMPLES, LONGEST = 3, 4, 6


def config_of(**keys):
    common = {"sources": {"words": {"path": "words.jsonl"}}, "steps": 1, "batch_size": PROMPTS, "sequence_length": 48}
    return Config(**common, samples=SAMPLES, rollout={"max_new_tokens": LONGEST, "temperature": 0.7}, **keys)


def reward(completions, **_):
    """Of text that TRL sampled: different in most groups, and equal in some."""
    return [float(len(text) % 3) + 0.25 * text.count("a") for text in completions]


def trainer_of(folder, kind, **keys):
    """A trainer of TRL whose policy has moved from the one that sampled, and what it sampled and scored."""
    import trl
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    words = ["ab", "cdefg", "hi"]
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "num_generations": SAMPLES,
        "max_completion_length": LONGEST,
        "temperature": 0.7,
        "num_iterations": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    config = getattr(trl, f"{kind}Config")(**options, **keys)
    tokenizer = tokenizer_of()
    tiny(vocab_size=len(tokenizer), initializer_range=0.3).save_pretrained(folder / "model")
    model = LlamaForCausalLM.from_pretrained(folder / "model")  # with a folder, from which TRL reads its reference
    rows = Dataset.from_list([{"prompt": word} for word in words])
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions([{"prompt": word} for word in words for _ in range(SAMPLES)])
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return trainer, batch


def logprobs_of(trainer, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, batch["completion_ids"].shape[1])


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def ours(config, trainer, batch, old_logprobs, monkeypatch):
    """(advantages [B], loss) as the stage computes them from the same log-probabilities."""
    mask = batch["completion_mask"].float()
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    lengths = mask.sum(1)
    samples = []
    for row, text in enumerate(texts):
        ids = batch["completion_ids"][row, : int(lengths[row])].tolist()
        samples.append(Sample(row, [], ids, True, [], score=reward([text])[0]))
    scores = group_objective.scores(config, samples, {})
    tokens = {"mask": mask, "logprobs": old_logprobs}
    if "ref_per_token_logps" in batch:
        tokens["ref_logprobs"] = batch["ref_per_token_logps"]
    signal = group_objective.signal(config, tokens, scores, config.update.kl_coef)
    weights = group_objective.row_weights(config, lengths, *2 * [torch.ones(len(lengths), dtype=torch.bool)])
    inputs = {**signal, "labels": batch["completion_ids"], "row_weights": weights[:, None]}
    inputs["kl_coef"] = config.update.kl_coef
    logprobs, *_ = logprobs_of(trainer, batch)
    monkeypatch.setattr(group_objective, "token_statistics", lambda *_: (logprobs, torch.zeros_like(logprobs)))
    loss, _ = group_objective.policy_loss_fn(config, None, inputs)
    return signal["advantages"][:, 0], loss / mask.sum()


def compare(config, trainer, batch, old_logprobs, monkeypatch):
    wanted = trainer._compute_loss(trainer.model, batch)
    wanted_gradients = gradients(wanted, trainer.model)
    advantages, loss = ours(config, trainer, batch, old_logprobs, monkeypatch)
    torch.testing.assert_close(advantages, batch["advantages"], atol=TOLERANCE, rtol=0)
    assert float(loss) == pytest.approx(float(wanted), abs=TOLERANCE)
    for found, expected in zip(gradients(loss, trainer.model), wanted_gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=1e-4)
    assert float(batch["advantages"].abs().max()) > 0.1 and max(float(g.abs().max()) for g in wanted_gradients) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "theirs, mine",
    [
        (
            {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
            {"update": {"kl_coef": 0.1, "ratio_limit": 1e9}},
        ),
        (
            {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
            {"algorithm": "dr_grpo", "update": {"ratio_limit": 1e9}},
        ),
        (
            {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5, "beta": 0.0},
            {"update": {"average": "token", "clip_high": 0.28, "dual_clip": 1.5, "ratio_limit": 1e9}},
        ),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-3, "epsilon_high": 4e-3},
            {"update": {"ratio": "sequence", "clip": 3e-3, "clip_high": 4e-3, "ratio_limit": 1e9}},
        ),
    ],
    ids=["grpo", "dr_grpo", "dapo", "gspo"],
)
def test_grpo_and_its_relatives_equal_trl(tmp_path, monkeypatch, theirs, mine):
    trainer, batch = trainer_of(tmp_path, "GRPO", **theirs)
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    compare(config_of(**mine), trainer, batch, batch["old_per_token_logps"], monkeypatch)


@pytest.mark.slow
def test_rloo_equals_trl(tmp_path, monkeypatch):
    """With the KL in the reward. TRL keeps the old log-probability of whole responses, so that of tokens is what the
    policy before its move gives."""
    trainer, batch = trainer_of(tmp_path, "RLOO", beta=0.05)
    moved = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(tiny(vocab_size=len(tokenizer_of()), initializer_range=0.3).state_dict())
    with torch.no_grad():
        old_logprobs = logprobs_of(trainer, batch)[0]
    trainer.model.load_state_dict(moved)
    torch.testing.assert_close((old_logprobs * batch["completion_mask"]).sum(1), batch["old_logps"])
    batch["ref_per_token_logps"] = old_logprobs  # the reference is the policy before its move
    config = config_of(algorithm="rloo", update={"kl_coef": 0.05, "ratio_limit": 1e9})
    compare(config, trainer, batch, old_logprobs, monkeypatch)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    torch.testing.assert_close(grpo.dr_advantages(rewards), torch.tensor([[0.0, -1.0, -1.0, 2.0], [0.0] * 4]))
    deviation = np.std([1, 0, 0, 3], ddof=1)
    torch.testing.assert_close(
        grpo.advantages(rewards)[0], torch.tensor([0.0, -1.0, -1.0, 2.0]) / (float(deviation) + 1e-4)
    )
    assert (grpo.advantages(rewards)[1] == 0).all() and (rloo.advantages(rewards)[1] == 0).all()
    torch.testing.assert_close(rloo.advantages(rewards)[0], torch.tensor([0.0, -4 / 3, -4 / 3, 8 / 3]))


@pytest.mark.parametrize("samples", [1, 2])
def test_reinforce_pp_against_its_definition(samples):
    """In float64, one token after the other."""
    (rewards_BT, penalties, _, _), mask, lengths = ragged(batch=6)
    rewards = rewards_BT[:, 0].view(-1, samples)
    found = reinforce_pp.advantages(rewards, penalties, mask)
    of_tokens = []
    for row, length in enumerate(lengths.tolist()):
        own = rewards.flatten()[row]
        if samples > 1:
            own = own - rewards[row // samples].mean()
        of_tokens.append([float(own - penalties[row, t:length].sum()) for t in range(length)])
    flat = np.array([value for row in of_tokens for value in row])
    for row, values in enumerate(of_tokens):
        np.testing.assert_allclose(
            found[row, : len(values)], (np.array(values) - flat.mean()) / flat.std(), rtol=1e-6, atol=1e-7
        )
    assert (found[mask == 0] == 0).all()


@pytest.mark.parametrize(
    "keys, kept",
    [
        ({"update": {"average": "response"}}, None),
        ({"update": {"average": "token"}}, None),
        ({"update": {"average": "constant"}}, None),
        ({"update": {"mask_truncated": True}}, [0, 2]),
        ({"update": {"mask_truncated": True, "average": "token"}}, [0, 2]),
    ],
    ids=["response", "token", "constant", "response-masked", "token-masked"],
)
def test_averages_against_their_definitions(keys, kept):
    config = config_of(**keys)
    losses = [torch.tensor([1.0, 2.0]), torch.tensor([5.0]), torch.tensor([1.0, 0.0, 4.0])]
    lengths = torch.tensor([2.0, 1.0, 3.0])
    weights = group_objective.row_weights(
        config, lengths, torch.tensor([True, kept is None, True]), torch.tensor([True] * 3)
    )
    found = sum(weight * loss.sum() for weight, loss in zip(weights, losses, strict=True)) / lengths.sum()
    left = losses if kept is None else [losses[row] for row in kept]
    wanted = {
        "response": np.mean([float(loss.mean()) for loss in left]),
        "token": float(torch.cat(left).mean()),
        "constant": float(torch.cat(left).sum()) / (len(left) * LONGEST),
    }
    assert float(found) == pytest.approx(wanted[group_objective.average_of(config)])


def test_long_responses_pay():
    """DAPO, equation of section 3.4, with 100 tokens of which the last 20 are the buffer."""
    lengths = torch.tensor([10.0, 80.0, 85.0, 90.0, 100.0])
    torch.testing.assert_close(grpo.overlong_penalty(lengths, 100, 20), torch.tensor([0, 0, 0.25, 0.5, 1.0]))


@pytest.mark.parametrize(
    "keys, place, estimator",
    [
        ({}, "loss", "k3"),
        ({"algorithm": "rloo"}, "reward", "k1"),
        ({"algorithm": "reinforce_pp"}, "loss", "k2"),
        ({"algorithm": "grpo", "update": {"kl_in": "reward"}}, "reward", "k1"),
    ],
)
def test_where_the_kl_counts(keys, place, estimator):
    update = {"kl_coef": 0.5, **keys.get("update", {})}
    config = config_of(**{**keys, "update": update})
    assert group_objective.kl_in_reward(config) == (place == "reward") and config.measures_kl()
    assert group_objective.kl_estimator(config) == estimator
    mask = torch.ones(PROMPTS * SAMPLES, 2)
    tokens = {"mask": mask, "logprobs": mask * -1.0, "ref_logprobs": mask * -2.0}
    signal = group_objective.signal(config, tokens, torch.zeros(PROMPTS * SAMPLES), 0.5)
    assert ("ref_logprobs" in signal) == (place == "loss")
