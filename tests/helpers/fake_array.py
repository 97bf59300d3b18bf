"""sbatch, squeue and scancel as small programs that run an array job on this machine."""

from pathlib import Path

# sbatch starts the script for each task of the array and says a number; squeue lists the job while one of them lives.
SBATCH = """#!/usr/bin/env python3
import os, pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")]
script = words[len(options):]
tasks = int(next(word for word in options if word.startswith("--array=0-")).removeprefix("--array=0-")) + 1
output = next(word for word in options if word.startswith("--output=")).removeprefix("--output=")
(here / "calls").open("a").write(" ".join(words) + "\\n")
for task in range(tasks):
    with open(output.replace("%a", str(task)), "w") as log:
        process = subprocess.Popen(["bash", *script], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "SLURM_ARRAY_TASK_ID": str(task)})
    (here / "pids").open("a").write(f"{process.pid}\\n")
print("4711;cluster")
"""
SQUEUE = """#!/usr/bin/env python3
import pathlib
for pid in (pathlib.Path(__file__).parent / "pids").read_text().split():
    path = pathlib.Path("/proc") / pid / "stat"
    if path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z":
        print("4711 running")
"""
SCANCEL = """#!/usr/bin/env python3
import os, pathlib, signal
for pid in (pathlib.Path(__file__).parent / "pids").read_text().split():
    try:
        os.kill(int(pid), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def write_programs(folder: Path) -> None:
    """The three programs, in a folder for the PATH."""
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
