"""What is written about steps: metrics.jsonl, the terminal's line, Weights & Biases. docs/pretrain.md has a table of
all names.

    meters = Meters(config, state, unit="tok", expected=Expected(...))
    stats = meters.step(engine.step(...), seconds)     # each step: adds up, and removes from `stats` the sums that are
                                                       # counted rather than shown
    line = meters.line(step, steps)                    # every `log.every_steps`. Collective

Counts over the run (tokens of each source) and since the last line (nats and tokens of each source) are in `state`,
which is part of checkpoints, so a resumed run writes the same lines as one that was not killed. Times and rates are
those of this process.
"""

import math
import resource
import sys
import time
from dataclasses import dataclass, field

import torch

from pipeline.core import accelerators, distributed
from pipeline.models.cost import Flops
from pipeline.train import phases
from pipeline.train.loss import Tally
from pipeline.train.peak_flops import peak
from pipeline.train.run_summary import duration

# Phases that every step has; their times are reported per step.
STEP_PHASES = ("data", "rollout", "forward", "backward", "pipeline", "reduce", "update", "log")
OTHER_PHASES = ("evaluate", "sample", "save")  # phases between some steps; their times are reported as totals
CALIBRATION = 20  # steps of a process after which the time of a step is reported
WARMUP = 3  # first steps of a process, whose time says nothing about later ones: kernels are loaded, buffers allocated


@dataclass
class Expected:
    """What measured numbers are related to: for epochs, MFU and the remaining time."""

    epoch_tokens: dict[str, int] = field(default_factory=dict)
    """Source -> tokens of one pass over it."""
    flops: Flops | None = None
    """Per token."""
    peak: float | None = None
    """FLOP/s of all devices together, if known."""
    seconds: float | None = None
    """Estimated seconds of the run before its first step."""


