"""What must not change unless a stage's VERSION does: identities of the shipped recipes, content of a tiny chain's data
stages, losses of its training stages.

    ALMA_RECORD_GOLDEN=1 .venv/bin/python -m pytest tests/test_golden.py      # after a change that is meant

The files are in tests/golden/. A diff of them in a commit says what a change did to old runs.
"""

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

import chain_rows
import pytest
from harness import succeed
from paths import ROOT

from pipeline.core.artifact import current
from pipeline.core.config import identity
from pipeline.core.recipe import load, module_of

GOLDEN = Path(__file__).parent / "golden"
RECORD = os.environ.get("ALMA_RECORD_GOLDEN") == "1"
WRITERS = ("pyarrow", "tokenizers", "sentencepiece", "numpy")  # of the files that are compared by content


def compare(name: str, found: dict) -> None:
    path = GOLDEN / f"{name}.json"
    if RECORD:
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    expected = json.loads(path.read_text())
    changed = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    assert not changed, f"{path}: {', '.join(changed)} changed; raise the stage's VERSION if that is meant"


def test_identities_of_the_shipped_recipes():
    """Keys that decide a result, and the stage's version: without sources and parents, which are not here."""
    found = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        for name, config in load(path).stages.items():
            value = {"kind": config.kind, "version": module_of(config.kind).VERSION, "config": identity(config)}
            text = json.dumps(value, sort_keys=True, ensure_ascii=False)
            found[f"{path.stem}.{name}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    compare("identities", found)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The tiny chain of chain_rows.py up to DPO and PPO."""
    folder = tmp_path_factory.mktemp("golden")
    chain_rows.rows_of(folder)
    for kind in ("clean", "tokenizer", "pack", "pretrain", "sft", "reward", "dpo", "ppo"):
        succeed(kind, "r.yaml", cwd=folder)
    return folder / "runs" / "whole"


def test_content_of_the_data_stages(chain):
    versions = {name: importlib.metadata.version(name) for name in WRITERS}
    found = {stage: current(chain / stage).digest for stage in ("clean", "tokenizer", "pack")}
    path = GOLDEN / "data.json"
    if not RECORD and json.loads(path.read_text())["versions"] != versions:
        pytest.skip(f"the files of {path} were written by other versions of {', '.join(WRITERS)}")
    compare("data", {**found, "versions": versions})


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo"])
def test_losses_of_the_training_stages(chain, stage):
    """1e-4 relative: processors round differently."""
    lines = (current(chain / stage).path / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if line.get("loss") is not None]
    path = GOLDEN / f"losses-{stage}.json"
    if RECORD:
        path.write_text(json.dumps(losses) + "\n")
    assert len(losses) > 1 and losses == pytest.approx(json.loads(path.read_text()), rel=1e-4, abs=1e-5)
