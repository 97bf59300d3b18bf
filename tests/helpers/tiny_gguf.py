"""A tiny model with its tokenizer, and the GGUF file that llama.cpp's converter would write of it."""

from pathlib import Path

import torch

TEXTS = [
    "What is 2024 in  12 words? It's the year\n\n  7 of the 小猫, don't you think so.\tYes: 3.14!\r\n",
    "def f(x):\n    return x ** 2  # 1234567 ½\n",
]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def backend(pre: str = "llama-bpe"):
    """A byte-level tokenizer that splits text as tokenizer.ggml.pre says."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2"))
    first = pre_tokenizers.Digits(individual_digits=True)
    if pre in ("llama-bpe", "qwen2"):
        from pipeline.data.tokenizer.pretokenize import pattern

        first = pre_tokenizers.Split(Regex(pattern(split_digits=pre == "qwen2")), behavior="isolated")
    made.pre_tokenizer = to_bytes if pre == "gpt-2" else pre_tokenizers.Sequence([first, to_bytes])
    made.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 20, trainer)
    return made


def model(family: str = "llama", tie: bool = True):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 340,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tie,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    if family == "qwen3":
        sizes["head_dim"] = 32  # not the width by the heads
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
                parameter.add_(torch.rand_like(parameter) / 2)
    return made


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring numbers of a head, transformers the first half with the second: its converter's
    LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write(
    path: Path, made, tokenizer, pre: str = "llama-bpe", quantised: bool = False, extra=None, tensors=None
) -> dict[str, torch.Tensor]:
    """The GGUF file of a model. extra: further keys of the metadata; tensors: further tensors. Returns the weights that
    are in it, by transformers' names: with `quantised`, matrices are rounded to Q8_0."""
    import gguf

    family, config = made.config.model_type, made.config
    writer = gguf.GGUFWriter(path, family)
    for key, attribute in KEYS.items():
        writer.add_uint32(f"{family}.{key}", getattr(config, attribute))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if family == "llama":
        writer.add_uint32("llama.rope.dimension_count", head_dim)
    if family == "qwen3":
        writer.add_uint32("qwen3.attention.key_length", head_dim)
        writer.add_uint32("qwen3.attention.value_length", head_dim)
    writer.add_float32(f"{family}.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_uint32(f"{family}.vocab_size", config.vocab_size)
    _write_tokenizer(writer, tokenizer, config.vocab_size, pre)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    kept = {}
    for name, weight in made.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = weight
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            stored = permuted(weight, heads)
        array = stored.numpy()
        if quantised and weight.dim() == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quantize(array, kind)
            writer.add_tensor(_name(name), packed, raw_dtype=kind)
            rounded = torch.from_numpy(gguf.dequantize(packed, kind))
            if stored is not weight:
                order = permuted(torch.arange(len(weight)), heads)
                unpermuted = torch.empty_like(rounded)
                unpermuted[order] = rounded
                rounded = unpermuted
            kept[name] = rounded
        else:
            writer.add_tensor(_name(name), array)
            kept[name] = weight
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def _write_tokenizer(writer, tokenizer, size: int, pre: str) -> None:
    import json

    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [5] * size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], kinds[index] = token, 3 if token in SPECIAL else 1
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem] + f".{kind}"
