"""The reference's log-probabilities: those of transformers, kept for other runs, the same bits whatever they are
computed with."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import tuned
from harness import succeed
from tiny_engine import VOCABULARY, config, output_in, tiny

from pipeline.core.errors import UserError
from pipeline.train import chunked_loss, engine
from pipeline.train.answer_rows import AnswerRow
from pipeline.train.reference_logprobs import Cache, fixed_batches, padded_length, reference_logprobs

LENGTH = 300


def answers(count: int, seed: int = 0) -> list[AnswerRow]:
    source = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(source.integers(8, LENGTH))
        ids = source.integers(0, VOCABULARY, length).astype(np.int32)
        rows.append(AnswerRow(ids, int(source.integers(1, length))))
    return rows


class Counting:
    """An engine that counts the answers that it runs."""

    def __init__(self, precision: str = "fp32"):
        settings = config(sequence_length=LENGTH, precision=precision)
        model = tiny(max_position_embeddings=LENGTH)
        chunked_loss.install(model, per_token=True, selects=True)
        self.engine = engine.build(model, None, settings)
        self.config, self.data_rank, self.data_world, self.computed = settings, 0, 1, 0

    def forward(self, batches, read):
        for batch in batches:
            ids = batch["inputs"]["input_ids"]
            self.computed += len(torch.unique(ids, dim=0))
        return self.engine.forward(batches, read)


def computed(trainer: Counting, rows, folder, tmp_path) -> np.ndarray:
    output = output_in(Path(tempfile.mkdtemp(dir=tmp_path)))
    return reference_logprobs(trainer, rows, 0, Cache(folder, {"weights": "a"}), output, "train")


@pytest.fixture(scope="module")
def trainer():
    return Counting()


def test_they_are_those_of_transformers(trainer, tmp_path):
    """Sums of up to 300 tokens to 1e-6 relative, fp32."""
    rows = answers(20)
    found = computed(trainer, [*rows, rows[3]], tmp_path / "cache", tmp_path)
    model = tiny(max_position_embeddings=LENGTH)
    for row, value in zip([*rows, rows[3]], found, strict=True):
        ids = torch.tensor(row.ids).long()
        with torch.no_grad():
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert float(logps[row.start - 1 :].sum()) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_changed_record_costs_itself_and_changes_no_bit(precision, tmp_path):
    """Values are the same bits with and without the cache, and next to other rows."""
    trainer, rows = Counting(precision), answers(60)
    first = computed(trainer, rows, tmp_path / "cache", tmp_path)
    assert trainer.computed == 60
    assert np.array_equal(computed(trainer, rows, tmp_path / "cache", tmp_path), first) and trainer.computed == 60
    changed = [*rows[:20], *answers(1, seed=1), *rows[21:]]
    again = computed(trainer, changed, tmp_path / "cache", tmp_path)
    assert trainer.computed == 61
    same = np.arange(60) != 20
    assert np.array_equal(again[same], first[same]) and again[20] != first[20]
    alone = computed(trainer, changed[::-7], tmp_path / "other", tmp_path)
    assert np.array_equal(alone, again[::-7])


def test_a_run_that_is_killed_computes_nothing_twice(trainer, tmp_path, monkeypatch):
    """Interrupted after the first file; the second run computes the rest."""
    from pipeline.core import faults

    rows = answers(200, seed=3)
    fresh = computed(trainer, rows, tmp_path / "fresh", tmp_path)

    def interrupt(name: str) -> None:
        if name == "work":
            raise KeyboardInterrupt

    before = trainer.computed
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(faults, "point", interrupt)
        computed(trainer, rows, tmp_path / "cache", tmp_path)
    assert 0 < trainer.computed - before < 200
    assert np.array_equal(computed(trainer, rows, tmp_path / "cache", tmp_path), fresh)
    assert trainer.computed - before == 200


def test_lengths_are_few_and_padding_is_little():
    lengths = {length: padded_length(length, 8000) for length in range(1, 8001)}
    assert all(length <= padded for length, padded in lengths.items()) and len(set(lengths.values())) < 45
    assert all(padded <= 1.125 * length + 1 for length, padded in lengths.items() if length >= 512)
    batches = fixed_batches(answers(50), np.arange(50), LENGTH)
    assert sorted({row for batch in batches for row in batch}) == list(range(50))


def test_a_damaged_file_is_named(tmp_path):
    cache = Cache(tmp_path, {"weights": "a"})
    cache.folder.mkdir(parents=True)
    for content in (b"", b"\x93NUMPY", b"no array"):
        (cache.folder / "a.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npy: is damaged .*; delete the folder"):
            cache.read()
    np.save(cache.folder / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match="its values are float64"):
        cache.read()


def test_another_run_takes_them_over(tmp_path):
    """Of the uninterrupted run's answers none is computed again, with another objective and adapters. A file of the
    cache's folder says what its values are of."""
    tuned.copy_until("dpo", tmp_path)
    cache = tmp_path / "runs/tiny/cache/reference-logprobs"
    files = {path: path.read_bytes() for path in cache.rglob("*.npy")}
    words = ("dpo.beta=0.3", "dpo.loss={hinge: 1.0, sft: 0.1}", "dpo.optimizer.lr=2e-3", "dpo.lora={rank: 4}")
    text = succeed("dpo", "tiny.yaml", *words, cwd=tmp_path)
    assert text.count("the reference's log-probabilities of") == 2 and "of 320 answers are in" in text
    assert files and {path: path.read_bytes() for path in cache.rglob("*.npy")} == files
    described = json.loads(next(cache.glob("*/model.json")).read_text())
    assert set(described) == {"format", "kept", "new_tokens", "precision", "weights"}
    metrics = tuned.metrics(tmp_path, "dpo")
    assert metrics["heldout_loss_hinge_after"] < metrics["heldout_loss_hinge_before"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_a_reference_compute_none(loss, tmp_path):
    tuned.copy_until("dpo", tmp_path)
    shutil.rmtree(tmp_path / "runs/tiny/cache")
    succeed("dpo", "tiny.yaml", "dpo.steps=2", f"dpo.loss={loss}", "dpo.beta=2", cwd=tmp_path)
    assert not (tmp_path / "runs/tiny/cache").exists()
