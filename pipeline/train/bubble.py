"""How long the stages of a pipeline compute and how long they wait, measured, to compare with the share that 1F1B has
to wait: (p - 1) / (m + p - 1).

Forward and backward passes count as work (with CUDA events on a GPU, so that kernels are timed and not their launch).
Reducing gradients and the update, which all stages do together at the end, count as neither. The rest of a step is the
bubble: waiting for neighbours, and sending.
"""

import time

import torch

from pipeline.core import distributed
from pipeline.models import pipeline_split

# Names of DeepSpeed's pipeline instructions.
WORK = ("ForwardPass", "BackwardPass")
END = ("ReduceGrads", "ReduceTiedGrads", "OptimizerStep")


class Clock:
    """Times the instructions of a DeepSpeed pipeline engine, by wrapping the functions in its instruction map."""

    def __init__(self, engine, device: torch.device):
        self.on_gpu, self.running = device.type == "cuda", False
        self.spans: dict[str, list] = {"work": [], "end": [], "step": []}
        kinds = dict.fromkeys(WORK, "work") | dict.fromkeys(END, "end")
        instructions = {}
        for instruction, function in engine._INSTRUCTION_MAP.items():
            kind = kinds.get(instruction.__name__)
            instructions[instruction] = self._timed(kind, function) if kind else function
        engine._INSTRUCTION_MAP = instructions

    def _timed(self, kind: str, function):
        def timed(engine, *args, **kwargs):
            start = self.now()
            try:
                return function(engine, *args, **kwargs)
            finally:
                if self.running:
                    self.spans[kind].append((start, self.now()))

        return timed

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.running, self.start = True, self.now()

    def __exit__(self, *_):
        self.running = False
        self.spans["step"].append((self.start, self.now()))

    def take(self) -> dict[str, float]:
        """Seconds since the last call: of work, of what all stages do at the end, of whole steps."""
        if self.on_gpu:
            torch.cuda.synchronize()
        totals = {}
        for kind, spans in self.spans.items():
            seconds = [start.elapsed_time(end) / 1e3 if self.on_gpu else end - start for start, end in spans]
            totals[kind] = sum(seconds)
            spans.clear()
        return totals


class Bubble:
    """Busy seconds of each stage, equal on all processes."""

    def __init__(self, engine, device, index: int, count: int, data_world: int):
        self.clock, self.index, self.count, self.data_world = Clock(engine, device), index, count, data_world
        self.busy = [0.0] * count  # over the whole run, mean of data ranks

    def measured(self, micro_batches: int) -> dict[str, float]:
        """bubble and bubble_ideal since the last call. Collective."""
        seconds = self.clock.take()
        own_busy = [0.0] * self.count
        own_busy[self.index] = seconds["work"]
        own_steps = (seconds["step"] - seconds["end"]) / self.count
        *busy, steps = (total / self.data_world for total in distributed.all_reduce_sum([*own_busy, own_steps]))
        self.busy = [before + new for before, new in zip(self.busy, busy, strict=True)]
        if not steps:
            return {}
        return {
            "bubble": 1 - sum(busy) / self.count / steps,
            "bubble_ideal": (self.count - 1) / (micro_batches + self.count - 1),
        }

    def advice(self, parts: list[range]) -> str | None:
        """Busy seconds of the stages, and numbers of layers that would balance them; None if nothing was measured
        yet."""
        if not all(self.busy):
            return None
        layer_seconds: list[float] = []  # of each layer; those of the last stage as the mean of the other stages
        stage_means = []
        for seconds, part in zip(self.busy[:-1], parts, strict=False):
            stage_means.append(seconds / len(part))
            layer_seconds += [seconds / len(part)] * len(part)
        layer_seconds += [sum(stage_means) / len(stage_means)] * len(parts[-1])
        output_seconds = max(0.0, self.busy[-1] - sum(layer_seconds[parts[-1].start :]))
        best = [len(part) for part in pipeline_split.partition(layer_seconds, output_seconds, self.count)]
        current = [len(part) for part in parts]
        busy = ", ".join(f"{seconds:.1f}" for seconds in self.busy)
        text = f"stages were busy {busy} s with {', '.join(map(str, current))} layers"
        if best == current:
            return f"{text}; no other cut is more even"
        return f"{text}; parallel.layers: {best} would be more even"
