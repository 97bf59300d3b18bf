"""Checkpoints as files: pieces that fit together, what is refused, saving beside the training, which ones stay, and
branches. Layouts: test_parallel.py."""

import errno
import itertools
import json
import os
import shutil
import signal
import threading
import time

import pytest
import safetensors
import tiny as corpus
import torch
from harness import files_of, stage, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import ROWS, batch_of, config, loss_fn, output_in, tiny

from pipeline.core.checkpoint_folder import complete_checkpoints
from pipeline.core.errors import Stopped, UserError
from pipeline.core.transient_errors import cause_of
from pipeline.train import checkpoints, engine, state
from pipeline.train.loop import fit


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_range_is_pieced_together_from_any_cut(tmp_path_factory, data):
    """Tensors cut at random places, the pieces dealt out to files at random: every range reads as the tensor's own,
    and safetensors reads the files."""
    folder = tmp_path_factory.mktemp("pieces")
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    whole = {f"p.{index}": torch.randn(size) for index, size in enumerate(sizes)}
    files = [[] for _ in range(data.draw(st.integers(1, 3)))]
    for name, values in whole.items():
        cuts = sorted({0, len(values), *data.draw(st.lists(st.integers(0, len(values)), max_size=4))})
        for first, last in zip(cuts, cuts[1:], strict=False):
            files[data.draw(st.integers(0, len(files) - 1))].append(
                state.Fragment("exp_avg", name, first, values[first:last])
            )
    for index, fragments in enumerate(files):
        part = state.Part(fragments, {f.name: {"shape": [len(whole[f.name])], "updates": 1} for f in fragments}, {})
        entry = state.write(folder / f"model-{index:05d}.safetensors", part)
        assert entry["size"] == (folder / f"model-{index:05d}.safetensors").stat().st_size
        with safetensors.safe_open(folder / f"model-{index:05d}.safetensors", "pt") as handle:
            assert {key: handle.get_tensor(key).tolist() for key in handle.keys()} == {
                f.key: f.values.tolist() for f in fragments
            }  # noqa: SIM118
    (folder / "model.json").write_text(json.dumps({"format": 1, "steps": 1, "optimizer": "adamw", "layout": {}}))
    reader = state.Reader(folder, "model")
    for name, values in whole.items():
        start = data.draw(st.integers(0, len(values) - 1))
        count = data.draw(st.integers(1, len(values) - start))
        assert torch.equal(reader.read("exp_avg", name, start, count), values[start : start + count])
    # Equal shares of what all hold: each element once.
    common, world = (
        [state.Fragment("weight", name, 0, values) for name, values in whole.items()],
        data.draw(st.integers(1, 5)),
    )
    dealt = [piece for rank in range(world) for piece in state.share(common, rank, world)]
    for name, values in whole.items():
        assert [value for piece in dealt if piece.name == name for value in piece.values.tolist()] == values.tolist()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_columns_of_a_matrix_are_read_in_any_other_parts(tmp_path_factory, data):
    """A matrix saved in blocks of rows and columns, one file each: any range, and any other blocks, read as the
    matrix has them; blocks as they were saved are read at once."""
    folder = tmp_path_factory.mktemp("blocks")
    shape = rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(2, 9))
    whole = torch.randn(shape)

    def blocks(row_cuts: list[int], column_cuts: list[int]) -> list[state.Fragment]:
        fragments = []
        for first, last in itertools.pairwise(sorted({0, rows, *row_cuts})):
            for left, right in itertools.pairwise(sorted({0, columns, *column_cuts})):
                values = whole[first:last, left:right].flatten()
                place = state.Rows(right - left, columns)
                fragments.append(state.Fragment("exp_avg", "p", first * columns + left, values, place))
        return fragments

    cuts = [data.draw(st.lists(st.integers(0, size), max_size=3)) for size in (*shape, *shape)]
    saved_blocks, others = blocks(*cuts[:2]), blocks(*cuts[2:])
    assert state.format_of(saved_blocks) == 2
    for index, fragment in enumerate(saved_blocks):
        part = state.Part([fragment], {"p": {"shape": list(shape), "updates": 1}}, {})
        state.write(folder / f"model-{index:05d}.safetensors", part)
    (folder / "model.json").write_text(json.dumps({"format": 2, "steps": 1, "optimizer": "adamw", "layout": {}}))
    reader = state.Reader(folder, "model")
    for fragment in (*saved_blocks, *others):
        into = fragment._replace(values=torch.zeros_like(fragment.values))
        reader.fill(into)
        assert torch.equal(into.values, fragment.values)
    start = data.draw(st.integers(0, whole.numel() - 1))
    count = data.draw(st.integers(1, whole.numel() - start))
    assert torch.equal(reader.read("exp_avg", "p", start, count), whole.flatten()[start : start + count])


