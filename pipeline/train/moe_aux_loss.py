"""The loss that keeps a mixture of experts balanced, row by row (DeepSeek-V3, 2024, section 2.1.2, equations 17 to 20).

For a row of T tokens, N experts of which each token takes K, and a layer's affinities s (softmax of the router's
logits, or their sigmoid in DeepSeek-V3): f_i = N / (K T) * tokens that took expert i, P_i = mean over the row of s_i /
sum_j s_j, loss = coefficient * sum_i f_i P_i. Perfectly balanced it is the coefficient; it is summed over layers and
averaged over the rows of a step. transformers' own loss (`output_router_logits`) takes f and P over a whole
micro-batch, so that it depends on the micro-batch; it is K times as large, averaged over layers.

Each row has a loss of its own, so micro-batches, accumulation and layout do not change it. Its gradient is put in where
the router is: forward, nothing happens to the scores; backward, the loss gets its gradient (as in Megatron-LM's
MoEAuxLossAutoScaler). So it works in every stage of a pipeline, and under activation checkpointing: a second forward
makes no second backward, and the numbers for the log are noted in the backward pass.
"""

import torch

from pipeline.core.errors import UserError
from pipeline.models.families import family_of, num_experts, supporting
from pipeline.train import distributed


def coefficient(model_config) -> float:
    """The model's `router_aux_loss_coef`; 0 for a model without experts. Raises UserError for routers that were not
    checked."""
    if not hasattr(model_config, "num_experts_per_tok"):
        return 0.0
    value = getattr(model_config, "router_aux_loss_coef", 0.0) or 0.0
    if value and family_of(model_config).router is None:
        raise UserError(
            f"router_aux_loss_coef: the balancing loss was not verified with the routers of {model_config.model_type},"
            f" only with {', '.join(supporting('router'))}; set it to 0"
        )
    return value


def row_losses(
    logits_NE: torch.Tensor, indices_NK: torch.Tensor, rows: int, affinity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_i f_i P_i of each row [rows], tokens that took each expert [E]). N tokens are `rows` rows one after the
    other."""
    logits = logits_NE.float()
    affinities = (
        logits.softmax(-1) if affinity == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    )
    experts = logits.shape[-1]
    mean_RE = affinities.view(rows, -1, experts).mean(1)
    chosen = indices_NK.reshape(rows, -1)
    counts_RE = torch.zeros_like(mean_RE).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=mean_RE.dtype))
    return (counts_RE * (experts / chosen.shape[1]) * mean_RE).sum(-1), counts_RE.sum(0)


class _Inject(torch.autograd.Function):
    """Scores as they are; backward, the loss gets the gradient `balance.scale` and is noted."""

    @staticmethod
    def forward(ctx, scores, loss, counts, balance, layer):
        ctx.save_for_backward(loss, counts)
        ctx.balance, ctx.layer = balance, layer
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx, gradient):
        loss, counts = ctx.saved_tensors
        ctx.balance.note(ctx.layer, loss, counts)
        return gradient, torch.full_like(loss, ctx.balance.scale), None, None, None


class Balance:
    """Hooks on the routers of a model, or of a pipeline's stage whose layers are numbered from `first_layer`."""

    def __init__(self, model, first_layer: int):
        config = model.config
        self.coefficient, self.affinity = coefficient(config), family_of(config).router
        self.shape = (config.num_hidden_layers, num_experts(config))
        self.begin(0.0)
        for name, block in model.named_modules():
            router = getattr(block, "gate", None)
            if type(router).__name__.lower().endswith("topkrouter"):
                layer = first_layer + next(int(part) for part in name.split(".") if part.isdigit())
                self._watch(block, router, layer)

    def _watch(self, block, router, layer: int) -> None:
        rows = [1]

        def before(_, inputs):
            rows[0] = inputs[0].shape[0]  # routers flatten [B, T, H]

        @torch.compiler.disable
        def after(_, inputs, output):
            logits, scores, indices = output
            if not (torch.is_grad_enabled() and logits.requires_grad):
                return output
            losses, counts = row_losses(logits, indices, rows[0], self.affinity)
            return logits, _Inject.apply(scores, self.coefficient * losses.sum(), counts, self, layer), indices

        block.register_forward_pre_hook(before)
        router.register_forward_hook(after)

    def begin(self, scale: float) -> None:
        """A new step: `scale` is the gradient of the sum over rows."""
        self.scale, self.loss, self.counts = scale, None, {}

    def note(self, layer: int, loss: torch.Tensor, counts: torch.Tensor) -> None:
        loss, counts = loss.detach().double(), counts.double()
        self.loss = loss if self.loss is None else self.loss + loss
        self.counts[layer] = self.counts[layer] + counts if layer in self.counts else counts

    def read(self, rows: float) -> dict[str, float]:
        """router_loss: mean over the step's rows, summed over layers; expert_load: tokens of the busiest expert over
        the mean, in the layer where that is most. Collective."""
        layers, experts = self.shape
        mine = torch.zeros(layers, experts, dtype=torch.float64)
        for layer, counts in self.counts.items():
            mine[layer] = counts.cpu()
        loss, *flat = distributed.all_reduce_sum(
            [0.0 if self.loss is None else self.loss.item(), *mine.flatten().tolist()]
        )
        counts = torch.tensor(flat).view(layers, experts)
        counts = counts[counts.sum(1) > 0]
        return {"router_loss": loss / rows, "expert_load": (counts.max(1).values / counts.mean(1)).max().item()}


def attach(model, config, first_layer: int = 0) -> Balance | None:
    """The balancing of a model in pretraining; tuning stages leave routers to their own losses."""
    return Balance(model, first_layer) if config.kind == "pretrain" and coefficient(model.config) else None
