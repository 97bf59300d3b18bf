"""Attention of rows: documents apart, in every family, without reads of the device, and with one matrix for all
layers."""

import types

import families
import pytest
import torch
from device_reads import Reads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models import build, row_attention
from pipeline.models.families import supporting

LENGTH = 16
POSITIONS = torch.tensor([[*range(5), *range(7), *range(4)], [*range(16)], [3, 4, *range(14)]])
BORDERS = [0, 5, 12, 16, 32, 34, 48]
UNSUITABLE = {"gemma2", "gemma3_text", "mistral"}  # windows or caps in their default configurations
FAST = {"llama", "gpt2", "deepseek_v3", "mistral"}


def tiny(family: str):
    return build.new({**families.of_family(family), "pad_vocab_to": 64}, families.Sized(64), 64, seed=1)


def run(model, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, gradient of the embedding) of three rows."""
    ids = torch.arange(3 * LENGTH).view(3, LENGTH).remainder(61)
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=POSITIONS, use_cache=False, **inputs).logits
    logits.square().sum().backward()
    return logits.detach(), model.get_input_embeddings().weight.grad.clone()


def lengths(model) -> dict:
    return {"cu_seq_lens_q": row_attention.borders(POSITIONS), "max_length_q": LENGTH}


def documents_one_by_one(query, key, value, borders_q, borders_k, longest_q, longest_k, scale, shares_keys):
    """What torch's kernel computes."""
    outputs = torch.zeros(*query.shape[:2], value.shape[-1])
    edges = borders_q.tolist()
    for begin, end in zip(edges, edges[1:], strict=False):
        part = [tensor[begin:end].transpose(0, 1)[None] for tensor in (query, key, value)]
        if end > begin:
            attention = torch.nn.functional.scaled_dot_product_attention
            found = attention(*part, is_causal=True, scale=scale, enable_gqa=shares_keys)
            outputs = outputs.index_put((torch.arange(begin, end),), found[0].transpose(0, 1))
    return outputs


@pytest.mark.parametrize(
    "family",
    [
        family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
        for family in supporting("document_mask")
    ],
)
def test_documents_stay_apart_as_with_transformers(family, monkeypatch):
    """Logits and gradients, with a matrix and with lengths, are those of transformers' sdpa (1e-5), and nothing is read
    from the device."""
    model = tiny(family)
    expected = run(model)
    assert row_attention.install(model) == (family not in UNSUITABLE)
    if family in UNSUITABLE:
        return
    monkeypatch.setattr(row_attention, "varlen", documents_one_by_one)
    masked = row_attention.document_inputs(model, POSITIONS, torch.device("cpu"), torch.float32)
    assert set(masked) == {"attention_mask"}
    with Reads() as reads:
        found = run(model, **masked)
    assert reads.count == 0
    for inputs in (found, run(model, **lengths(model))):
        for one, other in zip(expected, inputs, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_layers_share_one_matrix():
    """Matrices [T, T] that three layers keep for the backward pass: one, where transformers' sdpa keeps one for
    each."""
    kept: dict[str, set[int]] = {}
    for name in ("sdpa", "rows"):
        model = tiny("llama")
        inputs = {}
        if name == "rows":
            row_attention.install(model)
            inputs = row_attention.document_inputs(model, POSITIONS, torch.device("cpu"), torch.float32)
        storages, alive = kept.setdefault(name, set()), []

        def pack(tensor, storages=storages, alive=alive):
            if tensor.shape == (3, 1, LENGTH, LENGTH) and tensor.isinf().any():
                storages.add(tensor.untyped_storage().data_ptr())
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.zeros_like(POSITIONS), position_ids=POSITIONS, use_cache=False, **inputs)
    assert len(kept["rows"]) == 1 < len(kept["sdpa"])


class Squares(TorchDispatchMode):
    """Whether an operation makes a matrix of as many rows and columns as a row has tokens, or more."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.found = length, False

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        for value in tree_leaves(outputs):
            if isinstance(value, torch.Tensor) and value.dim() >= 2:
                self.found |= min(value.shape[-2:]) >= self.length
        return outputs


def test_documents_need_no_matrix_on_a_gpu(monkeypatch):
    """Rows of 2 x 100 tokens, more than any width of the model, forward and backward: what a GPU with bf16 is given are
    the borders of documents, and nothing [T, T] exists; with a mask it does."""
    positions = torch.arange(10).repeat(2, 10)
    length = positions.shape[1]
    model = tiny("llama")
    row_attention.install(model)
    monkeypatch.setattr(row_attention, "varlen", documents_one_by_one)
    borders = row_attention.borders
    stays = lambda rows: types.SimpleNamespace(to=lambda *_, **__: borders(rows))  # noqa: E731
    monkeypatch.setattr(row_attention, "borders", stays)
    ids = torch.zeros_like(positions)
    for device, dtype, has_matrix in (("cuda", torch.bfloat16, False), ("cpu", torch.float32, True)):
        with Squares(length) as squares:
            inputs = row_attention.document_inputs(model, positions, torch.device(device), dtype)
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, **inputs).logits
            logits.square().sum().backward()
        assert squares.found == has_matrix


def test_borders_have_few_shapes():
    found = row_attention.borders(POSITIONS)
    assert found.dtype == torch.int32 and len(found) % row_attention.LENGTHS == 0
    assert sorted(set(found.tolist())) == BORDERS and found.tolist()[: len(BORDERS)] == BORDERS


def test_calls_with_padding_use_another_attention():
    """A padded row has the logits that it has alone."""
    model = tiny("llama")
    row_attention.install(model)
    ids = torch.tensor([[5, 6, 7]])
    alone = model(input_ids=ids).logits
    padded_ids = torch.tensor([[0, 0, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    with row_attention.padded(model):
        found = model(input_ids=padded_ids, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 1, 2]])).logits
    torch.testing.assert_close(found[:, 2:], alone)
    assert row_attention.is_installed(model)
