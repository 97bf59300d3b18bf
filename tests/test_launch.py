"""What is in launch/ and docker/ is checked by the tools that will read it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from ruamel.yaml import YAML


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_dockerfiles_pass_hadolint_and_copy_what_exists(name):
    hadolint = Path(sys.executable).with_name("hadolint")
    answer = subprocess.run([hadolint, ROOT / "docker" / name], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
    for line in (ROOT / "docker" / name).read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), f"{name} copies {source}, which does not exist"
    assert "constraints.txt" in (ROOT / "docker" / name).read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_launch_config(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    stage = path.stem.removeprefix("zero") if path.stem.startswith("zero") else None
    if stage:
        assert str(config.distributed_type) == "DistributedType.DEEPSPEED" or config.distributed_type == "DEEPSPEED"
        assert config.deepspeed_config["zero_stage"] == int(stage)
    assert config.num_processes == (1 if path.stem == "one_gpu" else 8)
    assert YAML(typ="safe").load(path.read_text())["mixed_precision"] == "no"


@pytest.mark.parametrize(
    "path",
    sorted(path for path in (ROOT / "launch" / "slurm").iterdir() if path.suffix != ".py"),
    ids=lambda path: path.name,
)
def test_job_scripts_are_valid_bash_and_can_be_executed(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert path.stat().st_mode & 0o111


def job(
    folder: Path,
    srun: str,
    says: dict | None = None,
    options: tuple = (),
    *,
    status: str = "",
    shown: str = "",
    **environment: str,
) -> subprocess.CompletedProcess:
    """The job script on two stages, with Slurm's commands and `alma` replaced by ones that write down how they were
    called in folder/calls. `status`: what `alma status` does first; `shown`: the script as `scontrol show job` has
    it."""
    binaries = folder / "bin"
    if not binaries.exists():
        binaries.mkdir()
        for name in ("launch", "pipeline"):
            (folder / name).symlink_to(ROOT / name)
        for stage in ("clean", "pretrain"):
            (folder / stage).mkdir()
    tools = {
        "scontrol": (
            f'[ "$2" = job ] && {{ echo "   Command={shown}"; exit; }}; [ "$1" = show ] && {{ echo n1; echo n2; exit; }};'
            f' echo "scontrol $@" >> {folder}/calls'
        ),
        "alma": (
            f"""{status}
