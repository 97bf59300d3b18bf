"""Low-rank adapters (LoRA: Hu et al., 2022; DoRA: Liu et al., 2024): a frozen model whose linear layers learn an update
of low rank.

    attach(model, options, seed)              # freezes the model; its linear layers get adapters
    with disabled(model): ...                 # the model as it was before
    save(model, folder, base, precision)      # peft's format; `load` reads it
    merge(model)                              # the model with the updates in its weights

A layer that gets an adapter stays the module that it was, and its weight keeps its name: the layer's class is replaced
by a subclass that adds the update to the output. So names in checkpoints and engines do not change, and any linear
layer can have one: torch's, GPT-2's Conv1D, and quantised ones. The two matrices are parameters of the layer itself and
not of modules in it, so that ZeRO-3 gathers them together with the weight, which DoRA needs.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.seeds import derive
from pipeline.models import frozen
from pipeline.models.lora_config import Lora
from pipeline.models.model_files import ADAPTER_CONFIG as CONFIG
from pipeline.models.model_files import ADAPTER_WEIGHTS as WEIGHTS

# What peft has no place for: a hash of the model that an adapter was trained on, and how its weights were kept.
BASE = "alma_base.json"
PREFIX = "base_model.model."  # of peft's names of parameters
# Ours, and the end of peft's name.
PARAMETERS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
# Settings of peft that change what an adapter computes and that are not supported, with the values that change nothing.
UNSUPPORTED = {
    "bias": ("none",),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}

TASKS = {"causal": "CAUSAL_LM", "reward": "SEQ_CLS", "steps": "TOKEN_CLS"}  # as peft calls them
# fp32 rounding of a model of 80 layers stays below a tenth of this.
MERGE_TOLERANCE = 1e-3


@dataclass
class Adapter:
    """What the adapters of a model share."""

    options: Lora
    complete: tuple[str, ...] = ()
    """Modules that are trained as they are, such as a score layer."""
    enabled: bool = True


class Adapted:
    """Mixed into the class of a linear layer. lora_A is [rank, in], lora_B [out, rank], lora_magnitude [out]."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(inputs)
        if not self.adapter.enabled:
            return outputs
        options = self.adapter.options
        dropped = F.dropout(inputs, options.dropout, self.training)
        # Scaled where it is small: tokens x rank
        update = F.linear(F.linear(dropped, self.lora_A) * options.scale, self.lora_B)
        if not options.dora:
            return outputs + update
        if options.dropout and self.training:  # as peft: what is dropped is dropped from both parts of the correction
            base = self._without_bias(super().forward(dropped))
        else:
            base = self._without_bias(outputs)
        share = self.lora_magnitude / self._row_lengths()
        return outputs + (share - 1) * base + share * update

    def _without_bias(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs if self.bias is None else outputs - self.bias

    @torch.no_grad()
    def _row_lengths(self) -> torch.Tensor:
        """Euclidean length of each row of the merged weight, [out]; a constant for the gradient (DoRA, section 4.3)."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return torch.linalg.norm(frozen.matrix(self) + self._product(), dim=1)

    def _product(self) -> torch.Tensor:
        return self.adapter.options.scale * (self.lora_B.float() @ self.lora_A.float())

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The weight with its update, as the layer keeps it."""
        merged = frozen.matrix(self) + self._product()
        if self.adapter.options.dora:
            merged = merged * (self.lora_magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]
        if frozen.is_transposed(self):
            merged = merged.T
        return merged.contiguous().to(self.weight.dtype)


@functools.cache
def _adapted_class(base: type) -> type:
    return type(f"Lora{base.__name__}", (Adapted, base), {})


# ---- attach ----------------------------------------------------------------------------------------------------------


def attach(model, options: Lora, seed: int, complete: tuple[str, ...] = ()) -> None:
    """Freeze a model and give its linear layers adapters, which change nothing until they are trained: lora_B is 0.
    lora_A is drawn as peft draws it, from (seed, name of the layer). complete: modules that are trained as they are.
    The adapters of a model on the meta device have no values; `initialise` gives them to a part of it, and
    `checking_calls` is for a call of the model when it is complete.

    Raises UserError if there is no such layer, if none is as wide as the rank, or if the model computes without calling
    one.
    """
    layers = _targets(model, options)
    widest = max(min(frozen.widths(layer)) for layer in layers.values())
    if options.rank > widest:
        raise UserError(
            f"lora.rank: {options.rank} is more than the {widest} dimensions that the widest adapted layer has; use"
            f" {widest} or fewer, or train all weights (remove lora)"
        )
    model.requires_grad_(False)
    adapter = Adapter(options, complete)
    for layer in layers.values():
        _adapt(layer, adapter)
    for name in complete:
        model.get_submodule(name).requires_grad_(True)
    model.adapter = adapter
    if model.device.type != "meta":
        initialise(model, seed)
        with checking_calls(model):
            _call(model)


@torch.no_grad()
def initialise(part, seed: int, global_name: Callable[[str], str] = str) -> None:
    """First values of the adapters in a part of a model, whose own weights are there. global_name: name of a module in
    the part -> in the whole model."""
    for name, layer in adapted_layers(part).items():
        source = torch.Generator().manual_seed(derive(seed, "lora", global_name(name)))
        bound = 1 / math.sqrt(layer.lora_A.shape[1])
        layer.lora_A.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=source))
        layer.lora_B.zero_()
        if layer.adapter.options.dora:
            layer.lora_magnitude.copy_(layer._row_lengths())