class Meters:
    """weight: what a step's loss is averaged over (tokens, pairs); `unit` is its name in `UNIT_per_second`."""

    def __init__(self, config, state: dict, unit: str = "tok", expected: Expected | None = None, device=None):
        self.config, self.state, self.unit = config, state, unit
        self.expected = expected or Expected()
        self.device = device or distributed.device()
        self.state.setdefault("sources", {})
        self.state.setdefault("since", {})  # source -> [nats, tokens] since the last line
        self.total_seconds, self.total_weight = 0.0, 0.0  # of all steps of this process
        self.steps = 0  # of this process
        self.timed_steps, self.timed_seconds = 0, 0.0  # without those of the warmup
        self.started = time.perf_counter()
        phases.take()
        self._start_line()

    def _start_line(self) -> None:
        self.line_weight, self.line_steps = 0.0, 0

    def step(self, stats: dict, seconds: float) -> dict:
        """Count one step of `seconds`. Returns `stats` without the sums by source and with bits_per_byte."""
        shown = {}
        for key, value in stats.items():
            if isinstance(key, Tally):
                self._count(key, value, stats["weight"])
                if key.quantity == "bytes":
                    # loss and bytes are both divided by the weight
                    shown["bits_per_byte"] = stats["loss"] / math.log(2) / value if value else None
            else:
                shown[key] = value
        self.total_seconds += seconds
        self.total_weight += stats["weight"]
        self.steps += 1
        if self.steps > WARMUP:
            self.timed_seconds += seconds
            self.timed_steps += 1
        self.line_weight += stats["weight"]
        self.line_steps += 1
        return shown

    def _count(self, key: Tally, mean: float, weight: float) -> None:
        """Add a sum by source, which is given divided by the weight of the step."""
        if key.quantity == "nats":
            self.state["since"].setdefault(key.group, [0.0, 0])[0] += mean * weight
        elif key.quantity == "tokens":
            number = round(mean * weight)
            self.state["since"].setdefault(key.group, [0.0, 0])[1] += number
            self.state["sources"][key.group] = self.state["sources"].get(key.group, 0) + number

    # ---- metrics.jsonl -----------------------------------------------------------------------------------------------

    def line(self, step: int, steps: int | None) -> dict:
        """Further numbers to log at `step` of `steps`: rates, times and memory since the last line, counts over the
        run. Collective."""
        own_seconds = phases.take()
        own_step_seconds = sum(own_seconds.get(name, 0.0) for name in STEP_PHASES)
        own = [own_step_seconds, peak_memory(self.device)]
        own += [own_seconds.get(name, 0.0) for name in (*STEP_PHASES, *OTHER_PHASES)]
        ranks = distributed.all_rows(own)
        mean = [sum(column) / len(ranks) for column in zip(*ranks, strict=True)]
        rate = self.line_weight / max(mean[0], 1e-9)
        numbers = {f"{self.unit}_per_second": round(rate, 1)}
        numbers.update(self._times(ranks, mean, has_forward=bool(own_seconds.get("forward"))))
        numbers["peak_memory_gb"] = max(row[1] for row in ranks) / 1e9
        numbers = {key: round(value, 6) if isinstance(value, float) else value for key, value in numbers.items()}
        if self.expected.flops and self.expected.peak:
            numbers["mfu"] = round(rate * self.expected.flops.full / self.expected.peak, 4)
            numbers["mfu_causal"] = round(rate * self.expected.flops.causal / self.expected.peak, 4)
        numbers.update(self._counts())
        if steps is not None:
            seconds = (time.perf_counter() - self.started) / max(1, self.steps)
            numbers["seconds_left"] = round((steps - step) * seconds, 1)
        self._start_line()
        return numbers

    def _times(self, ranks: list[list[float]], mean: list[float], has_forward: bool) -> dict:
        """Times of steps and phases. A row of `ranks`: seconds of steps, memory, seconds of each phase."""
        num_steps = max(1, self.line_steps)
        data, forward = (2 + STEP_PHASES.index(name) for name in ("data", "forward"))
        numbers = {"seconds/step": mean[0] / num_steps}
        if len(ranks) > 1:
            numbers["seconds/step_max"] = max(row[0] for row in ranks) / num_steps
        if len(ranks) > 1 and has_forward:
            # All ranks end a step together, so a slow one shows in the time before it waits for the others.
            alone = [row[data] + row[forward] for row in ranks]
            numbers["seconds/alone"] = sum(alone) / len(alone) / num_steps
            numbers["seconds/alone_max"] = max(alone) / num_steps
            numbers["slowest_rank"] = alone.index(max(alone))
        phase_means = dict(zip((*STEP_PHASES, *OTHER_PHASES), mean[2:], strict=True))
        for name in STEP_PHASES:
            if phase_means[name]:
                numbers[f"seconds/{name}"] = phase_means[name] / num_steps
        for name in OTHER_PHASES:
            if phase_means[name] > 1e-4:
                numbers[f"seconds/{name}"] = phase_means[name]
        numbers["data_wait_share"] = max(row[data] / max(row[0], 1e-9) for row in ranks)
        return numbers

    def _counts(self) -> dict:
        """Loss of each source since the last line, its tokens and epochs over the run."""
        numbers = {}
        for source, (nats, tokens) in self.state["since"].items():
            if tokens:
                numbers[f"loss/{source}"] = nats / tokens
        self.state["since"] = {}
        for source, tokens in self.state["sources"].items():
            numbers[f"tokens/{source}"] = tokens
            if source in self.expected.epoch_tokens:
                numbers[f"epochs/{source}"] = round(tokens / self.expected.epoch_tokens[source], 4)
        return numbers

    # ---- the terminal ------------------------------------------------------------------------------------------------

    def progress_numbers(self, stats: dict) -> dict:
        """Numbers for the terminal's line."""
        numbers = {"loss": stats["loss"] if stats["loss"] is not None else "nan"}
        if stats.get("bits_per_byte") is not None:
            numbers["bits/byte"] = stats["bits_per_byte"]
        numbers[f"{self.unit}/s"] = self.rate
        if self.expected.flops and self.expected.peak:
            numbers["MFU"] = self._mfu(self.rate)
        return numbers

    def _mfu(self, rate: float) -> str:
        return f"{100 * rate * self.expected.flops.full / self.expected.peak:.1f}%"

    def calibrated(self, step: int, steps: int | None) -> str | None:
        """Once, when the first steps have been timed: how long the rest will take, compared with the estimate."""
        if self.steps != CALIBRATION or steps is None or steps - step < CALIBRATION:
            return None
        left = steps - step
        rate = self.total_weight / self.steps / self.step_seconds
        text = f"measured   {self.step_seconds:.3g} s per step, {rate:,.0f} {self.unit}/s"
        if self.expected.flops and self.expected.peak:
            text += f", {self._mfu(rate)} MFU"
        text += f": the other {left:,} steps take {duration(self.step_seconds * left)}"
        if self.expected.seconds:
            text += f"; the estimate was {duration(self.expected.seconds * left / steps)}"
        return text

    @property
    def rate(self) -> float:
        """Weight per second over all steps of this process, all ranks together, without evaluating and saving."""
        return self.total_weight / self.total_seconds if self.total_seconds else 0.0

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds of a step, without those of the warmup; None before there was any other."""
        return self.timed_seconds / self.timed_steps if self.timed_steps else None


def total_peak(config) -> float | None:
    """FLOP/s of the devices of all processes together, None if one of them is unknown. Measured on all at the same
    time, because CPU processes share a machine. Collective."""
    own = peak(config.log.peak, config.wide_precision, distributed.device())
    total, num_unknown = distributed.all_reduce_sum([own or 0.0, float(own is None)])
    return None if num_unknown else total


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that torch had allocated on the GPU; on a CPU the largest resident size of the process."""
    if device.type != "cpu":
        return accelerators.peak_memory(device)
    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * kilobyte