python3 - <<'P'
import json, os
print(json.dumps({{kind: {{"kind": kind, "state": "up to date" if os.path.exists(f"{folder}/{{kind}}/done") else "missing", "folder": f"{folder}/{{kind}}", **{says or {}}}} for kind in ("clean", "pretrain")}}))
P"""
        ),
        "srun": f'echo "srun $@" >> {folder}/calls; for last; do :; done; cd {folder}/$last; {srun}',
        "python": 'exec python3 "$@"',
        "sbatch": f'echo "sbatch $@" >> {folder}/calls',
    }
    for name, body in tools.items():
        (binaries / name).write_text(f"#!/bin/bash\n{body}\n")
        (binaries / name).chmod(0o755)
    settings = {
        "PATH": f"{binaries}:/usr/bin:/bin:{Path(sys.executable).resolve().parent}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(folder),
        **environment,
    }
    settings = {key: value for key, value in settings.items() if value}
    return subprocess.run(
        ["bash", ROOT / "launch" / "slurm" / "alma.sbatch", *options, "r.yaml", "pretrain.steps=3"],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        timeout=300,
    )


def calls(folder: Path, name: str) -> list[str]:
    return [line for line in (folder / "calls").read_text().splitlines() if line.startswith(name)]


def test_job_script_names_stages_in_order_and_layouts(tmp_path):
    answer = job(tmp_path, "touch done")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    first, second = calls(tmp_path, "srun")
    assert (
        "--nodes=1 --ntasks=1 python pipeline/cluster/rank.py pipeline/clean.py r.yaml pretrain.steps=3 --stage clean"
        in first
    )
    assert (
        "--nodes=2 --ntasks-per-node=8 python pipeline/cluster/rank.py pipeline/pretrain.py r.yaml pretrain.steps=3 --stage"
        " pretrain" in second
    )


def test_job_script_gives_slurm_the_nodes_and_the_time_of_the_recipe(tmp_path):
    """correctness 4: run.nodes and run.time, in a job and before there is one."""
    answer = job(tmp_path, "touch done", {"nodes": 4}, SLURM_JOB_NUM_NODES="2")
    assert answer.returncode == 2 and "clean" not in answer.stderr
    assert "stage pretrain asks for 4 nodes (run.nodes) and this job has 2; submit it with --nodes=4" in answer.stderr
    answer = job(tmp_path, "touch done", {"nodes": 2, "minutes": 90}, SLURM_JOB_NUM_NODES="3")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert (
        "--time=90 --signal=USR1@120 --relative=0 --nodes=2 --ntasks-per-node=8 python" in calls(tmp_path, "srun")[-1]
    )
    (tmp_path / "pretrain" / "done").unlink()
    answer = job(
        tmp_path,
        "",
        {"nodes": 4, "minutes": 2880},
        ("--gpus-per-node=8", "-pbig"),
        SLURM_JOB_ID="",
        ALMA_HOME=str(tmp_path),
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (line,) = calls(tmp_path, "sbatch")
    assert line.startswith("sbatch --nodes=4 --time=2880 --gpus-per-node=8 -pbig ")
    assert line.endswith("launch/slurm/alma.sbatch r.yaml pretrain.steps=3")


def leaves(saved: int, reason: str = "hang", code: int = 76) -> str:
    word = {"stage": "pretrain", "reason": reason, "step": saved + 7, "saved": saved, "message": f"{reason}: rank 3"}
    return f"echo '{json.dumps(word)}' > requeue.json; exit {code}"


def test_a_job_that_may_go_on_is_queued_again_until_it_makes_no_progress(tmp_path):
    job(tmp_path, "[ $last = clean ] && touch done")
    for saved, reason in ((100, "hang"), (100, "lost"), (200, "hang"), (200, "hang")):
        answer = job(tmp_path, leaves(saved, reason))
        assert answer.returncode == 0, answer.stdout + answer.stderr
    assert len(calls(tmp_path, "scontrol requeue 7")) == 4
    answer = job(tmp_path, leaves(200, "lost"))
    assert (
        answer.returncode == 76
        and "3 tries ended at step 200 without progress, the last with: lost: rank 3" in answer.stdout
    )
    answer = job(tmp_path, leaves(200), ALMA_TRIES="1")
    assert answer.returncode == 76 and "1 tries ended at step 200" in answer.stdout
    assert len(calls(tmp_path, "scontrol requeue 7")) == 4


def test_a_count_of_tries_that_was_torn_is_begun_again(tmp_path):
    """correctness 42: the machine went down while it was written."""
    job(tmp_path, "[ $last = clean ] && touch done")
    assert job(tmp_path, leaves(100)).returncode == 0
    (count,) = tmp_path.rglob("tries.json")
    count.write_text('{"tri')
    answer = job(tmp_path, leaves(100))
    assert answer.returncode == 0 and "try 1 of 3" in answer.stdout, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr and not list(tmp_path.rglob(".tries.json.*"))


def test_the_word_of_the_start_before_is_not_taken_for_this_ones(tmp_path):
    """A start that fails before its first step has not yet taken the old word away."""
    job(tmp_path, "[ $last = clean ] && touch done")
    assert job(tmp_path, leaves(100)).returncode == 0
    answer = job(tmp_path, "exit 2")
    assert (
        answer.returncode == 2
        and "left no requeue.json" in answer.stdout
        and len(calls(tmp_path, "scontrol requeue")) == 1
    )


@pytest.mark.parametrize("end", ["exit 2", "exit 1", "kill -9 $$"], ids=["mistake or spike", "exception", "killed"])
def test_a_job_without_a_word_is_not_queued_again(tmp_path, end):
    answer = job(tmp_path, end)
    assert (
        answer.returncode not in (0, 75)
        and not calls(tmp_path, "scontrol requeue")
        and "left no requeue.json" in answer.stdout
    )


def test_a_job_near_its_time_limit_is_queued_again(tmp_path):
    """SIGUSR1 to the job script: the stage is told, saves and leaves word; a stage that keeps units of work leaves
    none."""
    for end in ("exit 1", leaves(5, "signal", 75)):
        assert job(tmp_path, f"leave() {{ {end}; }}; trap leave USR1; kill -USR1 $PPID; sleep 2 & wait").returncode == 0
    assert len(calls(tmp_path, "scontrol requeue 7")) == 2


# ---- correctness 42 --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stage_without_steps_is_not_queued_again_for_ever(tmp_path):
    """The time limit comes each time before a unit is finished; with progress it goes on."""
    leave = "leave() {{ echo '{}' > requeue.json; exit 75; }}; trap leave USR1; kill -USR1 $PPID; sleep 5 & wait"
    for files in (3, 9, 9):
        word = {"stage": "clean", "reason": "signal", "signal": "SIGUSR1", "step": 0, "saved": 0, "progress": files}
        answer = job(tmp_path, leave.format(json.dumps(word)))
        assert answer.returncode == 0, answer.stdout + answer.stderr
    answer = job(tmp_path, leave.format(json.dumps(word)))
    assert answer.returncode == 75 and "3 tries ended at" in answer.stdout, answer.stdout + answer.stderr
    assert len(calls(tmp_path, "scontrol requeue 7")) == 3


@pytest.mark.slow
def test_a_stage_that_was_still_starting_at_the_limit_counts_as_a_try(tmp_path):
    """Python ends by the signal itself before alma can listen."""
    for _ in range(2):
        answer = job(tmp_path, "kill -USR1 $PPID; sleep 5 & wait; exit 138")
        assert answer.returncode == 0, answer.stdout + answer.stderr
    answer = job(tmp_path, "kill -USR1 $PPID; sleep 5 & wait; exit 138")
    assert answer.returncode == 138 and "before the stage had begun its work" in answer.stdout
    assert len(calls(tmp_path, "scontrol requeue 7")) == 2


def test_a_signal_during_status_is_not_lost(tmp_path):
    answer = job(tmp_path, "touch done", status="kill -USR1 $PPID")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert calls(tmp_path, "scontrol requeue 7") and not calls(tmp_path, "srun")
    for _ in range(2):
        answer = job(tmp_path, "touch done", status="kill -USR1 $PPID")
    assert answer.returncode == 75 and len(calls(tmp_path, "scontrol requeue 7")) == 2


def test_a_mistake_of_the_user_is_one_sentence(tmp_path):
    answer = job(tmp_path, "touch done", status="echo 'error: r.yaml: no such recipe' >&2; exit 2")
    assert answer.returncode == 2 and answer.stderr == "error: r.yaml: no such recipe\n"
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("words", ["", " r.yaml x=1"])
def test_a_job_may_be_submitted_from_any_folder(tmp_path, words):
    """Slurm runs a copy in its spool folder, and says in `scontrol show job` where it came from."""
    job(tmp_path, "touch done")
    (tmp_path / "calls").unlink()
    for stage in ("clean", "pretrain"):
        (tmp_path / stage / "done").unlink()
    for name in ("launch", "pipeline"):
        (tmp_path / name).unlink()
    program = tmp_path / "a program"
    shutil.copytree(ROOT / "launch", program / "launch")
    shutil.copytree(ROOT / "pipeline/cluster", program / "pipeline/cluster")
    answer = job(tmp_path, "touch done", shown=f"{program}/launch/slurm/alma.sbatch{words}")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"python {program}/pipeline/cluster/rank.py {program}/pipeline/clean.py r.yaml" in calls(tmp_path, "srun")[0]
    answer = job(tmp_path, "touch done")
    assert answer.returncode == 2 and "set ALMA_HOME to it" in answer.stderr


def test_a_failure_of_one_rank_is_not_queued_again(tmp_path):
    word = {"stage": "pretrain", "reason": "failed", "step": 7, "saved": 5, "message": "rank 1 failed: ValueError: x"}
    job(tmp_path, "[ $last = clean ] && touch done")
    answer = job(tmp_path, f"echo '{json.dumps(word)}' > requeue.json; exit 1")
    assert answer.returncode == 1 and "rank 1 failed: ValueError: x. Not queued again" in answer.stdout
    assert not calls(tmp_path, "scontrol requeue")


SAVES = """import os, signal, sys, time
def leave(number, frame):
    signal.signal(number, signal.SIG_IGN)  # the wrapper passes it on once more, maybe while Python shuts down
    sys.exit(75)