def test_each_header_is_read_by_one_of_the_processes(tmp_path, monkeypatch):
    """Of two processes that resume together each opens every second file, and knows all pieces afterwards; then each
    opens the files that hold what it keeps, and no others."""
    values = torch.arange(12.0)
    for index in range(3):
        part = state.Part(
            [state.Fragment("weight", "p", 4 * index, values[4 * index : 4 * index + 4])],
            {"p": {"shape": [12], "updates": 0}},
            {},
        )
        state.write(tmp_path / f"model-{index:05d}.safetensors", part)
    (tmp_path / "model.json").write_text(json.dumps({"format": 1, "steps": 1, "optimizer": "adamw", "layout": {}}))
    shares: list[dict] = []

    def gather(own: dict) -> list[dict]:
        shares.append(own)
        return shares

    state.Reader(tmp_path, "model", rank=1, world=2, gather=gather)
    reader = state.Reader(tmp_path, "model", rank=0, world=2, gather=gather)
    assert [[name[-13] for name in share] for share in shares] == [["1"], ["0", "2"]]
    opened = []

    def noting(path, *words, **options):
        opened.append(path.name)
        return open(path, *words, **options)

    monkeypatch.setattr(state, "open", noting, raising=False)
    assert torch.equal(reader.read("weight", "p", 5, 2), values[5:7])
    assert opened == ["model-00001.safetensors"], "what a process keeps is in one file of three"
    assert torch.equal(reader.read("weight", "p", 0, 12), values)


def saved(folder, **changes):
    """A folder with the state of two steps of a tiny model."""
    trainer = engine.build(tiny(), loss_fn, config(**changes))
    for step in range(2):
        trainer.step([batch_of(step, range(ROWS))])
    trainer.save(folder)
    return trainer


def test_a_hole_names_the_parameter_and_its_elements(tmp_path):
    trainer = saved(tmp_path)
    part = trainer.part()
    holed = [f._replace(values=f.values[:100]) if f.key == "exp_avg/model.norm.weight@0" else f for f in part.fragments]
    holed = [f._replace(values=f.values[:10]) if f.key == "exp_avg_sq/lm_head.weight@0" else f for f in holed]
    state.write(tmp_path / "model-00000.safetensors", part._replace(fragments=holed))
    with pytest.raises(UserError, match=r"exp_avg_sq of lm_head.weight lacks the elements 10 to 1952"):
        engine.build(tiny(), loss_fn, config()).load(tmp_path)


