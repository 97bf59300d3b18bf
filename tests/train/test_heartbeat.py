"""Two ranks of a stage, started as srun starts them (nobody ends the other when one leaves): a signal to one, a
hang, a death, a mistake on one, and the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from harness import Rank, files_of, start_ranks
from paths import ROOT

STEPS = 160
WORDS = (
    f"pretrain.steps={STEPS}",
    "pretrain.save.every_steps=20",
    "pretrain.schedule.warmup_steps=4",
    "pretrain.optimizer.lr=1e-3",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    tiny.write_inputs(folder)
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    return folder


def start(folder: Path, *words: str, second: tuple[str, ...] = ()) -> list[Rank]:
    """Both ranks; `second`: words for rank 1 alone."""
    common = ["recipe.yaml", *WORDS, *words]
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    for log in logs:
        log.unlink(missing_ok=True)
    return start_ranks(ROOT / "pipeline/pretrain.py", [common, [*common, *second]], folder, logs)


def said(folder: Path, rank: int) -> str:
    return (folder / f"rank-{rank}.log").read_text()


def until(condition, ranks, folder, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and all(rank.poll() is None for rank in ranks), said(folder, 0) + said(folder, 1)
        time.sleep(0.02)


def at_step(step: int, folder: Path, rank: int = 1):
    """Whether the heartbeat of a rank says that it is inside this step or a later one, and not in the first of its
    process."""

    def reached() -> bool:
        for path in (folder / "runs/tiny/pretrain").glob(f"*.partial/logs/heartbeat/rank-{rank:05d}.json"):
            found = json.loads(path.read_text())
            return found["step"] >= step and found["patience"] == "hang" and found["ending"] is None
        return False

    return reached


def end(ranks, folder, seconds=60) -> list[int]:
    begun = time.time()
    try:
        return [rank.wait(max(1, seconds - (time.time() - begun))) for rank in ranks]
    except TimeoutError:
        raise AssertionError(f"a rank did not end in {seconds} s\n{said(folder, 0)}\n{said(folder, 1)}") from None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def word(folder: Path) -> dict:
    return json.loads((folder / "runs/tiny/pretrain/requeue.json").read_text())


@pytest.mark.slow
def test_a_signal_to_one_a_hang_and_a_death_end_both_ranks_with_a_name_and_the_result_is_that_of_a_quiet_run(world):
    # SIGUSR1 to rank 1 alone: both stop at one step
    ranks = start(world)
    until(at_step(12, world), ranks, world)
    ranks[1].send_signal(signal.SIGUSR1)
    assert end(ranks, world) == [75, 75]
    stopped = word(world)
    assert (
        stopped["reason"] == "signal" and stopped["signal"] == "SIGUSR1" and stopped["saved"] == stopped["step"] >= 12
    )

    # Rank 1 hangs (SIGSTOP): found after watch.hang seconds, not after a collective's half hour
    ranks = start(world, "pretrain.watch={hang: 3, lost: 50}")
    until(at_step(stopped["step"] + 12, world), ranks, world)
    ranks[1].send_signal(signal.SIGSTOP)
    begun = time.time()
    assert ranks[0].wait(40) == 76
    assert 3 <= time.time() - begun < 25
    ranks[1].send_signal(signal.SIGCONT)  # the other's word is read late, and obeyed
    assert end(ranks, world)[1] != 0
    hang, text = word(world), said(world, 0)
    assert (
        hang["reason"] == "hang"
        and hang["rank"] == 1
        and hang["step"] >= stopped["step"] + 12
        and hang["saved"] >= stopped["step"]
    )
    assert (
        f"rank 1 ({socket.gethostname()}, process {ranks[1].pid}) has been in phase {hang['phase']} of step"
        f" {hang['step']} for"
        in text
        and "rank 0 waits in" in text
    ), text
    folder = next((world / "runs/tiny/pretrain").glob("*.partial"))
    assert "Thread" in (folder / "logs/stacks-rank-0.txt").read_text()

    # Rank 1 is killed: rank 0 names it
    ranks = start(world)
    until(at_step(hang["saved"] + 12, world), ranks, world)
    ranks[1].kill()
    begun = time.time()
    code = end(ranks, world)[0]
    assert time.time() - begun < 60 and code == 76, said(world, 0)
    lost = word(world)
    assert (
        lost["reason"] == "lost"
        and lost["rank"] == 1
        and f"rank 1 ({socket.gethostname()}, process {ranks[1].pid}) is lost: its process is gone" in said(world, 0)
    ), said(world, 0)

    # To the end, and the same run without any of this
    ranks = start(world)
    assert end(ranks, world, 120) == [0, 0], said(world, 0) + said(world, 1)
    ranks = start(world, "output=quiet")
    assert end(ranks, world, 120) == [0, 0], said(world, 0) + said(world, 1)
    assert files_of(world / "runs/tiny/pretrain/current") == files_of(world / "quiet/tiny/pretrain/current")
    assert not (world / "runs/tiny/pretrain/requeue.json").exists()


RANK_0 = """
import sys, time
from pathlib import Path
from pipeline.core.output import Output
from pipeline.train import phases
from pipeline.train.config import Watchdog
from pipeline.train.heartbeat import Watch

