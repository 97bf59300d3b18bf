"""How long the stages of a pipeline compute and how long they wait, measured, beside the share that 1F1B has to wait:
(p - 1) / (m + p - 1).

Forward and backward passes count as work (with CUDA events on a GPU, so that kernels are timed and not their launch);
reducing gradients and the update, which all stages do together at the end, count as neither. The rest of a step is the
bubble: waiting for neighbours, and sending.
"""

import time

import torch

from pipeline.models import pipeline_split
from pipeline.train import distributed

WORK = ("ForwardPass", "BackwardPass")
END = ("ReduceGrads", "ReduceTiedGrads", "OptimizerStep")


class Clock:
    """Times the instructions of a DeepSpeed pipeline engine, which looks them up in a table of its own."""

    def __init__(self, engine, device: torch.device):
        self.cuda, self.on = device.type == "cuda", False
        self.spans: dict[str, list] = {"work": [], "end": [], "step": []}
        kinds = {**dict.fromkeys(WORK, "work"), **dict.fromkeys(END, "end")}
        engine._INSTRUCTION_MAP = {
            kind: self._timed(kinds[kind.__name__], run) if kind.__name__ in kinds else run
            for kind, run in engine._INSTRUCTION_MAP.items()
        }

    def _timed(self, kind: str, run):
        def instruction(engine, *args, **options):
            begun = self.now()
            try:
                return run(engine, *args, **options)
            finally:
                if self.on:
                    self.spans[kind].append((begun, self.now()))

        return instruction

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.on, self.begun = True, self.now()

    def __exit__(self, *_):
        self.on = False
        self.spans["step"].append((self.begun, self.now()))

    def take(self) -> dict[str, float]:
        """Seconds since the last call: of work, of what all do at the end, of whole steps."""
        if self.cuda:
            torch.cuda.synchronize()
        found = {
            kind: sum(a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in spans)
            for kind, spans in self.spans.items()
        }
        for spans in self.spans.values():
            spans.clear()
        return found


class Bubble:
    """Busy seconds of each stage, agreed on by all processes."""

    def __init__(self, engine, device, index: int, count: int, data_world: int):
        self.clock, self.index, self.count, self.data_world = Clock(engine, device), index, count, data_world
        self.busy = [0.0] * count  # over the whole run, mean of data ranks

    def measured(self, micro_batches: int) -> dict[str, float]:
        """bubble and bubble_ideal since the last call. Collective."""
        spent = self.clock.take()
        mine = [0.0] * self.count
        mine[self.index] = spent["work"]
        *busy, steps = (
            value / self.data_world
            for value in distributed.all_reduce_sum([*mine, (spent["step"] - spent["end"]) / self.count])
        )
        self.busy = [a + b for a, b in zip(self.busy, busy, strict=True)]
        if not steps:
            return {}
        return {
            "bubble": 1 - sum(busy) / self.count / steps,
            "bubble_ideal": (self.count - 1) / (micro_batches + self.count - 1),
        }

    def advice(self, parts: list[range]) -> str | None:
        """Busy seconds of the stages, and the layers that would even them out; None before anything was measured."""
        if not all(self.busy):
            return None
        each = [seconds / len(part) for seconds, part in zip(self.busy[:-1], parts, strict=False)]
        layers = [cost for cost, part in zip(each, parts, strict=False) for _ in part] + [sum(each) / len(each)] * len(
            parts[-1]
        )
        output = max(0.0, self.busy[-1] - sum(layers[parts[-1].start :]))
        best = [len(part) for part in pipeline_split.partition(layers, output, self.count)]
        said = (
            f"stages were busy {', '.join(f'{seconds:.1f}' for seconds in self.busy)} s with"
            f" {', '.join(str(len(part)) for part in parts)} layers"
        )
        even = best == [len(part) for part in parts]
        return f"{said}; " + ("no other cut is more even" if even else f"parallel.layers: {best} would be more even")
