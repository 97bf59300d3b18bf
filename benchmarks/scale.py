"""Scale on paper: the model of step times behind `alma plan`, for 8B, 70B and 405B on up to 16,384 H100, and what
failures cost there. Nothing is measured.

    python benchmarks/scale.py              # tables
    python benchmarks/scale.py --pictures   # and docs/scale-*.svg

Rows of 8,192 tokens, one in a micro-batch, layers recomputed in full, compiled. A layout is one of: FSDP over all
devices, FSDP in groups of a node, tensor parallel 8 with FSDP over the rest, and tensor parallel 8 in a pipeline
(interleaved, one chunk per layer of a stage) with ZeRO-1. alma has the first two and a pipeline without tensor
parallelism.
"""

import argparse
import math
from pathlib import Path

from plan import LLAMA

from pipeline.models import devices, step_time
from pipeline.models.step_time import Setup

LENGTH = 8192
MODELS = {"8B": (LLAMA["8B"], 512, 1), "70B": (LLAMA["70B"], 1024, 8), "405B": (LLAMA["405B"], 2048, 16)}
"""Name -> shape, rows of a step (4, 8 and 16 M tokens), pipeline stages."""
COUNTS = [2**power for power in range(3, 15)]
NAMES = ("FSDP", "FSDP in a node", "TP 8, FSDP", "TP 8, pipeline")
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
# Grattafiori et al. (2024), section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs.
HOURS_BETWEEN_FAILURES = 54 * 24 * 16_384 / 419
"""Of one device."""
RESTART = 10 / 60
"""Hours until a run goes on after a failure; an assumption."""


def setups(shape, rows: int, stages: int, count: int) -> dict[str, Setup]:
    """The layouts that this many devices can have with a whole number of rows on each data rank."""
    common = {"length": LENGTH, "micro": 1, "recomputed": (1.0, 1.0), "compiled": True}
    found = {}
    if rows % count == 0:
        found["FSDP"] = Setup(**common, accumulation=rows // count, data=count, shard=count)
        found["FSDP in a node"] = Setup(**common, accumulation=rows // count, data=count, shard=8)
    data = count // 8
    if data and rows % data == 0:
        found["TP 8, FSDP"] = Setup(**common, accumulation=rows // data, data=data, shard=data, tensor=8)
    data = count // 8 // stages
    if stages > 1 and data and rows % data == 0:
        found["TP 8, pipeline"] = Setup(
            **common, accumulation=rows // data, data=data, tensor=8, stages=stages,
            chunks=max(1, shape.layers // stages), shares_optimizer=True,
        )  # fmt: skip
    return found


def fits(shape, setup: Setup) -> bool:
    """Whether 16 bytes per parameter, split as the layout does, leave a quarter of an H100 to the rest."""
    own = shape.parameters / setup.tensor / setup.stages
    held = 8.0 + 8.0 / setup.data if setup.shares_optimizer else 16.0 / setup.shard
    return own * held < 0.75 * devices.find("H100-80G").usable


def utilisation(model: str) -> dict[str, list[tuple[int, float]]]:
    """Layout -> (devices, MFU)."""
    shape, rows, stages = MODELS[model]
    lines: dict[str, list[tuple[int, float]]] = {}
    for count in COUNTS:
        cluster = devices.parse(f"{count}xH100-80G")
        for name, setup in setups(shape, rows, stages, count).items():
            if fits(shape, setup):
                lines.setdefault(name, []).append((count, step_time.mfu(shape, setup, cluster)))
    return lines


def lost(count: int, save_seconds: float) -> tuple[float, float]:
    """(hours between checkpoints, share of the time that is lost) at the best interval: sqrt(2 * save * time between
    failures) (Young, 1974). save_seconds: that training waits for a checkpoint."""
    between, save = HOURS_BETWEEN_FAILURES / count, save_seconds / 3600
    interval = math.sqrt(2 * save * between)
    return interval, save / interval + interval / 2 / between + RESTART / between


def picture(title: str, lines: dict[str, list[tuple[int, float]]], top: float) -> str:
    """A line chart as SVG: devices on a logarithmic axis, a share on the other."""
    left, right, high, low = 60, 560, 40, 290

    def place(count: int, share: float) -> tuple[float, float]:
        x = left + (right - left) * (math.log2(count) - 3) / 11
        return round(x, 1), round(low - (low - high) * share / top, 1)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="740" height="330" font-family="sans-serif" font-size="12">',
        '<rect width="740" height="330" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">{title}</text>',
    ]
    for step in range(6):
        share = top * step / 5
        y = place(8, share)[1]
        parts.append(f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{100 * share:.0f}%</text>')
    for count in COUNTS:
        x = place(count, 0)[0]
        parts.append(f'<text x="{x}" y="{low + 18}" text-anchor="middle">{count:,}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[NAMES.index(name) if name in NAMES else number]
        text = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 14}" y="{high + 12 + 20 * number}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="Write docs/scale-*.svg.")
    docs = Path(__file__).resolve().parents[1] / "docs"
    write = parser.parse_args().pictures
    for model in MODELS:
        lines = utilisation(model)
        print(f"\n| {model}: MFU on | {' | '.join(lines)} |\n| --- |{' --- |' * len(lines)}")
        for count in COUNTS:
            cells = [f"{dict(points)[count]:.1%}" if count in dict(points) else "" for points in lines.values()]
            if any(cells):
                print(f"| {count:,} | {' | '.join(cells)} |")
        if write:
            title = f"Llama 3.1 {model}, H100: model FLOPs utilisation (predicted)"
            (docs / f"scale-{model}.svg").write_text(picture(title, lines, 0.6))
    waits = {"1 s": 1.0, "10 s": 10.0, "60 s": 60.0}
    print(f"\n| devices | a failure every | {' | '.join(f'training waits {name}' for name in waits)} |")
    print(f"| --- | --- |{' --- |' * len(waits)}")
    for count in COUNTS[5:]:
        found = [lost(count, wait) for wait in waits.values()]
        cells = [f"{60 * hours:.0f} min, {share:.1%}" for hours, share in found]
        print(f"| {count:,} | {HOURS_BETWEEN_FAILURES / count:.1f} h | {' | '.join(cells)} |")
    if write:
        lines = {f"waits {name}": [(count, lost(count, wait)[1]) for count in COUNTS] for name, wait in waits.items()}
        title = "Time lost to checkpoints, failures and restarts (predicted)"
        (docs / "scale-failures.svg").write_text(picture(title, lines, 0.25))


if __name__ == "__main__":
    main()
