"""What is written of a step: metrics.jsonl, the terminal's line, Weights & Biases. docs/pretrain.md has the table of
all names.

    meters = Meters(config, state, unit="tok", text=Text(...))
    stats = meters.step(engine.step(...), seconds)     # each step: adds up, and takes the sums that are not for reading
                                                       # out of `stats`
    line = meters.line(step)                           # each `log.every_steps`. Collective

What is counted over the run (tokens of each source) and since the last line (nats and tokens of each source) lives in
`state`, which goes into checkpoints, so that a resumed run writes the lines of one that was not killed. Times and
rates are of this process alone.
"""

import math
import resource
import sys
import time
from dataclasses import dataclass, field

import torch

from pipeline.models.cost import Flops
from pipeline.train import distributed, phases
from pipeline.train.loss import Tally
from pipeline.train.peak_flops import peak
from pipeline.train.run_summary import duration

# phases that every step has; their times are shown a step
OF_A_STEP = ("data", "rollout", "forward", "backward", "pipeline", "reduce", "update", "log")
BESIDE = ("evaluate", "sample", "save")  # and those that come now and then, whose times are shown whole
CALIBRATED = 20  # steps of a process after which the time of a step is told
SETTLED = 3  # first steps of a process that say nothing about the others: kernels are loaded, buffers made


@dataclass
class Text:
    """What is known of the text that is read: for bits per byte, tokens of each source, epochs, and MFU."""

    epoch_tokens: dict[str, int] = field(default_factory=dict)
    """Source -> tokens of one pass over it."""
    flops: Flops | None = None
    """Of one token."""
    peak: float | None = None
    """FLOP/s of all devices together, if known."""
    expected: float | None = None
    """Seconds that the run was expected to take before its first step."""


