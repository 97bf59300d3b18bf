"""The shipped recipes' models, and tiny copies of them that keep everything but the sizes."""

from paths import ROOT

from pipeline.core import recipe as recipes

# Published numbers of parameters: the model's own page or paper, or the safetensors index of its checkpoint.
PUBLISHED = {
    "gpt1-117m": 116_534_784,
    "gpt2-124m": 124_439_808,
    "gpt3-125m": 125e6,
    "opt-125m": 125_239_296,
    "bloom-560m": 559_214_592,
    "llama-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "baichuan-7b": 7_000_559_616,
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
    "glm-4-9b": 9_399_951_360,
    "glm-4-9b-0414": 9.4e9,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "mamba-130m": 129_135_360,
    "mamba2-130m": 128_989_632,
    "rwkv-169m": 169_342_464,
}

SMALL = {
    "hidden_size": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "attention_hidden_size": 32,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_attention_heads": 2,
    "n_head": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_heads": 4,
    "state_size": 8,
    "chunk_size": 16,
    "sliding_window": 8,
    "pad_vocab_to": 64,
}


class Sized:
    """Stands for a tokenizer of a size: all that a configuration asks of one."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size


SOME = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
WITHOUT_RECIPE = {family: {"family": family, **SOME} for family in ("olmo2", "smollm3", "phi3", "gpt_neox")}
del WITHOUT_RECIPE["gpt_neox"]["num_key_value_heads"]


def load(name: str) -> recipes.Recipe:
    return recipes.load(ROOT / "recipes" / f"{name}.yaml")


def shrunken(name: str) -> dict:
    """A recipe's model block with every size cut down; dropout off, so that losses can be compared."""
    block = load(name).model
    small = {key: SMALL.get(key, value) for key, value in block.items()}
    if "num_key_value_heads" in block:
        small["num_key_value_heads"] = 1 if block["num_key_value_heads"] < block["num_attention_heads"] else 2
    if block.get("rope_parameters", {}).get("rope_type") == "llama3":
        small["rope_parameters"] = {**block["rope_parameters"], "original_max_position_embeddings": 8}
    return {key: 0.0 if key.endswith("pdrop") or key == "dropout" else value for key, value in small.items()}


def of_family(family: str) -> dict:
    """A tiny model block of a family."""
    return WITHOUT_RECIPE.get(family) or next(
        shrunken(name) for name in PUBLISHED if load(name).model["family"] == family
    )
