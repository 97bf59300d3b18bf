"""The replicated engine: DDP. That it trains as one process does is in test_parallel.py."""

import functools
import signal
from pathlib import Path

import harness
import pytest
import resume_worker
import tiny
import torch
from paths import HELPERS, ROOT

WORDS = ("recipe.yaml", "pretrain.batch_size=12", "pretrain.micro_batch=2", "pretrain.steps=8")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What so many processes found."""

    @functools.cache
    def found(processes: int) -> dict:
        folder = tmp_path_factory.mktemp(f"resume-{processes}")
        path = folder / "results.pt"
        harness.launch(processes, HELPERS / "resume_worker.py", path, cwd=folder, seconds=1800)
        return torch.load(path, weights_only=False)

    return found


CASES = [(processes, name) for processes in (3, 4) for name in resume_worker.layouts(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("processes, name", CASES)
def test_more_than_two_processes_resume_to_the_bit(results, processes, name):
    """Steps and weights of every layout. From three processes on a sum depends on its order, which DDP chose again
    after the first step of each start."""
    found = results(processes)[name]
    assert len(found["steps"]) == resume_worker.STEPS - resume_worker.SAVED_AFTER
    assert found["resumed steps"] == found["steps"]
    assert found["resumed weights"].keys() == found["weights"].keys()
    assert all(torch.equal(value, found["weights"][key]) for key, value in found["resumed weights"].items())


def launched(folder: Path, runs: str, fault: str | None) -> list[int]:
    """Exit codes of stage pretrain in three processes, all of which are killed at `fault`."""
    logs = [folder / f"{runs}.log"] * 3
    words = [[*WORDS, f"output={runs}", "pretrain.watch.lost=5"]] * 3
    ranks = harness.start_ranks(ROOT / "pipeline/pretrain.py", words, folder, logs, {"ALMA_FAULT": fault or ""})
    return [rank.wait(900) for rank in ranks]


@pytest.mark.slow
def test_three_processes_that_are_killed_end_with_the_bytes_of_a_run_that_was_not(tmp_path):
    """Files of the published model, after SIGKILL to all three of them after the fifth step."""
    tiny.write_inputs(tmp_path)
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    assert launched(tmp_path, "quiet", None) == [0, 0, 0]
    assert -signal.SIGKILL in launched(tmp_path, "killed", "work:5")
    assert launched(tmp_path, "killed", None) == [0, 0, 0]
    assert "resuming from" in (tmp_path / "killed.log").read_text()
    quiet, killed = (harness.files_of(tmp_path / runs / "tiny/pretrain/current") for runs in ("quiet", "killed"))
    assert killed == quiet
