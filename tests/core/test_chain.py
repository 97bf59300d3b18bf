"""The chain: a small recipe through all ten stages with `alma`, then what happens when things change, break and die."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from chain_rows import RECIPE, rows_of
from harness import files_of, stage, succeed

from pipeline.core import artifact, chain
from pipeline.core.errors import UserError
from pipeline.core.lock import Lock
from pipeline.core.output import Output
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage
from pipeline.core.status import examine

ALMA = [sys.executable, "-m", "pipeline.cli"]


def alma(*words, cwd, code=0, env=None) -> str:
    answer = subprocess.run(
        [*ALMA, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=300,
    )
    assert answer.returncode == code, (
        f"alma {' '.join(map(str, words))} ended with {answer.returncode}:\n{answer.stdout}\n{answer.stderr}"
    )
    assert "Traceback" not in answer.stderr, answer.stderr
    return answer.stdout + answer.stderr


def states(folder: Path, *words) -> dict[str, str]:
    graph = examine(load(folder / "r.yaml", [f"output={folder / 'runs'}", *words]))
    return {name: node.state for name, node in graph.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The chain, run once: killed at its first stage's first unit, and started again with the same command, as a
    user would."""
    folder = tmp_path_factory.mktemp("whole")
    rows_of(folder)
    before = os.getcwd()
    os.chdir(folder)
    # Stages run in forked children with torch loaded: ten imports less. `alma run` itself is tested below.
    for config in load("r.yaml").stages.values():
        succeed(config.kind, "r.yaml", cwd=folder)
    yield folder
    os.chdir(before)


def test_every_stage_is_up_to_date_and_a_second_run_does_nothing(whole):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = alma("run", "r.yaml", cwd=whole)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # seconds of processor time: the wall clock is that of whatever else runs here
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    assert said.count(": up to date") == 10 and "running" not in said
    assert "logits differ by" in said and "win" not in said  # the closing table
    answer = json.loads(alma("status", "r.yaml", "--json", cwd=whole))
    assert {node["state"] for node in answer.values()} == {"up to date"} and list(answer) == list(
        load(whole / "r.yaml").stages
    )


def test_every_output_is_whole_and_knows_its_parents(whole):
    said = alma("verify", "artifacts", "r.yaml", cwd=whole)
    assert said.count("complete ") == 10
    card = (whole / "runs/whole/export/current/README.md").read_text()
    for name in ("clean", "tokenizer", "pack", "pretrain", "sft", "reward", "ppo"):
        assert f"| {name} | {name} |" in card
    assert "| dpo |" not in card  # not an ancestor


def test_exported_folder_is_a_chat_model(whole):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = whole / "runs/whole/export/current"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a red cat?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    trained = AutoModelForCausalLM.from_pretrained(whole / "runs/whole/ppo/current/model")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, trained(**inputs).logits)
    assert model.generation_config.eos_token_id == [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]
    assert artifact.current(whole / "runs/whole/export").metrics["logit_difference"] == 0


def test_every_before_and_after_has_its_size(whole):
    """Correctness 19: no number of the closing table stands without an interval or the size of its sample."""
    measures = {}
    for name in load(whole / "r.yaml").stages:
        measures[name] = artifact.current(whole / "runs/whole" / name).metrics["summary"]["measure"]
    changed = {name: text for name, text in measures.items() if "->" in text}
    assert set(changed) == {"pretrain", "sft", "reward", "dpo", "ppo"}
    for name, text in changed.items():
        for part in text.split("->")[1:]:
            assert "n=" in part or name == "dpo", (name, text)
    assert "n=" in measures["dpo"] and "±" in measures["ppo"] and "n=8" in measures["ppo"]
    assert all("[" in part for part in measures["assess"].split(";"))


def test_export_in_bf16_says_how_far_it_is(whole):
    succeed(
        "export",
        "r.yaml",
        "export.dtype=bf16",
        "name=bf16",
        "export.inputs={model: ./runs/whole/sft/current}",
        cwd=whole,
    )
    metrics = artifact.current(whole / "runs/bf16/export").metrics
    assert 0 < metrics["logit_difference"] < 0.1 and metrics["top1_agreement"] > 0.9


