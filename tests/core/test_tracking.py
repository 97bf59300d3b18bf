"""metrics.jsonl always, Weights & Biases if asked for, progress with rate and time left."""

import json
import os
import pty
import subprocess
import sys

import tiny
from harness import files_of, succeed

from pipeline.core.tracking import Tracker


def test_wandb_is_offline_without_a_key_and_no_content(tmp_path):
    tiny.write_inputs(tmp_path)
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    keyless = {"WANDB_API_KEY": "", "HOME": str(tmp_path)}
    succeed("pretrain", "recipe.yaml", "pretrain.steps=3", cwd=tmp_path)
    plain = files_of(tmp_path / "runs/tiny/pretrain/current")
    succeed(
        "pretrain",
        "recipe.yaml",
        "pretrain.steps=3",
        "pretrain.log.wandb=here",
        "output=logged",
        cwd=tmp_path,
        env=keyless,
    )
    folder = tmp_path / "logged/tiny/pretrain/current"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert files_of(folder) == plain
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 3


def test_rewind_drops_later_and_torn_lines(tmp_path):
    tracker = Tracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, loss=1.0 / step)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 4, "lo')
    tracker.rewind(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    Tracker(tmp_path, is_main=False).log(9, loss=0.0)
    assert '"step": 9' not in (tmp_path / "metrics.jsonl").read_text()


PROGRAM = """
import time
import pipeline.core.tracking as tracking
tracking.PLAIN_SECONDS = 0.05
with tracking.Progress("stage", 1000, "tok") as bar:
    for _ in range(4):
        time.sleep(0.06)
        bar.update(250, loss=2.5)
"""


def test_progress_is_plain_lines_in_a_log():
    lines = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 4 and "\x1b" not in "".join(lines)
    assert (
        lines[1].startswith("stage: 50% (500 of 1k tok), ")
        and "tok/s" in lines[1]
        and "0m00s left" in lines[1]
        and lines[1].endswith("loss 2.5")
    )


def test_progress_is_a_bar_on_a_terminal():
    main, terminal = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=terminal, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(terminal)
    shown = os.read(main, 65536).decode()
    os.close(main)
    assert "100%" in shown and "tok/s" in shown and "loss 2.5" in shown and "━" in shown
