"""Standard output that nobody reads, and run folders in which somebody has been."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from pipeline.core import artifact, chain
from pipeline.core.errors import UserError
from pipeline.core.launch import sweep_snapshots
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage
from pipeline.core.status import examine

RECIPE = """
name: two
stages:
  clean: {sources: {a: {path: a.txt, sample_by: line}}, holdout: 0.2, workers: 1}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.txt").write_text("\n".join(tiny.texts(0, 60)) + "\n", encoding="utf-8")
    (folder / "r.yaml").write_text(RECIPE)
    before = os.getcwd()
    os.chdir(folder)
    run_stage(load("r.yaml"), "clean")
    yield folder
    os.chdir(before)


def alma(folder: Path, *words: str, stdout=subprocess.PIPE, shell: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline.cli", *words]
    if shell:
        command = ["bash", "-c", f'"$0" "$@" {shell}', *command]
    return subprocess.run(
        command,
        cwd=folder,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


@pytest.mark.parametrize("how", ["reader left", "closed", "all closed"])
def test_a_run_whose_output_nobody_reads_ends_well(made, tmp_path, how):
    """correctness 33: `alma run r.yaml | head`, `alma run r.yaml >&-`."""
    shutil.copy(made / "a.txt", tmp_path)
    shutil.copy(made / "r.yaml", tmp_path)
    if how == "reader left":
        reader, writer = os.pipe()
        os.close(reader)
        answer = alma(tmp_path, "run", "r.yaml", stdout=writer)
        os.close(writer)
    else:
        answer = alma(tmp_path, "run", "r.yaml", shell=">&-" if how == "closed" else "<&- >&- 2>&-")
    assert answer.returncode == 0 and b"Error" not in answer.stderr, answer.stderr
    here = tmp_path / "runs" / "two" / "clean" / "current"
    assert artifact.read(here.resolve()).damage(full=True) is None
    assert artifact.read(here.resolve()).digest == artifact.current(made / "runs" / "two" / "clean").digest


def test_status_ends_well_when_its_reader_leaves(made):
    """correctness 33"""
    reader, writer = os.pipe()
    os.close(reader)
    answer = alma(made, "status", "r.yaml", stdout=writer)
    os.close(writer)
    assert (answer.returncode, answer.stderr) == (0, b"")


def _folder_for_a_manifest(stage: Path) -> None:
    manifest = stage.resolve() / "current" / "manifest.json"
    manifest.unlink()
    manifest.mkdir()


def _list_for_a_manifest(stage: Path) -> None:
    (stage / "current" / "manifest.json").write_text("[" * 100_000)


def _no_text_in_a_manifest(stage: Path) -> None:
    (stage / "current" / "manifest.json").write_bytes(b"\xff\xfe\x00")


def _change_of_a_manifest(stage: Path, change: dict) -> None:
    manifest = stage / "current" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))


def _list_of_files_that_is_none(stage: Path) -> None:
    _change_of_a_manifest(stage, {"files": []})


def _files_without_hashes(stage: Path) -> None:
    _change_of_a_manifest(stage, {"files": {"data": 3}})


def _word_for_a_version(stage: Path) -> None:
    _change_of_a_manifest(stage, {"schema_version": "x"})


def _link_to_nowhere(stage: Path) -> None:
    (stage / "current").unlink()
    (stage / "current").symlink_to("0123456789ab")


def _link_to_itself(stage: Path) -> None:
    (stage / "current").unlink()
    (stage / "current").symlink_to("current")


def _file_for_a_link(stage: Path) -> None:
    name = os.readlink(stage / "current")
    (stage / "current").unlink()
    (stage / "current").write_text(name)


def _folder_for_a_link(stage: Path) -> None:
    content = (stage / "current").resolve()
    (stage / "current").unlink()
    content.rename(stage / "current")


@pytest.mark.parametrize(
    "harm, state, said",
    [
        (_folder_for_a_manifest, "damaged", "manifest.json: cannot be read (Is a directory)"),
        (_list_for_a_manifest, "damaged", "manifest.json: damaged, not JSON"),
        (_no_text_in_a_manifest, "damaged", "manifest.json: damaged, not JSON"),
        (_list_of_files_that_is_none, "damaged", "manifest.json: damaged, files is '[]'"),
        (_files_without_hashes, "damaged", "manifest.json: damaged, data has no sha256, size and mtime"),
        (_word_for_a_version, "damaged", "manifest.json: damaged, schema_version is 'x'"),
        (_link_to_nowhere, "up to date", "kept from an earlier run"),
        (_link_to_itself, "damaged", "manifest.json: cannot be read (Too many levels of symbolic links)"),
        (_file_for_a_link, "up to date", "kept from an earlier run"),
        (_folder_for_a_link, "up to date", ""),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_stands_in_a_run_folder_is_told_and_made_good(made, tmp_path, monkeypatch, harm, state, said):
    """correctness 33: a manifest or a link that is something else."""
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    stage = tmp_path / "runs" / "two" / "clean"
    digest = artifact.current(stage).digest
    harm(stage)
    node = examine(load("r.yaml"))["clean"]
    assert (node.state, said in node.reason) == (state, True), node.reason
    run_stage(load("r.yaml"), "clean")
    assert examine(load("r.yaml"))["clean"].state == "up to date"
    assert artifact.current(stage).digest == digest and (stage / "current").is_symlink()


def test_snapshots_of_other_chains_stay(made, monkeypatch):
    """correctness 33: another host's, another container's, and one that a stage may be reading."""
    folder = made / "runs" / "two"
    here = os.uname().nodename
    names = [f".chain-{here}-999999999.yaml", ".chain-elsewhere-999999999.yaml", f".chain-{here}-{os.getpid()}.yaml"]
    for name in names:
        (folder / name).write_text("")
    sweep_snapshots(folder)
    assert all((folder / name).exists() for name in names)
    for name in names:
        os.utime(folder / name, (1, 1))
    sweep_snapshots(folder)
    assert [name for name in names if (folder / name).exists()] == names[1:]
    for name in names[1:]:
        (folder / name).unlink()


def test_inputs_that_cannot_be_used_do_not_hide_the_other_stages(made, tmp_path):
    """correctness 33, 47: `alma status` has a line for each stage all the same."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "manifest.json").mkdir()
    recipe = load("r.yaml", [f"stages.tokenizer={{vocab_size: 400, inputs: {{data: {tmp_path / 'outside'}}}}}"])
    graph = examine(recipe)
    assert graph["clean"].state == "up to date" and graph["tokenizer"].state == "missing"
    assert "inputs.data" in graph["tokenizer"].reason and "cannot be read" in graph["tokenizer"].reason
    with pytest.raises(UserError, match="cannot be read"):
        chain.run(recipe)


def test_a_folder_that_cannot_be_an_input_is_refused_at_once(made, monkeypatch):
    """correctness 32, 33: the root of a disk by mistake, a file that another program removes meanwhile."""
    monkeypatch.setattr(artifact, "MAX_FILES", 5)
    with pytest.raises(UserError, match="has more than 5 files; name the folder that is meant"):
        artifact.external("data", Path("/usr"))
    monkeypatch.undo()
    monkeypatch.setattr(artifact, "content_files", lambda folder: [folder / "gone"])
    with pytest.raises(UserError, match="inputs.data: .*gone cannot be read: No such file"):
        artifact.external("data", made)