class Meters:
    """weight: what a step's loss is averaged over (tokens, pairs); `unit` is its name in `UNIT_per_second`."""

    def __init__(self, config, state: dict, unit: str = "tok", text: Text | None = None, device=None):
        self.config, self.state, self.unit, self.text = config, state, unit, text or Text()
        self.device = device or distributed.device()
        self.state.setdefault("sources", {})
        self.state.setdefault("since", {})  # source -> [nats, tokens] since the last line
        self.busy, self.done = 0.0, 0.0  # seconds and weight of all steps of this process
        self.settled_steps, self.settled_seconds, self.steps = 0, 0.0, 0
        self.begun = time.perf_counter()
        phases.take()
        self._clear()

    def _clear(self) -> None:
        self.weight, self.count = 0.0, 0

    def step(self, stats: dict, seconds: float) -> dict:
        """Count one step of `seconds`. Returns `stats` without the sums by source and with bits_per_byte."""
        weight = stats["weight"]
        shown = {}
        for key, value in stats.items():
            if not isinstance(key, Tally):
                shown[key] = value
            elif key.quantity == "nats":
                self.state["since"].setdefault(key.group, [0.0, 0])[0] += value * weight
            elif key.quantity == "tokens":
                number = round(value * weight)
                self.state["since"].setdefault(key.group, [0.0, 0])[1] += number
                self.state["sources"][key.group] = self.state["sources"].get(key.group, 0) + number
            elif key.quantity == "bytes":
                # both are divided by the weight
                shown["bits_per_byte"] = stats["loss"] / math.log(2) / value if value else None
        self.busy, self.done, self.steps = self.busy + seconds, self.done + weight, self.steps + 1
        if self.steps > SETTLED:
            self.settled_seconds, self.settled_steps = self.settled_seconds + seconds, self.settled_steps + 1
        self.weight, self.count = self.weight + weight, self.count + 1
        return shown

    def line(self, step: int, steps: int | None) -> dict:
        """What else is logged at `step` of `steps`: rates, times and memory since the last line, counts over the
        run. Collective."""
        spent = phases.take()
        # All of the time but that of the phases beside: what is logged here, and looking out for signals, is part of a
        # step.
        mine = [
            sum(spent.get(name, 0.0) for name in OF_A_STEP),
            peak_memory(self.device),
            *(spent.get(name, 0.0) for name in (*OF_A_STEP, *BESIDE)),
        ]
        rows = distributed.all_rows(mine)
        count = max(1, self.count)
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        rate = self.weight / max(mean[0], 1e-9)
        found = {f"{self.unit}_per_second": round(rate, 1), "seconds/step": mean[0] / count}
        if len(rows) > 1:
            found["seconds/step_max"] = max(row[0] for row in rows) / count
            if spent.get("forward"):  # steps end together, so a slow rank shows in the time before it meets the others
                own = [row[2 + OF_A_STEP.index("data")] + row[2 + OF_A_STEP.index("forward")] for row in rows]
                found |= {
                    "seconds/alone": sum(own) / len(own) / count,
                    "seconds/alone_max": max(own) / count,
                    "slowest_rank": own.index(max(own)),
                }
        for name, value in zip(OF_A_STEP, mean[2:], strict=False):
            if value:
                found[f"seconds/{name}"] = value / count
        for name, value in zip(BESIDE, mean[2 + len(OF_A_STEP) :], strict=True):
            if value > 1e-4:
                found[f"seconds/{name}"] = value
        found["data_wait_share"] = max(row[2 + OF_A_STEP.index("data")] / max(row[0], 1e-9) for row in rows)
        found["peak_memory_gb"] = max(row[1] for row in rows) / 1e9
        found = {key: round(value, 6) if isinstance(value, float) else value for key, value in found.items()}
        if self.text.flops and self.text.peak:
            found["mfu"], found["mfu_causal"] = (
                round(rate * flops / self.text.peak, 4) for flops in (self.text.flops.full, self.text.flops.causal)
            )
        for source, (nats, tokens) in self.state["since"].items():
            if tokens:
                found[f"loss/{source}"] = nats / tokens
        self.state["since"] = {}
        for source, tokens in self.state["sources"].items():
            found[f"tokens/{source}"] = tokens
            if source in self.text.epoch_tokens:
                found[f"epochs/{source}"] = round(tokens / self.text.epoch_tokens[source], 4)
        if steps is not None:
            found["seconds_left"] = round((steps - step) * (time.perf_counter() - self.begun) / max(1, self.steps), 1)
        self._clear()
        return found

    def shown(self, stats: dict) -> dict:
        """What stands on the terminal's line."""
        bits, known = stats.get("bits_per_byte"), self.text.flops and self.text.peak
        return {
            "loss": stats["loss"] if stats["loss"] is not None else "nan",
            **({"bits/byte": bits} if bits is not None else {}),
            f"{self.unit}/s": self.rate,
            **({"MFU": f"{100 * self.rate * self.text.flops.full / self.text.peak:.1f}%"} if known else {}),
        }

    def calibrated(self, step: int, steps: int | None) -> str | None:
        """Once, when the first steps have been timed: what the rest will take, beside what was expected."""
        if self.steps != CALIBRATED or steps is None or steps - step < CALIBRATED:
            return None
        expected = (
            f"; {duration(self.text.expected * (steps - step) / steps)} were expected" if self.text.expected else ""
        )
        rate = self.done / self.steps / self.step_seconds
        mfu = (
            f", {100 * rate * self.text.flops.full / self.text.peak:.1f}% MFU"
            if self.text.flops and self.text.peak
            else ""
        )
        return (
            f"measured   {self.step_seconds:.3g} s a step, {rate:,.0f} {self.unit}/s{mfu}: the other {steps - step:,}"
            f" steps take {duration(self.step_seconds * (steps - step))}{expected}"
        )

    @property
    def rate(self) -> float:
        """Weight a second over all steps of this process, all ranks together, without evaluating and saving."""
        return self.done / self.busy if self.busy else 0.0

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step, the first few left out; None as long as there was none."""
        return self.settled_seconds / self.settled_steps if self.settled_steps else None


def total_peak(config) -> float | None:
    """FLOP/s of all processes' devices together, None if one is unknown. Measured on all at the same time, because
    CPU processes share a machine. Collective."""
    mine = peak(config.log.peak, config.precision, distributed.device())
    total, unknown = distributed.all_reduce_sum([mine or 0.0, float(mine is None)])
    return None if unknown else total


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that torch had allocated on the GPU, or on a CPU the most that the process had resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
