"""What a step of an engine sends, reads and multiplies."""

import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SENT = {  # operators of torch.distributed: the argument that is the larger one of what goes in and comes out
    "allreduce_": 0,
    "broadcast_": 0,
    "allgather_": 1,
    "_allgather_base_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "send": 0,
    "recv_": 0,
}
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # operators: the argument that is the first factor


class Counted(TorchDispatchMode):
    """bytes: of complete tensors in fp32 and bf16, by (operator of torch.distributed, element type); other types are of
    flags, shapes and sums of a few numbers. calls: their number by operator. reads: values of tensors that a program waited for, as .item()
    does. products: types of the factors of matrix products."""

    def __init__(self):
        super().__init__()
        self.bytes: collections.Counter = collections.Counter()
        self.calls: collections.Counter = collections.Counter()
        self.products: set = set()
        self.reads = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().partition("::")[2].partition(".")[0]
        if function.namespace == "c10d":
            self.count(name, arguments)
        if name in PRODUCTS:
            first = PRODUCTS[name]
            self.products.add((arguments[first].dtype, arguments[first + 1].dtype))
        self.reads += name == "_local_scalar_dense"
        return function(*arguments, **(keywords or {}))

    def count(self, name: str, arguments) -> None:
        if name == "barrier":
            return
        value = arguments[SENT[name]]
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if tensor.dtype in (torch.float32, torch.bfloat16):
                kind = name.strip("_").removesuffix("_base")
                self.bytes[kind, str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
                self.calls[kind] += 1
