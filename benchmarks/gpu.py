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

# layers, width, inner width, heads, length, rows of a micro-batch, micro-batches of a step
MODELS = {
    "124M": (12, 768, 2048, 12, 1024, 32, 1),
    "350M": (24, 1024, 2816, 16, 2048, 8, 2),
    "1.2B": (24, 2048, 5504, 16, 2048, 4, 4),
    "tiny": (2, 64, 172, 2, 32, 2, 2),
}
VOCABULARY = 50304  # GPT-2's, rounded up to a multiple of 128


class Vocabulary:
    """What a model's configuration asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[name for name in MODELS if name != "tiny"], default="124M")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two narrow layers, not compiled, two rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s")
    parser.add_argument("--activation-checkpointing", choices=["none", "selective", "full"], default="none")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"

    import torch
    import torch.nn.functional as F
    import transformers

    from pipeline import pretrain
    from pipeline.models import build, cost
    from pipeline.train import distributed, engine, layers
    from pipeline.train.batches import loss_of

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible; --device cpu --tiny shows whether the code runs")
    num_layers, width, inner, heads, length, rows, micro_batches = MODELS["tiny" if given.tiny else given.model]
    vocabulary, rounds, steps = (512, 2, 2) if given.tiny else (VOCABULARY, given.rounds, given.steps)
    block = {
        "family": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": given.model == "124M",
    }
    config = pretrain.Config(
        kind="pretrain",
        seed=0,
        model=block,
        sequence_length=length,
        batch_size=rows * micro_batches,
        micro_batch=rows,
        steps=10**6,
        precision="bf16",
        compile=not given.tiny,
        activation_checkpointing=given.activation_checkpointing,
        optimizer={"lr": 3e-4, "max_grad_norm": 1.0},
    )
    distributed.setup(config)
    device = distributed.device()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    flops = cost.training_flops(
        model := build.new(block, Vocabulary(vocabulary), length, seed=0), cost.count(model), length
    )
    parameters = cost.count(model).total
    draw = torch.Generator().manual_seed(0)
    data = [torch.randint(3, vocabulary, (rows, length + 1), generator=draw) for _ in range(micro_batches)]

    layers.prepare(model, config)
    trainer = engine.build(model, loss_of(["a"]), config)

    def ours() -> None:
        batches = [
            {
                "inputs": {"input_ids": tokens[:, :-1].contiguous()},
                "labels": tokens[:, 1:].contiguous(),
                "weight": float(rows * length),
                "source": torch.zeros(rows, dtype=torch.long),
                "bytes": torch.ones(rows),
            }
            for tokens in data
        ]
        trainer.step(batches, lr=3e-4)

    other = build.new(block, Vocabulary(vocabulary), length, seed=0).to(device).train()
    if given.activation_checkpointing != "none":
        other.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(other.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = other if given.tiny else torch.compile(other, dynamic=False)

    def plain() -> None:
        for tokens in data:
            ids, labels = tokens[:, :-1].to(device, non_blocking=True), tokens[:, 1:].to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = compiled(input_ids=ids, use_cache=False).logits
            (F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def timed(step) -> float:
        """Tokens a second over a round."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return steps * rows * micro_batches * length / (time.perf_counter() - begun)

    rates: dict[str, list[float]] = {"alma": [], "plain": []}
    memory = {}
    for turn in range(rounds + 1):
        for name, step in (("alma", ours), ("plain", plain)):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rate = timed(step)
            if turn:  # the first compiles
                rates[name].append(rate)
                memory[name] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    medians = {name: statistics.median(found) for name, found in rates.items()}
    assert "deepspeed" not in sys.modules, "the replicated engine must not need deepspeed"
    line = {
        "model": "tiny" if given.tiny else given.model,
        "parameters": parameters,
        "sequence_length": length,
        "rows": rows * micro_batches,
        "micro_batch": rows,
        "activation_checkpointing": given.activation_checkpointing,
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
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
