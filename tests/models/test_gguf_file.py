"""A GGUF file becomes the folder of the same model and tokenizer, or is refused."""

import json

import pytest
import regex
import tiny_gguf
import torch

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.models import build, gguf_file

pytest.importorskip("gguf")
TEXTS = [
    *tiny_gguf.TEXTS,
    "in  12 x",
    "\t\t9",
    "  7",
    "a ½ ٣٤",
    "I'll we'RE 'tis",
    "\n\n \n",
    "x" * 40,
    "",
    "<|im_end|>",
]


@pytest.mark.parametrize(
    "family, tie, quantised", [("llama", True, True), ("qwen2", False, False), ("qwen3", True, False)]
)
def test_weights_configuration_and_logits(family, tie, quantised, tmp_path):
    """What the file has is what the folder has, bit for bit; logits are those of the model that was written."""
    made = tiny_gguf.model(family, tie)
    kept = tiny_gguf.write(tmp_path / "m.gguf", made, tiny_gguf.backend(), quantised=quantised)
    made.load_state_dict(kept, strict=False)
    gguf_file.convert(tmp_path / "m.gguf", tmp_path / "folder")
    loaded = build.load(tmp_path / "folder").eval()
    for name, weight in kept.items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    config = loaded.config
    for key in (*tiny_gguf.KEYS.values(), "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert getattr(config, key) == getattr(made.config, key), key
    assert (config.bos_token_id, config.pad_token_id) == (1, 2)
    assert json.loads((tmp_path / "folder/generation_config.json").read_text())["eos_token_id"] == [2]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("pre", sorted(gguf_file.SPLITS))
def test_ids_are_those_of_the_tokenizer_that_was_written(pre, tmp_path):
    written = tiny_gguf.backend(pre)
    tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.model(), written, pre)
    gguf_file.write_tokenizer(gguf_file.read_metadata(tmp_path / "m.gguf"), tmp_path / "tokenizer")
    fast = load_tokenizer(tmp_path / "tokenizer")
    for text in TEXTS:
        assert fast(text).input_ids == written.encode(text).ids, text
        assert fast.decode(fast(text).input_ids) == text
    assert fast.chat_template == tiny_gguf.TEMPLATE
    assert (fast.bos_token, fast.eos_token, fast.pad_token, fast.unk_token) == (
        "<|im_start|>",
        *["<|im_end|>"] * 2,
        "<|endoftext|>",
    )
    assert fast.all_special_tokens and "[PAD" not in "".join(fast.get_vocab())
    # transformers' own reading agrees where it knows how text is split
    if pre in ("llama-bpe", "qwen2"):
        from transformers import AutoTokenizer

        other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        assert [other(text).input_ids for text in TEXTS] == [fast(text).input_ids for text in TEXTS]


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def test_smollm_splits_text_as_llama_cpp_does(tmp_path):
    """llama.cpp (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM) splits at each \\p{N}, then by GPT-2's expression; each
    word becomes tokens on its own."""
    tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.model(), tiny_gguf.backend("smollm"), "smollm")
    backend = gguf_file.tokenizer_of(gguf_file.read_metadata(tmp_path / "m.gguf"))
    for text in TEXTS[:-1]:
        ids = []
        for piece in regex.split(r"(\p{N})", text):
            for word in regex.findall(GPT2, piece):
                ids += backend.encode(word).ids
        assert backend.encode(text).ids == ids, text
    assert backend.encode("a  12").ids != backend.encode("a ").ids + backend.encode(" 12").ids


@pytest.mark.parametrize(
    "how, said",
    [
        ("architecture", "is a model of the architecture 'falcon'; llama, qwen2, qwen3 are read"),
        ("scaling", "its metadata has llama.rope.scaling.type, which transformers does not read from a GGUF file"),
        ("factors", "weights, and the model that transformers builds of it"),
        ("split", "splits text like 'falcon'; read are gpt2 (byte-level BPE) with gpt-2, llama-bpe, qwen2, smollm"),
        ("cut", "is not a GGUF file"),
        ("text", "is not a GGUF file"),
    ],
)
def test_what_may_be_read_wrongly_is_refused(how, said, tmp_path):
    path, made, tokenizer = tmp_path / "m.gguf", tiny_gguf.model(), tiny_gguf.backend()
    if how == "scaling":
        tiny_gguf.write(path, made, tokenizer, extra={"llama.rope.scaling.type": "yarn"})
    elif how == "factors":  # how Llama 3.1's file has its scaling of positions
        tiny_gguf.write(path, made, tokenizer, tensors={"rope_freqs.weight": torch.ones(8)})
    else:
        tiny_gguf.write(path, made, tokenizer, "falcon" if how == "split" else "llama-bpe")
    if how == "architecture":
        path.write_bytes(
            path.read_bytes()
            .replace(b"llama", b"falco")
            .replace(b"\x05\0\0\0\0\0\0\0falco", b"\x06\0\0\0\0\0\0\0falcon")
        )
    if how == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    if how == "text":
        path.write_text("hello")
    with pytest.raises(UserError) as caught:
        gguf_file.convert(path, tmp_path / "folder")
    assert said in str(caught.value) and not (tmp_path / "folder").exists()


def test_a_missing_library_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"needs the package gguf, which is not installed; run pip install 'alma\[gguf\]'"
    ):
        gguf_file.require_library()
