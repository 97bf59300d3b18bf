"""Other programs, in environments of their own, as independent readers of what is written here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

XLLAMACPP = "xllamacpp==2026.10.11549"  # llama.cpp, built

# For `answer`, with a GGUF file and a JSON list of texts: their ids, and the likeliest tokens after the first of them.
LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup, parameters.n_gpu_layers = sys.argv[1], 512, False, 0
server = xllamacpp.Server(parameters)

def ask(route, **body):
    request = urllib.request.Request(
        server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))

ids = [ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"] for text in json.loads(sys.argv[2])]
said = ask("/completion", prompt=ids[0], n_predict=1, n_probs=20, temperature=0.0, cache_prompt=False)
print(json.dumps({"ids": ids, "likely": said["completion_probabilities"][0]["top_logprobs"]}))
"""


def aside(folder: Path, *packages: str) -> Path:
    """The interpreter of a virtual environment with these packages, and otherwise those of this one. Skips if they
    cannot be installed."""
    import sysconfig

    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    python = folder / "bin/python"
    install = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", *packages],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if install.returncode:
        pytest.skip(f"cannot install {', '.join(packages)} separately: {install.stderr.strip().splitlines()[-1:]}")
    [site] = (folder / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text("\n".join({sysconfig.get_paths()["purelib"], *map(str, _sites())}) + "\n")
    return python


def _sites() -> list[str]:
    return [entry for entry in sys.path if entry.rstrip("/").endswith("site-packages")]


def answer(python: Path, code: str, *words) -> object:
    """The JSON that a script prints as its last line, run by another interpreter away from this repository."""
    ran = subprocess.run(
        [python, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=1200, cwd=python.parent
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])
