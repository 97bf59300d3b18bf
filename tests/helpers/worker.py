"""The main program of the workers (*_worker.py): each process of a launch works, and the first saves what it found under
the first argument."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.core import distributed


def run(work: Callable[[Path], dict]) -> None:
    """work: from the folder of the results to the results."""
    warnings.simplefilter("ignore")
    distributed.setup()
    path = Path(sys.argv[1])
    results = work(path.parent)
    if distributed.is_main():
        torch.save(results, path)
    distributed.barrier()
    distributed.shutdown()


def continued(model) -> list[int]:
    """Eight greedy tokens after three; the same on every process."""
    words = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = model.generate(torch.tensor([[5, 6, 7]]), **words)[0].tolist()
    assert len({tuple(found) for found in distributed.all_gather_object(ids)}) == 1
    return ids
