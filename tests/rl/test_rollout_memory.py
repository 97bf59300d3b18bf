"""Room for sampling: keys and values are those that a sampler keeps, and what does not fit is refused."""

from dataclasses import replace

import pytest
import torch
from ppo_world import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.core.errors import UserError
from pipeline.models import cost, sampling_cost
from pipeline.models.sampling_cost import Sampling
from pipeline.rl import rollout_memory
from pipeline.rl.rollout import generate
from pipeline.train.fsdp_sharding import multiplied_names

PROMPTS, NEW = [[5] * 7, [6] * 12, [7] * 3, [5] * 12, [9] * 2], 40
HEADS = {
    "as many as queries": {},
    "shared by two": {"num_key_value_heads": 2},
    "one, wider": {"num_key_value_heads": 1, "head_dim": 24},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS)
def test_keys_and_values_are_those_of_a_sampler(heads, precision):
    """The bytes of the cache at the last token of sampled rows, by the tensors that the model returns: 4 for each
    number, 2 in bf16. The last token is never read, so that its place stays empty."""
    model = tiny(num_hidden_layers=3, **HEADS[heads])
    if precision == "bf16":  # as FSDP gathers it
        for name in multiplied_names(model):
            model.get_parameter(name).data = model.get_parameter(name).data.bfloat16()
    found = []

    def count(module, inputs, output):
        layers = output.past_key_values.layers
        found.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))

    model.register_forward_hook(count)
    rows = 4
    arguments = {"temperature": 1.0, "stop_ids": [], "pad_id": 0, "seeds": list(range(len(PROMPTS))), "batch": rows}
    generate(model, PROMPTS, max_new_tokens=NEW, **arguments)
    length = 12 + NEW
    config, layout = model.config, cost.Layout(precision=precision, shard=2)
    parts = sampling_cost.sampling_bytes(config, cost.count(model), length, layout, Sampling(rows, NEW))
    assert parts["keys and values"] == max(found) * length / (length - 1)
    head = config.head_dim
    item = 2 if precision == "bf16" else 4
    assert parts["keys and values"] == 3 * 2 * config.num_key_value_heads * head * item * rows * length


def llama_7b():
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(intermediate_size=11008, tie_word_embeddings=False))


def refusal(**changes) -> str:
    """What is said of LLaMA-7B in fp32 on 8 GPUs of 80 GB; empty if it may start."""
    model = llama_7b()
    arguments = {"sampling": Sampling(64, 1024), "longest": 1024, "kept": 20e9, "memory": 80e9, **changes}
    layout = cost.Layout(ranks=8, precision="fp32", shard=8)
    try:
        rollout_memory.require("ppo", model.config, cost.count(model), layout, **arguments)
    except UserError as error:
        return str(error)
    return ""


def test_a_cache_that_a_gpu_cannot_hold_is_refused_with_fewer_rows():
    """32 layers of 2 x 4,096 numbers of 4 bytes are a megabyte per token, 2.1 GB a row of 2,048: of the 57.9 GB that
    are left, the policy takes 27.0."""
    message = refusal()
    assert "keeps keys and values of 64 rows of 2,048 tokens, 137.4 GB" in message
    assert "gathers the complete policy, 27.0 GB" in message
    assert "use rollout.batch: 8, which changes no result" in message
    assert not refusal(sampling=Sampling(8, 1024))
    assert refusal(sampling=Sampling(16, 1024)) and not refusal(sampling=Sampling(16, 256), longest=256)


def test_a_policy_that_a_gpu_cannot_hold_is_refused():
    message = refusal(memory=48e9, sampling=Sampling(1, 16), longest=16)
    assert "GPU has 25.9 GB left beside 20.0 GB" in message and "use GPUs with more memory" in message
    of_a_server = refusal(memory=48e9, sampling=Sampling(0, 16), longest=16)
    assert "gathers the complete policy, 27.0 GB; its GPU" in of_a_server and "keys" not in of_a_server
    assert not refusal(memory=50e9, sampling=Sampling(0, 1024))


def test_keys_and_values_count_where_every_process_has_the_policy():
    """DDP gathers nothing, and keeps keys and values like every layout: in bf16 half a megabyte per token."""
    model, sampling = llama_7b(), Sampling(128, 1024)
    layout = cost.Layout(ranks=8, precision="bf16")
    arguments = ("grpo", model.config, cost.count(model), layout)
    with pytest.raises(UserError, match="each process keeps keys and values of 128 rows of 2,048 tokens, 137.4 GB"):
        rollout_memory.require(*arguments, sampling, 1024, 0.0, 140e9)
    rollout_memory.require(*arguments, replace(sampling, rows=64), 1024, 0.0, 140e9)
