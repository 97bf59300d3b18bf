"""What each tracker wrote without a network is read back with its own package: a run that was resumed is one curve."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from harness import files_of, stage, succeed

from pipeline.core import trackers
from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.core.tracking import Tracker

CONFIG = {"lr": 1e-3, "optimizer": {"kind": "adamw"}}
OFFLINE = ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID")


def read_tensorboard(run: trackers.TrackedRun, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.local / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format in blocks of 32 KiB, after a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # complete, or its last part
            yield record
            record = b""


def read_wandb(run: trackers.TrackedRun, name: str) -> list[tuple[int, float]]:
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service ends, so that the files are whole; the processes of later tests would look for it
    os.environ.pop("WANDB_SERVICE", None)
    points, ids = [], set()
    for path in sorted(run.folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if name in values:
                points.append((int(values["step"]), float(values[name])))
    assert ids == {run.id}, "the parts of the run have one id"
    return points


def read_mlflow(run: trackers.TrackedRun, name: str) -> list[tuple[int, float]]:
    import mlflow

    address = (run.local / "mlflow").resolve().as_uri()
    client = mlflow.MlflowClient(tracking_uri=address, registry_uri=address)
    experiment = client.get_experiment_by_name(run.project)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["lr"] == "0.001"
    return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]


def read_trackio(run: trackers.TrackedRun, name: str) -> list[tuple[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs(run.project) == [run.title]
    rows = SQLiteStorage.get_logs(run.project, run.title)
    return [(row["step"], row[name]) for row in rows if name in row]


def read_swanlab(run: trackers.TrackedRun, name: str) -> list[tuple[int, float]]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    points = []
    for path in sorted(run.local.glob("swanlab/run-*/*.swanlab"), key=lambda path: path.stat().st_mtime_ns):
        reader = DataStoreReader()
        reader.open(str(path))
        while data := reader.scan():
            record = Record()
            record.ParseFromString(data)
            if record.HasField("scalar") and record.scalar.key == name:
                points.append((record.scalar.step, record.scalar.value.number))
    return points


READERS = {"wandb": read_wandb, "swanlab": read_swanlab, "tensorboard": read_tensorboard}
READERS |= {"mlflow": read_mlflow, "trackio": read_trackio}


@pytest.mark.parametrize("name", list(READERS))
def test_a_resumed_run_is_one_curve(name, tmp_path, monkeypatch):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'alma[{name}]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for variable in OFFLINE:
        monkeypatch.delenv(variable, raising=False)
    run = trackers.TrackedRun(tmp_path / "run", "project", "pretrain", CONFIG)
    first = Tracker(run.folder, True, [name], run)
    for step in (1, 2, 3, 4):
        first.log(step, loss=1 / step, note="text", missing=float("nan"), **{"tok/s": 5})
    first.close()
    again = Tracker(run.folder, True, [name], run)
    again.rewind(2)
    for step in (3, 4, 5):
        again.log(step, loss=1 / step)
    again.close()
    points = READERS[name](run, "loss")
    assert {step for step, _ in points} == {1, 2, 3, 4, 5}
    assert all(value == pytest.approx(1 / step, rel=1e-6) for step, value in points)
    if name == "tensorboard":  # which hides what came before
        assert [step for step, _ in points] == [1, 2, 3, 4, 5]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and [line["loss"] for line in lines] == [
        1 / step for step in (1, 2, 3, 4, 5)
    ]


def test_a_tracker_that_fails_costs_no_run(tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, run):
            self.logged = 0

        def log(self, step, values):
            raise ConnectionError(f"no route to host\nat step {step}")

    def never(run):
        raise RuntimeError("no account")

    monkeypatch.setitem(trackers.CURVES, "wandb", Broken)
    monkeypatch.setitem(trackers.CURVES, "trackio", never)
    run = trackers.TrackedRun(tmp_path, "project", "pretrain", {})
    tracker = Tracker(tmp_path, True, ["wandb", "trackio"], run)
    tracker.log(1, loss=0.5)
    tracker.log(2, loss=0.4)
    tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().out.splitlines() == [
        "pretrain: trackio could not start (no account); metrics.jsonl is written as usual",
        "wandb failed (no route to host) and gets no more values; metrics.jsonl has them all",
    ]


def test_a_killed_run_is_one_curve_and_trackers_are_no_content(tmp_path):
    """TensorBoard beside a run that is killed and resumed: the same bytes as without, and one curve."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'alma[tensorboard]'")
    tiny.write_inputs(tmp_path)
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    succeed("pretrain", "recipe.yaml", "output=plain", cwd=tmp_path)
    words = ["recipe.yaml", "pretrain.log.to=[tensorboard]"]
    code, text = stage("pretrain", *words, cwd=tmp_path, fault="work:4")
    assert code == -9, text
    succeed("pretrain", *words, cwd=tmp_path)
    folder = tmp_path / "runs/tiny/pretrain/current"
    assert files_of(folder) == files_of(tmp_path / "plain/tiny/pretrain/current")
    points = read_tensorboard(trackers.TrackedRun(folder, "tiny", "pretrain", {}), "loss")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert points == [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "word, message",
    [
        ("log={project: mine}", "names the run's project in trackers, and `to` names none"),
        ("log={wandb: mine, to: [tensorboard]}", "both name trackers; write to and project"),
        ("log={to: [tensorboard, tensorboard]}", "names 'tensorboard' twice"),
        ("log={to: [tensorbord]}", "'tensorbord'"),
    ],
)
def test_keys_without_effect_are_refused(tmp_path, word, message):
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "recipe.yaml", [f"pretrain.{word}"])


def test_the_older_key_of_weights_and_biases_still_names_a_project(tmp_path):
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    log = load(tmp_path / "recipe.yaml", ["pretrain.log.wandb=mine"]).stages["pretrain"].log
    assert log.trackers == ["wandb"]
