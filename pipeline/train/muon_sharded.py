"""Muon where each process holds some rows of every matrix (FSDP).

The momentum is computed element by element on each process's rows. For the products of Newton-Schulz a matrix must be
complete, but on one process only: matrices are distributed over the processes of a copy, each is sent to the one that
orthogonalises it and the rows of the result are sent back, as in Moonlight (Liu et al., 2025, section 2.3). So every
process multiplies about as much as any other, and no product is computed twice.

This is done in rounds. In one, a process has matrices of at most MUON_BUCKET elements, or a single one, so the memory
that an update needs does not grow with the model. What is sent has the type of the products: casting and sending can be
exchanged.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist

from pipeline.core import distributed
from pipeline.models.cost import MUON_BUCKET
from pipeline.train.config import TrainConfig
from pipeline.train.muon import MatrixMuon, Muon, options_of, orthogonalised, orthogonalised_batch, product_dtype
from pipeline.train.shards import Piece


def build(
    pieces: dict[str, Piece], whole: dict[str, torch.nn.Parameter], matrices: set[str], group, config: TrainConfig
) -> Muon:
    """The optimizer of FSDP's parameters: this process's pieces of some, and those that every process holds. group: the
    processes that share a copy."""
    device = distributed.device()
    dtype, options = product_dtype(device, config.optimizer.products), options_of(config)
    split = {name: piece for name, piece in pieces.items() if name in matrices}
    complete = [parameter for name, parameter in whole.items() if name in matrices]
    others = [piece.values for name, piece in pieces.items() if name not in matrices and piece.values.numel()]
    others += [parameter for name, parameter in whole.items() if name not in matrices]
    parts: list[MatrixMuon] = []
    if split:
        parts.append(ShardedMuon(list(split.values()), group, dtype, **options))
    if complete:
        parts.append(MatrixMuon(complete, dtype, **options))
    return Muon(parts, others, config, device)


class ShardedMuon(MatrixMuon):
    """MatrixMuon of pieces, which are consecutive rows of matrices. A step is collective."""

    def __init__(self, pieces: list[Piece], group, dtype: torch.dtype, **options):
        assert all(piece.dim == 0 and len(piece.shape) == 2 for piece in pieces)
        super().__init__([piece.values for piece in pieces], dtype, **options)
        self.pieces, self.group = pieces, group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    @torch.no_grad()
    def step(self, closure=None):
        (options,) = self.param_groups
        # the same on all processes: those without rows of a matrix have an empty gradient of it
        trained = [piece for piece in self.pieces if piece.values.grad is not None]
        for owned in rounds([piece.shape for piece in trained], self.world):
            directions = {}
            for index in itertools.chain(*owned):
                directions[index] = self._direction(trained[index].values, options).to(self.dtype)
            shapes = {index: trained[index].shape for index in directions}
            updates = self._together(owned, directions, shapes, options)
            for index, update in updates.items():
                self._apply(trained[index].values, update, max(trained[index].shape), options)

    def _together(self, owned: list[list[int]], directions: dict, shapes: dict, options: dict) -> dict:
        """This process's rows of the orthogonalised matrices of a round. owned: matrices of each process; directions:
        this process's rows of all of them. Collective."""
        own = owned[self.rank]
        counts = {index: rows_of_each(shape[0], self.world) for index, shape in shapes.items()}
        rows = {index: count[self.rank] for index, count in counts.items()}
        sent = [[directions[index].flatten() for index in indices] for indices in owned]
        sizes = [sum(counts[index][source] * shapes[index][1] for index in own) for source in range(self.world)]
        received = self._exchanged(sent, sizes)
        parts: dict[int, list[torch.Tensor]] = {index: [] for index in own}
        for source, flat in enumerate(received):
            lengths = [counts[index][source] * shapes[index][1] for index in own]
            for index, part in zip(own, flat.split(lengths), strict=True):
                parts[index].append(part)
        matrices = {index: torch.cat(parts[index]).view(shapes[index]) for index in own}
        results = self._orthogonalised(matrices, options)
        back: list[list[torch.Tensor]] = [[] for _ in owned]
        for index in own:
            for target, part in enumerate(results[index].split(counts[index])):
                back[target].append(part.flatten())
        sizes = [sum(rows[index] * shapes[index][1] for index in indices) for indices in owned]
        updates = {}
        for indices, flat in zip(owned, self._exchanged(back, sizes), strict=True):
            lengths = [rows[index] * shapes[index][1] for index in indices]
            for index, part in zip(indices, flat.split(lengths), strict=True):
                updates[index] = part.view(rows[index], shapes[index][1])
        return updates

    def _exchanged(self, sent: list[list[torch.Tensor]], sizes: list[int]) -> list[torch.Tensor]:
        """Send flat tensors to each process; returns what each process sent here, `sizes` elements of it.
        Collective."""
        if self.world == 1:
            return [torch.cat(sent[0])]
        lengths = [sum(part.numel() for part in parts) for parts in sent]
        device = self.pieces[0].values.device
        # a process without matrices in this round sends nothing back
        flat = torch.cat([torch.empty(0, dtype=self.dtype, device=device), *itertools.chain(*sent)])
        received = flat.new_empty(sum(sizes))
        dist.all_to_all_single(received, flat, sizes, lengths, group=self.group)
        return list(received.split(sizes))

    def _orthogonalised(self, matrices: dict[int, torch.Tensor], group: dict) -> dict[int, torch.Tensor]:
        """Of complete matrices; those of one shape in one batch."""
        options = (self.dtype, group["ns_coefficients"], group["ns_steps"], group["eps"])
        by_shape: dict[torch.Size, list[int]] = {}
        for index, matrix in matrices.items():
            by_shape.setdefault(matrix.shape, []).append(index)
        results = {}
        for indices in by_shape.values():
            if len(indices) == 1:
                results[indices[0]] = orthogonalised(matrices.pop(indices[0]), *options)
                continue
            batch = torch.stack([matrices.pop(index) for index in indices])
            results |= dict(zip(indices, orthogonalised_batch(batch, *options), strict=True))
        return results


def rows_of_each(rows: int, world: int) -> list[int]:
    """The rows of a matrix that each process holds, as FSDP distributes them."""
    most = -(-rows // world)
    return [max(0, min(rows - most * rank, most)) for rank in range(world)]


def rounds(shapes: list[torch.Size], world: int) -> Iterator[list[list[int]]]:
    """The matrices that each process orthogonalises, by their numbers, round after round: the most expensive first,
    each on the process that has least to do."""

    def flops(index: int) -> int:
        return min(shapes[index]) ** 2 * max(shapes[index])

    owned: list[list[int]] = [[] for _ in range(world)]
    work = [0] * world
    for index in sorted(range(len(shapes)), key=lambda index: (-flops(index), index)):
        rank = work.index(min(work))
        owned[rank].append(index)
        work[rank] += flops(index)
    buckets = [_buckets(indices, shapes) for indices in owned]
    for of_round in itertools.zip_longest(*buckets, fillvalue=[]):
        yield list(of_round)


def _buckets(indices: list[int], shapes: list[torch.Size]) -> list[list[int]]:
    buckets: list[list[int]] = []
    total = 0
    for index in indices:
        total += shapes[index].numel()
        if not buckets or total > MUON_BUCKET:
            buckets.append([])
            total = shapes[index].numel()
        buckets[-1].append(index)
    return buckets
