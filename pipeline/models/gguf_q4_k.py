"""Weights in GGUF's type q4_k, which the package gguf unpacks and does not make.

A block of 256 weights is 8 groups of 32, each stored as `scale * level - offset` with levels 0 to 15; scales and
offsets of a block are 6-bit multiples of two fp16 numbers: 144 bytes in all. The search is that of llama.cpp up to 2025
(quantize_row_q4_K_ref and make_qkx2_quants in ggml-quants.c): of 22 grids of levels the one with the smallest error is
taken, where larger weights count more. Later versions search further and come 1% nearer
(tests/models/test_gguf_q4_k.py compares).
"""

import numpy as np

BLOCK, GROUP, LEVELS, STEPS = 256, 32, 15, 63
CHUNK = 1 << 17  # weights at a time, so that the search's arrays stay small


def quantize(values: np.ndarray) -> np.ndarray:
    """Packed blocks [..., row / 256 * 144] uint8 of fp32 values [..., row]; row is a multiple of 256."""
    blocks = values.astype(np.float32, copy=False).reshape(-1, BLOCK)
    size = CHUNK // BLOCK
    packed = [_pack(blocks[start : start + size]) for start in range(0, len(blocks), size)]
    return np.concatenate(packed).reshape(*values.shape[:-1], -1)


def _pack(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, BLOCK // GROUP, GROUP)
    scales, offsets = _fit(groups)
    scale_unit, scale_steps = _six_bits(scales)
    offset_unit, offset_steps = _six_bits(offsets)
    # What a reader computes with, so that levels make up for the rounding of scales and offsets.
    step = scale_unit.astype(np.float32) * scale_steps
    offset = offset_unit.astype(np.float32) * offset_steps
    divisor = np.where(step == 0, 1, step)[..., None]
    levels = np.rint((groups + offset[..., None]) / divisor).clip(0, LEVELS).astype(np.uint8)
    levels[step == 0] = 0
    pairs = levels.reshape(-1, BLOCK // (2 * GROUP), 2, GROUP)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(blocks), BLOCK // 2)
    units = [unit.view(np.uint8).reshape(-1, 2) for unit in (scale_unit, offset_unit)]
    return np.concatenate([*units, _interleaved(scale_steps, offset_steps), nibbles], axis=1)


def _fit(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scale, offset) [blocks, 8] of each group [blocks, 8, 32], both at least 0."""
    weights = np.abs(groups) + np.sqrt(np.square(groups).mean(-1, keepdims=True))
    lowest = np.minimum(groups.min(-1), 0)
    width = groups.max(-1) - lowest
    is_constant = width == 0
    width = np.where(is_constant, 1, width)
    shifted = groups - lowest[..., None]
    weighted = weights * groups
    # Sums over a group, in fp64, so that the error is a formula of them: it is a small difference of large numbers.
    sum_w, sum_x = (values.sum(-1, dtype=np.float64) for values in (weights, weighted))
    sum_x2 = np.einsum("bgk,bgk->bg", weighted, groups, dtype=np.float64)
    scale, begin, error = width / LEVELS, lowest, np.full(width.shape, np.inf)
    levels, product = np.empty_like(groups), np.empty_like(groups)
    for number in (None, *range(21)):
        per_unit = (LEVELS if number is None else LEVELS - 1 + 0.1 * number) / width
        np.multiply(shifted, per_unit[..., None], out=levels)
        np.rint(levels, out=levels)
        np.clip(levels, 0, LEVELS, out=levels)
        np.multiply(weights, levels, out=product)
        sum_l = product.sum(-1, dtype=np.float64)
        sum_l2 = np.einsum("bgk,bgk->bg", product, levels, dtype=np.float64)
        sum_xl = np.einsum("bgk,bgk->bg", product, groups, dtype=np.float64)
        determinant = sum_w * sum_l2 - np.square(sum_l)
        is_usable = determinant > 0
        if number is None:  # the plain grid from the lowest to the highest
            new_scale, new_begin = scale, begin
            is_usable = True
        else:
            divisor = np.where(is_usable, determinant, 1)
            new_scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
            new_begin = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
            # The stored offset is not negative: a group whose best line begins above 0 goes through 0.
            is_above = new_begin > 0
            new_scale = np.where(is_above, sum_xl / np.where(sum_l2 == 0, 1, sum_l2), new_scale)
            new_begin = np.where(is_above, 0, new_begin)
        squares = new_scale**2 * sum_l2 + new_begin**2 * sum_w + sum_x2
        new_error = squares + 2 * (new_scale * new_begin * sum_l - new_scale * sum_xl - new_begin * sum_x)
        is_better = is_usable & (new_error < error)
        scale, begin = np.where(is_better, new_scale, scale), np.where(is_better, new_begin, begin)
        error = np.where(is_better, new_error, error)
    return np.where(is_constant, 0, scale).astype(np.float32), -begin.astype(np.float32)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(fp16 unit [blocks, 1], multiples of it 0 to 63 [blocks, 8] uint8) of values [blocks, 8] that are at least 0."""
    largest = values.max(-1, keepdims=True)
    steps = np.rint(values * (STEPS / np.where(largest == 0, 1, largest))).clip(0, STEPS).astype(np.uint8)
    return (largest / STEPS).astype(np.float16), steps


def _interleaved(scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[blocks, 12]: 6 bits each of 8 scales and 8 offsets. The upper two bits of the last four are above the first
    four."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    middle = offsets[:, :4] | (offsets[:, 4:] >> 4) << 6
    last = (scales[:, 4:] & 15) | (offsets[:, 4:] & 15) << 4
    return np.concatenate([first, middle, last], axis=1)