def test_assess_against_transformers_own_loss(whole):
    """Perplexity of the SFT model on the same rows, by the loss that transformers computes."""
    import math

    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.data.tokens.heldout_rows import heldout_rows

    report = json.loads((whole / "runs/whole/assess/current/report.json").read_text())
    rows = heldout_rows(whole / "runs/whole/pack/current", 64, 8)
    ids = torch.stack([torch.tensor(row.tokens.tolist()) for row in rows])
    model = AutoModelForCausalLM.from_pretrained(whole / "runs/whole/sft/current/model")
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    found = report["models"]["sft"]
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(
        loss * 64 * len(rows) / math.log(2) / sum(row.bytes for row in rows), rel=1e-4
    )
    win = report["win_rates"]["dpo over sft"]
    assert 0 <= win["low"] <= win["rate"] <= win["high"] <= 1 and win["prompts"] == 12


def test_win_rate_and_its_interval():
    from types import SimpleNamespace

    from pipeline.assessment.measures import win_rate

    config = SimpleNamespace(seed=0, bootstrap=4000)
    win = win_rate([1.0] * 60 + [0.0] * 30 + [0.5] * 10, [0.5] * 100, config, "x")
    assert win["rate"] == 0.65 and win["ties"] == 0.1
    error = (0.6 * 0.35**2 + 0.3 * 0.65**2 + 0.1 * 0.15**2) ** 0.5 / 10  # standard error of the mean of these outcomes
    assert win["low"] == pytest.approx(0.65 - 1.96 * error, abs=0.015) and win["high"] == pytest.approx(
        0.65 + 1.96 * error, abs=0.015
    )


@pytest.mark.parametrize(
    "kind, faults",
    [("assess", ["work:2", "save:1", "publish:1"]), ("export", ["save:1", "work:1", "publish:1", "publish:2"])],
)
def test_killed_assess_and_export_end_with_the_same_bytes(whole, kind, faults):
    expected = files_of(whole / f"runs/whole/{kind}/current")
    shutil.rmtree(whole / f"runs/whole/{kind}")
    for fault in faults:
        assert stage(kind, "r.yaml", cwd=whole, fault=fault)[0] == -signal.SIGKILL
        assert (
            states(whole)[kind] in ("interrupted", "up to date")
            if fault == "publish:2"
            else states(whole)[kind] == "interrupted"
        )
    succeed(kind, "r.yaml", cwd=whole)
    assert files_of(whole / f"runs/whole/{kind}/current") == expected
    shutil.rmtree(whole / f"runs/whole/{kind}")
    for _ in range(2):
        stage(kind, "r.yaml", cwd=whole, kill_after=random.uniform(0.2, 2))
    succeed(kind, "r.yaml", cwd=whole)
    assert files_of(whole / f"runs/whole/{kind}/current") == expected


def test_a_change_is_explained_and_concerns_only_what_comes_after(whole):
    changed = states(whole, "reward.optimizer.lr=2e-3")
    assert [name for name, state in changed.items() if state != "up to date"] == ["reward", "ppo", "assess", "export"]
    said = alma("status", "r.yaml", "reward.optimizer.lr=2e-3", cwd=whole)
    assert "optimizer.lr: 0.001 -> 0.002" in said and "reward is stale" in said
    assert set(
        states(
            whole, "pretrain.micro_batch=2", "clean.workers=2", "sft.save.every_steps=1", "dpo.run.processes=2"
        ).values()
    ) == {"up to date"}


def test_a_parent_made_again_with_the_same_result_makes_nothing_stale(whole):
    succeed("tokenizer", "r.yaml", "--restart", cwd=whole)
    assert set(states(whole).values()) == {"up to date"}


def test_an_earlier_recipes_output_serves_again(whole):
    first = artifact.current(whole / "runs/whole/tokenizer").path
    succeed("tokenizer", "r.yaml", "tokenizer.vocab_size=330", cwd=whole)
    assert artifact.current(whole / "runs/whole/tokenizer").path != first
    said = alma("run", "r.yaml", "tokenizer", cwd=whole)
    assert "tokenizer: up to date" in said and artifact.current(whole / "runs/whole/tokenizer").path == first


