"""What is in launch/ and docker/ is checked by the tools that will read it."""

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_dockerfiles_pass_hadolint_and_copy_what_exists(name):
    hadolint = Path(sys.executable).with_name("hadolint")
    answer = subprocess.run([hadolint, ROOT / "docker" / name], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
    for line in (ROOT / "docker" / name).read_text().splitlines():
        if line.startswith("COPY "):
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


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "slurm").iterdir()), ids=lambda path: path.name)
def test_job_scripts_are_valid_bash_and_can_be_executed(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert path.stat().st_mode & 0o111


def test_job_script_names_stages_in_order_and_layouts(tmp_path):
    """The job script with Slurm's commands replaced by ones that write down how they were called."""
    calls = tmp_path / "calls"
    binaries = tmp_path / "bin"
    binaries.mkdir()
    states = tmp_path / "done"
    states.mkdir()
    tools = {
        "scontrol": 'echo n1; echo n2',
        "alma": f"""python3 - <<'P'
import json, os
kinds = {{"clean": "clean", "pretrain": "pretrain"}}
print(json.dumps({{n: {{"kind": k, "state": "up to date" if os.path.exists("{states}/" + n) else "missing"}} for n, k in kinds.items()}}))
P""",
        "srun": f'echo "$@" >> {calls}; for last; do :; done; touch {states}/$last',
        "python": 'if [ "$1" = -c ] && [ $# -gt 2 ]; then echo /nowhere; else exec python3 "$@"; fi',
    }
    for name, body in tools.items():
        script = binaries / name
        script.write_text(f"#!/bin/bash\n{body}\n")
        script.chmod(0o755)
    environment = {
        "PATH": f"{binaries}:/usr/bin:/bin:{Path(sys.executable).resolve().parent}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    answer = subprocess.run(["bash", ROOT / "launch" / "slurm" / "alma.sbatch", "r.yaml", "pretrain.steps=3"], env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    first, second = calls.read_text().splitlines()
    assert "--nodes=1 --ntasks=1 launch/slurm/rank.sh pipeline/clean.py r.yaml pretrain.steps=3 --stage clean" in first
    assert "--nodes=2 --ntasks-per-node=8 launch/slurm/rank.sh pipeline/pretrain.py r.yaml pretrain.steps=3 --stage pretrain" in second
