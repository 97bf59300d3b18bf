"""Where each layout keeps weights and moments: the same live memory is written by `save` and filled by `load`.

Each function returns fragments (state.Fragment) that are views of what this process holds, named as in the whole model;
`begin_*` creates the moments of an optimizer that has made no step yet, so that they can be filled. Names of
DeepSpeed's parts are those of version 0.19."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from pipeline.train.state import Fragment, Rows

ADAM = ("exp_avg", "exp_avg_sq")
MUON = ("momentum_buffer",)
MOMENTS = (*ADAM, *MUON)


def buffers(model) -> list[Fragment]:
    """Persistent state other than parameters. Not by state_dict, which takes 1 ms for 57 parameters while training
    waits."""
    fragments = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                full_name = f"{prefix}.{name}".removeprefix(".")
                fragments.append(Fragment("buffer", full_name, 0, value.detach().view(-1)))
    return fragments


def _update_counts(states: list[dict]) -> list[int]:
    """Updates that each of some optimizer states has seen; Muon counts none. All tensors are read at once, because each
    read waits for the GPU."""
    steps = [state.get("step", int(bool(state))) for state in states]
    tensors = [step for step in steps if isinstance(step, torch.Tensor)]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [int(next(values)) if isinstance(step, torch.Tensor) else step for step in steps]


def _flat_fragments(name: str, start: int, flat: torch.Tensor, offset: int, count: int, state: dict) -> list[Fragment]:
    """`count` elements of a parameter from its element `start` on, which are at `offset` of a flat fp32 tensor, and the
    same of its moments."""
    fragments = [Fragment("weight", name, start, flat.detach().narrow(0, offset, count))]
    for kind in MOMENTS:
        if kind in state:
            fragments.append(Fragment(kind, name, start, state[kind].narrow(0, offset, count)))
    return fragments


def _new_state(values: torch.Tensor, updates: int, kinds: tuple[str, ...] = ADAM) -> dict:
    """The state that torch's optimizer would have for `values` after so many updates, with zero moments."""
    state = {}
    if kinds != MUON:
        state["step"] = torch.tensor(float(updates), dtype=torch.float32, device=values.device)
    for kind in kinds:
        state[kind] = torch.zeros_like(values)
    return state


def _begin_flat(zero, flats: Iterable[torch.Tensor], updates: int) -> None:
    zero.optimizer.state.clear()
    if updates:
        for flat in flats:
            zero.optimizer.state[flat] = _new_state(flat.detach(), updates)


# ---- complete parameters: one process, DDP, ZeRO-0, and what is not trained ------------------------------------------


def whole(parameters: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> list[Fragment]:
    fragments = []
    for name, parameter in parameters.items():
        state = _state_of(parameter, optimizers)
        fragments.append(Fragment("weight", name, 0, parameter.detach().view(-1)))
        fragments += [Fragment(kind, name, 0, state[kind].view(-1)) for kind in MOMENTS if kind in state]
    return fragments


def _state_of(parameter: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> dict:
    for optimizer in optimizers:
        state = optimizer.state.get(parameter)
        if state is not None:
            return state
    return {}


def updates_whole(parameters: dict[str, torch.Tensor], optimizers: list) -> dict[str, int]:
    states = [_state_of(parameter, optimizers) for parameter in parameters.values()]
    return dict(zip(parameters, _update_counts(states), strict=True))


def begin_whole(parameters: dict, optimizers: list, saved: dict[str, dict]) -> None:
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        kinds = MUON if isinstance(optimizer, torch.optim.Muon) else ADAM
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                updates = saved[names[parameter]]["updates"]
                if updates:
                    optimizer.state[parameter] = _new_state(parameter.detach(), updates, kinds)


# ---- FSDP: some rows of each parameter -------------------------------------------------------------------------------


class Piece(NamedTuple):
    """This process's part of a parameter of some shape: `values`, which begin at index `start` of dimension `dim`, and
    at `column` of a matrix that is split by columns as well."""

    values: torch.nn.Parameter
    shape: torch.Size
    dim: int
    start: int
    column: int | None = None


def pieces(parameters: dict[str, Piece], optimizers: list[torch.optim.Optimizer]) -> list[Fragment]:
    fragments = []
    for name, piece in parameters.items():
        if not piece.values.numel():  # fewer rows than processes
            continue
        state = _state_of(piece.values, optimizers)
        tensors = {"weight": piece.values.detach()} | {kind: state[kind] for kind in MOMENTS if kind in state}
        outer, inner = math.prod(piece.shape[: piece.dim]), math.prod(piece.shape[piece.dim + 1 :])
        for kind, tensor in tensors.items():
            if piece.column is not None:
                rows = Rows(tensor.shape[1], inner)
                fragments.append(Fragment(kind, name, piece.start * inner + piece.column, tensor.view(-1), rows))
                continue
            for index, flat in enumerate(tensor.view(outer, -1)):
                start = (index * piece.shape[piece.dim] + piece.start) * inner
                fragments.append(Fragment(kind, name, start, flat))
    return fragments


# ---- ZeRO-1 and 2: a flat fp32 part of each parameter group ----------------------------------------------------------


def split(parameters: dict[str, torch.Tensor], zero) -> list[Fragment]:
    """zero: DeepSpeedZeroOptimizer. `_hp_mapping` says which elements of a parameter are where in this process's
    part."""
    fragments = []
    for name, parameter in parameters.items():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        start = mapping.lp_fragment_address.start
        address = mapping.hp_fragment_address
        state = zero.optimizer.state.get(flat, {})
        fragments += _flat_fragments(name, start, flat, address.start, address.numel, state)
    return fragments


def begin_split(zero, updates: int) -> None:
    zero._hp_optimizer_states_linked = False  # linked again by its next step
    _begin_flat(zero, zero.single_partition_of_fp32_groups, updates)


# ---- ZeRO-3: a flat part of each parameter; that of the last process may be padded -----------------------------------


def scattered(parameters: dict[str, torch.Tensor], zero) -> list[Fragment]:
    """zero: DeepSpeedZeroOptimizer_Stage3."""
    fragments = []
    for name, parameter in parameters.items():
        part_size = parameter.ds_tensor.ds_numel
        start = part_size * zero._get_param_partition_rank(parameter)
        count = min(part_size, parameter.ds_numel - start)
        if count <= 0:
            continue
        if not parameter.requires_grad:
            values = parameter.ds_tensor.detach().view(-1).narrow(0, 0, count)
            fragments.append(Fragment("weight", name, start, values))
            continue
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        fragments += _flat_fragments(name, start, flat, offset, count, zero.optimizer.state.get(flat, {}))
    return fragments


def begin_scattered(zero, updates: int) -> None:
    _begin_flat(zero, zero.fp32_partitioned_groups_flat, updates)


def spread(zero) -> None:
    """After the fp32 part was filled: copy it to the weights with which ZeRO-3 computes. Collective."""
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:  # small ones, which every process holds completely
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def updates_flat(zero) -> int:
    """Updates that ZeRO's moments have seen, the same for all parameters."""
    return max(_update_counts(list(zero.optimizer.state.values())), default=0)
