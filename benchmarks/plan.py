"""The model of step times behind `alma plan` (pipeline/models/step_time.py) against published runs.

    python benchmarks/plan.py                # every row: published, predicted, error; medians; one line of JSON
    python benchmarks/plan.py --calibrate    # fits the constants again on the calibration rows

Rows marked `fit` calibrated the constants in step_time.py; the others did not. Nothing is measured here, and no row is
of alma. Sources:

    mosaic     MosaicML LLM Foundry, scripts/train/benchmarking/README.md (2023): MPT models, FSDP, no compile
    titan      torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: Llama 3.1, H100 of 96 GB HBM2e at 500 W
    kempner    KempnerForge, benchmarks/mfu_scaling (2026-04) and weak_scaling_160gpu (2026-06): Llama 3, 4 H200 a node
    megatron   Narayanan et al. (2021), table 1: GPT, A100, full recomputation, attention not fused
    korthi     Korthikanti et al. (2022), table 5: GPT, A100, sequence parallel, attention recomputed
    llama3     Grattafiori et al. (2024), table 4: 405B, H100
"""

import argparse
import itertools
import json
import math
import statistics
from dataclasses import dataclass, replace

from pipeline.models import devices, step_time
from pipeline.models.step_time import Setup, Shape, saved_bytes


@dataclass(frozen=True)
class Row:
    source: str
    name: str
    cluster: devices.Cluster
    shape: Shape
    setup: Setup
    published: float
    """Tokens per second and device."""
    fit: bool = False

    @property
    def predicted(self) -> float:
        return step_time.tokens_per_second(self.shape, self.setup, self.cluster) / self.setup.devices

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


# ---- models ----------------------------------------------------------------------------------------------------------


def gpt(layers: int, width: int, heads: int, vocabulary: int) -> Shape:
    matrices = ((width, 3 * width, 1.0), (width, width, 1.0), (width, 4 * width, 1.0), (4 * width, width, 1.0))
    saved = saved_bytes(width, width, width, 4 * width, gated=False, residual=2.0)
    return Shape(
        layers, width, vocabulary, matrices, 2.0 * width, heads, saved, 12.0 * width**2, float(vocabulary * width)
    )


def llama(layers: int, width: int, heads: int, groups: int, inner: int, vocabulary: int = 128_256) -> Shape:
    keys = width // heads * groups
    matrices = (
        (width, width, 1.0), (width, keys, 1.0), (width, keys, 1.0), (width, width, 1.0),
        (width, inner, 1.0), (width, inner, 1.0), (inner, width, 1.0),
    )  # fmt: skip
    parameters = float(sum(rows * columns for rows, columns, _ in matrices))
    saved = saved_bytes(width, width, keys, inner, gated=True, residual=2.0)
    return Shape(layers, width, vocabulary, matrices, 2.0 * width, heads, saved, parameters, 2.0 * vocabulary * width)


MPT = {
    "125m": gpt(12, 768, 12, 50_368), "350m": gpt(24, 1024, 16, 50_368), "760m": gpt(24, 1536, 12, 50_368),
    "1b": gpt(24, 2048, 16, 50_368), "3b": gpt(32, 2560, 20, 50_368), "7b": gpt(32, 4096, 32, 50_368),
    "13b": gpt(40, 5120, 40, 50_368), "30b": gpt(48, 7168, 56, 50_368), "70b": gpt(80, 8192, 64, 50_368),
}  # fmt: skip
LLAMA = {
    "8B": llama(32, 4096, 32, 8, 14_336), "13B": llama(40, 5120, 40, 8, 17_920),
    "70B": llama(80, 8192, 64, 8, 28_672), "405B": llama(126, 16_384, 128, 8, 53_248),
}  # fmt: skip
FULL = (1.0, 1.0)


# ---- rows ------------------------------------------------------------------------------------------------------------


def mosaic(model, length, gpus, device, micro, accumulation, checkpointed, published, fit=False) -> Row:
    """FULL_SHARD; with `amp_bf16` gradients are reduced in fp32, with PURE in bf16."""
    setup = Setup(
        length, micro, accumulation, data=gpus, shard=gpus, recomputed=FULL if checkpointed else (0.0, 0.0),
        reduce_bytes=2.0 if device == "A100-40G" else 4.0,
    )  # fmt: skip
    name = f"{model} x {length}, {gpus} {device}"
    return Row("mosaic", name, devices.parse(f"{gpus}x{device}"), MPT[model], setup, published, fit)


def titan(gpus, compiled, published, fit=False) -> Row:
    """FSDP2, 2 rows of 8,192; selective checkpointing keeps every other matrix product."""
    cluster = devices.parse(f"{gpus}xH100-80G")
    # Capped at 500 W, so its peak lies between that of the SXM and the NVL card; 2.4 TB/s (the page's footnotes).
    cluster = replace(cluster, device=replace(cluster.device, peak=912e12, bandwidth=2.4e12))
    setup = Setup(8192, 2, 1, data=gpus, shard=gpus, recomputed=(0.5, 1.0), compiled=compiled)
    name = f"8B x 8192, {gpus} H100, {'compiled' if compiled else 'eager'}"
    return Row("titan", name, cluster, LLAMA["8B"], setup, published, fit)


