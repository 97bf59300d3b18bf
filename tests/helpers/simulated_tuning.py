"""The peak memory at full size of a finetuning stage with adapters on one process, without allocating it: as in
simulated_stage.py, a forward and a backward pass run on fake tensors.

    peak(config, model_config)      # Peak(states, computing), bytes

Frozen weights of 4 bits are simulated by a matrix that exists in bf16 only while it is multiplied, forward and
backward, as bitsandbytes' products do it; its states are counted from the paper (QLoRA, appendix: 4.127 bits per weight
with double quantisation).
"""

import copy

import torch
from simulated_stage import Live, Peak
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from pipeline.models import frozen, lora
from pipeline.train import chunked_loss, layers

NF4_BYTES = 4.127 / 8
TRAINED_BYTES = 16  # weight, gradient and two moments in fp32


class Dequantised(torch.autograd.Function):
    """inputs [*, in] @ weight.T [in, out], with a copy of the weight that nothing keeps."""

    @staticmethod
    def forward(context, inputs, weight):
        context.weight = weight
        return functional.linear(inputs, weight.detach().clone())

    @staticmethod
    def backward(context, gradient):
        return gradient @ context.weight.detach().clone(), None


def peak(config, model_config) -> Peak:
    """config: of stage sft or dpo, with `lora`."""
    first, second = (_peak_of(config, model_config, count) for count in (2, 4))
    more = (model_config.num_hidden_layers - 2) / 2
    return Peak(*(one + more * (two - one) for one, two in zip(first, second, strict=True)))


def _peak_of(config, model_config, num_layers: int) -> Peak:
    import transformers

    model_config = copy.deepcopy(model_config)
    model_config.num_hidden_layers = num_layers
    if getattr(model_config, "layer_types", None):
        model_config.layer_types = model_config.layer_types[:num_layers]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).train()
        model.set_attn_implementation("sdpa")
        four_bits = config.lora.base == "nf4"
        frozen.store(model, "bf16" if four_bits else config.lora.base, config.precision, torch.device("cpu"))
        quantised = _multiply_dequantised(model) if four_bits else 0
        lora.attach(model, config.lora, 0)
        chunked_loss.install(
            model, chunked_loss.chunk_of(model_config.vocab_size, "cuda"), per_token=config.kind == "dpo"
        )
        if config.activation_checkpointing != "none":
            layers.checkpoint(model, config.activation_checkpointing)
        return Peak(_state_bytes(model, quantised), _computing(config, model))


class DequantisedLinear(torch.nn.Linear):
    """In place of models/frozen.py's layers of 4 bits, whose package cannot work on fake tensors."""

    def forward(self, inputs):
        outputs = Dequantised.apply(inputs.to(torch.bfloat16), self.weight)
        return outputs if self.bias is None else outputs + self.bias.to(torch.bfloat16)


def _multiply_dequantised(model) -> int:
    """Returns the number of weights."""
    count = 0
    output = model.get_output_embeddings()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not output:
            layer.__class__ = DequantisedLinear
            count += layer.weight.numel()
    return count


def _state_bytes(model, quantised: int) -> float:
    total = 0.0
    for parameter in model.parameters():
        total += parameter.numel() * TRAINED_BYTES if parameter.requires_grad else parameter.nbytes
    return total - quantised * (2 - NF4_BYTES)


def _computing(config, model) -> float:
    rows = config.micro_rows(1) * config.sequences_per_row()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)  # part of the states
    live = Live([*model.parameters(), *(parameter.grad for parameter in trained), *model.buffers()])
    ids = torch.zeros(rows, config.sequence_length, dtype=torch.long)
    places = torch.arange(config.sequence_length).expand(rows, -1).contiguous()
    with live:
        chunked_loss.installed(model).expect([{"labels": ids}])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            losses = model(input_ids=ids, position_ids=places, use_cache=False).logits
        (losses.nll_BT.sum() if config.kind == "dpo" else losses.total).backward()
        live.sweep()
    return live.peak
