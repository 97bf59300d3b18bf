"""What the core asks of a stage: a new kind is one file and one name in KINDS."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
from paths import ROOT

STAGE = '''\
"""Count the words of a list in the cleaned text."""

from pathlib import Path

import pyarrow.parquet

from pipeline.core.config import ExternalFiles, StageConfig, check_source_names
from pipeline.core.errors import UserError
from pipeline.core.files import write_json

VERSION = 1
INPUTS = {"data": ("clean",)}


class Config(StageConfig):
    """What is counted."""

    words: str
    """File with one word per line."""
    source: str
    """Documents of this source."""

    @classmethod
    def external(cls):
        return [ExternalFiles("words", lambda config: [Path(config.words)])]

    def check_inputs(self, inputs):
        data = inputs.get("data")
        if data and data.config:
            check_source_names({"source": [self.source]}, data.config.planned_sources(data.inputs))

    def check_records(self, inputs):
        if Path(self.words).is_file() and not Path(self.words).read_text().split():
            raise UserError(f"words: {self.words} has no words")


def run(config, inputs, output):
    words = Path(config.words).read_text().split()
    counts = dict.fromkeys(words, 0)
    for shard in sorted((inputs["data"].path / "train").glob("*.parquet")):
        for row in pyarrow.parquet.read_table(shard).to_pylist():
            if row["source"] == config.source:
                for word in words:
                    counts[word] += row["text"].count(word)
    write_json(output.path / "counts.json", counts)
    return {"summary": {"measure": f"{sum(counts.values())} occurrences"}}


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("count")
'''
RECIPE = """\
name: toy
stages:
  clean:
    filters: {max_repeated_shingles: 1.0}
    sources:
      one: {path: one.txt, sample_by: line}
  count: {words: words.txt, source: one}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pipeline/count.py").write_text(STAGE)
    kinds = folder / "pipeline/core/recipe.py"
    before = kinds.read_text()
    kinds.write_text(before.replace("KINDS = (", 'KINDS = (\n    "count",'))
    assert kinds.read_text() != before
    (folder / "one.txt").write_text("\n".join(tiny.texts(1, 150)) + "\n", encoding="utf-8")
    (folder / "words.txt").write_text("gnu\ncat\n")
    (folder / "r.yaml").write_text(RECIPE)
    return folder


def alma(folder, *words) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def state(folder, *words) -> dict:
    done = alma(folder, "status", "r.yaml", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["count"]


def test_a_new_kind_of_stage_runs_in_a_chain(world):
    """With an input, a file from outside and a requirement of its input: up to date, stale, refused, absent."""
    for words, said in (
        (["count.source=two"], "stages.count.source: its text has no source 'two'; it has one"),
        (["count.words=no.txt"], "words: no.txt does not exist"),
        (["count.word=no.txt"], "unknown key stages.count.word; did you mean 'words'?"),
        (["count.run.processes=2"], "stage count: 2 processes were launched, but it runs in one process"),
        (["count.words=empty.txt"], "words: empty.txt has no words"),
    ):
        (world / "empty.txt").write_text("\n")
        done = alma(world, "run", "r.yaml", *words)
        assert done.returncode == 2 and said in done.stderr and not (world / "runs/toy/clean").exists(), done.stderr

    done = alma(world, "run", "r.yaml")
    assert done.returncode == 0 and "occurrences; the result is in runs/toy/count/current" in done.stdout, done.stderr
    counts = json.loads((world / "runs/toy/count/current/counts.json").read_text())
    assert set(counts) == {"gnu", "cat"} and counts["gnu"] > 0
    done = alma(world, "run", "r.yaml")
    assert done.stdout.splitlines()[:2] == ["clean: up to date", "count: up to date"]

    (world / "moved").mkdir()
    (world / "words.txt").rename(world / "moved/words.txt")
    assert state(world, "count.words=moved/words.txt")["state"] == "up to date"
    assert state(world)["reason"] == "as of its run; not on this machine: words"
    (world / "words.txt").write_text("gnu\ndog\n")
    assert (state(world)["state"], state(world)["reason"]) == ("stale", "words: 1 file changed (words.txt)")
    manifest = json.loads((world / "runs/toy/count/current/manifest.json").read_text())
    assert manifest["identity"]["config"] == {"kind": "count", "seed": 0, "source": "one"}
    assert list(manifest["identity"]["sources"]) == ["@words"]


def test_the_schema_has_a_new_kind(world):
    schema = json.loads(alma(world, "recipe", "schema").stdout)
    assert schema["$defs"]["stage-count"]["properties"]["words"]["description"] == "File with one word per line."
