"""A model's folder is judged by its files, before anything is loaded."""

import json
import pickle
import shutil

import pytest
import tiny_gguf
from transformers import PreTrainedTokenizerFast

from pipeline.core.errors import UserError
from pipeline.models import lora, model_files
from pipeline.models.lora_config import Lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as transformers writes it, with its weights in several files, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_gguf.model().save_pretrained(folder, max_shard_size="100KB")
    PreTrainedTokenizerFast(tokenizer_object=tiny_gguf.backend(), eos_token="<|im_end|>").save_pretrained(folder)
    assert len(model_files.weight_files(folder)) > 2
    return folder


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "m")


def adapter(base, folder, kind: str = "llama"):
    """An adapter by peft, for a model of the given kind."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(tiny_gguf.model(kind), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    made.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    shutil.copy(base / "config.json", folder)
    return folder


def refused(folder) -> str:
    with pytest.raises(UserError) as caught:
        model_files.check(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_complete_models_and_adapters(base, tmp_path):
    model_files.check(base)
    model_files.check_tokenizer(base)
    model_files.check(adapter(base, tmp_path / "theirs"))
    ours = tiny_gguf.model()
    lora.attach(ours, Lora(rank=3), 0)
    lora.save(ours, tmp_path / "ours", base)
    shutil.copy(base / "config.json", tmp_path / "ours")
    model_files.check(tmp_path / "ours")


def test_weights(folder):
    shards = model_files.weight_files(folder)
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    assert "bytes, expected" in refused(folder)
    shards[1].write_bytes(b"\x80" * 64)
    assert "is not a safetensors file (its header would have" in refused(folder)
    shards[1].unlink()
    assert f"lacks {shards[1].name}, one of {len(shards)} files of weights; copy the model again" in refused(folder)
    (folder / model_files.INDEX).unlink()
    assert "contains no weights (model.safetensors); copy the model again, or give another folder" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "its weights only as a pickle (pytorch_model.bin), which can run code when it is loaded" in refused(folder)


def test_configuration(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert "its weights are quantised (fp8), and weights that are trained must not be" in refused(folder)
    path.write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoModel": "m.Model"}}))
    assert "needs its own Python code, which is never run" in refused(folder)
    path.write_text(json.dumps(config | {"model_type": "llama_99"}))
    assert "model_type is 'llama_99', which the installed transformers does not have" in refused(folder)
    path.write_text("{")
    assert "config.json: is not JSON" in refused(folder)
    path.unlink()
    assert "contains no model (no config.json)" in refused(folder)


def test_adapters_of_other_models(base, tmp_path):
    other = adapter(base, tmp_path / "other", "qwen3")  # whose heads are twice as wide
    assert "is an adapter of another model than" in refused(other)
    assert "outputs of model.layers.0.self_attn.q_proj, whose weight has the shape [64, 64]" in refused(other)
    ours = tiny_gguf.model()
    lora.attach(ours, Lora(rank=3), 0)
    lora.save(ours, tmp_path / "deep", base)
    shutil.copy(base / "config.json", tmp_path / "deep")
    path = tmp_path / "deep" / model_files.ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes().replace(b"layers.1.", b"layers.7."))
    assert "it is for model.layers.7." in refused(tmp_path / "deep") and "no such layer" in refused(tmp_path / "deep")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/name"}))
    assert "is an adapter of org/name, which is not a model folder on this machine" in refused(other)


def test_which_files_of_a_repository_belong_to_its_model():
    belonging = ["model-00001-of-2.safetensors", "config.json", "chat_template.jinja", "merges.txt", "tokenizer.model"]
    assert all(map(model_files.belongs, belonging))
    others = ["original/params.json", "pytorch_model.bin", "README.md", "modeling_own.py", "onnx/model.onnx"]
    assert not any(map(model_files.belongs, others))
