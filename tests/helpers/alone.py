"""A function called in a process of its own: what it measures does not depend on what this one has done before."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def alone(function: Callable, *arguments):
    """What the function, of a module, returns. The process starts with nothing: one that is forked from a process with
    torch in it dies when torch traces what is compiled."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
