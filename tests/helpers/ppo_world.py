"""A small world for PPO: tiny models, a tokenizer of single letters, a reward model that likes `z`, and a recipe."""

import json
from statistics import mean
from types import SimpleNamespace

import numpy as np
import torch
from harness import succeed

from pipeline.core.intervals import mean_half
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


def tokenizer_of(letters=LETTERS, template=TEMPLATE):
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
        tokenizer_object=made, chat_template=template, clean_up_tokenization_spaces=False, **names
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


# ---- sums ------------------------------------------------------------------------------------------------------------

# What a policy that knows some sums starts from: passes over all of them.
SUMS_PASSES = 60

SUMS_RECIPE = """
name: t
stages:
  {kind}:
    inputs: {{policy: ./policy}}
    sources: {{sums: {{path: sums.jsonl, prompt: "{{a}}+{{b}}", answer: "{{c}}"}}}}
    holdout: 0.25
    rewards: {{right: {{function: exact}}}}
    sequence_length: 40
    precision: fp32
    rollout: {{max_new_tokens: 3}}
    evaluate_prompts: 64
    save: {{every_steps: 1000}}
    {keys}
"""


def write_sums(folder):
    """policy/model: knows how sums of two digits are answered, and some of the answers; sums.jsonl: all 100 of them."""
    tokenizer = tokenizer_of(LETTERS + "03456789+")
    rows = [{"a": a, "b": b, "c": a + b} for a in range(10) for b in range(10)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = tiny(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        initializer_range=0.05,
        eos_token_id=SPECIAL.index("<|eos|>"),
    )
    ids, labels = [], []
    for row in rows:
        question = [{"role": "user", "content": f"{row['a']}+{row['b']}"}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        answer = tokenizer.encode(f"{row['c']}<|im_end|>", add_special_tokens=False)
        padding = 2 - len(str(row["c"]))
        ids.append([*prompt, *answer, *[PAD] * padding])
        labels.append([*[-100] * len(prompt), *answer, *[-100] * padding])
    ids, labels = torch.tensor(ids), torch.tensor(labels)
    train_on(policy, ids, labels, SUMS_PASSES)
    policy.save_pretrained(folder / "policy" / "model")
    tokenizer.save_pretrained(folder / "policy" / "model")
    return folder


def train_on(policy, ids, labels, passes):
    """A loop without a stage: a policy that online training starts from, in seconds."""
    optimizer, source = torch.optim.AdamW(policy.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    policy.train()
    for _ in range(passes):
        for part in torch.randperm(len(ids), generator=source).split(16):
            policy(input_ids=ids[part], labels=labels[part]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    policy.eval().config.architectures = [type(policy).__name__]


def learned_sums(kind, folder, keys):
    """Shares of held-out sums that are right before and after training, for each of five seeds."""
    write_sums(folder)
    (folder / "sums.yaml").write_text(SUMS_RECIPE.format(kind=kind, keys=keys))
    before, after = [], []
    for seed in range(5):
        succeed(kind, "sums.yaml", f"{kind}.seed={seed}", f"output=seed-{seed}", cwd=folder)
        manifest = (folder / f"seed-{seed}" / "t" / kind / "current" / "manifest.json").read_text()
        metrics = json.loads(manifest)["metrics"]
        before.append(metrics["reward_before"])
        after.append(metrics["reward_after"])
    print(f"{kind}: {mean(before):.3f} -> {mean(after):.3f} ± {mean_half(after):.3f} (95%, 5 seeds: {after})")
    return before, after


# ---- tools -----------------------------------------------------------------------------------------------------------

TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool.function.name + ' ' }}{% endfor %}{{"
    " '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in"
    ' m.tool_calls or [] %}{{ \'<tool_call>{"name": "\' + call.function.name + \'", "arguments": \' +'
    " (call.function.arguments | tojson) + '}</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Each one token, so that a call is short.
CALL_TOKENS = ["<tool_call>", "</tool_call>", '{"name": "twice", "arguments": {"word": "']

TOOLS = """
import time

def twice(word: str, left="", right=""):
    \"\"\"A word, written twice.\"\"\"
    if word == "a":
        time.sleep(1000)
    if word == "b":
        raise ValueError("not this one")
    if word == "c":
        return {1, 2}
    return left + word + word + right

def share(response, calls, double):
    return float(response == double) + len(calls) / 10
"""

TOOL_RECIPE = """
name: t
stages:
  grpo:
    inputs: {policy: ./policy}
    sources: {words: {path: words.jsonl, prompt: "{word}", reward_fields: [double]}}
    holdout: 0.3
    tools: {twice: {function: "tools.py:twice", seconds: 60}}
    tool_calls: 2
    rewards: {share: {function: "tools.py:share"}}
    steps: 3
    batch_size: 4
    samples: 4
    sequence_length: 120
    precision: fp32
    rollout: {max_new_tokens: 60, temperature: 1.0}
    update: {epochs: 2}
    optimizer: {lr: 3e-4}
    evaluate_prompts: 4
    show: 4
    save: {every_steps: 1}
    log: {every_steps: 1}
"""


def tool_tokenizer():
    tokenizer = tokenizer_of(LETTERS + "034\"{}:,_.<>/'", TOOL_TEMPLATE)
    tokenizer.add_tokens(CALL_TOKENS)
    return tokenizer


def write_tools(folder, passes=100):
    """policy/model: calls `twice` for a word and says what it returned, most of the time; tools.py, words.jsonl and
    recipe.yaml. No word hangs: what a deadline ends depends on the machine."""
    from pipeline.data.chat.rendering import Dialogue
    from pipeline.data.chat.template import Chat
    from pipeline.rl.tool_config import Tool, Toolbox

    (folder / "tools.py").write_text(TOOLS)
    (folder / "recipe.yaml").write_text(TOOL_RECIPE)
    words = list("bcdefghijklmnopq")
    (folder / "words.jsonl").write_text(
        "".join(json.dumps({"word": word, "double": 2 * word}) + "\n" for word in words)
    )
    tokenizer = tool_tokenizer()
    chat = Chat(tokenizer)
    definitions = Toolbox({"twice": Tool(function=f"{folder}/tools.py:twice")}).definitions(["double"])
    policy = tiny(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=128,
        initializer_range=0.05,
        eos_token_id=SPECIAL.index("<|eos|>"),
    )
    ids, labels = [], []
    for word in words:
        prompt = chat.prompt(Dialogue([{"role": "user", "content": word}], definitions))
        call = f'<tool_call>{{"name": "twice", "arguments": {{"word": "{word}"}}}}</tool_call><|im_end|>'
        parts = [(prompt, False), (tokenizer.encode(call, add_special_tokens=False), True)]
        parts += [(chat.results(["twice"], [word * 2]), False)]
        parts += [(tokenizer.encode(f"{word * 2}<|im_end|>", add_special_tokens=False), True)]
        ids.append([token for part, _ in parts for token in part])
        labels.append([token if learned else -100 for part, learned in parts for token in part])
    ids, labels = torch.tensor(ids), torch.tensor(labels)
    train_on(policy, ids, labels, passes)
    tokenizer.save_pretrained(folder / "policy" / "model")
    policy.save_pretrained(folder / "policy" / "model")
    return folder
