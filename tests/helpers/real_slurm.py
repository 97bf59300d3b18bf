"""A real Slurm on this machine: slurmctld, munged, and one slurmd per node, each of which believes that it has a host
of its own.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. Nothing outside of the folder is written,
everything listens on 127.0.0.1, and nothing needs systemd or cgroups. What it is not: memory limits are not enforced,
accounts and qualities of service are accepted and ignored, GPUs are only names.

Each slurmd has its own UTS namespace, so that the hostname in it is that of the node, and its own mount namespace, in
which /etc/hosts has the names of all nodes.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.core.processes import die_with_parent

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"

CONFIG = """\
ClusterName=alma
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a job that is queued again waits until its credential has expired: two minutes by default
AuthInfo=socket={folder}/munge/socket,cred_expire=6
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# nodes may claim more cores and memory than this machine has
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_continue
PriorityType=priority/basic
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=10
KillWait=3
DefMemPerCPU=512
MinJobAge=7200
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmctldDebug=info
SlurmdDebug=info
GresTypes=gpu
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=cpu Nodes={names} MaxTime=INFINITE DefaultTime=60 State=UP
"""


def reason_to_skip() -> str | None:
    """Why no Slurm can be started here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "starting a Slurm needs root on Linux"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        return f"{', '.join(missing)} not found; on Debian: {PACKAGES}"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "this container may not create namespaces"
    return None


class RealSlurm:
    """A cluster of nodes n1, n2, ... with `cpus` cores and 8 GB each, as a context. `environment` is for the programs
    that are to find it."""

    def __init__(self, folder: Path, nodes: int, cpus: int = 4):
        self.folder, self.names = folder, [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus, self.port = cpus, _free_ports(nodes + 1)
        self.daemons: dict[str, subprocess.Popen] = {}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self):
        for name in ("state", "munge", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True)
        self._configure()
        try:
            self._start("munged", self._munged())
            wait_for((self.folder / "munge/socket").exists, 20, "munged")
            self._start("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
            for node in self.names:
                self.start_node(node)
            wait_for(lambda: len(self.nodes_in("idle")) == len(self.names), 60, "nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def _munged(self) -> list:
        munge = self.folder / "munge"
        self.folder.chmod(0o755)
        munge.chmod(0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return ["munged", "--foreground", "--force", *(f"--{name}={munge / file}" for name, file in files.items())]

    def _configure(self) -> None:
        nodes = []
        for number, node in enumerate(self.names, 1):
            place = f"NodeHostname={node} NodeAddr=127.0.0.1 Port={self.port + number}"
            nodes.append(f"NodeName={node} {place} CPUs={self.cpus} RealMemory=8192 Gres=gpu:fake:2 State=UNKNOWN")
        values = {"host": socket.gethostname(), "port": self.port, "folder": self.folder, "nodes": "\n".join(nodes)}
        names = ",".join(self.names)
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values, names=names))
        for number in range(2):  # a GPU must be a device
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"NodeName={names} Name=gpu Type=fake File={self.folder}/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        (self.folder / "plugstack.conf").write_text("")
        hosts = "".join(f"127.0.0.1 {node}\n" for node in self.names)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text().rstrip() + "\n" + hosts)

    def _start(self, name: str, words: list) -> None:
        parent = os.getpid()
        with open(self.folder / f"{name}.out", "a") as log:
            self.daemons[name] = subprocess.Popen(
                words,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment},
                preexec_fn=lambda: die_with_parent(parent),
            )

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        script = 'mount --bind "$3" /etc/hosts && hostname "$1" && exec slurmd -D -f "$2" -N "$1"'
        words = [node, self.environment["SLURM_CONF"], str(self.folder / "hosts")]
        self._start(node, ["unshare", "--uts", "--mount", "sh", "-c", script, "sh", *words])

    def lose_node(self, node: str) -> None:
        """SIGKILL for slurmd and for everything that runs on the node, as if its power had failed."""
        for pid in self.processes_of(node):
            os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def processes_of(self, node: str) -> list[int]:
        """Processes in the UTS namespace of a node."""
        space = os.readlink(f"/proc/{self.daemons[node].pid}/ns/uts")
        found = []
        for path in Path("/proc").glob("[0-9]*/ns/uts"):
            try:
                if os.readlink(path) == space:
                    found.append(int(path.parts[2]))
            except OSError:  # it has ended
                continue
        return found

    def set_down(self, node: str) -> None:
        """What a health check does: Slurm ends the jobs of the node."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def resume_nodes(self) -> None:
        """Every node is up again."""
        for node in self.names:
            if node not in self.daemons or self.daemons[node].poll() is not None:
                self.start_node(node)
        for node in self.nodes_in("down,drain,fail"):
            self.run("scontrol", "update", f"nodename={node}", "state=resume")
        wait_for(lambda: len(self.nodes_in("idle,mix,alloc")) == len(self.names), 60, "nodes")

    def nodes_in(self, states: str) -> set[str]:
        words = ["sinfo", "--noheader", "--Node", "--partition=main", f"--states={states}", "--format=%N"]
        answer = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **self.environment})
        return set(answer.stdout.split())

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def run(self, *words: str) -> str:
        """Output of one of Slurm's commands."""
        answer = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **self.environment})
        assert answer.returncode == 0, f"{' '.join(words)}: {answer.stderr}"
        return answer.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState, Restarts, Reason, NodeList."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def hosts(self, nodes: str) -> list[str]:
        """Names of nodes in Slurm's short form, such as n[1-3]."""
        return self.run("scontrol", "show", "hostnames", nodes).split()

    def wait_for_job(self, number: str, seconds: float) -> str:
        """Wait until a job has ended; its last state."""
        live = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"}
        wait_for(lambda: self.job(number)["JobState"] not in live, seconds, f"job {number}: {self.job(number)}")
        return self.job(number)["JobState"]

    def cancel_all(self) -> None:
        jobs = self.run("squeue", "--noheader", "--format=%A").split()
        if jobs:
            self.run("scancel", *jobs)
            wait_for(lambda: not self.run("squeue", "--noheader", "--format=%A").split(), 30, "scancel")

    def stop(self) -> None:
        """End the jobs, then the daemons that this object started."""
        try:
            if self.daemons.get("slurmctld") and self.daemons["slurmctld"].poll() is None:
                self.cancel_all()
        except AssertionError as error:
            print(f"the jobs could not be cancelled: {error}")
        for node in [name for name in self.names if name in self.daemons]:
            if self.daemons[node].poll() is None:
                self.lose_node(node)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nothing listens on."""
    for first in range(17000, 30000, count):
        if all(_is_free(first + number) for number in range(count)):
            return first
    raise AssertionError("no free ports from 17000 to 30000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
