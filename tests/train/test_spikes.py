"""Spikes through the stage: a document that does not belong makes the loss jump; what each policy then does, what is
written, and kills around it."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import tiny_engine
from harness import files_of, stage, succeed
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.core.output import Output
from pipeline.train import engine, loop
from pipeline.train.config import Spikes
from pipeline.train.spikes import Guard

STEPS = 44
JUNK = "".join(chr(random.Random(9).randrange(0x3000, 0x9FFF)) for _ in range(60))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """120 documents of which one is junk, packed; nothing is trained yet."""
    folder = tmp_path_factory.mktemp("spikes")
    tiny.write_inputs(folder)
    path = folder / "clean/train/part-00000.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[70].update(text=JUNK, id="the poisoned one")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    succeed("pack", "pack.yaml", cwd=folder)
    recipe = tiny.RECIPE.replace("steps: 6", f"steps: {STEPS}").replace("every_steps: 2", "every_steps: 5")
    (folder / "recipe.yaml").write_text(recipe + "    spikes: {sigma: 6, window: 16}\n")
    return folder


def lines_of(folder, runs, state="current"):
    (path,) = (folder / runs / "tiny/pretrain").glob(f"{state}/metrics.jsonl")
    return [line for line in map(json.loads, path.read_text().splitlines()) if "grad_norm" in line]


def train(folder, policy, *words, runs=None, **options):
    return stage(
        "pretrain",
        "recipe.yaml",
        f"output={runs or policy}",
        f"pretrain.spikes.policy={policy}",
        *words,
        cwd=folder,
        **options,
    )


@pytest.fixture(scope="module")
def skipped(world):
    code, said = train(world, "skip")
    assert code == 0, said
    lines = lines_of(world, "skip")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    found = [line["step"] for line in lines if not line["applied"]]
    assert found and all(line["refused"] for line in lines if not line["applied"])
    return found, said


def test_a_spike_is_what_a_slow_reference_says_and_its_update_is_not_made(world, skipped):
    """Median and MAD by numpy over the applied steps before; every step, not those alone that fired."""
    lines, window = lines_of(world, "skip"), 16
    for number, line in enumerate(lines):
        before = [earlier for earlier in lines[:number] if earlier["applied"]][-window:]
        jumps = []
        for values, value in (
            ([x["loss"] for x in before], line["loss"]),
            ([math.log(x["grad_norm"]) for x in before], math.log(line["grad_norm"])),
        ):
            if len(values) >= window // 2:
                median = np.median(values)
                jumps.append(
                    (value - median)
                    / max(1.4826 * np.median(np.abs(np.array(values) - median)), 1e-3 * max(1, abs(median)))
                    > 6
                )
        assert line["applied"] == (not any(jumps)), line["step"]
    manifest = json.loads((world / "skip/tiny/pretrain/current/manifest.json").read_text())
    assert (
        manifest["metrics"]["spikes"] == manifest["metrics"]["skipped_steps"] == len(skipped[0])
        and manifest["metrics"]["rollbacks"] == 0
    )


def test_the_rows_of_a_spike_are_written_with_their_documents_and_text(world, skipped):
    for step in skipped[0][:2]:
        head, *rows = [
            json.loads(line)
            for line in (
                (world / f"skip/tiny/pretrain/current/logs/spikes/step-{step:06d}.jsonl").read_text().splitlines()
            )
        ]
        assert head["step"] == step and "deviations above the median" in head["reason"] and head["reason"] in skipped[1]
        assert [row["row"] for row in rows] == list(range((step - 1) * 8, step * 8))
        assert np.mean([row["loss"] for row in rows]) == pytest.approx(head["loss"], rel=1e-4)
        worst = max(rows, key=lambda row: row["loss"])
        place = next(document for document in worst["documents"] if document["id"] == "the poisoned one")
        assert any(worst["text"].count(piece) for piece in (JUNK[i : i + 3] for i in range(0, 57))), (
            "the text of the junk"
        )
        assert sum(document["tokens"] for document in worst["documents"]) == 33 and place["tokens"] > 3


def test_killed_between_spikes_it_ends_the_same(world, skipped):
    for fault in (f"work:{skipped[0][0]}", "save:1"):
        assert train(world, "skip", runs="killed", fault=fault)[0] == -9
    assert train(world, "skip", runs="killed")[0] == 0
    assert files_of(world / "killed/tiny/pretrain/current") == files_of(world / "skip/tiny/pretrain/current")
    shown = [{key: line[key] for key in ("step", "loss", "applied")} for line in lines_of(world, "killed")]
    assert shown == [{key: line[key] for key in ("step", "loss", "applied")} for line in lines_of(world, "skip")]


def test_stop_keeps_the_state_before_the_spike_and_says_where_to_look(world, skipped):
    step = skipped[0][0]
    for _ in range(2):  # the same command meets the same spike
        code, said = train(world, "stop")
        assert (
            code == 2
            and "Traceback" not in said
            and f"step {step} was not applied" in said
            and "logs/spikes" in said
            and "--fork" in said
        ), said
        (folder,) = (world / "stop/tiny/pretrain").glob("*.partial")
        assert max(path.name for path in (folder / "checkpoints").glob("step-*")) == f"step-{step - 1:06d}"
        assert not (world / "stop/tiny/pretrain/requeue.json").exists()
    code, said = train(world, "skip", "--fork", runs="stop")
    assert code == 0 and f"resuming from step-{step - 1:06d}" in said, said


def test_rollback_goes_back_and_past_the_rows_and_kills_around_it_change_nothing(world, skipped):
    step = skipped[0][0]
    back = (step - 1) // 5 * 5
    code, said = train(world, "rollback", "pretrain.spikes.rollbacks=9")
    assert code == 0 and f"back to step {back}; rows {back * 8} to {step * 8 - 1} are skipped" in said, said
    lines = lines_of(world, "rollback")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and all(line["applied"] for line in lines)
    note = next(line for line in lines if "skipped_rows" in line)
    assert note["step"] == back + 1 and note["skipped_rows"][0] == [back * 8, step * 8]
    quiet = lines_of(world, "skip")
    assert [line["loss"] for line in lines[:back]] == [line["loss"] for line in quiet[:back]] and lines[back][
        "loss"
    ] != quiet[back]["loss"]
    for fault in (f"work:{step - 1}", "rollback:1", "rollback:2", "save:1", "rollback:1"):
        code, text = train(world, "rollback", "pretrain.spikes.rollbacks=9", runs="back", fault=fault)
        assert code in (-9, 0), text
    assert train(world, "rollback", "pretrain.spikes.rollbacks=9", runs="back")[0] == 0
    assert files_of(world / "back/tiny/pretrain/current") == files_of(world / "rollback/tiny/pretrain/current")


def test_a_branch_of_a_run_that_rolled_back_reads_the_rows_that_its_parent_reads(world, skipped):
    """From the last checkpoint but one, with the parent's own settings: the same bytes, so the skipped rows came
    along; its counts are its own."""
    if not (world / "rollback").exists():
        assert train(world, "rollback", "pretrain.spikes.rollbacks=9")[0] == 0
    text = (world / "recipe.yaml").read_text()
    own = (
        text.partition("  pretrain:\n")[2]
        .replace("tokenizer: ./tokenizer}", "tokenizer: ./tokenizer, model: pretrain}")
        .replace("sigma: 6", "policy: rollback, rollbacks: 9, sigma: 6")
    )
    (world / "branch.yaml").write_text(f"{text}  decay:\n    kind: pretrain\n    from_step: {STEPS - STEPS % 5}\n{own}")
    words = ("output=rollback", "pretrain.spikes.policy=rollback", "pretrain.spikes.rollbacks=9")
    succeed("pretrain", "branch.yaml", "--stage", "decay", *words, cwd=world)
    parent, child = (files_of(world / "rollback/tiny" / name / "current") for name in ("pretrain", "decay"))
    assert child["model/model.safetensors"] == parent["model/model.safetensors"]
    assert json.loads((world / "rollback/tiny/decay/current/manifest.json").read_text())["metrics"]["rollbacks"] == 0


def test_after_its_number_of_rollbacks_it_stops(world):
    """Everything above a hundredth of a deviation is a spike here."""
    code, said = train(
        world,
        "rollback",
        "pretrain.spikes={policy: rollback, sigma: 0.01, window: 4, rollbacks: 1, in_a_row: 50}",
        runs="often",
    )
    assert code == 2 and said.count("back to step") == 1 and "1 rollbacks were made" in said, said


def jumps(logits, batch):
    loss, sums = tiny_engine.loss_fn(logits, batch)
    return loss * batch["factor"], sums


def fitted(folder, identity: int, fork: bool = False, spiked: tuple[int, ...] = (7, 12)) -> dict:
    """16 steps with a checkpoint after every second one. The batches `spiked` have a hundred times the loss."""
    spikes = {"policy": "rollback", "sigma": 1000, "window": 4, "rollbacks": 1}
    config = tiny_engine.config(steps=16, spikes=spikes)

    def batches(number: int) -> list[dict]:
        part = range(number * tiny_engine.ROWS, (number + 1) * tiny_engine.ROWS)
        return [tiny_engine.batch_of(number, part) | {"factor": 100.0 if number in spiked else 1.0}]

    output = Output(folder, "pretrain", "pretrain", {"a": identity}).open(config={}, parents={}, fork=fork)
    try:
        return loop.fit(engine.build(tiny_engine.tiny(), jumps, config), config, output, batches)
    finally:
        output.lock.release()


def test_a_fork_has_rollbacks_of_its_own(tmp_path, capsys):
    """A run that has gone back once stops at the next spike; another recipe that may go back once continues it. Rows
    that were skipped before stay skipped."""
    with pytest.raises(UserError, match="step 11 was not applied.* 1 rollbacks were made"):
        fitted(tmp_path, 1)
    with pytest.raises(UserError, match="step 11 was not applied.* 1 rollbacks were made"):
        fitted(tmp_path, 1)
    capsys.readouterr()
    spikes = fitted(tmp_path, 2, fork=True)["spikes"]
    assert "back to step 10; rows 48 to 63 and 96 to 103 are skipped" in "".join(capsys.readouterr())
    assert (spikes["rollbacks"], spikes["count"]) == (1, 1)


def test_a_fork_knows_rows_that_were_skipped_right_after_its_checkpoint(tmp_path, capsys):
    """Batch 6 is a spike, and after going back to step 6 so is batch 7, before anything was saved."""
    with pytest.raises(UserError, match="step 7 was not applied.* 1 rollbacks were made"):
        fitted(tmp_path, 1, spiked=(6, 7))
    with pytest.raises(UserError, match="step 7 was not applied.* 1 rollbacks were made"):
        fitted(tmp_path, 1, spiked=(6, 7))
    capsys.readouterr()
    spikes = fitted(tmp_path, 2, fork=True, spiked=(6, 7))["spikes"]
    assert "back to step 6; rows 48 to 55 and 56 to 63 are skipped" in "".join(capsys.readouterr())
    assert (spikes["rollbacks"], spikes["count"]) == (1, 1)


# ---- the rows of a step ----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=6), st.integers(1, 9))
def test_after_any_rollbacks_no_skipped_row_is_read_and_none_is_read_twice(moves, batch):
    """Rollbacks from a few steps ahead to up to six steps back, against a reader that crosses rows off a list."""
    guard = Guard(Spikes(), {})
    read: list[int] = []  # row that each step read
    crossed: set[int] = set()

    def following() -> int:
        row = read[-1] + batch if read else 0
        while row in crossed:
            row += batch
        return row

    for back, ahead in moves:
        for _ in range(ahead + 1):
            read.append(following())
        step = len(read) - 1
        checkpoint = max(0, step - back)
        saved = {"spikes": {"loss": [], "log_norm": [], "in_a_row": 0, "count": 0, "rollbacks": 0, "skipped_rows": []}}
        guard = Guard(Spikes(), guard.rolled_back(saved, checkpoint, step, batch))
        crossed |= set(range(read[checkpoint], read[step] + batch))
        read = read[:checkpoint]
    for _ in range(8):
        read.append(following())
    assert [guard.first_row(step, batch) for step in range(len(read))] == read


def test_steps_that_are_not_finite_stop_the_run_when_there_are_too_many_in_a_row():
    state: dict = {}
    guard = Guard(Spikes(in_a_row=3), state)
    bad, good = (
        {"applied": False, "weight": 5.0, "loss": math.nan, "grad_norm": math.nan},
        {"applied": True, "weight": 5.0, "loss": 1.0, "grad_norm": 1.0},
    )
    found = []
    for stats in (bad, bad, good, bad, bad, bad):
        reason = guard.after(stats)
        found.append(guard.action(stats) if reason else "fine")
    assert found == ["continue", "continue", "fine", "continue", "continue", "stop"]
    guard.forget()
    message = guard.error_message(SimpleNamespace(stage="pretrain", path="x"), 6, reason)
    assert "not finite" in message and "with 2 before it" in message
