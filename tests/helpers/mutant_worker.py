"""The worker of `alma verify parallel` with a fault in four of its layouts: test_verify.py runs it in the worker's
place, and each must be found.

DDP divides its loss by twice the weight. ZeRO-1 reports the true gradient norm and clips by that of its own share.
ZeRO-2's second rank reads the rows of the first again. The pipeline takes a norm that is not a number for a good one.
"""

import sys

from deepspeed.runtime.zero import stage_1_and_2

from pipeline.checks import verify_worker
from pipeline.train import engine, loop, replicated

build, share, update = engine.build, loop.share, replicated.Replicated._update
clip, invalid = stage_1_and_2.DeepSpeedZeroOptimizer.unscale_and_clip_grads, stage_1_and_2.is_invalid_grad_norm
now = None  # the `parallel` block of the layout that is trained


def noted_build(model, loss_fn, config, **options):
    global now
    now = config.parallel
    return build(model, loss_fn, config, **options)


def same_rows(config, trainer, step):
    if now.zero == 2:
        trainer.data_rank = 0
    return share(config, trainer, step)


def local_norm(self, gradients, total_norm):
    return clip(
        self,
        gradients,
        (
            sum(gradient.norm() ** 2 for gradient in gradients) ** 0.5
            if now.zero == 1 and now.pipeline == 1
            else total_norm
        ),
    )


if __name__ == "__main__":
    engine.build, loop.share = noted_build, same_rows
    replicated.Replicated._update = lambda self, batches, weight, lr: update(
        self, batches, weight * self.data_world, lr
    )
    stage_1_and_2.DeepSpeedZeroOptimizer.unscale_and_clip_grads = local_norm
    stage_1_and_2.is_invalid_grad_norm = lambda norm: now.pipeline == 1 and invalid(norm)
    verify_worker.main(sys.argv[1])
