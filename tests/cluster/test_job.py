"""What the batch step of a stage's job does: it starts the processes, and queues the job again or not. A shell
script stands in for srun."""

import json
import os
import signal
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from pipeline.cluster import job
from pipeline.cluster.job import Job
from pipeline.core.graph import nodes
from pipeline.core.recipe import load

RECIPE = """
name: small
model: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
stages:
  clean: {sources: {a: {path: a.txt}}}
  pretrain:
    inputs: {tokens: ./tokens, tokenizer: ./tok}
    steps: 2
    batch_size: 48
    sequence_length: 64
    run: {nodes: 2, processes: 2}
    resources: {preflight: false}
"""
# note: as rank.py leaves it; and what ends well has published something
NOTE = """
note() {{ echo "n2 41 $2" > $ALMA_ENDED/rank-$1; }}
publish() {{ mkdir -p made; ln -sfn made current; echo > made/new; mv made/new made/manifest.json; }}
trap '[ $? = 0 ] && [ -z "$LOST" ] && publish' EXIT
cd {folder}
"""


class Start:
    """Starts of a job, one after another, with what srun does in each."""

    def __init__(self, folder: Path, stage: str):
        self.jobs, self.stage, self.folder = folder / "runs/small/jobs", stage, folder / "runs/small" / stage

    def __call__(self, srun: str, restarts: int = 0, *words: str, options: tuple[str, ...] = ()) -> int:
        os.environ["SLURM_RESTART_COUNT"] = str(restarts)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.jobs.mkdir(exist_ok=True)
        Path("bin/srun.sh").write_text(NOTE.format(folder=self.folder) + srun)
        self.node = nodes(load("r.yaml", words))[self.stage]
        return Job(self.jobs.absolute() / "recipe.yaml", self.node, options).run()

    @property
    def record(self) -> dict:
        return json.loads((self.jobs / f"{self.stage}.json").read_text())


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(RECIPE)
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.chdir(tmp_path)
    settings = {"PATH": fake.path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "64"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield fake
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(fake, tmp_path):
    return Start(tmp_path, "pretrain")


def marker(saved: int, reason: str = "hang") -> str:
    record = {"stage": "pretrain", "reason": reason, "step": saved, "saved": saved, "progress": saved}
    record |= {"from": f"step {saved}", "message": f"{reason}: rank 3"}
    return f"echo '{json.dumps(record)}' > requeue.json; "


def test_processes_get_the_cores_and_the_meeting_place_of_the_job(start, fake, tmp_path):
    assert start('echo "$OMP_NUM_THREADS $MASTER_ADDR $MASTER_PORT" > environment') == 0
    (call,) = fake.calls("srun")
    jobs = start.jobs.absolute()
    assert f"srun --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=2 --cpus-per-task=32 --output={jobs}/pret" in call
    assert call.endswith(f"pipeline.cluster.rank -P -m pipeline.pretrain {jobs}/recipe.yaml --stage pretrain")
    assert (start.folder / "environment").read_text() == "32 n1 20007\n"
    assert start.record["state"] == "done" and not (start.folder / ".ended").exists()
    assert start("", 0, "pretrain.resources.cpus=3", "pretrain.run.threads=2") == 0
    assert "--cpus-per-task=3 " in fake.calls("srun")[-1]


@pytest.mark.parametrize(
    "image, words",
    [
        (
            "alma.sif",
            "apptainer exec --nv --bind={here} --bind={runs} --bind=/data --pwd={here} alma.sif python -P -m pi",
        ),
        (
            "lab/alma:1",
            "--container-image=lab/alma:1 --container-mounts={here}:{here},{runs}:{runs},/data:/data"
            " --container-workdir={here} python -P -m pipeline.cluster.rank",
        ),
    ],
)
def test_processes_run_in_a_container(start, fake, tmp_path, image, words):
    assert start("", 0, f"pretrain.resources={{container: '{image}', mounts: [/data], preflight: false}}") == 0
    assert words.format(here=tmp_path, runs=tmp_path / "runs/small") in fake.calls("srun")[0]


def test_it_is_queued_again_until_there_is_no_progress(start, fake, capsys):
    for restarts, saved in enumerate((100, 100, 200, 200)):
        assert start(marker(saved) + "exit 76", restarts) == 75
        assert start.record["state"] == "queued again"
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7"] * 4
    assert start(marker(200) + "exit 76", 4) == 76
    assert "3 tries ended at step 200 without progress, the last with: hang: rank 3" in start.record["reason"]
    assert len(fake.calls("scontrol requeue")) == 4


def test_an_error_for_the_user_is_never_queued_again(start, fake, capsys):
    log = "echo 'error: a.txt: no such file' >> ../jobs/pretrain-7-rank-1.log; "
    assert start(log + marker(5) + "note 1 2; exit 76") == 2
    assert start.record["state"] == "failed" and start.record["reason"] == "a.txt: no such file"
    assert "rank 1 (n2, process 41) failed with code 2; the end of" in capsys.readouterr().out
    assert not fake.calls("scontrol requeue")


def test_an_exception_is_not_queued_again(start, fake):
    assert start(marker(5, "failed") + "note 1 1; exit 1") == 1
    assert start("exit 1") == 1
    assert not fake.calls("scontrol requeue")


def test_a_process_that_was_killed_is_no_end(start, fake):
    """Also one that had no time to leave a marker, such as the only one of a stage; three times at most."""
    assert [start("note 0 137; exit 137", restarts) for restarts in range(3)] == [75, 75, 137]
    assert "was killed by SIGKILL" in start.record["reason"]


def test_a_lost_node_counts_as_a_try(start, fake):
    """Slurm ends the start and queues the job again itself; a node that is lost each time must not go on forever."""
    lost = "kill -TERM $PPID; sleep 0.2; exit 143"
    assert start(lost) == 75 and start.record["state"] == "cancelled"
    assert start(lost, 1) == 75
    assert start(lost, 2) == 75
    assert start("exit 0", 3) == 1
    assert "3 tries ended at step 0 without progress, the last with: Slurm ended the start" in start.record["reason"]
    assert not fake.calls("scontrol requeue") and len(fake.calls("srun")) == 3


def test_srun_that_gives_up_with_0_has_done_nothing(start, fake):
    """Seen on a real Slurm: scancel, processes that do not end in time, and "forcing job termination" with code 0."""
    assert start("LOST=1; kill -TERM $PPID; sleep 0.2; exit 0") == 75
    assert start.record["state"] == "cancelled" and not fake.calls("scontrol requeue")
    assert start("LOST=1; exit 0", 1) == 75
    assert start.record["state"] == "queued again" and "nothing is published" in start.record["reason"]
    assert start("kill -TERM $PPID; sleep 0.2; exit 0", 2) == 0  # it was done before Slurm could end it
    assert start.record["state"] == "done"
    # an output of before is none of this start
    assert start("LOST=1; kill -TERM $PPID; sleep 0.2; exit 0") == 75 and start.record["state"] == "cancelled"


def test_a_new_job_has_all_its_tries(start, fake):
    assert [start(marker(5) + "exit 76", restarts) for restarts in (0, 1)] == [75, 75]
    assert [start(marker(5) + "exit 76", restarts) for restarts in (0, 1, 2)] == [75, 75, 76]


def test_it_saves_and_is_queued_again_near_its_time_limit(start, fake):
    trap = f"leave() {{ {marker(7, 'signal')} exit 75; }}; trap leave USR1; kill -USR1 $PPID; sleep 5 & wait"
    assert start(trap) == 75 and fake.calls("scontrol requeue")
    # it finished although it had been asked to stop
    assert start("trap : USR1; kill -USR1 $PPID; sleep 1; exit 0", 1) == 0


def test_a_job_that_cannot_be_queued_again_fails(start, fake):
    fake.write("scontrol.fails", "Job is pending execution")
    with pytest.raises(Exception, match="scontrol show hostnames failed"):
        start(marker(5) + "exit 76")


def test_progress_of_a_stage_without_steps_is_counted_in_files(fake, tmp_path):
    start = Start(tmp_path, "clean")
    more = (
        "mkdir -p a.partial/work; echo > a.partial/work/$RANDOM$RANDOM; touch a.partial/run.json; note 0 137; exit 137"
    )
    assert [start(more, restarts) for restarts in range(5)] == [75] * 5
    assert "finished files" in start.record["reason"]


PUBLISHED = "publish; "


def test_restart_is_given_until_its_result_is_published(start, fake):
    """A start that is ended before that is resumed; one that is ended after it must not make everything again."""
    assert start(PUBLISHED + "exit 0") == 0
    killed = "note 0 137; exit 137"
    assert [start(killed, restarts, options=("--restart",)) for restarts in (0, 1)] == [75, 75]
    assert start(PUBLISHED + killed, 2, options=("--restart",)) == 137  # the third try, and nothing was saved
    assert start("exit 0", 3, options=("--restart",)) == 0
    assert [line.endswith("--restart") for line in fake.calls("srun")] == [False, True, True, True, False]


# ---- errors of machines ----------------------------------------------------------------------------------------------

DEVICE = json.dumps(
    {"stage": "pretrain", "reason": "device", "step": 6, "saved": 5, "progress": 5, "from": "step 5", "rank": 1}
    | {"host": "n2", "message": "rank 1 (n2) failed: AcceleratorError: CUDA error: uncorrectable ECC error encountered"}
)
BROKEN_GPU = f"echo '{DEVICE}' > requeue.json; note 1 1; exit 1"


def test_an_error_of_a_gpu_is_queued_again_as_long_as_there_is_progress(start, fake):
    assert [start(BROKEN_GPU, restarts) for restarts in range(3)] == [75, 75, 1]
    assert "3 tries ended at step 5 without progress, the last with: rank 1 (n2) failed" in start.record["reason"]
    assert not fake.calls("scontrol update")


def test_the_process_that_caused_it_is_shown_also_if_another_one_ended_before_it(start, capsys):
    log = "echo 'cause' >> ../jobs/pretrain-7-rank-1.log; echo 'consequence' >> ../jobs/pretrain-7-rank-0.log; "
    assert start(log + BROKEN_GPU.replace("note 1 1", "note 0 1")) == 75
    shown = capsys.readouterr().out
    assert "ECC error encountered; the end of" in shown and "    cause\n" in shown and "consequence" not in shown


def test_the_node_with_the_broken_gpu_is_avoided_if_the_recipe_asks_for_it(start, fake, capsys):
    fake.write("job.txt", "JobId=7 ExcNodeList=n9 Restarts=0\n")
    assert start(BROKEN_GPU, 0, "pretrain.resources.exclude_failed=true") == 75
    assert fake.calls("scontrol")[-3:] == [
        "scontrol requeue 7",
        "scontrol --oneliner show job 7",
        "scontrol update JobId=7 ExcNodeList=n9,n2",
    ]
    assert "the next start avoids n9,n2" in capsys.readouterr().out


def test_the_first_error_of_each_process_is_summarised(start, capsys):
    """Of this start: logs of earlier ones are in the same files."""
    log = "../jobs/pretrain-7-rank-{}.log"
    start.jobs.mkdir(parents=True)
    (start.jobs / "pretrain-7-rank-2.log").write_text("RuntimeError: of an earlier start\n")
    lines = [f"printf 'step 3\\nValueError: odd\\nTypeError: later\\n' >> {log.format(rank)}" for rank in (0, 2, 3)]
    lines.append(f"echo '[rank1]: torch.AcceleratorError: CUDA error: x' >> {log.format(1)}")
    assert start("; ".join([*lines, "note 1 1", "exit 1"])) == 1
    shown = capsys.readouterr().out
    assert "the first error of each process:" in shown and "earlier start" not in shown
    assert "    ranks 0, 2-3: ValueError: odd\n    rank 1: torch.AcceleratorError: CUDA error: x\n" in shown


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left, longest, is_asked", [("9:00", 200, True), ("59:00", 200, False), ("9:00", 60, False)])
def test_slow_steps_and_checkpoints_are_stopped_earlier(start, fake, monkeypatch, left, longest, is_asked):
    """Twice the longest step and checkpoint and half a minute, but not before half of the time is over."""
    monkeypatch.setattr(job, "LOOK_EVERY", 0.1)
    fake.write("left.txt", f"{left}\n")
    logs = start.folder / "a.partial/logs"
    logs.mkdir(parents=True)
    (logs / "pace.json").write_text(json.dumps({"longest_step": longest - 20, "longest_save": 20}))
    later = iter([0.0] + [300.0] * 1000)  # five minutes pass at once
    monkeypatch.setattr(job.time, "monotonic", lambda: next(later))
    ended = f"leave() {{ {marker(7, 'signal')} exit 75; }}; trap leave USR1; sleep 1 & wait; exit 0"
    assert start(ended) == (75 if is_asked else 0)


# ---- the look at the nodes -------------------------------------------------------------------------------------------

NOTES = """
folder=$(echo "$@" | sed 's/.*cluster.preflight \\([^ ]*\\) .*/\\1/')
echo '{"node": "n1", "at": "done", "problem": null}' > $folder/0.json
"""
FIT = NOTES + """echo '{"node": "n2", "at": "done", "problem": null}' > $folder/1.json"""
BROKEN = NOTES + """echo '{"node": "n2", "at": "its GPUs", "problem": "torch sees 1 of 2 GPUs"}' > $folder/1.json"""


def test_nodes_are_looked_at_before_the_stage_starts(start, fake):
    fake.write("preflight.sh", FIT)
    assert start("touch started", 0, "pretrain.resources.preflight=true") == 0
    look, stage = fake.calls("srun")
    assert look.startswith("srun --nodes=2 --ntasks-per-node=1 --cpus-per-task=64 ")
    assert look.endswith(f"{start.folder}/.ended/preflight {start.folder} 2") and "pipeline.cluster.rank" in stage


@pytest.mark.parametrize("look, said", [(BROKEN, "its GPUs: torch sees 1 of 2 GPUs"), (NOTES, "did not start")])
def test_a_node_that_is_not_fit_is_named_and_the_stage_does_not_start(start, fake, look, said):
    fake.write("preflight.sh", look)
    assert start("touch started", 0, "pretrain.resources.preflight=~") == 1
    assert said in start.record["reason"] and "node n2: " in start.record["reason"]
    assert "exclude it (resources.exclude: n2)" in start.record["reason"]
    assert not (start.folder / "started").exists() and not fake.calls("scontrol requeue")


def test_a_node_that_is_not_fit_is_avoided_if_the_recipe_asks_for_it(start, fake):
    fake.write("preflight.sh", BROKEN)
    words = ["pretrain.resources.preflight=true", "pretrain.resources.exclude_failed=true"]
    assert [start("", restarts, *words) for restarts in range(3)] == [75, 75, 1]
    assert fake.calls("scontrol update") == ["scontrol update JobId=7 ExcNodeList=n2"] * 2
    assert "3 tries ended at step 0 without progress" in start.record["reason"]


def test_one_cpu_node_is_not_looked_at(start, fake):
    assert start("", 0, "pretrain.resources={preflight: ~}", "pretrain.run={nodes: 1, processes: 2, device: cpu}") == 0
    assert len(fake.calls("srun")) == 1
