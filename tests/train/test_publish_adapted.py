"""Merged adapters are published with the same bytes, whether the model was in memory as a whole or in parts."""

import copy
from types import SimpleNamespace

import families
import pytest
import torch
from transformers import AutoTokenizer
from tuned import tokenizer as make_tokenizer

from pipeline.models import build, frozen, lora, publish
from pipeline.models.lora_config import Lora
from pipeline.train.config import Parallel
from pipeline.train.finetune import Parent
from pipeline.train.publish_adapted import publish_adapted


@pytest.mark.parametrize(
    "family, options",
    [
        ("qwen3_moe", {"rank_stabilised": True}),
        ("gpt2", {"base": "nf4"}),
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"dora": True}, marks=pytest.mark.slow),
    ],
)
def test_a_model_is_merged_in_parts_as_it_is_as_a_whole(family, options, tmp_path, capsys, monkeypatch):
    """With frozen weights in bf16, whose fp32 values are the folder's, or in 4 bits, whose values are those that these
    are multiplied with; in files of 20 kB."""
    options = {"base": "bf16"} | options
    if options["base"] == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(publish, "LARGEST_FILE", 20_000)
    make_tokenizer(tmp_path / "texts")
    block = families.of_family(family) | {"pad_vocab_to": 64}
    model = build.new(block, families.Sized(64), 48, seed=1)
    publish.publish(model.state_dict(), model.config, tmp_path / "texts", tmp_path / "parent")
    keys = Lora(rank=4, publish="merged", **options)
    trained = build.load(tmp_path / "parent")
    frozen.store(trained, keys.base, "bf16", torch.device("cpu"))
    lora.attach(trained, keys, seed=7)
    source = torch.Generator().manual_seed(2)
    weights = {}
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=source)
    parent = Parent(tmp_path / "parent", AutoTokenizer.from_pretrained(tmp_path / "texts"), None, {})
    contents = []
    for name, parallel in (("whole", Parallel()), ("parts", Parallel(shard="full"))):
        config = SimpleNamespace(
            kind="sft", seed=7, sequence_length=32, precision="bf16", chat_template=None, chat_template_kwargs={}
        )
        config.lora, config.parallel = keys, parallel
        output = SimpleNamespace(path=tmp_path / name)
        publish_adapted(trained, copy.deepcopy(weights), config, parent, output)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name / "model").iterdir()})
    assert contents[0].keys() == contents[1].keys() and len(contents[0]) > 5
    assert contents[0] == contents[1]
    assert "outputs of a layer differ by at most" in capsys.readouterr().out
