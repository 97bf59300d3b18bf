"""Processes of a stage: Ctrl-C once and twice, SIGTERM and a closed terminal, and that nothing outlives its parent."""

import contextlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from cleaned import published
from harness import files_of
from paths import ROOT
from word_corpus import words, write

from pipeline import cli
from pipeline.core.lock import lock_holder

ALMA = [sys.executable, "-m", "pipeline.cli"]
# one checkpoint, at the end: what a stop saves is what it was asked to save
STEPS = ("pretrain.steps=4000", "pretrain.save.every_steps=4000", "pretrain.log.every_steps=5")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_inputs(folder)
    (folder / "r.yaml").write_text(tiny.RECIPE)
    return folder


def start(command: list, folder: Path, **options) -> subprocess.Popen:
    """In a process group of its own, as a shell starts a job, with its output in folder/log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True} | options
        return subprocess.Popen(command, cwd=folder, env=environment, preexec_fn=default_signals, **options)


def default_signals() -> None:
    """Whatever `nohup` or a shell's `&` starts, these tests included, ignores SIGHUP or SIGINT, and so would a child."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(condition, process: subprocess.Popen, folder: Path, seconds: float = 120) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline, (folder / "log").read_text()
        time.sleep(0.02)


def stepping(folder: Path):
    """Whether a step of training was made."""
    return lambda: any('"loss"' in path.read_text() for path in folder.glob("pretrain/*.partial/metrics.jsonl"))


def saved(folder: Path) -> int:
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("pretrain/*.partial/checkpoints/step-*")]
    return max(steps, default=0)


def end(process: subprocess.Popen, seconds: float = 120) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def started_in(folder: Path) -> list[int]:
    """Processes that were started in a folder and live."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            living = (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if living and os.readlink(path / "cwd") == str(folder) and int(path.name) != os.getpid():
                found.append(int(path.name))
        except OSError:  # gone, or not ours
            continue
    return found


def gone(folder: Path, seconds: float) -> None:
    deadline = time.time() + seconds
    while left := started_in(folder):
        assert time.time() < deadline, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["chain", "terminal"])
def test_the_first_interrupt_of_a_chain_saves_the_step_it_is_at(world, how):
    """correctness 43: a terminal's Ctrl-C reaches every process of the group, `kill -INT` the chain alone."""
    folder = world / f"runs-{how}/tiny"
    ranks = "pretrain.run.processes=" + ("2" if how == "terminal" else "1")
    chain = start([*ALMA, "run", "r.yaml", *STEPS, f"output=runs-{how}", ranks], world)
    until(stepping(folder), chain, world)
    (os.killpg if how == "terminal" else os.kill)(chain.pid, signal.SIGINT)
    assert end(chain) == 75
    said = (world / "log").read_text()
    step = saved(folder)
    assert step > 0 and f"pretrain: Ctrl-C received, saved at step {step}" in said and "Traceback" not in said, said
    assert "Ctrl-C again ends it at once" in said
    assert json.loads((folder / "pretrain/requeue.json").read_text())["saved"] == step
    assert lock_holder(folder / "pretrain") is None and not started_in(world)


@pytest.mark.slow
def test_an_interrupt_while_a_stage_is_starting_is_one_sentence(world):
    """correctness 43: Python is still importing, and a terminal sends Ctrl-C to it too."""
    folder = world / "runs-starting/tiny"
    chain = start([*ALMA, "run", "r.yaml", "output=runs-starting", "pretrain.run.processes=2"], world)
    until(lambda: len(started_in(world)) == 3, chain, world)
    os.killpg(chain.pid, signal.SIGINT)
    assert end(chain) == 75
    said = (world / "log").read_text()
    assert "Traceback" not in said and "stopped while it was starting" in said, said
    assert saved(folder) == 0 and not started_in(world)


