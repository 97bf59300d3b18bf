"""Trackers that a recipe can name in `log.to`, each through its own package. The numbers are those of metrics.jsonl.

All work without an account and without a network: what they write then is in the run's folder, or where the package
keeps local runs. A run that is resumed goes on with the same curve: it has an id of its own, kept in its folder. Steps
since the last checkpoint are computed again, with the same values, and sent again.
"""

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pipeline.core.files import write_atomic
from pipeline.core.terminal import show

TrackerName = Literal["wandb", "swanlab", "tensorboard", "mlflow", "trackio"]
FOLDER = "trackers"
"""In the folder of a run: the id, and what trackers write there."""


@dataclass(frozen=True)
class TrackedRun:
    folder: Path
    """Of the run."""
    project: str
    name: str
    """Of the stage."""
    config: dict
    """Keys of the stage."""

    @property
    def local(self) -> Path:
        return self.folder / FOLDER

    @property
    def id(self) -> str:
        """Made at the first start of a run, and kept for its later ones."""
        return self.kept("id", lambda: uuid.uuid4().hex[:12])

    @property
    def title(self) -> str:
        """The stage and the run's id, where a tracker knows runs by their names."""
        return f"{self.name}-{self.id}"

    def kept(self, file: str, make: Callable[[], str]) -> str:
        """The content of a small file; made and written if there is none."""
        path = self.local / file
        if not path.exists():
            write_atomic(path, make())
        return path.read_text(encoding="utf-8")


class Curve(Protocol):
    """A run in a tracker."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def rewind(self, step: int) -> None:
        """Values after `step` follow again."""

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases: offline without WANDB_API_KEY, unless WANDB_MODE says otherwise. `wandb sync` uploads the
    folders of an offline run and of its resumed parts as one run."""

    def __init__(self, run: TrackedRun):
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.folder,
            mode=mode,
            config=run.config,
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
        # Its own counter of steps only grows and drops what comes again.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values | {"step": step})

    def rewind(self, step: int) -> None:
        """Points of equal steps are drawn over each other."""

    def close(self) -> None:
        self.run.finish()


class Swanlab:
    """SwanLab: offline without SWANLAB_API_KEY, unless SWANLAB_MODE says otherwise. It resumes a run only online;
    offline, `swanlab sync` uploads each part, and they have the same name."""

    def __init__(self, run: TrackedRun):
        import swanlab

        mode = os.environ.get("SWANLAB_MODE") or ("online" if os.environ.get("SWANLAB_API_KEY") else "offline")
        resumable = {"id": run.id, "resume": "allow"} if mode == "online" else {}
        folder = run.local / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        self.run = swanlab.init(
            project=run.project,
            name=run.title,
            mode=mode,
            log_dir=str(folder),
            config=run.config,
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),  # it would also upload what is printed
            **resumable,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def rewind(self, step: int) -> None:
        """It keeps the last value of a step."""

    def close(self) -> None:
        self.run.finish()


class Tensorboard:
    """TensorBoard: event files in the run's folder (`tensorboard --logdir runs/NAME`)."""

    def __init__(self, run: TrackedRun):
        self.folder = run.local / "tensorboard"
        self.writer = self._opened(None)

    def _opened(self, purge_step: int | None):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=purge_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """A new file in which an event hides those of the other files from the next step on."""
        self.writer.close()
        self.writer = self._opened(step + 1)

    def close(self) -> None:
        self.writer.close()


class Mlflow:
    """MLflow: the server that MLFLOW_TRACKING_URI names, or files in the run's folder (`mlflow ui
    --backend-store-uri FOLDER`)."""

    def __init__(self, run: TrackedRun):
        # A server that does not answer must not hold a run up for long: its own are 7 tries of 120 s.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = (run.local / "mlflow").resolve().as_uri()
        import mlflow

        self.client = mlflow.MlflowClient(tracking_uri=address, registry_uri=address)
        self.run = run.kept("mlflow-run", lambda: self._created(run))
        self.newest = None

    def _created(self, run: TrackedRun) -> str:
        experiment = self.client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self.client.create_experiment(run.project)
        created = self.client.create_run(number, run_name=run.name)
        for name, value in run.config.items():
            self.client.log_param(created.info.run_id, name, str(value)[:500])
        return created.info.run_id

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in values.items()]
        self.newest = self.client.log_batch(self.run, metrics=metrics, synchronous=False)

    def rewind(self, step: int) -> None:
        """Points of equal steps are drawn over each other."""

    def close(self) -> None:
        if self.newest:
            self.newest.wait()  # batches are sent in order
        self.client.set_terminated(self.run)


class Trackio:
    """Trackio: a database on this machine, in TRACKIO_DIR (`trackio show`), or the Hugging Face Space that
    TRACKIO_SPACE_ID names."""

    def __init__(self, run: TrackedRun):
        import trackio

        with _silent():
            self.run = trackio.init(
                project=run.project,
                name=run.title,
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def rewind(self, step: int) -> None:
        """Points of equal steps are drawn over each other."""

    def close(self) -> None:
        with _silent():
            self.run.finish()


CURVES: dict[TrackerName, Callable[[TrackedRun], Curve]] = {
    "wandb": Wandb,
    "swanlab": Swanlab,
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


class Trackers:
    """The trackers of one run. A run must not be lost because of one of them: at its first error a line is printed and
    it gets nothing more."""

    def __init__(self, names: list[TrackerName], run: TrackedRun):
        self.curves: dict[str, Curve] = {}
        for name in names:
            try:
                self.curves[name] = CURVES[name](run)
            except Exception as error:  # each package raises its own, those of its network library, and bare ones
                show(f"{run.name}: {name} could not start ({_first_line(error)}); metrics.jsonl is written as usual")

    def log(self, step: int, values: dict[str, Any]) -> None:
        numbers = {}
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                numbers[key] = value
        self._each(lambda curve: curve.log(step, numbers))

    def rewind(self, step: int) -> None:
        self._each(lambda curve: curve.rewind(step))

    def close(self) -> None:
        self._each(lambda curve: curve.close())

    def _each(self, action: Callable[[Curve], None]) -> None:
        for name, curve in list(self.curves.items()):
            try:
                action(curve)
            except Exception as error:
                del self.curves[name]
                show(f"{name} failed ({_first_line(error)}) and gets no more values; metrics.jsonl has them all")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that a package prints for people: a stage has its own."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
