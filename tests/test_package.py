"""The wheel and the sdist: built as for users, installed away from the repository, and used there.

By default the fresh environment borrows the dependencies of this one. With ALMA_WHEEL_PYTHON, as `make test-wheel` sets
it, that interpreter gets an environment of its own and pip installs the dependencies of the wheel.
"""

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fake_array import write_programs
from paths import ROOT

from pipeline.core import shipped_recipes

pytestmark = pytest.mark.slow
RECIPE = """
name: mine
model: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
stages:
  clean: {sources: {text: {path: text.jsonl}}, holdout: 0.1, filters: {max_repeated_shingles: 1.0}}
  tokenizer: {algorithm: byte-bpe, vocab_size: 320, sample_bytes: 100_000}
  pack: {workers: 1}
  pretrain:
    sequence_length: 32
    batch_size: 8
    steps: 4
    precision: fp32
    heldout_rows: 8
    run: {processes: 2}
  export: {}
"""


def run(command: list, folder: Path, code: int = 0, **environment: str) -> str:
    """Output of a command; without the repository or its environment on any path."""
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own |= {"OMP_NUM_THREADS": "1", **environment}
    answer = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=1200)
    text = answer.stdout + answer.stderr
    assert answer.returncode == code, f"{command} ended with {answer.returncode}:\n{text[-4000:]}"
    return text


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("build")
    names = run(["git", "ls-files", "pyproject.toml", "README.md", "LICENSE", "pipeline", "recipes"], ROOT).splitlines()
    for name in names:
        (folder / "alma" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "alma" / name).symlink_to(
            (ROOT / name).resolve() if not (ROOT / name).is_symlink() else os.readlink(ROOT / name)
        )
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "alma"], folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_the_wheel_has_every_file_of_the_package_and_the_recipes(archives):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = set(run(["git", "ls-files", "pipeline", "recipes"], ROOT).splitlines()) - {"pipeline/recipes"}
    wanted = {f"pipeline/{name}" if name.startswith("recipes/") else name for name in files}
    assert packed == wanted - {"pipeline/recipes/schema.json"}


@pytest.fixture(scope="module")
def environment(archives, tmp_path_factory) -> Path:
    """bin/ of a fresh environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    python = os.environ.get("ALMA_WHEEL_PYTHON")
    run([python or sys.executable, "-m", "venv", folder / "venv"], folder)
    own = folder / "venv/bin/python"
    pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if python:
        constraints = ["-c", ROOT / "constraints.txt"]
        run([*pip, *constraints, "torch", "numpy"], folder)
        run([*pip, *constraints, archives["wheel"]], folder)
    else:
        purelib = run([own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
        borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
        (Path(purelib) / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
        run([*pip, "--no-deps", "--force-reinstall", archives["wheel"]], folder)
    where = run([own, "-c", "import pipeline; print(pipeline.__file__)"], folder)
    assert str(folder) in where, where
    return folder / "venv/bin"


def test_shipped_recipes_are_found_in_any_folder(environment, tmp_path):
    alma = environment / "alma"
    listed = run([alma, "recipe", "list"], tmp_path).splitlines()
    assert [line.split()[0] for line in listed] == shipped_recipes.names()
    assert "clean        missing" in run([alma, "status", "quickstart"], tmp_path)
    run([alma, "recipe", "copy", "mistral-7b"], tmp_path)
    assert (tmp_path / "mistral-7b.yaml").read_bytes() == (ROOT / "recipes/mistral-7b.yaml").read_bytes()
    checked = run([alma, "recipe", "check", "mistral-7b.yaml"], tmp_path)  # it extends sources/text.yaml
    assert "5 stages, every key is known" in checked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mistral-7b.yaml"]


def write_inputs(folder: Path) -> None:
    (folder / "mine.yaml").write_text(RECIPE)
    draw = random.Random(0)
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(200):
            words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(40)]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def test_an_array_job_is_made_from_the_installed_package(environment, tmp_path):
    """Its script is not in the repository, and its workers find the package without it."""
    write_inputs(tmp_path)
    write_programs(tmp_path / "bin")
    words = [environment / "alma", "run", "mine.yaml", "clean"]
    run(words, tmp_path)
    words += ["clean.executor=slurm", "clean.workers=2", "output=many"]
    run(words, tmp_path, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert len((tmp_path / "bin/calls").read_text().splitlines()) == 1
    runs = [tmp_path / output / "mine/clean/current/manifest.json" for output in ("runs", "many")]
    one, many = (json.loads(path.read_text())["digest"] for path in runs)
    assert one == many


def test_a_chain_runs_from_the_installed_package(environment, tmp_path):
    write_inputs(tmp_path)
    alma = environment / "alma"
    text = run([alma, "run", "mine.yaml"], tmp_path, ACCELERATE_USE_CPU="true")
    assert "logits differ by" in text and (tmp_path / "runs/mine/export/current/model.safetensors").is_file()
    states = json.loads(run([alma, "status", "mine.yaml", "--json"], tmp_path))
    assert {state["state"] for state in states.values()} == {"up to date"}
    # One stage by a launcher: the module in place of the script's path.
    launched = [environment / "python", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launched += ["--main_process_port", "0", "-m", "pipeline.pretrain", "mine.yaml", "output=launched"]
    run([alma, "run", "mine.yaml", "pack", "output=launched"], tmp_path)
    run(launched, tmp_path, ACCELERATE_USE_CPU="true")
    manifests = [tmp_path / runs / "mine/pretrain/current/manifest.json" for runs in ("runs", "launched")]
    digests = [json.loads(path.read_text())["digest"] for path in manifests]
    assert digests[0] == digests[1]
