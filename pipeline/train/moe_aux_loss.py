"""The auxiliary loss that keeps a mixture of experts balanced, row by row (DeepSeek-V3, 2024, section 2.1.2, equations
17 to 20).

For a row of T tokens, N experts of which each token uses K, and a layer's affinities s (softmax of the router's logits,
or their sigmoid in DeepSeek-V3): f_i = N / (K T) * tokens sent to expert i, P_i = mean over the row of s_i / sum_j s_j,
loss = coefficient * sum_i f_i P_i. With perfect balance it equals the coefficient; it is summed over layers and
averaged over the rows of a step. transformers' own loss (`output_router_logits`) computes f and P over a complete
micro-batch, so it depends on the micro-batch; it is K times as large, and averaged over layers.

Each row has a loss of its own, so micro-batches, accumulation and layout do not change it. Its gradient is injected at
the router: the forward pass leaves the scores unchanged, the backward pass adds the gradient of the loss (as in
Megatron-LM's MoEAuxLossAutoScaler). So it works in every stage of a pipeline, and with activation checkpointing: a
second forward pass makes no second backward pass, and the numbers for the log are added up in the backward pass.
"""

import torch

from pipeline.core import accelerators, distributed
from pipeline.models.families import balance_coefficient, family_of, num_experts


def row_losses(
    logits_NE: torch.Tensor, indices_NK: torch.Tensor, rows: int, affinity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_i f_i P_i of each row [rows], tokens sent to each expert [E]). The N tokens are those of `rows` rows, one
    row after the other."""
    logits = logits_NE.float()
    if affinity == "softmax":
        shares_NE = logits.softmax(-1)
    else:
        shares_NE = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    experts = logits.shape[-1]
    mean_RE = shares_NE.view(rows, -1, experts).mean(1)
    chosen = indices_NK.reshape(rows, -1)
    counts_RE = torch.zeros_like(mean_RE).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=mean_RE.dtype))
    return (counts_RE * (experts / chosen.shape[1]) * mean_RE).sum(-1), counts_RE.sum(0)


class _Inject(torch.autograd.Function):
    """Returns the scores unchanged; in the backward pass the loss gets the gradient `balance.scale` and is recorded."""

    @staticmethod
    def forward(ctx, scores, loss, counts, balance, layer):
        ctx.save_for_backward(loss, counts)
        ctx.balance, ctx.layer = balance, layer
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, gradient):
        loss, counts = ctx.saved_tensors
        ctx.balance.record(ctx.layer, loss, counts)
        return gradient, torch.full_like(loss, ctx.balance.scale), None, None, None


class Balance:
    """Hooks on the routers of a model, or of a pipeline stage whose first layer is `first_layer`."""

    def __init__(self, model, first_layer: int):
        config = model.config
        self.coefficient, self.affinity = balance_coefficient(config), family_of(config).router
        self.shape = (config.num_hidden_layers, num_experts(config))
        self.begin(0.0)
        for name, block in model.named_modules():
            router = getattr(block, "gate", None)
            if type(router).__name__.lower().endswith("topkrouter"):
                layer = first_layer + next(int(part) for part in name.split(".") if part.isdigit())
                self._add_hooks(block, router, layer)

    def _add_hooks(self, block, router, layer: int) -> None:
        num_rows = 1

        def before(_, inputs):
            nonlocal num_rows
            num_rows = inputs[0].shape[0]  # routers flatten [B, T, H]

        @torch.compiler.disable
        def after(_, inputs, output):
            logits, scores, indices = output
            if not (torch.is_grad_enabled() and logits.requires_grad):
                return output
            losses, counts = row_losses(logits, indices, num_rows, self.affinity)
            return logits, _Inject.apply(scores, self.coefficient * losses.sum(), counts, self, layer), indices

        block.register_forward_pre_hook(before)
        router.register_forward_hook(after)

    def begin(self, scale: float) -> None:
        """Start a step. scale: gradient of the sum over its rows."""
        self.scale, self.loss, self.counts = scale, None, {}

    def record(self, layer: int, loss: torch.Tensor, counts: torch.Tensor) -> None:
        loss, counts = accelerators.double(loss.detach()), accelerators.double(counts)
        self.loss = loss if self.loss is None else self.loss + loss
        self.counts[layer] = self.counts[layer] + counts if layer in self.counts else counts

    def read(self, rows: float) -> dict[str, float]:
        """router_loss: mean over the rows of the step, summed over layers; expert_load: tokens of the busiest expert
        divided by the mean, in the layer where that is largest. Collective."""
        own_loss, own_counts = 0.0, torch.zeros(self.shape, dtype=torch.float64)
        if self.loss is not None:  # one read of the device for all layers
            own_loss, *flat = torch.cat([self.loss.view(1), *self.counts.values()]).tolist()
            own_counts[list(self.counts)] = torch.tensor(flat, dtype=torch.float64).view(len(self.counts), -1)
        loss, *flat = distributed.all_reduce_sum([own_loss, *own_counts.flatten().tolist()])
        counts = torch.tensor(flat).view(self.shape)
        counts = counts[counts.sum(1) > 0]
        load = counts.max(1).values / counts.mean(1)
        return {"router_loss": loss / rows, "expert_load": load.max().item()}


def attach(model, config, first_layer: int = 0) -> Balance | None:
    """The balancing loss of a model; None without one, and in stages that do not train with it."""
    return (
        Balance(model, first_layer) if type(config).balances_experts() and balance_coefficient(model.config) else None
    )
