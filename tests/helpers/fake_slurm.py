"""Slurm's commands as small programs on the PATH: they check the words that they are given as the real ones do, note
them, and answer from files."""

import os
import sys
from pathlib import Path

PROGRAM = """#!/usr/bin/python3 -SE
import os, pathlib, re, sys
here = pathlib.Path(__file__).parent
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with (here / "calls").open("a") as file:
    file.write(" ".join([name, *words]) + "\\n")
SBATCH = {"parsable", "test-only", "dependency", "kill-on-invalid-dep"}
SCRIPT = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "exclusive", "mem", "time", "partition", "account",
    "qos", "constraint", "exclude", "job-name", "chdir", "output", "open-mode", "signal", "requeue", "reservation"}
def refuse(text, code=1):
    print(f"{name}: error: {text}", file=sys.stderr)
    sys.exit(code)
def answer(file, default=""):
    path = here / file
    sys.stdout.write(path.read_text() if path.exists() else default)
options = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("-")]
if (here / f"{name}.fails").exists():
    refuse((here / f"{name}.fails").read_text())
if name == "sbatch":
    unknown = set(options) - SBATCH
    if unknown:
        refuse(f"unrecognized option {unknown}")
    text = pathlib.Path(words[-1]).read_text()
    if not text.startswith("#!"):
        refuse("This does not look like a batch script")
    for line in re.findall("^#SBATCH (.*)", text, re.M):
        if line.removeprefix("--").partition("=")[0] not in SCRIPT:
            refuse(f"unrecognized option {line}")
    refused = here / "refused"
    if refused.exists() and refused.read_text().strip() in words[-1] and "test-only" not in options:
        refuse("Batch job submission failed: Job violates accounting/QOS policy")
    if "test-only" not in options:
        number = 100 + len((here / "calls").read_text().split("sbatch --parsable")) - 1
        answer("sbatch.txt")
        print(f"{number};mini")
elif name == "sinfo":
    if options != ["noheader", "exact", "format"] or words[-1] != "--format=%P|%a|%l|%c|%m|%G|%D":
        refuse("unexpected words")
    answer("sinfo.txt", "main*|up|infinite|4|8192|gpu:fake:4|2\\n")
elif name == "squeue" and words[-1] == "--format=%L":
    answer("left.txt", "UNLIMITED\\n")
elif name == "squeue":
    if options != ["noheader", "states", "jobs", "format"] or "--states=all" not in words or words[-1] != "--format=%i|%T|%r":
        refuse("unexpected words")
    answer("squeue.txt")
elif name == "sacct":
    if (here / "sacct.txt").exists():
        answer("sacct.txt")
    else:
        refuse("Slurm accounting storage is disabled")
elif name == "scontrol":
    if words[:3] == ["--oneliner", "show", "nodes"]:
        answer("nodes.txt", "NodeName=n1 NodeAddr=127.0.0.1 State=IDLE\\nNodeName=n2 NodeAddr=127.0.0.1 State=IDLE\\n")
    elif words[:2] == ["show", "hostnames"]:
        print("n1\\nn2")
    elif words[:3] == ["--oneliner", "show", "job"]:
        answer("job.txt", "JobId=7 ExcNodeList=(null) Restarts=0\\n")
    elif words[0] not in ("requeue", "update"):
        refuse("unexpected words")
elif name == "srun":
    script = "srun.sh"
    if "pipeline.cluster.preflight" in words:
        script = "preflight.sh"
    elif "--kill-on-bad-exit=1" not in words:
        refuse("unexpected words")
    os.execv("/bin/bash", ["bash", str(here / script), *words])
elif name != "scancel":
    refuse("no such program")
"""
NAMES = ("sbatch", "sinfo", "squeue", "sacct", "scontrol", "scancel", "srun")


class FakeSlurm:
    """A folder with the programs. `calls(name)` are the command lines so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name in NAMES:
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)
        self.path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def calls(self, name: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{name} ")]