def reads_whole_weight(layer: nn.Module) -> bool:
    """Whether all rows of a layer's weight are needed at the start: for the first values of its adapter, or because
    they are quantised together."""
    return isinstance(layer, frozen.FourBit) or (isinstance(layer, Adapted) and layer.adapter.options.dora)


def _targets(model, options: Lora) -> dict[str, nn.Module]:
    """Layers that get an adapter, by name."""
    candidates = _linear_layers(model)
    if options.targets is None:
        layers = {name: layer for name, (layer, inside) in candidates.items() if inside}
        if not layers:
            raise UserError(f"lora: the family {model.config.model_type} has no linear layers that can be adapted")
        return layers
    layers = {}
    for target in options.targets:
        matches = [name for name in candidates if name == target or name.endswith(f".{target}")]
        if not matches:
            _refuse_experts(model, target)
            names = sorted({name.rpartition(".")[2] for name in candidates})
            raise UserError(f"lora.targets: no linear layer is called {target!r}; this model has {', '.join(names)}")
        for name in matches:
            layers[name] = candidates[name][0]
    return {name: layers[name] for name in candidates if name in layers}


def _refuse_experts(model, target: str) -> None:
    """Raise UserError for a target that is a matrix of all experts of a layer."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and (name == target or name.endswith(f".{target}")):
            raise UserError(
                f"lora.targets: {target!r} has the weights of {len(parameter)} experts, which are no linear layers;"
                " adapters of experts are not supported, name linear layers, or train all weights (without lora)"
            )


def _linear_layers(model) -> dict[str, tuple[nn.Module, bool]]:
    """Linear layers of a model by name, and whether each is inside a decoder layer. The output layer is not listed: its
    weight may be the embedding's too."""
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.pytorch_utils import Conv1D

    decoder_layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = tuple(f"{name}." for name in decoder_layers)
    output = model.get_output_embeddings()
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and not name.endswith("score"):
            layers[name] = (module, name.startswith(inside))
    return layers


def _adapt(layer: nn.Module, adapter: Adapter, rank: int | None = None) -> None:
    num_inputs, num_outputs = frozen.widths(layer)
    rank = rank or adapter.options.rank
    device = layer.weight.device
    layer.lora_A = nn.Parameter(torch.zeros(rank, num_inputs, device=device))
    layer.lora_B = nn.Parameter(torch.zeros(num_outputs, rank, device=device))
    if adapter.options.dora:
        layer.lora_magnitude = nn.Parameter(torch.ones(num_outputs, device=device))
    layer.adapter = adapter
    layer.__class__ = _adapted_class(type(layer))


@contextlib.contextmanager
def checking_calls(model) -> Iterator[None]:
    """Inside, the model must be called. Raises UserError if it computes with the weight of an adapted layer without
    calling the layer, as fused kernels do: its adapter would be ignored."""
    layers, called = adapted_layers(model), set()
    handles = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    ignored = [name for name in layers if name not in called]
    if ignored:
        raise UserError(
            f"lora: the family {model.config.model_type} computes {ignored[0]} without calling it, so that an adapter"
            " would be ignored; name other layers (lora.targets)"
        )


