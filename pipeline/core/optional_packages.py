"""Packages that only some recipes need. What is missing is reported before the first stage runs."""

import importlib.util

from pipeline.core.errors import UserError

# Importable name -> extra of alma that installs it.
EXTRAS = {
    "deepspeed": "deepspeed",
    "datasets": "datasets",
    "bitsandbytes": "qlora",
    "compressed_tensors": "quantized",
    "torchao": "fp8",
    "starlette": "serve",
    "uvicorn": "serve",
    "plotly": "report",
    "lm_eval": "eval",
    "modelscope": "modelscope",
    "wandb": "wandb",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def require(package: str, subject: str, alternative: str = "") -> None:
    """Raise UserError unless a package of EXTRAS is installed. subject: the key that needs it; alternative: what to do
    without it."""
    if not is_installed(package):
        raise UserError(
            f"{subject} needs the package {package}, which is not installed; run {install_line(package)}"
            f"{', or ' + alternative if alternative else ''}"
        )


def install_line(package: str) -> str:
    return f"pip install 'alma[{EXTRAS[package]}]'"