output = Output(Path(sys.argv[1]), "pretrain", "pretrain", {})
output.path.mkdir(parents=True)
phases.enter("data", at=6)
with Watch(output, Watchdog(hang=3, lost=50)):
    phases.enter("data", at=7)
    phases.enter("reduce")
    time.sleep(60)
"""


@pytest.mark.slow
def test_of_two_in_the_same_phase_the_silent_one_is_named(tmp_path):
    """Rank 0 waits in place 1 of step 7. Rank 1 was last seen there too, or before, or after (gloo lets one rank out of
    a collective before the other has all it needs), and shows no more heartbeats; or it beats on."""
    cases = {"before": (0, False), "same": (1, False), "after": (2, False), "alive": (1, True)}
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "two"}
    ranks, states = {}, {}
    for case in cases:
        (tmp_path / case).mkdir()
        with open(tmp_path / case / "rank-0.log", "w") as log:
            ranks[case] = subprocess.Popen(
                [sys.executable, "-c", RANK_0, str(tmp_path / case / "run")], env=environment, cwd=ROOT, stderr=log
            )
    for beats in range(100):
        for case, (place, alive) in cases.items():
            first = next((tmp_path / case).glob("run/*.partial/logs/heartbeat/rank-00000.json"), None)
            if first and (alive or case not in states):
                states.setdefault(case, json.loads(first.read_text()))
                state = {"rank": 1, "step": 7, "place": place, "phase": "reduce", "patience": "hang", "beats": beats}
                (tmp_path / case / "next").write_text(json.dumps({**states[case], **state}))
                (tmp_path / case / "next").rename(first.with_name("rank-00001.json"))
        time.sleep(0.3)
        if all(rank.poll() is not None for rank in ranks.values()):
            break
    assert {case: rank.wait() for case, rank in ranks.items()} == dict.fromkeys(cases, 76)
    for case, (_, alive) in cases.items():
        found = json.loads((tmp_path / case / "run/requeue.json").read_text())
        text = found["message"]
        if alive:
            assert found["rank"] == 0 and "ranks 0-1 have been in phase reduce of step 7 for" in text, text
        else:
            assert found["rank"] == 1 and "it gives no heartbeat" in text and "rank 0 waits in reduce" in text, text
            assert text in said(tmp_path / case, 0)


SUSPENDED = """
import json, os, subprocess, sys, time
from pathlib import Path
from pipeline.core.lock import born
from pipeline.core.output import Output
from pipeline.train import phases
from pipeline.train.config import Watchdog
from pipeline.train.heartbeat import Watch

other = subprocess.Popen(["sleep", "60"])
output = Output(Path(sys.argv[1]), "pretrain", "pretrain", {})
(output.path / "logs/heartbeat").mkdir(parents=True)

def beat(watch, beats, ending):
    path = output.path / "logs/heartbeat/rank-00001.json"
    state = {"rank": 1, "pid": other.pid, "born": watch.born, "step": 7, "place": 1, "phase": "reduce"}
    path.with_suffix(".new").write_text(json.dumps(
        {**watch.own, **state, "patience": "hang", "beats": beats, "ending": ending, "seconds": 0}
    ))
    path.with_suffix(".new").rename(path)

class Suspended(Watch):
    looked, born = 0, born(other.pid)

    def read_others(self):
        super().read_others()
        self.looked += 1
        if self.looked == 2:  # SIGSTOP comes here, and SIGCONT when the other has written why it ends, and is gone
            beat(self, 2, {"reason": "hang", "rank": 0, "phase": "data", "step": 7, "message": "hang: of rank 0", "code": 76})
            other.kill()
            other.wait()

with Suspended(output, Watchdog(hang=30, lost=50)) as watch:
    beat(watch, 1, None)
    time.sleep(60)
"""


def test_who_was_suspended_while_another_ended_obeys_its_word(tmp_path):
    """Found by a run of the test above in which rank 1 was stopped between a look at rank 0's heartbeat and one at its
    process: it then told of a loss."""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "two"}
    rank = subprocess.run([sys.executable, "-c", SUSPENDED, str(tmp_path / "run")], env=environment, cwd=ROOT)
    assert rank.returncode == 76
    found = json.loads((tmp_path / "run/requeue.json").read_text())
    assert (found["reason"], found["message"]) == ("hang", "hang: of rank 0")


@pytest.mark.slow
def test_a_mistake_that_one_rank_makes_is_told_by_the_other(world):
    ranks = start(world, "output=mistake", second=("pretrain.heldout_rows=1",))
    codes = end(ranks, world)
    assert (
        codes[1] == 2 and codes[0] in (1, 2) and "1 held-out rows cannot be shared by 2 processes" in said(world, 0)
    ), (codes, said(world, 0))
    assert not (world / "mistake/tiny/pretrain/requeue.json").exists()
