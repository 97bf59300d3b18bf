"""One GPU: alma's replicated engine compared with a plain compiled transformers loop. bf16 autocast over fp32 weights,
fused AdamW, clipping at 1.0, random tokens.

    python benchmarks/gpu.py --model 124M                       # 124M, 350M or 1.2B
    python benchmarks/gpu.py --model 124M --device cpu --tiny   # does the code run?

Both make the same steps; turns alternate, the median of the rounds counts. Prints one JSON line: tokens/s of both,
their ratio, and MFU against --peak (989 TFLOP/s: a H100's dense bf16) with attention counted in full (PaLM, 2022,
appendix B) and halved for causality.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pretrain_setup import LR, Vocabulary  # noqa: E402

# layers, width, inner width, heads, length, rows of a micro-batch, micro-batches of a step
MODELS = {
    "124M": (12, 768, 2048, 12, 1024, 32, 1),
    "350M": (24, 1024, 2816, 16, 2048, 8, 2),
    "1.2B": (24, 2048, 5504, 16, 2048, 4, 4),
    "tiny": (2, 64, 172, 2, 32, 2, 2),
}
VOCABULARY = 50304  # GPT-2's, rounded up to a multiple of 128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[name for name in MODELS if name != "tiny"], default="124M")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers, not compiled, two rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s")
    parser.add_argument("--activation-checkpointing", choices=["none", "selective", "full"], default="none")
    return parser.parse_args()


class Setup:
    """What both loops get: the model's block, the shape of a step, its tokens and the device."""

    def __init__(self, given: argparse.Namespace):
        import torch

        from pipeline import pretrain
        from pipeline.core import distributed

        self.name = "tiny" if given.tiny else given.model
        layers, width, inner, heads, self.length, self.rows, self.micro_batches = MODELS[self.name]
        self.vocabulary = 512 if given.tiny else VOCABULARY
        self.compiled, self.checkpointing = not given.tiny, given.activation_checkpointing
        self.block = {
            "family": "llama",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "tie_word_embeddings": given.model == "124M",
        }
        self.config = pretrain.Config(
            kind="pretrain",
            seed=0,
            model=self.block,
            sequence_length=self.length,
            batch_size=self.rows * self.micro_batches,
            micro_batch=self.rows,
            steps=10**6,
            precision="bf16",
            compile=self.compiled,
            activation_checkpointing=self.checkpointing,
            optimizer={"lr": LR, "max_grad_norm": 1.0},
        )
        distributed.setup(self.config)
        self.device = distributed.device()
        draw = torch.Generator().manual_seed(0)
        shape = (self.rows, self.length + 1)
        self.data = [torch.randint(3, self.vocabulary, shape, generator=draw) for _ in range(self.micro_batches)]

    def new_model(self):
        from pipeline.models import build

        return build.new(self.block, Vocabulary(self.vocabulary), self.length, seed=0)

    @property
    def step_tokens(self) -> int:
        return self.rows * self.micro_batches * self.length


def alma(setup: Setup, model):
    """A function that makes a step with alma's engine."""
    import torch

    from pipeline.train import engine, layers
    from pipeline.train.batches import loss_of

    layers.prepare(model, setup.config)
    trainer = engine.build(model, loss_of(["a"]), setup.config)

    def step() -> None:
        batches = [
            {
                "inputs": {"input_ids": tokens[:, :-1].contiguous()},
                "labels": tokens[:, 1:].contiguous(),
                "weight": float(setup.rows * setup.length),
                "source": torch.zeros(setup.rows, dtype=torch.long),
                "bytes": torch.ones(setup.rows),
            }
            for tokens in setup.data
        ]
        trainer.step(batches, lr=LR)

    return step


def plain(setup: Setup, model):
    """A function that makes a step as one writes it by hand, the model compiled whole."""
    import torch
    import torch.nn.functional as F

    device = setup.device
    model = model.to(device).train()
    if setup.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model, dynamic=False) if setup.compiled else model

    def step() -> None:
        for tokens in setup.data:
            ids, labels = tokens[:, :-1].to(device, non_blocking=True), tokens[:, 1:].to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = compiled(input_ids=ids, use_cache=False).logits
            (F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / setup.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(step, count: int, device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def play(setup: Setup, contestants: dict, rounds: int, steps: int) -> tuple[dict[str, float], dict[str, float | None]]:
    """(tokens/s, peak memory in GB) of both, in turns: medians over the rounds after the first, which compiles."""
    import torch

    on_gpu = setup.device.type == "cuda"
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    memory = {}
    for turn in range(rounds + 1):
        for name, step in contestants.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            rate = steps * setup.step_tokens / seconds_of(step, steps, setup.device)
            if turn:
                rates[name].append(rate)
                memory[name] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    return {name: statistics.median(found) for name, found in rates.items()}, memory


def main() -> None:
    given = arguments()
    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"

    import torch
    import transformers

    from pipeline.models import cost

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --device cpu --tiny shows whether the code runs")
    rounds, steps = (2, 2) if given.tiny else (given.rounds, given.steps)
    setup = Setup(given)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = setup.new_model()
    size = cost.count(model)
    flops = cost.training_flops(model, size, setup.length)
    contestants = {"alma": alma(setup, model), "plain": plain(setup, setup.new_model())}
    medians, memory = play(setup, contestants, rounds, steps)
    assert "deepspeed" not in sys.modules, "the replicated engine must not need deepspeed"
    line = {
        "model": setup.name,
        "parameters": size.total,
        "sequence_length": setup.length,
        "rows": setup.rows * setup.micro_batches,
        "micro_batch": setup.rows,
        "activation_checkpointing": setup.checkpointing,
        "attention": model.config._attn_implementation,
        "tokens_per_second": round(medians["alma"]),
        "plain_tokens_per_second": round(medians["plain"]),
        "ratio": round(medians["alma"] / medians["plain"], 4),
        **{
            f"{prefix}mfu{suffix}": round(medians[name] * count / (given.peak * 1e12), 4)
            for prefix, name in (("", "alma"), ("plain_", "plain"))
            for suffix, count in (("", flops.full), ("_causal", flops.causal))
        },
        "peak_memory_gb_of_both": memory,
        "peak_tflops": given.peak,
        "device": torch.cuda.get_device_name() if setup.device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
