"""Soups: what is averaged, what is left out, what is refused."""

import json

import pytest
import torch
import tuned
from harness import stage

from pipeline.core.errors import UserError
from pipeline.core.graph import check, nodes
from pipeline.core.recipe import load
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.models import build
from pipeline.models.publish import publish

RECIPE = """\
name: s
seed: 1
stages:
  soup:
    inputs: {inputs}
    max_rows: 40
    sources: {{nouns: {{path: rows.jsonl, {chat}}}}}
"""


def write(folder, inputs: dict) -> None:
    text = RECIPE.format(inputs=json.dumps(inputs), chat=tuned.CHAT)
    (folder / "s.yaml").write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_models_stay_only_if_the_average_is_better(tmp_path):
    """plus and minus are a trained model with and without the same noise, so their average is that model; far has more
    and other noise."""
    trained = tuned.plain() / "runs/tiny/sft/current/model"
    tuned.write_rows(tmp_path / "rows.jsonl")
    model = build.load(trained)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(value.shape, generator=generator) for name, value in original.items()}
    other = {name: torch.randn(value.shape, generator=generator) for name, value in original.items()}
    for name, scale, direction in (("plus", 0.2, noise), ("minus", -0.2, noise), ("far", 0.8, other)):
        state = {key: value + scale * direction[key] * value.abs().mean() for key, value in original.items()}
        publish(state, model.config, trained, tmp_path / name)
    write(tmp_path, {name: f"./{name}" for name in ("far", "plus", "minus")})
    code, output = stage("soup", "s.yaml", cwd=tmp_path)
    assert code == 0, output
    folder = tmp_path / "runs/s/soup/current"
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert set(metrics["models"]) == {"plus", "minus"} and [trial["kept"] for trial in metrics["trials"]] == [
        True,
        False,
    ]
    assert metrics["loss_after"] < metrics["loss_before"] == min(metrics["losses"].values())
    for name, value in build.load(folder / "model").state_dict().items():
        torch.testing.assert_close(value, original[name], atol=1e-6, rtol=1e-5)
    # Of plus and far alone no average is better.
    write(tmp_path, {"plus": "./plus", "far": "./far"})
    code, output = stage("soup", "s.yaml", cwd=tmp_path)
    assert code == 0 and "no average is better than plus" in output
    for name, value in build.load(folder / "model").state_dict().items():
        torch.testing.assert_close(value, build.load(tmp_path / "plus").state_dict()[name])


def test_what_has_no_average_is_refused_before_the_chain(tmp_path, monkeypatch):
    for name, hidden in (("a", 48), ("b", 64)):
        made = tuned.tokenizer(tmp_path / f"{name}-tokenizer")
        block = {"family": "llama", "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = build.new({**block, "intermediate_size": 64}, made, 64, seed=1)
        publish(model.state_dict(), model.config, tmp_path / f"{name}-tokenizer", tmp_path / name)
    tuned.write_rows(tmp_path / "rows.jsonl")
    assert len(load_tokenizer(tmp_path / "a")) > 300
    write(tmp_path, {"a": "./a", "b": "./b"})
    monkeypatch.chdir(tmp_path)
    graph = nodes(load("s.yaml"))
    with pytest.raises(UserError, match="a and b cannot be averaged: hidden_size is 48 and 64"):
        check(graph["soup"], graph)
    write(tmp_path, {"a": "./a"})
    with pytest.raises(UserError, match="a soup needs two models or more"):
        load(tmp_path / "s.yaml")
    write(tmp_path, {"a": "./a", "b": "./b", "tokens": "./t"})
    with pytest.raises(UserError, match="with sources conversations decide, and no text is read"):
        load(tmp_path / "s.yaml")
