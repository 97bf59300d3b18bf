"""Where each layout keeps weights and moments: the same live memory is written by `save` and filled by `load`.

Each function gives pieces (state.Fragment) that are views of what this process holds, named as in the whole model;
`begin_*` makes the moments of an optimizer that has made no step yet, so that there is something to fill. DeepSpeed
0.19's own names are used for its parts.
"""

import torch

from pipeline.train.state import Fragment

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def buffers(model) -> list[Fragment]:
    """Persistent state that is no parameter. By hand, because state_dict takes 1 ms for 57 parameters, and training
    stands still meanwhile."""
    return [
        Fragment("buffer", f"{prefix}.{name}".removeprefix("."), 0, value.detach().view(-1))
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    ]


def _steps(states: list[dict]) -> list[int]:
    """Updates that each of some moments has seen; Muon counts none. Read at once: each look at a GPU waits for it."""
    found = [state.get("step", int(bool(state))) for state in states]
    tensors = [step for step in found if isinstance(step, torch.Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [int(next(read) if isinstance(step, torch.Tensor) else step) for step in found]


def _piece(name: str, start: int, flat: torch.Tensor, at: int, count: int, state: dict) -> list[Fragment]:
    """`count` elements of a parameter from its `start` on, at `at` of a flat fp32 tensor, and of its moments."""
    moments = [Fragment(kind, name, start, state[kind].narrow(0, at, count)) for kind in MOMENTS if kind in state]
    return [Fragment("weight", name, start, flat.detach().narrow(0, at, count)), *moments]


def _fresh(values: torch.Tensor, updates: int, kinds=("exp_avg", "exp_avg_sq")) -> dict:
    count = (
        {}
        if "momentum_buffer" in kinds
        else {"step": torch.tensor(float(updates), dtype=torch.float32, device=values.device)}
    )
    return {**count, **{kind: torch.zeros_like(values) for kind in kinds}}


def _begin(zero, flats: list[torch.Tensor], updates: int) -> None:
    zero.optimizer.state.clear()
    for flat in flats if updates else ():
        zero.optimizer.state[flat] = _fresh(flat.detach(), updates)


# ---- whole parameters: one process, DDP, ZeRO-0, and what is not trained ---------------------------------------------


def whole(parameters: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> list[Fragment]:
    found = []
    for name, parameter in parameters.items():
        state = _state(parameter, optimizers)
        found.append(Fragment("weight", name, 0, parameter.detach().view(-1)))
        found += [Fragment(kind, name, 0, state[kind].view(-1)) for kind in MOMENTS if kind in state]
    return found


def _state(parameter: torch.Tensor, optimizers: list[torch.optim.Optimizer]) -> dict:
    for optimizer in optimizers:
        if (state := optimizer.state.get(parameter)) is not None:
            return state
    return {}


def updates_whole(parameters: dict[str, torch.Tensor], optimizers: list) -> dict[str, int]:
    states = [_state(parameter, optimizers) for parameter in parameters.values()]
    return dict(zip(parameters, _steps(states), strict=True))


def begin_whole(parameters: dict, optimizers: list, saved: dict[str, dict]) -> None:
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        kinds = ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("exp_avg", "exp_avg_sq")
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if updates := saved[names[parameter]]["updates"]:
                    optimizer.state[parameter] = _fresh(parameter.detach(), updates, kinds)


# ---- ZeRO-1 and 2: a flat fp32 part of each parameter group ----------------------------------------------------------


def split(parameters: dict[str, torch.Tensor], zero) -> list[Fragment]:
    """zero: DeepSpeedZeroOptimizer. `_hp_mapping` says which elements of a parameter lie where in this process's
    part."""
    found = []
    for name, parameter in parameters.items():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        start, at, count = (
            mapping.lp_fragment_address.start,
            mapping.hp_fragment_address.start,
            mapping.hp_fragment_address.numel,
        )
        found += _piece(name, start, flat, at, count, zero.optimizer.state.get(flat, {}))
    return found


def begin_split(zero, updates: int) -> None:
    zero._hp_optimizer_states_linked = False  # linked again by its next step
    _begin(zero, zero.single_partition_of_fp32_groups, updates)


# ---- ZeRO-3: a flat part of each parameter, of which the last process's may be padded --------------------------------


def scattered(parameters: dict[str, torch.Tensor], zero) -> list[Fragment]:
    """zero: DeepSpeedZeroOptimizer_Stage3."""
    found = []
    for name, parameter in parameters.items():
        part = parameter.ds_tensor.ds_numel
        start = part * zero._get_param_partition_rank(parameter)
        count = min(part, parameter.ds_numel - start)
        if count <= 0:
            continue
        if not parameter.requires_grad:
            found.append(Fragment("weight", name, start, parameter.ds_tensor.detach().view(-1).narrow(0, 0, count)))
            continue
        group, at, _ = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        found += _piece(name, start, flat, at, count, zero.optimizer.state.get(flat, {}))
    return found


def begin_scattered(zero, updates: int) -> None:
    _begin(zero, zero.fp32_partitioned_groups_flat, updates)


def spread(zero) -> None:
    """After its fp32 part was filled: ZeRO-3 takes the weights that it computes with from there. Collective."""
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:  # small ones, which every process holds whole
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def updates_flat(zero) -> int:
    """Updates that ZeRO's moments have seen, the same for all parameters."""
    return max(_steps(list(zero.optimizer.state.values())), default=0)