def _call(model) -> None:
    training = model.training
    try:
        with torch.no_grad(), frozen.computing(model):
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        model.train(training)


def fill(model, weights: dict[str, torch.Tensor]) -> None:
    """Give a model with adapters trained weights, by name. Of a model on the meta device these are then the only
    weights."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert parameters.keys() == weights.keys(), "the weights are those of another adapter"
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.is_meta:
                module, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(module), attribute, nn.Parameter(weights[name]))
            else:
                parameter.copy_(weights[name])


def adapted_layers(model) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


@contextlib.contextmanager
def disabled(model) -> Iterator[None]:
    """Inside, the model computes as it did before it got adapters. Modules that are trained completely keep what they
    learned."""
    model.adapter.enabled = False
    try:
        yield
    finally:
        model.adapter.enabled = True


@torch.no_grad()
def merge(model) -> None:
    """Add each update to its layer's weight and remove the adapters. Not for a model whose weights are in shards."""
    for layer in adapted_layers(model).values():
        layer.weight.copy_(layer.merged_weight())
        for name in PARAMETERS:
            layer._parameters.pop(name, None)
        del layer.adapter
        layer.__class__ = type(layer).__mro__[2]  # Lora..., Adapted, and what it was
    del model.adapter


@torch.no_grad()
def merged_and_compared(layer: nn.Module) -> tuple[torch.Tensor, float]:
    """(the weight of an adapted layer with its update, the largest difference that it makes to outputs for random
    inputs, as a share of the largest output). Raises AssertionError if that is more than rounding can explain."""
    inputs = torch.randn(8, frozen.widths(layer)[0], generator=torch.Generator().manual_seed(0))
    layer.eval()
    before = layer(inputs)
    weight = layer.merged_weight()
    matrix = weight.T if frozen.is_transposed(layer) else weight
    difference = float((F.linear(inputs, matrix, layer.bias) - before).abs().max() / before.abs().max())
    if not difference < MERGE_TOLERANCE:
        raise AssertionError(f"merging an adapter changed outputs by {difference:.1e}, more than {MERGE_TOLERANCE:g}")
    return weight, difference


@torch.no_grad()
def merge_and_compare(model, most_tokens: int) -> float:
    """Merge, and return the largest difference of a logit on random tokens, as a share of the largest logit. Raises
    AssertionError if that is more than rounding can explain."""
    length = min(64, most_tokens)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0), device="cpu")
    model.eval()
    before = model(input_ids=ids.to(model.device), use_cache=False).logits
    merge(model)
    after = model(input_ids=ids.to(model.device), use_cache=False).logits
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference < MERGE_TOLERANCE:
        raise AssertionError(f"merging the adapter changed logits by {difference:.1e}, more than {MERGE_TOLERANCE:g}")
    return difference


# ---- files -----------------------------------------------------------------------------------------------------------


def is_adapter(folder: Path | str) -> bool:
    return (Path(folder) / CONFIG).is_file()


