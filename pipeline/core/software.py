"""What made an output: versions of packages, and the commit."""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "trl",
    "datasets",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "pyarrow",
)


def software() -> dict:
    """Versions and commit that made an output. No paths, no environment: manifests get published."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    here = Path(__file__).parent
    answer = (
        subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
        )
        if shutil.which("git")
        else None
    )
    if answer and answer.returncode == 0:
        versions["git"] = answer.stdout.strip()
    return versions
