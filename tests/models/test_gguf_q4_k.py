"""Weights in GGUF's type q4_k, against a plain transcription of llama.cpp's search and the package gguf's reader."""

import ctypes
import math

import numpy as np
import pytest
from aside import XLLAMACPP, aside

from pipeline.models import gguf_q4_k

gguf = pytest.importorskip("gguf")
Q4_K = gguf.GGMLQuantizationType.Q4_K


def slow_fit(x: list[float]) -> tuple[float, float]:
    """make_qkx2_quants(32, 15, x, weights, -1, 0.1, 20) of llama.cpp, one number after another: (scale, offset)."""
    average = math.sqrt(sum(value * value for value in x) / len(x))
    weights = [average + abs(value) for value in x]
    low, high = min(0.0, *x), max(x)
    if high == low:
        return 0.0, -low
    sum_w, sum_x = sum(weights), sum(w * v for w, v in zip(weights, x))

    def levels_of(scale):
        return [min(15, max(0, round(scale * (value - low)))) for value in x]

    def error_of(levels, scale, begin):
        return sum(w * (scale * level + begin - v) ** 2 for w, level, v in zip(weights, levels, x))

    scale, begin = (high - low) / 15, low
    best = error_of(levels_of(15 / (high - low)), scale, begin)
    for step in range(21):
        levels = levels_of((-1 + 0.1 * step + 15) / (high - low))
        sum_l = sum(w * level for w, level in zip(weights, levels))
        sum_l2 = sum(w * level * level for w, level in zip(weights, levels))
        sum_xl = sum(w * level * v for w, level, v in zip(weights, levels, x))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if determinant <= 0:
            continue
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_begin = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        if this_begin > 0:
            this_scale, this_begin = sum_xl / sum_l2, 0.0
        error = error_of(levels, this_scale, this_begin)
        if error < best:
            best, scale, begin = error, this_scale, this_begin
    return scale, -begin


def slow_block(x: list[float]) -> list[float]:
    """What a block of 256 weights becomes, with the rounding of scales and offsets to 6 bits of fp16 numbers."""
    fits = [slow_fit(x[start : start + 32]) for start in range(0, 256, 32)]
    units = [float(np.float16(max(fit[place] for fit in fits) / 63)) for place in (0, 1)]
    largest = [max(fit[place] for fit in fits) for place in (0, 1)]
    found = []
    for group, fit in enumerate(fits):
        steps = [round(63 / largest[place] * fit[place]) if largest[place] else 0 for place in (0, 1)]
        scale, offset = units[0] * steps[0], units[1] * steps[1]
        for value in x[32 * group : 32 * group + 32]:
            level = min(15, max(0, round((value + offset) / scale))) if scale else 0
            found.append(scale * level - offset)
    return found


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "positive", "one large"])
def test_blocks_are_those_of_the_plain_search(kind):
    generator = np.random.default_rng(3)
    values = generator.normal(size=(4, 512)).astype(np.float32) * 0.02
    if kind == "heavy tails":
        values = generator.standard_t(2, size=(4, 512)).astype(np.float32)
    elif kind == "positive":
        values = np.abs(values) + 0.01
    elif kind == "one large":
        values[:, 7] = 0.3
    packed = gguf_q4_k.quantize(values)
    assert packed.shape == (4, 2 * 144) and packed.dtype == np.uint8
    read = gguf.dequantize(packed, Q4_K)
    slow = np.array([slow_block(block.tolist()) for block in values.reshape(-1, 256)]).reshape(values.shape)
    # A group whose two best grids are equal up to rounding of fp32 may have the other one.
    same = np.isclose(read, slow, rtol=1e-3, atol=1e-6 * np.abs(values).max())
    assert same.mean() > 0.98
    error, expected = np.square(read - values).mean(), np.square(slow - values).mean()
    assert error == pytest.approx(expected, rel=0.01)


def test_it_is_nearer_than_q4_0():
    """By about a third on normally distributed weights, with 4.5 bits as q4_0 has."""
    values = np.random.default_rng(1).normal(size=(64, 1024)).astype(np.float32)
    errors = {}
    for name in ("Q4_0", "Q4_K"):
        kind = gguf.GGMLQuantizationType[name]
        packed = gguf_q4_k.quantize(values) if name == "Q4_K" else gguf.quantize(values, kind)
        assert packed.nbytes == values.size * 4.5 / 8
        errors[name] = np.square(gguf.dequantize(packed, kind) - values).mean()
    assert errors["Q4_K"] < 0.75 * errors["Q4_0"]


def test_values_that_need_no_rounding_and_zeros():
    levels = np.tile(np.arange(16), 32).reshape(1, 512).astype(np.float32)
    np.testing.assert_allclose(gguf.dequantize(gguf_q4_k.quantize(levels), Q4_K), levels, atol=0.01)
    for constant in (0.0, -2.0):
        values = np.full((2, 256), constant, np.float32)
        np.testing.assert_allclose(gguf.dequantize(gguf_q4_k.quantize(values), Q4_K), values, rtol=2e-3)
    half = np.zeros((1, 256), np.float32)
    half[0, :32] = np.linspace(-1, 1, 32)
    read = gguf.dequantize(gguf_q4_k.quantize(half), Q4_K)
    assert np.all(read[0, 32:] == 0) and np.abs(read[0, :32] - half[0, :32]).max() < 0.08


def test_more_weights_than_are_packed_at_a_time(monkeypatch):
    values = np.random.default_rng(2).normal(size=(8, 512)).astype(np.float32)
    whole = gguf_q4_k.quantize(values)
    monkeypatch.setattr(gguf_q4_k, "CHUNK", 1024)
    assert np.array_equal(whole, gguf_q4_k.quantize(values))


@pytest.mark.slow
def test_it_is_as_near_as_llama_cpps_own(tmp_path):
    """llama.cpp's function, out of its library: the same layout of blocks, and a squared error that is 1% smaller,
    because versions since 2026 search further."""
    python = aside(tmp_path / "venv", XLLAMACPP)
    [library] = python.parent.parent.glob("lib/python3*/site-packages/xllamacpp/xllamacpp*.so")
    reference = ctypes.CDLL(str(library)).quantize_row_q4_K_ref
    generator = np.random.default_rng(5)
    for values in (generator.normal(size=(64, 1024)), generator.standard_t(3, size=(64, 1024))):
        values = values.astype(np.float32)
        theirs = np.zeros((64, 1024 // 256 * 144), np.uint8)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, theirs)]
        reference(*pointers, ctypes.c_int64(values.size))
        packed = gguf_q4_k.quantize(values)
        errors = [np.square(gguf.dequantize(blocks, Q4_K) - values).mean() for blocks in (packed, theirs)]
        assert errors[1] < errors[0] < 1.02 * errors[1]
        assert (packed == theirs).mean() > 0.8