def test_damage_is_named_refused_by_children_and_mended(whole):
    path = whole / "runs/whole/tokenizer/current/tokenizer.json"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b" ")
    try:
        assert states(whole)["tokenizer"] == "damaged" and states(whole)["pack"] == "stale"
        code, said = stage("pack", "r.yaml", cwd=whole)
        assert code == 2 and "tokenizer.json has sha256" in said and "Traceback" not in said
        assert "damaged" in alma("verify", "artifacts", "r.yaml", "tokenizer", cwd=whole, code=2)
        succeed("tokenizer", "r.yaml", cwd=whole)
        assert set(states(whole).values()) == {"up to date"}
    finally:
        assert path.read_bytes() == good


def test_a_source_that_changed_makes_its_readers_stale(whole):
    path = whole / "animals.txt"
    before, status = path.read_text(), path.stat()
    try:
        path.write_text(before + "one more line of text\n")
        assert states(whole)["clean"] == "stale" and states(whole)["sft"] == "stale"
        found = examine(load("r.yaml"))  # correctness 46
        assert found["clean"].reason == "sources.animals: 1 file changed (animals.txt)"
        (whole / "animals2.txt").write_text("more lines\n")
        found = examine(load("r.yaml", ["clean.sources.animals.path=animals*.txt", "clean.sources.animals.limit=9"]))
        assert found["clean"].reason == (
            "sources.animals.limit: none (default) -> 9; sources.animals: 1 file added (animals2.txt), 1 file changed"
            " (animals.txt)"
        )
        path.write_text(before)  # another mtime, the same text
        assert set(states(whole).values()) == {"up to date"}
    finally:
        (whole / "animals2.txt").unlink(missing_ok=True)
        path.write_text(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.slow
def test_without_the_raw_text_later_stages_show_their_state_and_run(whole, tmp_path, monkeypatch, capfd):
    """correctness 47: clean on one machine, train on another."""
    here = tmp_path / "here"
    shutil.copytree(whole, here, symlinks=True)
    (here / "animals.txt").unlink()
    (here / "rows.jsonl").unlink()
    monkeypatch.chdir(here)

    def refused(*words, only=(), **options) -> str:
        with pytest.raises(UserError) as caught:
            chain.run(load("r.yaml", words), only, **options)
        return str(caught.value)

    found = examine(load("r.yaml"))
    assert {node.state for node in found.values()} == {"up to date"}
    assert found["clean"].reason == "as of its run; not on this machine: sources.animals, sources.nouns"
    assert "sources.nouns" in found["sft"].reason and not found["pretrain"].reason
    # what needs none of it runs; what needs it is refused with every reason, before anything else runs
    assert "export: stale" in alma("run", "r.yaml", "export", "export.dtype=bf16", cwd=here)
    said = refused("clean.holdout=0.2", "sft.steps=5")
    for line in (
        "r.yaml:9: sources.animals: animals.txt does not exist",
        "r.yaml:10: sources.nouns: rows.jsonl does not exist",
    ):
        assert line in said
    assert capfd.readouterr().out == ""
    assert "sources.nouns: rows.jsonl does not exist" in refused(only=["clean"], restart=True)
    run_stage(load("r.yaml"), "clean")
    assert "clean: up to date (as of its run; not on this machine" in capfd.readouterr().out
    # another option of a source is another result, which cannot be made here
    assert "animals.txt does not exist" in refused("clean.sources.animals.limit=3")
    # of clean and pack nothing was copied
    shutil.rmtree(here / "runs" / "whole" / "clean")
    shutil.rmtree(here / "runs" / "whole" / "pack")
    found = examine(load("r.yaml"))
    assert {found[name].state for name in ("clean", "pack")} == {"absent"}
    assert {node.state for name, node in found.items() if name not in ("clean", "pack")} == {"up to date"}
    chain.run(load("r.yaml"))
    assert "clean: absent (" in capfd.readouterr().out
    assert "stages.pack.inputs.data: clean has no output on this machine" in refused("pretrain.steps=7")
    assert "animals.txt does not exist" in refused(only=["clean"])


@pytest.mark.slow
def test_alma_run_is_killed_and_goes_on_and_its_stage_dies_with_it(tmp_path):
    """kill -9 of the chain's own process: the stage goes too, nothing holds the lock, and the same command ends."""
    rows_of(tmp_path)
    words = [*ALMA, "run", "r.yaml", "tokenizer"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lock = tmp_path / "runs/whole/clean/lock.json"
    deadline = time.time() + 60
    while not lock.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.stdout.read()
    holder = json.loads(lock.read_text())["pid"]
    process.kill()
    process.wait()
    for _ in range(200):
        if (
            not Path(f"/proc/{holder}").exists()
            or Path(f"/proc/{holder}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        ):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the stage outlived the chain")
    said = alma("run", "r.yaml", "tokenizer", cwd=tmp_path)
    assert "tokenizer: missing, running" in said and artifact.current(tmp_path / "runs/whole/tokenizer") is not None
    assert (
        not list((tmp_path / "runs/whole").glob(".chain-*"))
        or len(list((tmp_path / "runs/whole").glob(".chain-*"))) == 1
    )


def test_mistakes_end_before_any_work_with_code_2(tmp_path, monkeypatch, capfd):
    from pipeline import cli

    def refused(*words):  # the command in this process: torch is imported once
        monkeypatch.setattr(sys, "argv", ["alma", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        answer = capfd.readouterr()
        assert left.value.code == 2 and "Traceback" not in answer.err
        return answer.out + answer.err

    rows_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere.jsonl")
    said = refused("run", "r.yaml")
    assert said.startswith("error: ") and "rows.jsonl" in said and "clean: missing, running" not in said
    (tmp_path / "elsewhere.jsonl").rename(tmp_path / "rows.jsonl")
    for words, part in [
        (["run", "r.yaml", "tokeniser"], "no stage is called 'tokeniser'"),
        (
            ["run", "r.yaml", "pretrain.batch_size=9", "pretrain.run.processes=2"],
            "batch_size 9 is not divisible by 2 data-parallel ranks",
        ),
        (["run", "r.yaml", "pretrain.parallel={pipeline: 2, zero: 3}"], "pipeline: 2 cannot be combined with zero: 3"),
        (["run", "r.yaml", "sft.parallel.pipeline=2", "sft.run.processes=2"], "pipeline: 2 is for pretraining"),
        (["run", "r.yaml", "model.hiden_size=3"], "did you mean hidden_size?"),
    ]:
        said = refused(*words)
        assert part in said and said.count("\n") == 1, said
    assert not any((tmp_path / "runs").rglob("run.json"))


def test_a_stage_without_its_parent_says_which(tmp_path):
    rows_of(tmp_path)
    code, said = stage("pack", "r.yaml", cwd=tmp_path)
    assert code == 2 and "needs the output of clean" in said and "alma run" in said


def test_two_stages_of_a_kind_need_a_name(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE + "  export2: {kind: export, inputs: {model: sft}}\n")
    code, said = stage("export", "r.yaml", cwd=tmp_path)
    assert code == 2 and "has 2 stages of kind export (export, export2); choose one with --stage NAME" in said
    code, said = stage("export", "r.yaml", "--stage", "export3", cwd=tmp_path)
    assert code == 2 and "no stage of kind export has this name; expected one of export, export2" in said


FORKED = (
    tiny.RECIPE
    + """
  more: {kind: pretrain, inputs: {tokens: ./tokens, tokenizer: ./tokenizer, model: pretrain}, sequence_length: 32, batch_size: 8, steps: 3, precision: fp32, heldout_rows: 4, optimizer: {lr: 3e-3}}
"""
)


@pytest.mark.slow
def test_a_fork_goes_on_and_what_comes_after_it_is_made_anew(tmp_path, monkeypatch):
    """Only the stage whose own keys changed goes on from its checkpoint; a stage whose input changed has nothing to
    go on from, and says so (correctness 48)."""
    tiny.write_inputs(tmp_path)
    (tmp_path / "r.yaml").write_text(FORKED)
    for name in ("pretrain", "more"):
        succeed("pretrain", "r.yaml", "--stage", name, cwd=tmp_path)
    # its parent is stale now
    code, said = stage("pretrain", "r.yaml", "--stage", "more", "pretrain.steps=8", cwd=tmp_path)
    assert code == 2 and "needs the output of pretrain, which is stale: steps: 6 -> 8" in said
    said = alma("run", "r.yaml", "pretrain.steps=8", "--fork", cwd=tmp_path)
    assert "resuming from step-000006" in said and said.count("resuming from") == 1
    line = next(line for line in said.splitlines() if line.startswith("more: --fork has no checkpoint"))
    assert "inputs.model: another result of pretrain (" in line and ": steps: 6 -> 8)" in line
    assert line.endswith("it starts from step 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is at step-000008 already and the recipe asks for 2 steps"):
        chain.run(load("r.yaml", ["pretrain.steps=2"]), fork=True)
    with pytest.raises(UserError, match="--fork found no complete checkpoint of stage pretrain.*inputs.tokens"):
        shutil.copytree("tokens", "tokens2")
        (tmp_path / "tokens2/index.json").write_text(" " + (tmp_path / "tokens/index.json").read_text())
        (tmp_path / "tokens2/manifest.json").unlink()
        chain.run(load("r.yaml", ["pretrain.inputs.tokens=./tokens2"]), ["pretrain"], fork=True)
    assert artifact.current(tmp_path / "runs/tiny/pretrain").manifest["forked_from"].endswith("step-000006")
    assert artifact.current(tmp_path / "runs/tiny/more").manifest["forked_from"] is None
    forked = files_of(tmp_path / "runs/tiny/more/current")
    (tmp_path / "alone").mkdir()
    shutil.copytree(tmp_path / "runs/tiny/pretrain/current", tmp_path / "alone/model")
    succeed("pretrain", "r.yaml", "--stage", "more", "output=again", "more.inputs.model=./alone/model", cwd=tmp_path)
    assert files_of(tmp_path / "again/tiny/more/current") == forked
    path = tmp_path / "alone/model/model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, said = stage(
        "pretrain", "r.yaml", "--stage", "more", "output=third", "more.inputs.model=./alone/model", cwd=tmp_path
    )
    assert code == 2 and "is damaged" in said and "model.safetensors" in said
    code, said = stage(
        "pretrain", "r.yaml", "--stage", "more", "output=third", "more.inputs.model=./runs/pack", cwd=tmp_path
    )
    assert code == 2 and "is not a folder" in said


def test_a_recipe_corrected_after_its_error_runs(tmp_path):
    """correctness 48: clean has done all its work when it finds that nothing is held out."""
    rows_of(tmp_path)
    code, said = stage("clean", "r.yaml", "clean.holdout=1e-9", cwd=tmp_path)
    assert code == 2 and "change `holdout`" in said
    said = succeed("clean", "r.yaml", cwd=tmp_path)
    assert "from which nothing can be resumed" in said
    assert artifact.current(tmp_path / "runs/whole/clean") is not None


def test_another_run_between_publishing_and_checking(tmp_path, monkeypatch):
    """correctness 48: it may hold the lock, start the stage again, or its user may change a source."""
    rows_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    meanwhile = {}

    def launch(node, recipe, *, restart, fork):
        succeed("clean", "r.yaml", cwd=tmp_path)
        meanwhile["do"](node)

    monkeypatch.setattr(chain, "launch", launch)
    other = Lock(tmp_path / "runs/whole/clean")
    meanwhile["do"] = lambda node: other.acquire()
    assert chain.run(load("r.yaml"), ["clean"])["clean"].state == "up to date"
    other.release()

    def again(node):
        output = Output(node.folder, "clean", "clean", node.identity)
        output.open(config={}, parents={}, restart=True).close()

    (tmp_path / "animals.txt").write_text("\n".join(tiny.texts(1, 150)) + "\n", encoding="utf-8")
    meanwhile["do"] = again
    with pytest.raises(UserError, match="stage clean finished, but is now interrupted.*run the same command"):
        chain.run(load("r.yaml"), ["clean"])
    meanwhile["do"] = lambda node: (tmp_path / "animals.txt").write_text("another text\n")
    with pytest.raises(UserError, match=r"is now stale: sources.animals: 1 file changed \(animals.txt\)"):
        chain.run(load("r.yaml"), ["clean"])
