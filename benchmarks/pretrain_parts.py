"""Figures of benchmarks/pretrain.py that have processes of their own: memory of the loss, and speed of layouts."""

import json
import statistics
import time
from pathlib import Path

from pretrain_setup import LR, THREADS, Vocabulary, model_block, new_model, sampler_of, sizes


def peak_of_loss(chunks: bool, quick: bool) -> None:
    """Prints by how many bytes resident memory grew, at most, over forward and backward of output layer and loss."""
    import resource

    import torch

    from pipeline.models import build
    from pipeline.train import chunked_loss
    from pipeline.train.loss import next_token

    torch.set_num_threads(THREADS)
    vocabulary, tokens, width = (16384, 512, 64) if quick else (131072, 2048, 512)
    model = build.new(
        {
            "family": "llama",
            "hidden_size": width,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        Vocabulary(vocabulary),
        64,
        seed=0,
    )
    layer = model.get_output_embeddings()
    if chunks:
        chunked_loss.install(model)
    hidden, labels = torch.randn(1, tokens, width, requires_grad=True), torch.randint(0, vocabulary, (1, tokens))

    def loss(hidden, labels):
        if chunks:
            layer.expect([{"labels": labels}])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = layer(hidden)
        next_token(outputs, labels)[0].backward()
        layer.weight.grad = None

    loss(hidden[:, :8].detach().requires_grad_(), labels[:, :8])  # kernels and buffers that any size needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(hidden, labels)
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def parallel_worker(folder: Path, quick: bool) -> None:
    """In each of two processes: DDP, ZeRO-1 and a pipeline of two take turns; prints tokens/s of each turn."""
    import torch

    from pipeline import pretrain
    from pipeline.core import distributed
    from pipeline.train import engine, layers
    from pipeline.train.batches import loss_of, to_batch
    from pipeline.train.loop import share

    size, found, engines = sizes(quick), {}, {}
    store, sampler = sampler_of(folder, size)
    # in this order: DeepSpeed builds no plain engine after a pipeline
    for name, parallel in {"ddp": {}, "zero1": {"zero": 1}, "pipeline2": {"pipeline": 2}}.items():
        config = pretrain.Config(
            kind="pretrain",
            seed=0,
            model=model_block(size),
            sequence_length=size["length"],
            batch_size=size["rows"],
            micro_batch=max(1, size["rows"] // 4),
            steps=1000,
            parallel=parallel,
        )
        distributed.setup(config)
        torch.manual_seed(0)
        model = new_model(size)
        torch.set_num_threads(1)
        layers.prepare(model, config)
        engines[name] = engine.build(model, loss_of(store.sources), config), config
        found[name] = []
    steps = 2 if quick else 4
    for turn in range(size["rounds"] + 1):
        for name, (trainer, config) in engines.items():
            distributed.barrier()
            begun = time.perf_counter()
            for step in range(turn * steps, (turn + 1) * steps):
                trainer.step(
                    [
                        to_batch([sampler.row(index) for index in rows], store, False)
                        for rows in share(config, trainer, step)
                    ],
                    lr=LR,
                )
            if turn:
                found[name].append(steps * size["rows"] * size["length"] / (time.perf_counter() - begun))
    if distributed.is_main():
        (folder / "parallel.json").write_text(
            json.dumps({name: statistics.median(rates) for name, rates in found.items()})
        )
    distributed.barrier()
    distributed.shutdown()