def save(model, folder: Path, base: Path, precision: str = "fp32") -> None:
    """Write a model's adapter as peft does, for a model in the folder `base`. precision: in which it was trained."""
    from safetensors.torch import save_file

    from pipeline.models.build import head_of
    from pipeline.models.weights_hash import weights_hash

    adapter: Adapter = model.adapter
    layers = adapted_layers(model)
    tensors = {}
    for name, layer in layers.items():
        for ours, theirs in PARAMETERS.items():
            if ours in layer._parameters:
                tensors[f"{PREFIX}{name}.{theirs}"] = layer._parameters[ours]
    for name in adapter.complete:
        for key, parameter in model.get_submodule(name).named_parameters():
            tensors[f"{PREFIX}{name}.{key}"] = parameter
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    options = adapter.options
    settings = {
        "peft_type": "LORA",
        "task_type": TASKS[head_of(model)],
        "base_model_name_or_path": str(base),
        "r": options.rank,
        "lora_alpha": options.numerator,
        "lora_dropout": options.dropout,
        "target_modules": _shortest_names(model, layers),
        "modules_to_save": list(adapter.complete) or None,
        "use_rslora": options.rank_stabilised,
        "use_dora": options.dora,
        "fan_in_fan_out": any(frozen.is_transposed(layer) for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, settings)
    write_json(folder / BASE, {"hash": weights_hash(base), "kept": options.base, "precision": precision})


def _shortest_names(model, layers: dict[str, nn.Module]) -> list[str]:
    """Names by which peft finds exactly these layers: their last parts, or whole names if others end alike."""
    short = sorted({name.rpartition(".")[2] for name in layers})
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return short if found == set(layers) else sorted(layers)


def base_of(folder: Path | str) -> Path:
    """The folder of the model that an adapter belongs to. Raises UserError if it is not there, or if its weights are
    not those that the adapter was trained on."""
    from pipeline.models.weights_hash import weights_hash

    settings = _settings(Path(folder))
    base = Path(settings["base_model_name_or_path"] or "")
    if not (base / "config.json").is_file():
        raise UserError(
            f"{folder}: is an adapter of {base}, which is not a model folder on this machine; give"
            " base_model_name_or_path in its adapter_config.json the place of that model"
        )
    expected = _base_record(Path(folder)).get("hash")
    if expected and weights_hash(base) != expected:
        raise UserError(
            f"{folder}: is an adapter of another model: the weights in {base} are not those that it was trained on;"
            f" give base_model_name_or_path in its {CONFIG} the place of these, or remove its {BASE} if the difference"
            " is meant"
        )
    return base


def _base_record(folder: Path) -> dict:
    """What `save` wrote of the base; empty for an adapter by peft."""
    path = folder / BASE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("hash", "kept", "precision")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error!r}); copy the adapter again") from None


def _settings(folder: Path) -> dict:
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the configuration of an adapter ({error!r}); copy it again") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind}, expected LORA; merge it with peft first")
    for key, neutral in UNSUPPORTED.items():
        if key in settings and settings[key] not in neutral:
            raise UserError(f"{path}: {key}: {settings[key]!r} is not supported; merge the adapter with peft first")
    return settings


def trains_completely(folder: Path | str, module: str) -> bool:
    """Whether an adapter's folder has all weights of a module, such as a score layer."""
    return module in (_settings(Path(folder)).get("modules_to_save") or ())


def load(model, folder: Path) -> None:
    """Give a model in fp32 the adapter in a folder, by us or by peft, and the weights that it was trained on if these
    were kept in 4 bits. Raises UserError if it belongs to another model."""
    from safetensors.torch import load_file

    settings = _settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: contains no {WEIGHTS}; copy the adapter again")
    record = _base_record(folder)
    frozen.round_as(model, record.get("kept", "fp32"), record.get("precision", "fp32"))
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    options = Lora(
        rank=settings["r"],
        alpha=settings.get("lora_alpha") or 8,
        rank_stabilised=bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
    )
    adapter = Adapter(options, tuple(settings.get("modules_to_save") or ()))
    suffix = f".{PARAMETERS['lora_A']}"
    modules = dict(model.named_modules())
    for key, matrix in tensors.items():
        if key.endswith(suffix):
            layer = modules.get(key.removesuffix(suffix))
            if layer is None:
                raise _other_model(folder, key, "a model without that layer")
            _adapt(layer, adapter, len(matrix))
    parameters = dict(model.named_parameters())
    names = {theirs: ours for ours, theirs in PARAMETERS.items()}
    for key, tensor in tensors.items():
        for theirs, ours in names.items():
            if key.endswith(f".{theirs}"):
                key = f"{key.removesuffix(theirs)}{ours}"
        if key not in parameters:
            raise _other_model(folder, key, "a model without that parameter")
        if parameters[key].shape != tensor.shape:
            raise _other_model(folder, key, f"shape {list(tensor.shape)}, the model has {list(parameters[key].shape)}")
        with torch.no_grad():
            parameters[key].copy_(tensor)
    model.adapter = adapter


def _other_model(folder: Path, key: str, difference: str) -> UserError:
    return UserError(
        f"{folder}: is an adapter of another model: {key} is for {difference}; give the model that it was trained from"
    )
