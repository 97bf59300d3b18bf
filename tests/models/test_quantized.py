"""Folders with quantised weights: what the libraries make of the same weights, what is refused, what is measured."""

import json
from types import SimpleNamespace

import pytest
import torch
import tuned
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.assessment import quality_loss
from pipeline.core import optional_packages
from pipeline.core.errors import UserError
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.models import build, quantized
from pipeline.models.publish import publish


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose rows have 128 and 256 weights."""
    home = tmp_path_factory.mktemp("quantized")
    tuned.tokenizer(home / "tokenizer")
    block = {"family": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    block |= {"num_attention_heads": 4, "initializer_range": 0.1}
    model = build.new(block, load_tokenizer(home / "tokenizer"), 64, seed=1)
    publish(model.state_dict(), model.config, home / "tokenizer", home / "model")
    return home / "model"


def check_folder(folder, target, form: str, error: float):
    """The folder is complete, smaller, and read again it is near the model; what gives the logits is as it was."""
    assert (target / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    config = json.loads((target / "config.json").read_text())
    method = {"bitsandbytes": "bitsandbytes", "compressed_tensors": "compressed-tensors"}
    assert config["quantization_config"]["quant_method"] == method[quantized.FORMS[form].package]
    sizes = [sum(path.stat().st_size for path in place.glob("*.safetensors")) for place in (folder, target)]
    assert sizes[1] < 0.75 * sizes[0]
    original = build.load(folder).eval()
    read = AutoModelForCausalLM.from_pretrained(target, local_files_only=True, device_map={"": "cpu"}).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected, logits = original(input_ids=ids).logits, read(input_ids=ids).logits.float()
    assert torch.equal(read.lm_head.weight.float(), original.lm_head.weight)
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert 0 < difference < error, difference
    return read


def test_nf4_is_that_of_bitsandbytes(folder, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    (folder / "run.json").write_text("a path of this machine")
    quantized.write(folder, "nf4", tmp_path / "q", torch.float32)
    check_folder(folder, tmp_path / "q", "nf4", 0.6)
    assert not (tmp_path / "q/run.json").exists()
    # Read once more: a forward pass on a CPU brings the weights into another order.
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "q", local_files_only=True, device_map={"": "cpu"})
    weight = build.load(folder).model.layers[0].mlp.up_proj.weight.detach()
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    stored = read.model.layers[0].mlp.up_proj.weight
    assert torch.equal(stored.data.flatten().view(torch.uint8), packed.flatten())
    assert torch.equal(stored.quant_state.absmax.float(), state.absmax.float())


@pytest.mark.slow
@pytest.mark.parametrize("form, error", [("w4a16", 0.6), ("w8a16", 0.04), ("fp8", 0.25)])
def test_compressed_tensors(form, error, folder, tmp_path):
    """Read by transformers as vLLM's format. Integers are the weights divided by their group's scale."""
    pytest.importorskip("compressed_tensors")
    quantized.write(folder, form, tmp_path / "q", torch.float32)
    read = check_folder(folder, tmp_path / "q", form, error)  # its forward pass unpacks the weights
    weight = build.load(folder).model.layers[0].mlp.up_proj.weight.detach()
    size = {"w4a16": 128, "w8a16": 128, "fp8": weight.shape[1]}[form]
    largest = weight.reshape(-1, size).abs().amax(-1, keepdim=True)
    step = {"w4a16": 2 / 15, "w8a16": 2 / 255, "fp8": 1 / 14}[form]
    stored = read.model.layers[0].mlp.up_proj.weight.detach().float().reshape(-1, size)
    assert ((stored - weight.reshape(-1, size)).abs() <= 0.51 * step * largest).all()


@pytest.mark.parametrize(
    "changes, form, sentence",
    [
        ({"hidden_size": 96}, "w4a16", "w4a16 has groups of 128 weights, and rows of the model have 96"),
        ({"intermediate_size": 96}, "nf4", "nf4 has groups of 64 weights, and rows of the model have 96"),
        ({"num_local_experts": 8, "model_type": "mixtral"}, "fp8", "a mixtral model keeps its experts in one array"),
    ],
)
def test_models_that_cannot_have_a_form(changes, form, sentence):
    values = {"hidden_size": 128, "intermediate_size": 256, "model_type": "llama"} | changes
    with pytest.raises(UserError) as caught:
        quantized.refuse(SimpleNamespace(**values), [form])
    assert sentence in str(caught.value)
    quantized.refuse(SimpleNamespace(**values), [])
    quantized.refuse(SimpleNamespace(**{"hidden_size": 96, "intermediate_size": 96, "model_type": "llama"}), ["fp8"])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(optional_packages, "is_installed", lambda package: package != "compressed_tensors")
    quantized.require_libraries(["nf4"])
    with pytest.raises(
        UserError, match=r"export.quantized: fp8 needs .*pip install 'alma\[quantized\]', or remove fp8"
    ):
        quantized.require_libraries(["nf4", "fp8"])


class Chain(torch.nn.Module):
    """Answers each token with the next one of ten, but `odd` with itself."""

    def __init__(self, odd: int | None = None):
        super().__init__()
        self.weight, self.odd = torch.nn.Parameter(torch.zeros(1)), odd

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        following = torch.where(input_ids == self.odd, input_ids, (input_ids + 1) % 10) if self.odd else input_ids + 1
        return CausalLMOutputWithPast(logits=torch.nn.functional.one_hot(following % 10, 10).float())


def test_greedy_tokens_that_are_kept():
    """One token of ten is another one: 90% of the places, and no text of 32 tokens."""
    beginnings = [[(start + place) % 10 for place in range(quality_loss.PREFIX)] for start in range(10)]
    before = quality_loss.reference(Chain(), beginnings, [])
    assert before.texts.shape == (10, 48) and before.texts[0].tolist() == [place % 10 for place in range(48)]
    same, other = (quality_loss.loss_of(model, before) for model in (Chain(), Chain(odd=4)))
    assert same["greedy_tokens"]["rate"] == 1 == same["unchanged_texts"]["rate"] and "bits_per_byte" not in same
    assert other["greedy_tokens"]["rate"] == pytest.approx(0.9) and other["unchanged_texts"]["rate"] == 0
    assert other["greedy_tokens"]["n"] == 320
    assert quality_loss.sentence(other).startswith("90.0% of 320 greedy tokens are the model's (95%: 86.2% to 92.8%)")