def kempner(model, gpus, tensor, micro, accumulation, total, compiled=True, fit=False) -> Row:
    cluster = devices.parse(f"{gpus}xH200-141G", per_node=min(gpus, 4))
    data = gpus // tensor
    setup = Setup(4096, micro, accumulation, data=data, shard=data, tensor=tensor, recomputed=FULL, compiled=compiled)
    layout = f"TP{tensor} x FSDP{data}" if tensor > 1 else f"FSDP{data}"
    return Row("kempner", f"{model} x 4096, {layout} H200", cluster, LLAMA[model], setup, total / gpus, fit)


def megatron(billions, layers, width, heads, tensor, stages, gpus, batch, tflops, fit=False) -> Row:
    shape = gpt(layers, width, heads, 51_200)
    per_token = 96 * layers * width**2 * (1 + 2048 / (6 * width) + 51_200 / (16 * layers * width))
    data = gpus // tensor // stages
    setup = Setup(
        2048, 1, batch // data, data=data, tensor=tensor, stages=stages, recomputed=FULL, materialises_scores=True,
        overlaps=False,
    )  # fmt: skip
    name = f"{billions} x 2048, TP{tensor} x PP{stages} x DP{data} A100"
    return Row("megatron", name, devices.parse(f"{gpus}xA100-80G"), shape, setup, tflops * 1e12 / per_token, fit)


def korthikanti(billions, layers, width, heads, stages, chunks, gpus, batch, micro, seconds, fit=False) -> Row:
    shape = gpt(layers, width, heads, 51_200)
    data = gpus // 8 // stages
    setup = Setup(
        2048, micro, batch // data // micro, data=data, tensor=8, stages=stages, chunks=chunks,
        recomputed=(0.0, 0.1), materialises_scores=True, overlaps=False,
    )  # fmt: skip
    name = f"{billions} x 2048, TP8 x PP{stages} A100"
    published = batch * 2048 / seconds / gpus
    return Row("korthi", name, devices.parse(f"{gpus}xA100-80G"), shape, setup, published, fit)


def llama3(gpus, data, batch, tflops) -> Row:
    """TP 8, PP 16, each chunk one layer (section 3.3.2), 16M tokens a step; its FLOPs counted as here."""
    shape = LLAMA["405B"]
    setup = Setup(
        8192, 1, batch, data=data, shard=1, tensor=8, stages=16, chunks=8, shares_optimizer=True, compiled=True
    )
    published = tflops * 1e12 / shape.flops(8192)
    return Row(
        "llama3", f"405B x 8192, TP8 x PP16 x DP{data} H100", devices.parse(f"{gpus}xH100-80G"), shape, setup, published
    )


