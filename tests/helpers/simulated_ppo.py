"""The memory of one process of stage ppo under FSDP at full size, simulated as in simulated_fsdp.py: both engines, the
reference and the reward model as the stage builds them, and the phases of an iteration one after another.

    peaks(config, model_config, world)       # phase -> bytes, from a few layers

What is sampled depends on data, which fake tensors have not. So sampling is simulated as its two largest moments: the
prompts are read, and the last token is computed with a full cache of keys and values. These are phases of their own:
of a few layers the first one may be the larger, of all layers the second. Reward and value model have the policy's
shape.
"""

import functools
from unittest import mock

import simulated_fsdp
import torch
from alone import alone

from pipeline.rl import frozen_models, ppo_objective
from pipeline.rl.responses import ValueModel, predict, predict_at_labels, token_statistics
from pipeline.rl.rollout import choose
from pipeline.train import chunked_loss
from pipeline.train import engine as engines


def peaks(config, model_config, world: int) -> dict[str, float]:
    few = 3
    first, second = (
        alone(_peaks, config, simulated_fsdp.with_layers(model_config, count), world) for count in (few, few + 2)
    )
    more = (model_config.num_hidden_layers - few) / 2
    return {phase: first[phase] + more * (second[phase] - first[phase]) for phase in first}


def _peaks(config, model_config, world: int) -> dict[str, float]:
    model_config.num_labels, model_config.pad_token_id = 1, 0
    with simulated_fsdp.simulated(config, world) as live:
        frozen = [_read_only(config, model_config, reward) for reward in (False, True)]
        policy = simulated_fsdp.engine_of(
            _language_model(config, model_config),
            functools.partial(ppo_objective.policy_loss_fn, config),
            config,
            "policy",
        )
        value = simulated_fsdp.engine_of(
            ValueModel(simulated_fsdp.on_meta(config, model_config, reward=True)),
            functools.partial(ppo_objective.value_loss_fn, config),
            config,
            "value",
        )
        moments = simulated_fsdp.moments_of(policy) + simulated_fsdp.moments_of(value)
        found = {}
        for phase, act in {
            "read the prompts": lambda: _read_prompts(config, policy),
            "sample the last token": lambda: _sample_last(config, policy),
            "measure": lambda: _measure(config, policy),
            "reference": lambda: _read(config, frozen[0], _logprobs),
            "values": lambda: _values(config, value),
            "scores": lambda: _read(config, frozen[1], _scores),
            "update of the policy": lambda: _update(config, policy),
            "update of the value model": lambda: _update(config, value),
        }.items():
            live.peak = live.now()
            act()
            found[phase] = live.peak
        assert moments
        return found


def _language_model(config, model_config):
    """A policy or reference. Which positions have labels depends on data, so the losses are computed at all of them, as
    many at a time as on a GPU."""
    model = simulated_fsdp.on_meta(config, model_config)
    predict_at_labels(model, config.rollout.temperature)
    head = chunked_loss.installed(model)
    head.selects, head.chunk = False, chunked_loss.chunk_of(model_config.vocab_size, "cuda")
    return model


def _read_only(config, model_config, reward: bool):
    model = simulated_fsdp.on_meta(config, model_config, True) if reward else _language_model(config, model_config)
    empty = simulated_fsdp.empty_copy(model)
    with mock.patch.object(frozen_models, "without_weights", lambda _: empty):
        return frozen_models.only_read(model.to_empty(device="cpu"), config, shared=False)


def _batch(config, rows: int) -> dict:
    """Rows of the largest size, as `layout` in pipeline/rl/responses.py makes them."""
    ids = torch.zeros(rows, config.sequence_length, dtype=torch.long)
    return {"inputs": {"input_ids": ids}, "labels": ids, "mask": ids.float()}


def _autocast(config):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def _read_prompts(config, engine) -> None:
    rows, length, new = config.rollout.batch, config.sequence_length, config.rollout.max_new_tokens
    with engine.gathered(), _autocast(config):
        model = engine.model.eval()
        ids = torch.zeros(rows, length - new, dtype=torch.long)
        mask = torch.ones_like(ids)
        model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=True, logits_to_keep=1)
    engine.model.train()


@torch.no_grad()
def _sample_last(config, engine) -> None:
    """A token after all others of the longest rows."""
    from pipeline.rl.kv_cache import reserve

    rows, length = config.rollout.batch, config.sequence_length
    with engine.gathered(), _autocast(config):
        model = engine.model.eval()
        ids, mask = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
        arguments = {"input_ids": ids, "position_ids": ids, "use_cache": True, "logits_to_keep": 1}
        cache = model(**arguments, attention_mask=mask[:, :1]).past_key_values
        reserve(cache, length)
        for layer in cache.layers:
            heads, width = layer.keys.shape[1], layer.keys.shape[3]
            empty = torch.empty(1, 1, 1, 1, dtype=layer.keys.dtype).expand(rows, heads, length - 2, width)
            layer.update(empty, empty)
        outputs = model(**arguments, attention_mask=mask, past_key_values=cache)
        choose(outputs.logits[:, -1], config.rollout.temperature, torch.zeros(rows, dtype=torch.float64))
    engine.model.train()


@torch.no_grad()
def _logprobs(config, model) -> None:
    batch = _batch(config, config.rollout.batch)
    with _autocast(config):
        token_statistics(predict(model, batch), batch["labels"], config.rollout.temperature)


def _measure(config, engine) -> None:
    with engine.gathered():
        _logprobs(config, engine.model.eval())
    engine.model.train()


def _read(config, model, act) -> None:
    with model.complete() as whole:
        act(config, whole)


@torch.no_grad()
def _scores(config, model) -> None:
    ids = _batch(config, config.rollout.batch)["labels"]
    with _autocast(config):
        hidden = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        model.score(hidden[:, -1])


@torch.no_grad()
def _values(config, engine) -> None:
    batch = _batch(config, config.rollout.batch)
    with engine.gathered(), _autocast(config):
        engine.model.eval()(**batch["inputs"])
    engine.model.train()


def _update(config, engine: engines.Engine) -> None:
    batch = _batch(config, config.micro_batch)
    for name in ("logprobs", "advantages", "values", "returns"):
        batch[name] = torch.zeros_like(batch["mask"])
    for _ in range(2):
        loss, _ = engine._forward(engine.model, batch)
        loss.backward()
    for parameter in engine.parameters:
        parameter.grad = None
    for parameter in engine.sharded.values():
        parameter.grad = None
