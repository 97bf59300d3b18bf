"""A small world for PPO: tiny models, a tokenizer of single letters, a reward model that likes `z`, and a recipe."""

import json
from types import SimpleNamespace

import numpy as np
import torch

from pipeline.rl.responses import Sample

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


LETTERS = "abcdefghijklmnopqrstuvwxyz \n?12"  # the digits are in the question that each chat template is tried with
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

GROUP_RECIPE = """
name: t
stages:
  grpo:
    inputs: {policy: ./policy, reward: ./reward}
    sources: {words: {path: prompts.jsonl, prompt: "{word}", answer: zzzzzz}}
    holdout: 0.3
    steps: 3
    batch_size: 4
    samples: 4
    sequence_length: 48
    precision: fp32
    rollout: {max_new_tokens: 6, temperature: 0.7}
    update: {epochs: 2, minibatches: 2}
    optimizer: {lr: 3e-3}
    evaluate_prompts: 12
    save: {every_steps: 1}
    log: {every_steps: 1}
"""


def write_world(folder):
    """A policy, a reward model, 61 prompts, a recipe of ppo and one of grpo."""
    write_models(folder)
    source = np.random.default_rng(0)
    words = ["".join(source.choice(list(LETTERS[:25]), size=source.integers(3, 9))) for _ in range(60)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in [*words, "q" * 60]))
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "group.yaml").write_text(GROUP_RECIPE)
    return folder


def inside(folder, output, words=("ppo.steps=4",)):
    """(models, prompts, held-out prompts, state) in this process, as the stage has them before its first iteration."""
    from pipeline import ppo
    from pipeline.core import artifact
    from pipeline.core.recipe import load
    from pipeline.rl.online import Parents
    from pipeline.rl.prompts import Prompts, encoded_prompts, tasks_of
    from pipeline.train import finetune

    config = load("recipe.yaml", list(words)).stages["ppo"]
    policy, reward = (
        finetune.load_parent(config, artifact.external(key, folder / key), key) for key in ("policy", "reward")
    )
    _, extra = encoded_prompts(config, policy.chat, [reward.chat], SimpleNamespace(path=output))
    pool, heldout = tasks_of(extra, "train"), tasks_of(extra, "heldout")
    parents = Parents(policy, reward if config.uses_reward_model() else None)
    prompts = Prompts(len(pool), max(len(task.ids) for task in pool + heldout))
    models = ppo.build_models(config, parents, prompts)
    return models, pool, heldout, {"step": 0, "kl_coef": 0.05, "calibration": (0.0, 1.0), "skipped_updates": 0}