ROWS = [
    mosaic("125m", 2048, 8, "A100-80G", 32, 2, False, 141_737),
    mosaic("350m", 2048, 8, "A100-80G", 32, 2, False, 58_782, fit=True),
    mosaic("1b", 2048, 8, "A100-80G", 14, 4, False, 20_513),
    mosaic("3b", 2048, 8, "A100-80G", 10, 2, False, 10_811, fit=True),
    mosaic("7b", 2048, 8, "A100-80G", 6, 2, False, 4_641),
    mosaic("7b", 8192, 8, "A100-80G", 8, 2, True, 3_206),
    mosaic("7b", 65_536, 8, "A100-80G", 1, 2, True, 1_013, fit=True),
    mosaic("13b", 2048, 8, "A100-80G", 2, 3, False, 2_262),
    mosaic("30b", 2048, 8, "A100-80G", 3, 21, True, 916),
    mosaic("70b", 2048, 64, "A100-80G", 8, 4, True, 410, fit=True),
    mosaic("13b", 2048, 128, "A100-40G", 16, 1, True, 1_972),
    mosaic("30b", 2048, 128, "A100-40G", 6, 1, True, 865),
    mosaic("760m", 2048, 16, "H100-80G", 24, 1, False, 68_551),
    mosaic("1b", 2048, 8, "H100-80G", 14, 1, False, 45_455, fit=True),
    mosaic("1b", 2048, 64, "H100-80G", 20, 1, False, 44_402),
    mosaic("3b", 2048, 16, "H100-80G", 10, 3, False, 24_142),
    mosaic("7b", 2048, 8, "H100-80G", 6, 1, False, 10_643),
    mosaic("7b", 32_768, 8, "H100-80G", 2, 2, True, 3_318, fit=True),
    mosaic("13b", 4096, 8, "H100-80G", 10, 3, True, 4_717),
    mosaic("30b", 2048, 32, "H100-80G", 14, 3, True, 2_308),
    mosaic("70b", 2048, 32, "H100-80G", 2, 16, True, 882),
    mosaic("70b", 2048, 64, "H100-80G", 8, 4, True, 1_039),
    titan(8, False, 5_762, fit=True),
    titan(8, True, 6_667, fit=True),
    titan(128, False, 5_605),
    titan(128, True, 6_514),
    kempner("8B", 1, 1, 4, 2, 10_471),
    kempner("8B", 2, 1, 4, 2, 18_728),
    kempner("8B", 4, 1, 4, 2, 38_983, fit=True),
    kempner("13B", 8, 1, 4, 4, 35_405, compiled=False),
    kempner("8B", 4, 4, 4, 2, 25_135),
    kempner("13B", 32, 4, 4, 4, 110_373),
    kempner("13B", 160, 4, 4, 4, 534_644),
    kempner("70B", 32, 4, 2, 4, 18_688),
    kempner("70B", 160, 4, 2, 4, 85_571),
    megatron("1.7B", 24, 2304, 24, 1, 1, 32, 512, 137),
    megatron("7.5B", 36, 4096, 32, 4, 1, 128, 512, 142),
    megatron("39B", 48, 8192, 64, 8, 2, 512, 1536, 138),
    megatron("146B", 80, 12_288, 96, 8, 8, 1536, 2304, 148),
    megatron("530B", 105, 20_480, 128, 8, 35, 2520, 2520, 163),
    megatron("1T", 128, 25_600, 160, 8, 64, 3072, 3072, 163),
    korthikanti("22B", 48, 6144, 64, 1, 1, 8, 4, 4, 1.10),
    korthikanti("175B", 96, 12_288, 96, 8, 3, 64, 64, 1, 13.75),
    korthikanti("530B", 105, 20_480, 128, 35, 3, 280, 280, 1, 37.83),
    korthikanti("1T", 128, 25_600, 160, 64, 1, 512, 512, 1, 71.49),
    llama3(8192, 64, 32, 430),
    llama3(16_384, 128, 16, 400),
]


# ---- the report ------------------------------------------------------------------------------------------------------


def report() -> dict:
    print(f"{'source':9} {'run':44} {'':4} {'published':>10} {'predicted':>10} {'error':>7}   MFU, exposed, bubble")
    for row in ROWS:
        parts = step_time.step_seconds(row.shape, row.setup, row.cluster)
        total = sum(parts.values())
        utilisation = step_time.mfu(row.shape, row.setup, row.cluster)
        print(
            f"{row.source:9} {row.name:44} {'fit' if row.fit else '':4} {row.published:10,.0f} {row.predicted:10,.0f}"
            f" {row.error:+7.1%}   {utilisation:.1%}, {parts['communication'] / total:.1%},"
            f" {parts['bubble'] / total:.1%}"
        )
    tested = [abs(row.error) for row in ROWS if not row.fit]
    figures = {
        "rows": len(ROWS),
        "fit_rows": len(ROWS) - len(tested),
        "median_error_fit": statistics.median(abs(row.error) for row in ROWS if row.fit),
        "median_error_test": statistics.median(tested),
        "largest_error_test": max(tested),
        "within_15_percent_test": sum(error <= 0.15 for error in tested) / len(tested),
    }
    for source in dict.fromkeys(row.source for row in ROWS):
        errors = [abs(row.error) for row in ROWS if row.source == source and not row.fit]
        print(f"{source}: median error {statistics.median(errors):.1%} of {len(errors)} rows that were not fitted")
    print(json.dumps(figures))
    return figures


def calibrate() -> None:
    """Coordinate descent on the constants, on the mean squared logarithm of predicted / published."""
    names = [
        (step_time.SHARE, "ampere"), (step_time.SHARE, "hopper"), (step_time.ATTENTION_SHARE, "ampere"),
        (step_time.ATTENTION_SHARE, "hopper"), (step_time.PASSES, "eager"), (step_time.PASSES, "compiled"),
    ]  # fmt: skip
    bounds = [(0.4, 0.85)] * 2 + [(0.15, 0.85)] * 2 + [(2.0, 12.0)] * 2

    def loss() -> float:
        return statistics.fmean(math.log1p(row.error) ** 2 for row in ROWS if row.fit)

    for _, (table, key), (low, high) in itertools.chain.from_iterable(
        [(turn, name, bound) for name, bound in zip(names, bounds, strict=True)] for turn in range(8)
    ):
        best = (math.inf, table[key])
        for step in range(61):
            table[key] = low + (high - low) * step / 60
            best = min(best, (loss(), table[key]))
        table[key] = best[1]
    for name in ("SHARE", "ATTENTION_SHARE", "PASSES"):
        print(name, {key: round(value, 3) for key, value in vars(step_time)[name].items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="Fit the constants again before the report.")
    if parser.parse_args().calibrate:
        calibrate()
    report()
