"""One start of a stage's job, in its batch step: `python -m pipeline.cluster.job RECIPE STAGE`, with --restart or
--fork as the stage is to get them, which the scripts of `alma run --on slurm` end in (pipeline/cluster/job_files.py).

It looks at the nodes (preflight.py), starts the processes of the stage with srun, has them save before the time limit,
and decides whether the job is queued again (again.py): after a signal, a hang, an error of a GPU or of the network, or
the loss of a process or a node, as long as there is progress; never after an error that the user must fix. STAGE.json
says how the start ended, for `alma status`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.cluster import again, preflight, slurm
from pipeline.cluster.job_files import LEAD, log_path, pattern_of
from pipeline.cluster.rank_logs import RankLogs
from pipeline.core.chain import can_fork
from pipeline.core.checkpoint_folder import newest_step
from pipeline.core.config import StageConfig
from pipeline.core.errors import EXIT_STOPPED, EXIT_USER
from pipeline.core.files import now, write_json
from pipeline.core.graph import Node, ancestors, nodes
from pipeline.core.pace import seconds_to_stop
from pipeline.core.partial_runs import finished_files
from pipeline.core.recipe import load
from pipeline.core.stage import guarded
from pipeline.core.status import examine_one

MOST_TRIES = 3  # without progress; ALMA_TRIES overrides it
PREFLIGHT_SECONDS = 240  # for the look at the nodes; torch may be loaded from a slow file system
LOOK_EVERY = 10.0  # seconds between two looks at the clock
MARGIN = 30.0  # seconds that the end of the processes and the queueing take after the last checkpoint


class Job:
    """This start of a job. path: the recipe's file in the folder of the run's jobs. options: of the stage, --restart or
    --fork."""

    def __init__(self, path: Path, node: Node, options: Sequence[str] = ()):
        self.recipe, self.node, self.folder = path, node, path.parent
        self.options = list(options)
        self.number = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.tries = int(os.environ.get("ALMA_TRIES", MOST_TRIES))
        self.ended = (node.folder / ".ended").absolute()  # notes of rank.py
        self.logs = RankLogs(lambda rank: log_path(self.folder, node.name, self.number, rank), node.config.run.world)
        self.limit = slurm.seconds_left(self.number)
        self.ends = time.monotonic() + self.limit
        self.srun: subprocess.Popen | None = None
        self.before: str | None = None  # the output of the stage before the first start of this job
        self.found: str | None = None  # the output of the stage before this start
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
        self._restart_once()
        self.found = published_output(self.node)
        say(f"{now()} stage {self.node.name}, start {self.restarts + 1}, on {os.environ['SLURM_JOB_NODELIST']}")
        self._record("running", "")
        bad_nodes = self._look_at_nodes()
        if self.asked or self.cancelled:
            return self._after_failure(EXIT_STOPPED)
        if bad_nodes:
            return self._after_bad_nodes(bad_nodes)
        words = [*srun_words(self.node, self.recipe, self.number), *self.options]
        say(f"{now()} {' '.join(words)}")
        self.srun = subprocess.Popen(words, env=environment(self.node.config, self.ended))
        if self.asked:  # the signal came before there was anything to pass it on to
            self.srun.send_signal(signal.SIGUSR1)
        code = self._wait()
        return self._end("done", "", 0) if self._is_done(code) else self._after_failure(code)

    def _restart_once(self) -> None:
        """Drop --restart if an earlier start of this job has published what it made. One that was ended before that is
        resumed by --restart (pipeline/core/output.py)."""
        before = again.read_record(self.folder / f"{self.node.name}.json", "before")
        is_first = self.restarts == 0 or before.get("job") != self.number
        self.before = published_output(self.node) if is_first else before["before"]
        if "--restart" in self.options and published_output(self.node) != self.before:
            self.options.remove("--restart")

    def _wait(self) -> int:
        """Wait for the processes of the stage, and have them save in time."""
        while True:
            try:
                return self.srun.wait(timeout=LOOK_EVERY)
            except subprocess.TimeoutExpired:
                self._stop_in_time()

    def _is_done(self, code: int) -> bool:
        """Whether the stage has done its work. srun ends with 0, too, when Slurm ends the job and processes do not
        answer in time ("forcing job termination"): no exit code has reached it."""
        output = published_output(self.node)
        return code == 0 and output is not None and not (self.cancelled and output == self.found)

    def _stop_in_time(self) -> None:
        """Ask the processes to save if the time limit is nearer than twice what a step and a checkpoint took at most.
        Slurm asks LEAD seconds before the limit, whatever they take. The first half of the time is always for work."""
        left = self.ends - time.monotonic()
        needed = max((seconds_to_stop(run) or 0 for run in self.node.folder.glob("*.partial")), default=0)
        if not self.asked and LEAD < left < min(2 * needed + MARGIN, self.limit / 2):
            say(f"{now()} {left:.0f} s before the time limit: a step and a checkpoint took up to {needed:.0f} s")
            self._pass_on(signal.SIGUSR1, None)

    def _pass_on(self, number, frame) -> None:
        self.asked = True
        if self.srun is not None and self.srun.poll() is None:
            self.srun.send_signal(signal.SIGUSR1)  # srun passes it on to every process; SIGTERM would end them at once

    def _note_end(self, number, frame) -> None:
        """scancel, preemption, or the loss of a node: Slurm ends the processes itself, and queues the job again if it
        is to be."""
        self.cancelled = True

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def _look_at_nodes(self) -> dict[str, str]:
        """Node -> what is wrong with it, for the nodes that are not fit for the stage."""
        config = self.node.config
        num_nodes = config.run.nodes or 1
        wanted = config.resources.preflight
        if wanted is False or (wanted is None and num_nodes == 1 and not config.gpus_per_node):
            return {}
        notes = self.ended / "preflight"
        notes.mkdir()
        options = [f"--nodes={num_nodes}", "--ntasks-per-node=1"]
        options.append(f"--cpus-per-task={cpus_per_process(config) * config.run.processes}")
        program = ["-m", "pipeline.cluster.preflight", str(notes), str(self.node.folder.absolute())]
        words = step_words(self.node, self.recipe, options, [*program, str(config.gpus_per_node)])
        self.srun = subprocess.Popen(words, env=environment(config, self.ended))
        try:
            self.srun.wait(timeout=PREFLIGHT_SECONDS)
        except subprocess.TimeoutExpired:
            self.srun.kill()
            self.srun.wait()
        bad = preflight.problems(notes, slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])[:num_nodes])
        for name, problem in bad.items():
            say(f"{now()} node {name} is not fit: {problem}")
        return bad

    def _after_bad_nodes(self, bad: dict[str, str]) -> int:
        text = "; ".join(f"node {name}: {problem}" for name, problem in bad.items())
        advice = f"exclude it (resources.exclude: {','.join(bad)}), or have its administrators look at it"
        if not self.node.config.resources.exclude_failed:
            return self._end("failed", f"{text}; {advice}, then submit again", 1)
        marker = {"reason": "preflight", "message": text} | progress(self.node)
        may_start, text = again.count(self.node.folder, self.tries, marker)
        say(text)
        return self._queue_again(text, list(bad)) if may_start else self._end("failed", text, 1)

    def _exclude(self, names: list[str]) -> None:
        """Have the next start of this job avoid some nodes."""
        answer = slurm.call_patiently("scontrol", "--oneliner", "show", "job", self.number)
        before = re.search(r"\bExcNodeList=(\S+)", answer.stdout)
        listed = [before[1]] if before and before[1] != "(null)" else []
        nodes_text = ",".join(dict.fromkeys([*listed, *names]))
        answer = slurm.call_patiently("scontrol", "update", f"JobId={self.number}", f"ExcNodeList={nodes_text}")
        done = f"(Slurm refused it: {slurm.message_of(answer)})" if answer.returncode else ""
        say(f"the next start avoids {nodes_text} {done}".rstrip())

    # ---- the end of a start ------------------------------------------------------------------------------------------

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
        if code == 0:
            code, message = 1, "srun ended before the processes of the stage, and nothing is published"
            marker = {"reason": "lost", "message": message} | progress(self.node)
            may_start, text = again.count(self.node.folder, self.tries, marker)
        else:
            may_start, text = again.decide(self.node.folder, self.tries, self.asked, self.ended, progress(self.node))
        say(text)
        if not may_start:
            return self._end("failed", self._reason(failed, text), code)
        marker = again.read_record(self.node.folder / "requeue.json", "host")
        has_bad_node = self.node.config.resources.exclude_failed and marker.get("reason") == "device"
        return self._queue_again(text, [marker["host"]] if has_bad_node else [])

    def _queue_again(self, text: str, excluded: list[str]) -> int:
        """Put the job back into the queue, for nodes other than `excluded`; Slurm then ends this process, too."""
        self._record("queued again", text)
        answer = slurm.call_patiently("scontrol", "requeue", self.number)
        if answer.returncode == 0:
            if excluded:  # only of a job that waits can the nodes be changed
                self._exclude(excluded)
            return EXIT_STOPPED
        text = f"the job cannot be queued again ({slurm.message_of(answer)}); submit it again to continue"
        say(text)
        return self._end("failed", text, EXIT_STOPPED)

    def _first_error(self, entry: dict) -> str:
        """The end of the log of the process that failed first, and the first error of every process. entry: of the
        processes that ended with an error; the one that caused it may still have been ending when Slurm ended it."""
        rank, ending = entry["rank"], "was killed" if entry["code"] > 128 else "failed"
        head = f"rank {rank} ({entry['host']}, process {entry['process']}) {ending} with code {entry['code']}"
        marker = again.read_record(self.node.folder / "requeue.json", "host")
        if marker and entry["code"] <= 128:
            rank, head = marker["rank"], marker["message"]
        lines = [f"{head}; the end of {self.logs.path_of(rank)}:", *(f"    {line}" for line in self.logs.end(rank))]
        errors = self.logs.summary()
        if errors:
            lines += ["the first error of each process:", *(f"    {line}" for line in errors)]
        return "\n".join(lines)

    def _reason(self, failed: list[dict], text: str) -> str:
        """Why the stage failed, on one line: its own message for the user, if it has one."""
        if failed and failed[0]["code"] <= 128:
            lines = self.logs.end(failed[0]["rank"])
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
        record |= {"before": self.before, "time": now(), "nodes": os.environ.get("SLURM_JOB_NODELIST", "")}
        write_json(self.folder / f"{self.node.name}.json", record)


def published_output(node: Node) -> str | None:
    """What tells the published output of a stage from one that replaces it, even if it has the same content."""
    try:
        manifest = (node.folder / "current" / "manifest.json").stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return f"{manifest.st_ino} {manifest.st_mtime_ns}"


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
    run = node.config.run
    options = ["--kill-on-bad-exit=1", f"--nodes={run.nodes or 1}", f"--ntasks-per-node={run.processes}"]
    # srun does not take this over from sbatch since Slurm 22.05, and would give each process one core.
    options.append(f"--cpus-per-task={cpus_per_process(node.config)}")
    log = log_path(recipe.parent, node.name, job, "%t")
    options += [f"--output={pattern_of(log)}", "--open-mode=append"]
    program = ["-m", "pipeline.cluster.rank", "-P", "-m", f"pipeline.{node.config.kind}"]
    return step_words(node, recipe, options, [*program, str(recipe), "--stage", node.name])


def step_words(node: Node, recipe: Path, options: list[str], program: list[str]) -> list[str]:
    """A command that runs a program of Python on nodes of the job, in the container if the stage has one."""
    resources = node.config.resources
    words = ["srun", *options]
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
    return [*words, *python, *program]


def cpus_per_process(config: StageConfig) -> int:
    """Cores of each process: those of the recipe, or its share of what the job has on a node."""
    available = int(os.environ.get("SLURM_CPUS_ON_NODE", 1))
    return config.resources.cpus or max(1, available // config.run.processes)


def environment(config: StageConfig, ended: Path) -> dict[str, str]:
    """Environment of the processes: where they meet, their threads, and where rank.py leaves notes."""
    threads = config.run.threads or cpus_per_process(config)
    return os.environ | {
        "MASTER_ADDR": slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])[0],
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
        "OMP_NUM_THREADS": str(threads),
        "ALMA_ENDED": str(ended),
    }


def say(text: str) -> None:
    print(text, flush=True)


def fork_is_possible(graph: dict[str, Node], stage: str) -> bool:
    """Whether a run of another recipe has a checkpoint for a stage. In the first start; later ones resume."""
    for name in graph:
        if name in ancestors(graph, [stage]):
            examine_one(graph[name], graph, running=False)
    return can_fork(graph[stage], graph, named=False)


def main(words: list[str]) -> int:
    path, stage, *options = words
    code = 0

    def start() -> None:
        nonlocal code
        graph = nodes(load(path))
        if "--fork" in options and not fork_is_possible(graph, stage):
            options.remove("--fork")
        code = Job(Path(path), graph[stage], options).run()

    return guarded(start) or code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