@pytest.mark.parametrize(
    "changes, settings, said",
    [
        ({"intermediate_size": 40}, {}, r"model.layers.0.mlp.gate_proj.weight is \[48, 32\] there and \[40, 32\] here"),
        ({"num_hidden_layers": 4}, {}, "it has no model.layers.3"),
        ({"num_hidden_layers": 2}, {}, "it has model.layers.2.*this one does not"),
        ({}, {"optimizer": {"kind": "muon"}}, "optimizer.kind: adamw.*cannot be used by muon"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused_with_the_first_difference(tmp_path, changes, settings, said):
    saved(tmp_path)
    with pytest.raises(UserError, match=said):
        engine.build(tiny(**changes), loss_fn, config(**settings)).load(tmp_path)


def test_a_pickle_of_an_earlier_alma_is_told_apart(tmp_path):
    (tmp_path / "model-state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="as a pickle.*--restart"):
        engine.build(tiny(), loss_fn, config()).load(tmp_path)


def test_buffers_that_are_saved_with_a_model_come_back(tmp_path):
    """Persistent buffers, also whole numbers and truth values; what is not persistent is left alone."""

    def made():
        model = tiny()
        model.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
        model.register_buffer("seen", torch.tensor(False))
        model.register_buffer("scratch", torch.zeros(1), persistent=False)
        return engine.build(model, loss_fn, config())

    trainer = made()
    trainer.model.counts += torch.tensor([1, 2**40, 3])
    trainer.model.seen.fill_(True)
    trainer.save(tmp_path)
    other = made()
    other.load(tmp_path)
    assert (
        other.model.counts.tolist() == [1, 2**40, 3]
        and other.model.seen.item() is True
        and other.model.scratch.item() == 0
    )


# ---- in the loop -----------------------------------------------------------------------------------------------------


def run(folder, losses=None, **changes):
    """Six steps by the loop, checkpoints in folder. losses: of the evaluations, in their order, in place of measured
    ones."""
    options = config(**{"save": {"every_steps": 2}, "schedule": {"kind": "constant"}, **changes})
    output = output_in(folder)
    try:
        trainer = engine.build(tiny(), loss_fn, options)
        queue = iter(losses or [])

        def evaluate():
            found = trainer.evaluate([batch_of(99, range(ROWS))])
            return {**found, "loss": next(queue)} if losses else found

        result = fit(trainer, options, output, lambda step: [batch_of(step, range(ROWS))], evaluate=evaluate)
        return result, trainer.consolidated(), output.path
    finally:
        output.close()


def same(one, other) -> bool:
    numbers = [
        {key: found[0][key] for key in ("before", "after", "first", "last", "weight", "skipped")}
        for found in (one, other)
    ]
    return numbers[0] == numbers[1] and all(torch.equal(value, other[1][key]) for key, value in one[1].items())


def steps_in(path) -> list[int]:
    return [int(found.name.removeprefix("step-")) for found in complete_checkpoints(path)]


def test_training_goes_on_while_a_checkpoint_is_written_and_a_second_one_waits(tmp_path, monkeypatch, capsys):
    """The writer is held until the next step was made; the loop's numbers and every checkpoint's bytes are those of
    blocking saves."""
    plain = run(tmp_path / "plain", save={"every_steps": 1, "keep": 9, "asynchronous": False})
    write, threads = state.write, set()

    def slow(path, part, cancelled):
        threads.add(threading.current_thread().name)
        time.sleep(0.05)
        return write(path, part, cancelled)

    monkeypatch.setattr(state, "write", slow)
    found = run(tmp_path / "beside", save={"every_steps": 1, "keep": 9})
    assert same(plain, found) and threads == {"checkpoint"}
    assert "step 1 is still being written, that of step 2 waits for it" in capsys.readouterr().out
    assert steps_in(found[2]) == steps_in(plain[2]) == [1, 2, 3, 4, 5, 6]
    for step in range(1, 7):
        one, other = (
            path / "checkpoints" / f"step-{step:06d}" / "model-00000.safetensors" for path in (plain[2], found[2])
        )
        assert one.read_bytes() == other.read_bytes(), "a copy of the moment, not of what training made of it"


def test_a_stop_while_a_checkpoint_is_being_written_makes_no_second_one(tmp_path, monkeypatch, capsys):
    """The limit of a job may be near. The steps since then are made again, and end in the same bytes."""
    whole = run(tmp_path / "whole")
    write = state.write

    def slow(path, part, cancelled):
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread notes it in the step that it makes meanwhile
        time.sleep(0.5)
        return write(path, part, cancelled)

    monkeypatch.setattr(state, "write", slow)
    monkeypatch.setattr("pipeline.core.stop._first_signal_at", None)  # no signal is the first one of this process twice
    with pytest.raises(Stopped, match="SIGTERM received, saved at step 2;"):
        run(tmp_path / "stopped")
    assert "the checkpoint of step 2 is being written; it is finished, and the 1 step since" in capsys.readouterr().out
    assert steps_in(next((tmp_path / "stopped/run").glob("*.partial"))) == [2]
    monkeypatch.setattr(state, "write", write)
    assert same(run(tmp_path / "stopped"), whole)


def test_a_file_server_that_fails_is_no_mistake_of_the_user(tmp_path, monkeypatch):
    """The run may be started again: an OSError, which leaves a marker for the job, and not a UserError."""

    def stale(path, part, cancelled):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(state, "write", stale)
    with pytest.raises(OSError, match="step 2 could not be written by process 0: Stale file handle") as caught:
        run(tmp_path)
    assert cause_of(caught.value) == "storage"


@pytest.mark.parametrize("beside", [True, False])
def test_a_full_disk_ends_the_run_with_a_sentence_and_the_checkpoint_before_stays_valid(tmp_path, monkeypatch, beside):
    whole = run(tmp_path / "whole")
    write = state.write

    def full(path, part, cancelled):
        if "000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, part, cancelled)

    monkeypatch.setattr(state, "write", full)
    with pytest.raises(
        UserError, match=r"step 4 could not be written by process 0: No space left.*resumes from step-000002"
    ):
        run(tmp_path / "full", save={"every_steps": 2, "asynchronous": beside})
    folder = next((tmp_path / "full").rglob("checkpoints"))
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    monkeypatch.setattr(state, "write", write)
    assert same(run(tmp_path / "full"), whole)


def test_too_little_room_is_refused_with_the_numbers(tmp_path, monkeypatch):
    """Before the first step: 3 checkpoints and the model; before a save: one checkpoint. 12 and 4 bytes a parameter."""
    size = sum(parameter.numel() for parameter in tiny().parameters())
    free = [40 * size + 1]
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    run(tmp_path / "enough")
    free[0] = 40 * size - 1
    with pytest.raises(
        UserError,
        match=(
            rf"3 checkpoints of {12 * size / 1e6:.1f} MB .*need {40 * size / 1e6:.1f} MB more, {free[0] / 1e6:.1f} MB"
            r" are free"
        ),
    ):
        run(tmp_path / "refused")
    monkeypatch.setattr(checkpoints.Saver, "check_room", lambda *_: None)
    free[0] = 12 * size - 1
    with pytest.raises(UserError, match=rf"the checkpoint of step 2 takes {12 * size / 1e6:.1f} MB, .*MB are free"):
        run(tmp_path / "later")


def test_what_stays_is_the_newest_those_of_a_grid_and_the_best(tmp_path):
    keep = {"every_steps": 1, "keep": 1, "keep_every": 4, "keep_best": True}
    *_, path = run(tmp_path, losses=[9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0], evaluate_every=1, save=keep)
    assert steps_in(path) == [2, 4, 6]
    assert json.loads((path / "checkpoints" / "losses.json").read_text())["2"] == 3.0
    assert not list((path / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_ahead_of_the_run_crowds_no_valid_one_out(tmp_path, monkeypatch):
    """The newest of keep: 1 is damaged and skipped; what the run saves before it gets there again must stay, so
    that a kill on the way loses nothing."""
    *_, path = run(tmp_path, save={"every_steps": 2, "keep": 9})
    file = path / "checkpoints" / "step-000006" / "model-00000.safetensors"
    file.write_bytes(b"damaged")
    shutil.rmtree(path / "checkpoints" / "step-000004")
    step = engine.Engine.step
    monkeypatch.setattr(
        engine.Engine, "step", lambda self, *given: step(self, *given) if self.step_count < 5 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, save={"every_steps": 2, "keep": 1})
    assert steps_in(path) == [4]


def test_keeping_the_best_needs_steps_that_are_saved_and_evaluated():
    for every in (None, 5):
        with pytest.raises(UserError, match="no step is both saved"):
            config(save={"every_steps": 2, "keep_best": True}, evaluate_every=every).check(1)


def test_a_crash_of_the_evaluation_loses_nothing_and_its_numbers_are_made_again(tmp_path, monkeypatch):
    """A checkpoint is written before its evaluation: after a crash between the two the next start evaluates, and the
    curve has each point once."""
    whole = run(tmp_path / "whole", evaluate_every=2)
    evaluate, calls = engine.Engine.evaluate, []

    def dies(self, batches):
        calls.append(self.step_count)
        if self.step_count == 4:
            raise ZeroDivisionError
        return evaluate(self, batches)

    monkeypatch.setattr(engine.Engine, "evaluate", dies)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "parts", evaluate_every=2)
    monkeypatch.setattr(engine.Engine, "evaluate", evaluate)
    found = run(tmp_path / "parts", evaluate_every=2)
    assert calls == [0, 2, 4] and same(found, whole)
    for path in (whole[2], run(tmp_path / "parts", evaluate_every=2)[2]):  # started once more, when all is done
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 2, 4, 6]


# ---- through the stage -----------------------------------------------------------------------------------------------

BRANCH = """
  decay:
    kind: pretrain
    inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: pretrain}
    from_step: 4
    sequence_length: 32
    batch_size: 8
    steps: 6
    precision: fp32
    mixture: {one: 2, two: 1}
    heldout_rows: 10
    optimizer: {lr: 3e-3, max_grad_norm: 0.7}
    schedule: {kind: cosine, warmup_steps: 2}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branch")
    corpus.write_inputs(folder)
    (folder / "recipe.yaml").write_text(corpus.RECIPE.replace("keep: 2}", "keep: 1, keep_every: 4}") + BRANCH)
    succeed("pretrain", "recipe.yaml", "--stage", "pretrain", cwd=folder)
    return folder


def test_a_branch_from_a_step_goes_on_as_the_run_itself_did(world):
    """Same schedule, same data: the branch ends with the bytes of its parent, so weights, moments, step count and
    place in the data came along."""
    said = succeed("pretrain", "recipe.yaml", "--stage", "decay", cwd=world)
    assert "resuming from" in said and "step-000004" in said
    parent, child = (files_of(world / "runs/tiny" / name / "current") for name in ("pretrain", "decay"))
    assert child["model/model.safetensors"] == parent["model/model.safetensors"]
    metrics = json.loads((world / "runs/tiny/decay/current/manifest.json").read_text())["metrics"]
    assert metrics["tokens"] == 2 * 8 * 32, "its own two steps"
    said = succeed(
        "pretrain",
        "recipe.yaml",
        "--stage",
        "decay",
        "output=runs",
        "decay.schedule={kind: wsd, decay_ratio: 0.34}",
        cwd=world,
    )
    assert files_of(world / "runs/tiny/decay/current")["model/model.safetensors"] != parent["model/model.safetensors"]


@pytest.mark.parametrize(
    "word, said",
    [
        ("decay.from_step=3", "no checkpoint of step 3; it has those of steps 4, 6"),
        ("decay.from_step=6", "leaves nothing to do in steps: 6"),
        ("decay.inputs={tokens: ./tokens, tokenizer: ./tokenizer}", "name that stage"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(world, word, said):
    code, text = stage("pretrain", "recipe.yaml", "--stage", "decay", word, cwd=world)
    assert code == 2 and said in text and "Traceback" not in text, text


def test_a_branch_from_a_damaged_checkpoint_is_refused(world):
    file = (world / "runs/tiny/pretrain/current").resolve() / "checkpoints/step-000004/model-00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        code, text = stage("pretrain", "recipe.yaml", "--stage", "decay", "decay.steps=7", cwd=world)
    finally:
        file.write_bytes(data)
    assert code == 2 and "has sha256" in text and "Traceback" not in text, text


@pytest.mark.parametrize(
    "faults", [["save:1", "save:1"], ["save:2", "work:4"], ["save:3"]], ids=lambda f: "-".join(f).replace(":", "")
)
def test_killed_while_a_checkpoint_is_written_beside_the_training_it_ends_the_same(world, faults):
    runs = "killed-" + "-".join(faults).replace(":", "")
    for fault in faults:
        code, text = stage("pretrain", "recipe.yaml", "--stage", "pretrain", f"output={runs}", cwd=world, fault=fault)
        assert code == -9, f"{fault}: {code}\n{text}"
    succeed("pretrain", "recipe.yaml", "--stage", "pretrain", f"output={runs}", cwd=world)
    path = world / runs / "tiny/pretrain/current"
    assert files_of(path) == files_of(world / "runs/tiny/pretrain/current") and steps_in(path.resolve()) == [4, 6]