signal.signal({name}, leave)
{then}
time.sleep(20)
"""


@pytest.mark.parametrize(
    "program, code, noted",
    [
        ("import os; os.kill(os.getpid(), 9)", 137, "137"),
        ("raise SystemExit(1)", 1, "1"),
        ("raise SystemExit(75)", 75, None),
        (SAVES.format(name="signal.SIGUSR1", then="os.kill(os.getppid(), signal.SIGUSR1)"), 75, None),
        (SAVES.format(name="signal.SIGTERM", then="os.killpg(0, signal.SIGTERM)"), 75, None),
    ],
    ids=["killed", "failed", "stopped", "signal", "group"],
)
def test_a_rank_passes_signals_on_and_notes_how_it_ended(tmp_path, program, code, noted):
    environment = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_NUM_NODES": "2"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "ALMA_ENDED": str(tmp_path)}
    command = [sys.executable, ROOT / "pipeline/cluster/rank.py", "-c", program]
    answer = subprocess.run(command, env=environment, timeout=60, start_new_session=True)
    assert answer.returncode == code
    path = tmp_path / "rank-3"
    assert (path.read_text().split()[2] if path.exists() else None) == noted
    assert not (tmp_path / ".3").exists()


SIGNALLED = """
import os, signal, sys, time
from pathlib import Path
from pipeline.core.output import Output
from pipeline.core.stop import interruptible

output = Output(Path(sys.argv[1]), "pretrain", "pretrain", {})
output.path.mkdir(parents=True)
with interruptible(output):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
"""


@pytest.mark.parametrize("ended, reason", [("n2 41 137", "lost"), ("n2 41 1", "failed"), ("n2 41 143", "signal")])
def test_slurms_signal_after_the_end_of_another_rank_is_no_request_to_stop(tmp_path, ended, reason):
    """srun sends SIGTERM to the ranks that are left; the file of rank.py is there before."""
    (tmp_path / "ended").mkdir()
    (tmp_path / "ended/rank-1").write_text(ended)
    environment = {**os.environ, "ALMA_ENDED": str(tmp_path / "ended"), "RANK": "0", "WORLD_SIZE": "2"}
    answer = subprocess.run(
        [sys.executable, "-c", SIGNALLED, tmp_path / "run"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    word = json.loads((tmp_path / "run/requeue.json").read_text())
    assert word["reason"] == reason
    if reason != "signal":
        assert (
            word["rank"] == 1 and "rank 1 (n2, process 41)" in answer.stderr and "nothing is lost" not in answer.stderr
        )
