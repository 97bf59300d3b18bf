"""Initial values of a model's weights: a function of (seed, module name) alone, so that they do not depend on how a
model is cut up or in which order it is built."""

import math
from collections.abc import Callable

import torch

from pipeline.core.seeds import derive
from pipeline.models import mup


def initialise(part, seed: int, global_name: Callable[[str], str] = str, model=None) -> None:
    """Fill a model, one stage of a pipeline, or a module `part` of a `model`, with transformers' own initial values for
    its family.

    Each module draws from a generator seeded by (seed, its name in the whole model), children first. Modules whose
    parameters are all filled already, such as an output layer tied to the embedding, are skipped. `init` and `mup` come
    last.

    Every parameter is NaN at first, which shows what a family leaves to its constructors (GPT-1's Conv1D: transformers
    gives it normal weights and no bias). No NaN may remain.
    """
    from transformers.pytorch_utils import Conv1D

    filled: set[int] = set()
    model = part if model is None else model
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for parameter in part.parameters():
            parameter.fill_(math.nan)
        for name, module in _children_first(part, ""):
            own = list(module.parameters(recurse=False))
            if own and all(id(parameter) in filled for parameter in own):
                continue
            torch.manual_seed(derive(seed, "initial", global_name(name)))
            model._init_weights(module)
            if isinstance(module, Conv1D) and module.weight.isnan().any():
                module.weight.normal_(std=model.config.initializer_range)
                module.bias.zero_()
            filled.update(id(parameter) for parameter in own)
        mup.scale_initial_values(part, global_name, model)
    empty = [name for name, parameter in part.named_parameters() if parameter.isnan().any()]
    assert not empty, f"{model.config.model_type}: no initial values for {', '.join(empty[:3])}"


def _children_first(module, name: str):
    """(global name, module) with every module after its children: some families initialise a child again from its
    parent (GPT-2's c_proj)."""
    for child_name, child in module.named_children():
        yield from _children_first(child, f"{name}.{child_name}" if name else child_name)
    yield name, module
