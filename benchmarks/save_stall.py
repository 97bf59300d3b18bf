"""How long training waits for a checkpoint, compared with one plain copy of the state in memory and with a synchronous
save.

    OMP_NUM_THREADS=1 python benchmarks/save_stall.py [millions of parameters]

`measure()` gives the figures to other benchmarks: `save_stall_ratio` is the stall of the loop with `save.asynchronous:
true` (the call of save and what the two following steps do for it) over the time of a plain copy, both medians of
rounds that alternate on this machine.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 7


def measure(millions: float = 20.0, rounds: int = ROUNDS) -> dict:
    """Seconds and ratios for a llama of about this size with AdamW, in one process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pipeline.core import distributed
    from pipeline.core.output import Output
    from pipeline.train import checkpoints, engine
    from pipeline.train.config import TrainConfig
    from pipeline.train.loss import cross_entropy_sum

    width = 256
    layers = max(1, round(millions * 1e6 / (12 * width**2)))
    shape = {
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": 4 * width * 2 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    config = TrainConfig(kind="pretrain", steps=10, batch_size=1, sequence_length=8, precision="fp32", seed=0)
    trainer = engine.build(
        LlamaForCausalLM(LlamaConfig(**shape)),
        lambda logits, batch: (cross_entropy_sum(logits, batch["labels"]), {}),
        config,
    )
    ids = torch.arange(9)[None]
    trainer.step([{"inputs": {"input_ids": ids[:, :-1]}, "labels": ids[:, 1:], "weight": 8.0}])

    def state() -> list:
        return [fragment.values for fragment in trainer.part().fragments]

    times: dict[str, list[float]] = {
        "copy": [],
        "copy_into_used_memory": [],
        "stall": [],
        "blocking": [],
        "until_valid": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Output(Path(folder) / "run", "pretrain", "pretrain", {}).open(config={}, parents={})
        saver = checkpoints.Saver(output, [trainer], config.save)
        size = sum(values.nbytes for values in state())
        kept = [values.clone() for values in state()]
        for number in range(rounds + 1):  # the first one only warms up
            begun = time.perf_counter()
            copies = [values.clone() for values in state()]
            copied = time.perf_counter()
            del copies
            again = time.perf_counter()
            for place, values in zip(kept, state(), strict=True):
                place.copy_(values)
            reused = time.perf_counter()
            saver.save(2 * number + 1, {})
            stalled = time.perf_counter() - reused
            # what the steps after it do: once when all is written, once when it is published
            while saver.step is not None:
                if saver.thread:
                    saver.thread.join()
                here = time.perf_counter()
                saver.settle(*distributed.all_reduce_max(saver.flags()))
                stalled += time.perf_counter() - here
            valid = time.perf_counter() - reused
            blocking = time.perf_counter()
            saver.save(2 * number + 2, {}, wait=True)
            blocking = time.perf_counter() - blocking
            for name, seconds in zip(times, (copied - begun, reused - again, stalled, blocking, valid), strict=True):
                times[name] += [seconds] if number else []
        output.close()
    median = {name: statistics.median(found) for name, found in times.items()}
    return {
        "save_stall_ratio": round(median["stall"] / median["copy"], 3),
        "save_stall_ratio_used_memory": round(median["stall"] / median["copy_into_used_memory"], 3),
        "blocking_over_stall": round(median["blocking"] / median["stall"], 1),
        "state_mb": round(size / 1e6, 1),
        **{f"{name}_seconds": round(seconds, 4) for name, seconds in median.items()},
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    print(json.dumps(measure(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0), indent=2))
