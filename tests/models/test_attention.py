"""Which flash kernel transformers calls for rows of several documents, seen by kernels that only record their calls."""

import collections
import functools
import itertools
import json

import families
import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

from pipeline.core import recipe
from pipeline.core.errors import UserError
from pipeline.models import attention, build
from pipeline.models.families import supporting

DOCUMENTS = [0, 5, 12, 16]  # where the documents of a row begin and end
PRETRAIN = """
name: packed
model: {family: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}
stages:
  pretrain: {inputs: {tokens: ./tokens, tokenizer: ./tokenizer}, sequence_length: 16, batch_size: 8, steps: 1}
"""


@pytest.fixture
def calls(monkeypatch):
    """[(kernel, borders of sequences)] of each call of a flash kernel, on a machine that seems to have them."""
    found: list[tuple[str, list[int] | None]] = []

    def recording(kernel: str):
        def call(query, key, value, **given):
            borders = given.get("cu_seqlens_q")
            found.append((kernel, None if borders is None else borders.tolist()))
            return query.new_zeros(*query.shape[:-1], value.shape[-1])

        return call

    takes = collections.defaultdict(lambda: True)  # every argument that a kernel may have
    process = functools.partial(flash._process_flash_attention_kwargs, supports_mapping=takes)
    kernels = (recording("dense"), recording("varlen"), None, None, None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: (kernels, (process, None)))
    monkeypatch.setattr(attention, "flash_obstacle", lambda *_: None)
    return found


def run(model, rows: int) -> None:
    """A forward pass over `rows` rows of three documents, whose positions begin again with each (train/batches.py)."""
    positions = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(DOCUMENTS)])
    ids = torch.arange(DOCUMENTS[-1]).remainder(7).add(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = {"input_ids": ids.repeat(rows, 1), "position_ids": positions.repeat(rows, 1)}
        model(**batch, use_cache=False)


def with_flash(family: str):
    """A tiny model that calls the flash kernels. transformers itself would not let a CPU have them."""
    model = build.new({**families.of_family(family), "pad_vocab_to": 64}, families.Sized(64), 64, seed=1)
    for config in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
        config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize("family", supporting("document_mask"))
def test_one_row_is_given_to_the_kernel_as_documents(family, calls):
    """Correctness 5: what micro_batch: 1 is allowed for, in every family that document_mask is."""
    run(with_flash(family), rows=1)
    assert calls and set((kernel, tuple(borders)) for kernel, borders in calls) == {("varlen", tuple(DOCUMENTS))}


def test_two_rows_are_not_and_are_refused(calls):
    """Correctness 5: transformers calls the plain causal kernel, in which documents see each other. Should this fail
    with a newer transformers, the refusal may go."""
    model = with_flash("llama")
    run(model, rows=2)
    assert {kernel for kernel, _ in calls} == {"dense"}
    with pytest.raises(UserError, match="one row only, and a micro-batch here has 2; use micro_batch: 1"):
        attention.choose(model, "flash_attention_2", "bf16", packed_rows=2)
    assert attention.choose(model, "flash_attention_2", "bf16", packed_rows=1) == "flash_attention_2"


def test_auto_takes_another_attention_for_two_rows(calls):
    """Correctness 5: slower and right."""
    model = build.new({**families.of_family("llama"), "pad_vocab_to": 64}, families.Sized(64), 64, seed=1)
    assert attention.choose(model, "auto", "bf16", packed_rows=2) == "sdpa"
    run(model, rows=2)
    assert not calls


@pytest.mark.parametrize(
    "keys, world, rows",
    [
        ({"document_mask": True}, 1, 8),
        ({"document_mask": True}, 4, 2),
        ({"document_mask": True, "micro_batch": 4}, 2, 4),
        ({"document_mask": True}, 8, None),
        ({"document_mask": True, "micro_batch": 1}, 2, None),
        ({}, 1, None),
        ({"document_mask": True, "attention": "sdpa"}, 1, None),
    ],
)
def test_the_recipe_is_refused_before_anything_starts(tmp_path, keys, world, rows):
    """Correctness 5: by the rows of a micro-batch, given or what a process's share comes to."""
    (tmp_path / "packed.yaml").write_text(PRETRAIN)
    words = [f"pretrain.{key}={json.dumps(value)}" for key, value in {"attention": "flash_attention_2", **keys}.items()]
    config = recipe.load(tmp_path / "packed.yaml", words).stages["pretrain"]
    if rows is None:
        config.check(world)
    else:
        with pytest.raises(UserError, match=f"attention: flash_attention_2 keeps the documents .* has {rows};"):
            config.check(world)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_folder_does_not_choose_the_kernel(tmp_path, key):
    """Correctness 5: config.json of a folder made elsewhere may name flash attention. Packed rows of sft would leak on
    a machine that has it, and loading failed on one that does not."""
    model = build.new({**families.of_family("llama"), "pad_vocab_to": 64}, families.Sized(64), 64, seed=1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "flash_attention_2"}))
    for head in ("causal", "reward"):
        assert build.load(tmp_path, head=head).config._attn_implementation == "sdpa"
