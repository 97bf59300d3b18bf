"""One start of a stage's job, in its batch step: `python -m pipeline.cluster.job RECIPE STAGE`, which the scripts of
`alma run --on slurm` end in (pipeline/cluster/job_files.py).

It starts the processes of the stage with srun, has them save before the time limit, and decides whether the job is
queued again (again.py): after a signal, a hang, or the loss of a process or a node, as long as there is progress; never
after an error that the user must fix. STAGE.json says how the start ended, for `alma status`.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from pipeline.cluster import again, slurm
from pipeline.cluster.job_files import log_path
from pipeline.core.checkpoint_folder import newest_step
from pipeline.core.config import StageConfig
from pipeline.core.errors import EXIT_STOPPED, EXIT_USER, UserError
from pipeline.core.files import now, write_json
from pipeline.core.graph import Node, nodes
from pipeline.core.partial_runs import finished_files
from pipeline.core.recipe import load
from pipeline.core.stage import guarded

MOST_TRIES = 3  # without progress; ALMA_TRIES overrides it
NUM_LAST_LINES = 15  # of the log of the process that failed first


class Job:
    """This start of a job. path: the recipe's file in the folder of the run's jobs."""

    def __init__(self, path: Path, node: Node):
        self.recipe, self.node, self.folder = path, node, path.parent
        self.number = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.tries = int(os.environ.get("ALMA_TRIES", MOST_TRIES))
        self.ended = (node.folder / ".ended").absolute()  # notes of rank.py
        self.srun: subprocess.Popen | None = None
        self.asked = False  # to save and be queued again
        self.cancelled = False

    def run(self) -> int:
        """Run the stage. Returns the exit code of the job, after which the jobs that need it start if it is 0."""
        signal.signal(signal.SIGUSR1, self._pass_on)
        signal.signal(signal.SIGTERM, self._note_end)
        self.node.folder.mkdir(parents=True, exist_ok=True)
        if self._was_lost_too_often():
            return 1
        (self.node.folder / "requeue.json").unlink(missing_ok=True)  # of an earlier start
        shutil.rmtree(self.ended, ignore_errors=True)
        self.ended.mkdir()
        words = srun_words(self.node, self.recipe, self.number)
        say(f"{now()} stage {self.node.name}, start {self.restarts + 1}: {' '.join(words)}")
        self._record("running", "")
        if self.asked:
            return self._after_failure(EXIT_STOPPED)
        self.srun = subprocess.Popen(words, env=environment(self.node.config, self.ended))
        if self.asked:  # the signal came before there was anything to pass it on to
            self.srun.send_signal(signal.SIGUSR1)
        code = self.srun.wait()
        return self._end("done", "", 0) if code == 0 else self._after_failure(code)

    def _pass_on(self, number, frame) -> None:
        self.asked = True
        if self.srun is not None and self.srun.poll() is None:
            self.srun.send_signal(signal.SIGUSR1)  # srun passes it on to every process; SIGTERM would end them at once

    def _note_end(self, number, frame) -> None:
        """scancel, preemption, or the loss of a node: Slurm ends the processes itself, and queues the job again if it
        is to be."""
        self.cancelled = True

    def _was_lost_too_often(self) -> bool:
        """Count the start before this one if Slurm ended it before it could decide anything: its node was lost, or it
        was preempted. Whether it was one too many."""
        counted = self.node.folder / "tries.json"
        if self.restarts == 0:
            counted.unlink(missing_ok=True)
            return False
        before = self.restarts - 1
        if again.read_record(counted, "tries").get("start") == before:
            return False
        message = "Slurm ended the start before this one: a node was lost, or the job was preempted"
        marker = {"reason": "lost", "message": message} | progress(self.node)
        may_start, text = again.count(self.node.folder, self.tries, marker, before)
        if not may_start:
            say(text)
            self._end("failed", text, 1)
        return not may_start

    def _after_failure(self, code: int) -> int:
        failed = again.ended_ranks(self.ended)
        if failed:
            say(self._first_error(failed[0]))
        if self.cancelled:
            return self._end("cancelled", "ended by Slurm: cancelled, preempted, or a node was lost", EXIT_STOPPED)
        if any(entry["code"] == EXIT_USER for entry in failed):
            code = EXIT_USER
        may_start, text = again.decide(self.node.folder, self.tries, self.asked, self.ended, progress(self.node))
        say(text)
        if not may_start:
            return self._end("failed", self._reason(failed, text), code)
        self._record("queued again", text)
        answer = slurm.call("scontrol", "requeue", self.number)
        if answer.returncode == 0:
            return EXIT_STOPPED
        text = f"the job cannot be queued again ({slurm.message_of(answer)}); submit it again to continue"
        say(text)
        return self._end("failed", text, EXIT_STOPPED)

    def _first_error(self, entry: dict) -> str:
        """The end of the log of the process that failed first."""
        path = log_path(self.folder, self.node.name, self.number, entry["rank"])
        lines = last_lines(path, NUM_LAST_LINES)
        ending = "was killed" if entry["code"] > 128 else "failed"
        head = f"rank {entry['rank']} ({entry['host']}, process {entry['process']}) {ending} with code {entry['code']}"
        return "\n".join([f"{head}; the end of {path}:", *(f"    {line}" for line in lines)])

    def _reason(self, failed: list[dict], text: str) -> str:
        """Why the stage failed, on one line: its own message for the user, if it has one."""
        if failed and failed[0]["code"] <= 128:
            path = log_path(self.folder, self.node.name, self.number, failed[0]["rank"])
            lines = last_lines(path, NUM_LAST_LINES)
            errors = [line for line in lines if line.startswith("error: ")] or lines[-1:]
            if errors:
                return errors[-1].removeprefix("error: ")
        return text

    def _end(self, state: str, reason: str, code: int) -> int:
        self._record(state, reason, code)
        shutil.rmtree(self.ended, ignore_errors=True)
        if state == "done":
            (self.node.folder / "tries.json").unlink(missing_ok=True)
        return code

    def _record(self, state: str, reason: str, code: int | None = None) -> None:
        record = {"job": self.number, "restarts": self.restarts, "state": state, "reason": reason, "code": code}
        record |= {"time": now(), "nodes": os.environ.get("SLURM_JOB_NODELIST", "")}
        write_json(self.folder / f"{self.node.name}.json", record)


def progress(node: Node) -> dict:
    """How far a stage is, as its marker would say (pipeline/core/stop.py)."""
    runs = list(node.folder.glob("*.partial"))
    saved = max((newest_step(run) for run in runs), default=0)
    if node.config.HAS_STEPS:
        return {"saved": saved, "progress": saved, "from": f"step {saved}"}
    num_files = sum(finished_files(run) for run in runs)
    return {"saved": saved, "progress": num_files, "from": f"{num_files} finished files"}


def srun_words(node: Node, recipe: Path, job: str) -> list[str]:
    """The command that starts the stage's processes on the job's nodes."""
    run, resources = node.config.run, node.config.resources
    log = log_path(recipe.parent, node.name, job, "%t")
    words = ["srun", "--kill-on-bad-exit=1", f"--nodes={run.nodes or 1}", f"--ntasks-per-node={run.processes}"]
    # srun does not take this over from sbatch since Slurm 22.05, and would give each process one core.
    words.append(f"--cpus-per-task={cpus_per_process(node.config)}")
    words += [f"--output={log}", "--open-mode=append"]
    python = [sys.executable, "-P"]
    folders = list(dict.fromkeys([os.getcwd(), str(recipe.parent.parent), *resources.mounts]))
    if resources.container and resources.container.endswith(".sif"):
        gpus = ["--nv"] if node.config.gpus_per_node else []
        mounts = [f"--bind={folder}" for folder in folders]
        python = ["apptainer", "exec", *gpus, *mounts, f"--pwd={os.getcwd()}", resources.container, "python", "-P"]
    elif resources.container:
        words.append(f"--container-image={resources.container}")
        words.append(f"--container-mounts={','.join(f'{folder}:{folder}' for folder in folders)}")
        words.append(f"--container-workdir={os.getcwd()}")
        python = ["python", "-P"]
    program = [*python, "-m", "pipeline.cluster.rank", "-P", "-m", f"pipeline.{node.config.kind}"]
    return [*words, *program, str(recipe), "--stage", node.name]


def cpus_per_process(config: StageConfig) -> int:
    """Cores of each process: those of the recipe, or its share of what the job has on a node."""
    available = int(os.environ.get("SLURM_CPUS_ON_NODE", 1))
    return config.resources.cpus or max(1, available // config.run.processes)


def environment(config: StageConfig, ended: Path) -> dict[str, str]:
    """Environment of the processes: where they meet, their threads, and where rank.py leaves notes."""
    answer = slurm.call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
    if answer.returncode:
        raise UserError(f"scontrol show hostnames failed: {slurm.message_of(answer)}")
    threads = config.run.threads or cpus_per_process(config)
    return os.environ | {
        "MASTER_ADDR": answer.stdout.split()[0],
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
        "OMP_NUM_THREADS": str(threads),
        "ALMA_ENDED": str(ended),
    }


def last_lines(path: Path, number: int) -> list[str]:
    """The last lines of a log that are not empty."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-number:]


def say(text: str) -> None:
    print(text, flush=True)


def main(words: list[str]) -> int:
    path, stage = Path(words[0]), words[1]
    code = 0

    def start() -> None:
        nonlocal code
        code = Job(path, nodes(load(path))[stage]).run()

    return guarded(start) or code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
