"""Weights that are read from a folder part by part are those of transformers' from_pretrained, bit for bit: of every
family, of some rows only, with new tokens, with another head, and with adapters."""

import json
import math

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_engine import config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from tuned import tokenizer as make_tokenizer

from pipeline.core.errors import UserError
from pipeline.core.seeds import derive
from pipeline.models import build, folder_weights, frozen, lora, pipeline_split, publish, vocabulary
from pipeline.models.families import FAMILIES
from pipeline.models.lora_config import Lora
from pipeline.train.config import Parallel
from pipeline.train.pipelined import Stage

VOCABULARY, LENGTH = 64, 48
KNOWN = [family for family in FAMILIES if family != "olmo3"]  # there is no tiny model of it
FAST = ("llama", "phi3", "deepseek_v3")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


def published(folder, texts, family: str, **changes):
    """A folder with a tiny model of a family, whose vectors are not all alike, in files of 20 kB."""
    block = families.of_family(family) | changes
    model = build.new(block, families.Sized(VOCABULARY), LENGTH, seed=1)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=source))
    largest, publish.LARGEST_FILE = publish.LARGEST_FILE, 20_000
    try:
        publish.publish(model.state_dict(), model.config, texts, folder)
    finally:
        publish.LARGEST_FILE = largest
    return folder


def filled(model, weights):
    model.to_empty(device="cpu")
    model.tie_weights()
    weights(model)
    return model


def assert_equal(found, expected) -> None:
    found, expected = ({**dict(model.state_dict()), **dict(model.named_buffers())} for model in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "family", [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in KNOWN]
)
def test_a_family_is_read_as_from_pretrained_reads_it(family, tmp_path, texts):
    """Parameters and buffers; renamed weights, experts that are stored one by one, tied tables."""
    folder = published(tmp_path / "model", texts, family)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_equal(filled(*build.skeleton(folder)), expected)


@pytest.mark.parametrize(
    "family, rank",
    [
        ("llama", 0),
        ("mixtral", 2),
        *(pytest.param(family, 0, marks=pytest.mark.slow) for family in ("gpt2", "qwen3_moe", "mixtral")),
        *(pytest.param(family, 2, marks=pytest.mark.slow) for family in ("llama", "gpt2", "deepseek_v3")),
    ],
)
def test_some_rows_are_read_and_no_others(family, rank, tmp_path, texts):
    """A third of the rows of each matrix; what is not kept stays as it was."""
    folder = published(tmp_path / "model", texts, family)
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    model, weights = build.skeleton(folder)
    model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
        if parameter.dim() > 1:
            rows = -(-len(parameter) // 3)
            start = min(rank * rows, len(parameter))
            folder_weights.keep_rows(parameter, 0, start, min(start + rows, len(parameter)))
    read = []
    rows_of = folder_weights.Files.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_weights.Files, "rows", lambda *words: read.append(rows_of(*words)) or read[-1])
        weights(model)
    for name, parameter in model.named_parameters():
        dim, start, stop = folder_weights.kept_rows(parameter)
        assert torch.equal(parameter[start:stop], expected[name][start:stop]), name
        if parameter.dim() > 1:
            assert parameter[:start].isnan().all() and parameter[stop:].isnan().all(), name
    kept = sum(buffer.numel() for name, buffer in model.named_buffers() if name in weights.shapes)
    for _, parameter in model.named_parameters(remove_duplicate=False):
        _, start, stop = folder_weights.kept_rows(parameter)
        kept += parameter[start:stop].numel()
    assert sum(tensor.numel() for tensor in read) == kept