def test_an_interrupt_between_stages_says_what_is_kept(tmp_path, monkeypatch, capsys):
    """correctness 43: no stage runs that could say it."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupted)
    monkeypatch.setattr(sys, "argv", ["alma", "run", "r.yaml"])
    monkeypatch.setattr(cli, "keep_open", lambda: None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130 and "finished stages are kept" in capsys.readouterr().err


def test_an_interrupt_while_a_program_is_importing_is_one_line(tmp_path):
    """correctness 43. Only in programs of alma: others that import the package keep their handler."""
    program = "import os, signal, pipeline; os.kill(os.getpid(), signal.SIGINT); print('went on')"
    for name in ("alma", "other"):
        (tmp_path / name).write_text(program)
        process = start([sys.executable, tmp_path / name], tmp_path)
        code, said = end(process), (tmp_path / "log").read_text()
        if name == "alma":
            assert (code, said) == (130, "interrupted before anything was done\n")
        else:
            assert code == -signal.SIGINT and "KeyboardInterrupt" in said


@pytest.mark.slow
def test_the_second_interrupt_ends_a_chain_and_a_stage_at_once(world):
    """correctness 43. Saving takes as long as it likes: this process group is stopped in it."""
    folder = world / "runs-twice/tiny"
    chain = start([*ALMA, "run", "r.yaml", *STEPS, "output=runs-twice", "pretrain.run.processes=2"], world)
    until(stepping(folder), chain, world)
    rank = next(pid for pid in started_in(world) if b"pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(rank, signal.SIGSTOP)  # so that the first one cannot be obeyed
    os.kill(chain.pid, signal.SIGINT)
    until(lambda: "Ctrl-C again" in (world / "log").read_text(), chain, world)
    os.kill(chain.pid, signal.SIGINT)
    begun = time.time()
    assert end(chain) == 130 and time.time() - begun < 10
    said = (world / "log").read_text()
    assert "pretrain: ended at once; the same command continues from the start of this stage" in said, said
    gone(world, 2)

    alone = start([sys.executable, ROOT / "pipeline/pretrain.py", "r.yaml", *STEPS, "output=runs-alone"], world)
    until(stepping(world / "runs-alone/tiny"), alone, world)
    os.kill(alone.pid, signal.SIGINT)
    os.kill(alone.pid, signal.SIGINT)
    time.sleep(0.001)
    while alone.poll() is None:  # the first may have been obeyed already
        try:
            os.kill(alone.pid, signal.SIGINT)
        except ProcessLookupError:
            break
        time.sleep(0.005)
    said = (world / "log").read_text()
    assert end(alone) == 130 and "pretrain: ended at once; the same command continues from the start" in said, said
    assert lock_holder(world / "runs-alone/tiny/pretrain") is None


def test_a_terminal_that_is_closed_saves_too(world):
    """correctness 43: the end of an ssh connection sends SIGHUP, and nothing can be printed after it."""
    main, terminal = pty.openpty()
    folder = world / "runs-closed/tiny"
    command = [sys.executable, ROOT / "pipeline/pretrain.py", "r.yaml", *STEPS, "output=runs-closed"]
    stage = start(command, world, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.set_blocking(main, False)  # a read that waits for output would let the run reach its end
    deadline = time.time() + 120
    while not stepping(folder)():
        assert stage.poll() is None and time.time() < deadline
        with contextlib.suppress(BlockingIOError):
            os.read(main, 65536)
        time.sleep(0.02)
    os.kill(stage.pid, signal.SIGHUP)
    os.close(main)
    assert end(stage) == 75
    assert saved(folder) > 0


def units(folder: Path) -> list[Path]:
    return list(folder.glob("runs/t/clean/*/work/units-*/*/*.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_clean_keeps_its_units_and_says_so(tmp_path, workers):
    """correctness 43: a stage without steps. What was finished is not done again, and the result is the same."""
    draw = random.Random(3)
    rows = {"a": [{"text": " ".join(words(draw, 300))} for _ in range(1200)]}
    path = write(tmp_path, rows, unit_bytes=40_000, workers=workers)
    command = [*ALMA, "run", path]
    chain = start(command, tmp_path)
    until(lambda: len(units(tmp_path)) >= 3, chain, tmp_path)
    os.killpg(chain.pid, signal.SIGINT)
    assert end(chain) == 75
    said = (tmp_path / "log").read_text()
    assert "clean: Ctrl-C received; the same command continues from there (finished units are kept)" in said, said
    assert "Traceback" not in said and "memory" not in said, said
    kept = {unit: unit.stat().st_mtime_ns for unit in units(tmp_path)}
    assert len(kept) >= 3 and not published_yet(tmp_path)
    chain = start(command, tmp_path)
    until(lambda: len(units(tmp_path)) > len(kept) or published_yet(tmp_path), chain, tmp_path)
    assert {unit: unit.stat().st_mtime_ns for unit in kept if unit.exists()}.items() <= kept.items()
    assert end(chain) == 0, (tmp_path / "log").read_text()
    found = files_of(published(tmp_path))
    chain = start([*command, "output=again"], tmp_path)
    assert end(chain) == 0
    again = next((tmp_path / "again").glob("*/clean/current"))
    assert files_of(again) == found


def published_yet(folder: Path) -> bool:
    return (folder / "runs/t/clean/current").exists()


@pytest.mark.parametrize("delay", [*(pytest.param(delay, marks=pytest.mark.slow) for delay in (0.0, 1.5)), 0.3])
def test_nothing_outlives_a_chain_that_is_killed(world, delay):
    """correctness 34: from the moment at which a stage of two ranks is started, when its processes know nothing yet."""
    chain = start([*ALMA, "run", "r.yaml", *STEPS, "output=runs-killed", "pretrain.run.processes=2"], world)
    until(lambda: len(started_in(world)) >= 3, chain, world)
    time.sleep(delay)
    chain.kill()
    chain.wait()
    gone(world, 2)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.5, 4.0])
def test_nothing_outlives_a_launcher_that_is_killed(world, delay):
    """correctness 34: torchrun by hand."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start([*launcher, ROOT / "pipeline/pretrain.py", "r.yaml", *STEPS, "output=runs-torchrun"], world)
    until(lambda: len(started_in(world)) >= 3, process, world)
    time.sleep(delay)
    process.kill()
    process.wait()
    gone(world, 30)  # a rank that is still importing finds out when it has begun


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_by_the_chain(world):
    """correctness 34, 42: kill -9 of one of two ranks."""
    folder = world / "runs-rank/tiny"
    chain = start([*ALMA, "run", "r.yaml", *STEPS, "output=runs-rank", "pretrain.run.processes=2"], world)
    until(stepping(folder), chain, world)
    ranks = {}
    for path in folder.glob("pretrain/*.partial/logs/heartbeat/rank-*.json"):
        state = json.loads(path.read_text())
        ranks[state["rank"]] = state["pid"]
    os.kill(ranks[1], signal.SIGKILL)
    assert end(chain) == 75
    said = (world / "log").read_text()
    assert "rank 1 (" in said and f"process {ranks[1]}) is lost: its process is gone" in said, said
    assert (
        "nothing is lost" not in said
        and "continues from the start of this stage, because nothing was saved yet" in said
    )
    gone(world, 2)


@pytest.mark.slow
def test_a_single_process_that_is_killed_is_not_said_to_have_lost_nothing(world):
    """correctness 42: its siblings, a stage of one process."""
    folder = world / "runs-one/tiny"
    chain = start([*ALMA, "run", "r.yaml", *STEPS, "output=runs-one"], world)
    until(stepping(folder), chain, world)
    os.kill(lock_holder(folder / "pretrain")["pid"], signal.SIGKILL)
    assert end(chain) == 1
    said = (world / "log").read_text()
    assert "its process was killed by SIGKILL" in said and "work since the last save is lost" in said, said
