"""Reward functions that do what they should not: each is an outcome, the next call works, and nothing is left behind."""

import os
import time
from pathlib import Path

import pytest

from pipeline.rl.reward_workers import Call, RewardWorkers

FUNCTIONS = """
import math, os, random, subprocess, sys, time

def good(response): return len(response)
def seeded(response): return random.random()
def ordered(response): return float(list({"a", "b", "c", "d"}).index("a"))
def hangs(response): time.sleep(1000)
def loops(response):
    while True: pass
def raises(response): raise ValueError("no such response")
def exits(response): sys.exit(0)
def not_a_number(response): return math.nan
def nothing(response): return None
def dies(response): os._exit(3)
def eats(response): return len("x" * (4 << 30))
def forks(response):
    if os.fork() == 0:
        time.sleep(1000)
    return 5
def comes_back_twice(response):
    os.fork()
    return 6
def hides(response):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    return 7
def hangs_with_children(response):
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    time.sleep(1000)
def waits_for_its_child(response):
    return float(subprocess.run(["echo", "8"], capture_output=True).stdout)
def text(response): return "0.5"
def true(response): return True
class Array:
    def __float__(self): raise RuntimeError("2 elements")
def array(response): return Array()
def large(response): return 10**400
def numpy_number(response):
    import numpy
    return numpy.float32(0.5)
def prints(response):
    print("x" * 5_000_000), sys.stderr.write("x" * 5_000_000)
    return 9
def leaves(response):
    folder = os.path.dirname(__file__) + "/gone"
    os.mkdir(folder), os.chdir(folder), os.rmdir(folder)
    return 10
def lowers(response):
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    return 11
def scribbles(response):
    for descriptor in range(3, 20):
        try: os.write(descriptor, (4).to_bytes(4, "big") + b"oops")
        except OSError: pass
    time.sleep(1000)
"""
BAD = [
    ("hangs", None, "timeout"),
    ("loops", None, "timeout"),
    ("hangs_with_children", None, "timeout"),
    ("raises", None, "error"),
    ("exits", None, "error"),
    ("not_a_number", None, "value"),
    ("nothing", None, "value"),
    ("dies", None, "died"),
    ("eats", None, "memory"),
    ("forks", 5.0, "processes"),
    ("comes_back_twice", 6.0, "processes"),
    ("hides", 7.0, "processes"),
    ("waits_for_its_child", 8.0, ""),
    ("text", None, "value"),
    ("true", 1.0, ""),
    ("array", None, "value"),
    ("large", None, "value"),
    ("numpy_number", 0.5, ""),
    ("prints", 9.0, ""),
    ("leaves", 10.0, ""),
    ("lowers", 11.0, ""),
    ("scribbles", None, "died"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTIONS)
    (path.parent / "broken.py").write_text("import nowhere\ndef f(response): return 1\n")
    return path


@pytest.fixture(scope="module")
def workers():
    workers = RewardWorkers(2)
    yield workers
    workers.close()


def call(file, name, seconds=1.0, **keys):
    return Call(f"{file}:{name}", {"response": "abc"}, seconds, 2.0, keys.pop("seed", 0), **keys)


def descendants() -> set[int]:
    """Processes of this machine that have this one among their ancestors."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if words[0] != "Z":
            parents[int(path.parent.name)] = int(words[1])
    found, own = set(), {os.getpid()}
    while own:
        own = {pid for pid, parent in parents.items() if parent in own} - found
        found |= own
    return found


def test_whatever_a_function_does_the_next_call_works(file, workers):
    calls = []
    for name, _, failure in BAD:
        calls += [call(file, name, seconds=1.0 if failure == "timeout" else 20.0), call(file, "good", seconds=20)]
    start = time.monotonic()
    outcomes = list(workers.run(calls))
    assert time.monotonic() - start < 60
    for (name, value, failure), outcome, good in zip(BAD, outcomes[::2], outcomes[1::2], strict=True):
        assert (outcome.value, outcome.failure) == (value, failure), (name, outcome)
        assert (good.value, good.failure) == (3.0, ""), name
    sleeping = [pid for pid in descendants() if b"1000" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert not sleeping


def test_closing_ends_all_processes(file):
    before = descendants()
    workers = RewardWorkers(2)
    assert [outcome.value for outcome in workers.run([call(file, "good", seconds=20)] * 4)] == [3.0] * 4
    assert descendants() - before
    workers.close()
    assert not descendants() - before


def test_random_numbers_follow_the_seed_and_not_the_process(file, workers):
    calls = [call(file, "seeded", seconds=20, seed=seed) for seed in (1, 2, 1, 2)] + [call(file, "ordered")] * 4
    values = [outcome.value for outcome in workers.run(calls)]
    assert values[:2] == values[2:4] and values[0] != values[1] and len(set(values[4:])) == 1


def test_a_message_says_what_was_raised_and_where(file, workers):
    (outcome,) = workers.run([call(file, "raises")])
    assert outcome.message == "ValueError: no such response (mine.py:10)"


def test_a_file_that_cannot_be_imported(file, workers):
    broken = call(file.parent / "broken.py", "f", only_import=True)
    (outcome,) = workers.run([broken])
    assert outcome.value is None and "No module named 'nowhere'" in outcome.message