@pytest.mark.parametrize(
    "family, tied",
    [
        ("llama", True),
        *(pytest.param(*words, marks=pytest.mark.slow) for words in (("gpt2", True), ("qwen3_moe", False))),
    ],
)
def test_a_stage_of_a_pipeline_reads_its_own_layers(family, tied, tmp_path, texts):
    """The last one has the embedding as its output layer, if these are tied."""
    folder = published(tmp_path / "model", texts, family, tie_word_embeddings=tied)
    whole = build.load(folder)
    expected, parts = whole.state_dict(), pipeline_split.split(whole, Parallel(pipeline=3), LENGTH)
    found = {}
    for index in range(3):
        stage = Stage(build.skeleton(folder)[0], index, parts, config(), build.skeleton(folder)[1])
        for name, value in stage.model.state_dict().items():
            found[pipeline_split.global_name(name, stage.offset)] = value
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_types_are_those_that_the_stage_needs(tmp_path, texts):
    """A file in bf16 into fp32, and one in fp32 into a frozen model's bf16."""
    folder = published(tmp_path / "model", texts, "llama")
    model, weights = build.skeleton(folder)
    frozen.store(model, "bf16", "bf16", torch.device("cpu"))
    expected = build.load(folder)
    frozen.store(expected, "bf16", "bf16", torch.device("cpu"))
    assert_equal(filled(model, weights), expected)
    for path in folder.glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_equal(filled(*build.skeleton(folder)), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_begin_as_with_a_complete_model(tied, tmp_path, texts):
    folder = published(tmp_path / "model", texts, "llama", tie_word_embeddings=tied)
    pieces = {10: [3, 4], 64: [5], 65: [6, 7, 8], 67: [1, 2]}  # 66 is no text's
    expected = build.load(folder)
    vocabulary.add_rows(expected, pieces)
    model, weights = build.skeleton(folder)
    vocabulary.add_rows(model, pieces)
    weights.new_rows = pieces
    assert_equal(filled(model, weights), expected)
    assert not expected.get_input_embeddings().weight[66].any()


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"dora": True}])
def test_adapters_begin_as_with_a_complete_model(options, tmp_path, texts):
    folder = published(tmp_path / "model", texts, "qwen3_moe")
    expected = build.load(folder)
    lora.attach(expected, Lora(rank=4, **options), seed=7)
    model, weights = build.skeleton(folder)
    lora.attach(model, Lora(rank=4, **options), seed=7)
    weights.then.append(lambda part, global_name: lora.initialise(part, 7, global_name))
    assert_equal(filled(model, weights), expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in expected.named_parameters() if parameter.requires_grad}


def test_a_new_score_layer_is_that_of_a_complete_model(tmp_path, texts):
    folder = published(tmp_path / "model", texts, "llama")
    assert_equal(filled(*build.skeleton(folder, "reward", seed=3)), build.load(folder, "reward", seed=3))
    torch.manual_seed(derive(3, "initial", "score"))
    expected = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    assert_equal(filled(*build.skeleton(folder, "reward", seed=3)), expected)
    assert_equal(filled(*build.skeleton(folder, "steps", seed=3)), build.load(folder, "steps", seed=3))
    with pytest.raises(UserError, match="is not a reward model"):
        build.skeleton(folder, "judge")


def test_what_cannot_be_read_in_parts_is_read_as_a_whole(tmp_path, texts):
    """An adapter, and a model whose files have both tied tables."""
    folder = published(tmp_path / "model", texts, "llama", tie_word_embeddings=True)
    model = build.load(folder)
    lora.attach(model, Lora(rank=2), seed=0)
    publish.publish_adapter(model, folder, tmp_path / "adapter", texts, "fp32")
    adapted, weights = build.skeleton(tmp_path / "adapter")
    assert weights is None
    assert_equal(adapted, build.load(tmp_path / "adapter"))
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    read, weights = build.skeleton(folder)
    assert weights is None
    assert torch.equal(read.lm_head.weight, tensors["lm_head.weight"])


class WithGainConfig(LlamaConfig):
    model_type = "llama_with_gain"


class WithGain(LlamaForCausalLM):
    """A parameter beside the layers and beside all modules that are read as a part."""

    config_class = WithGainConfig

    def __init__(self, config):
        super().__init__(config)
        self.gain = torch.nn.Parameter(torch.full((config.hidden_size,), 0.5))


def test_a_parameter_beside_the_parts(tmp_path):
    """The model is read as a whole."""
    AutoConfig.register("llama_with_gain", WithGainConfig)
    AutoModelForCausalLM.register(WithGainConfig, WithGain)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = WithGain(WithGainConfig(vocab_size=VOCABULARY, **sizes))
    made.save_pretrained(tmp_path)
    read, weights = build.skeleton(tmp_path)
    assert weights is None
    assert_equal(read, made)
    assert read.gain.tolist() == [0.5] * 16


def test_weights_that_are_missing_or_of_another_shape_are_named(tmp_path, texts):
    folder = published(tmp_path / "model", texts, "llama")
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "intermediate_size": 40}))
    with pytest.raises(UserError, match=r"gate_proj.weight has the shape \[48, 32\], and the model has \[40, 32\]"):
        filled(*build.skeleton(folder))
    (folder / "config.json").write_text(json.dumps({**keys, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match="the weights of model.layers.3.input_layernorm.weight, .* are missing for a"):
        build.skeleton(folder)
