"""`alma verify dedup` against theory and planted copies."""

import json
import random

import numpy as np
from word_corpus import words, write

from pipeline.data.dedup.minhash import Near

LONG = [chr(0x4E00 + i) for i in range(2000)]


def test_the_theoretical_curve_against_simulation():
    from pipeline.checks.verify_dedup import chance

    rng = np.random.default_rng(0)
    for near in (Near(), Near(bands=5, rows=4, similarity=0.5), Near(similarity=0)):
        for similarity in (0.45, 0.65, 0.75):
            equal = rng.random((20000, near.bands, near.rows)) < similarity
            found = equal.all(2).any(1) & (equal.mean((1, 2)) >= near.similarity)
            assert abs(found.mean() - chance(similarity, near)) < 4 * np.sqrt(0.25 / 20000)


def test_verify_finds_what_is_planted_and_fails_below_the_bar(tmp_path, capsys):
    from pipeline.checks.verify_dedup import verify
    from pipeline.core.recipe import load

    rng = random.Random(7)
    sources = {
        "en": [{"text": " ".join(words(rng, rng.randrange(90, 200)))} for _ in range(150)],
        "zh": [{"text": "".join(rng.choices(LONG, k=150))} for _ in range(150)],
    }
    path = write(tmp_path, {name: rows for name, rows in sources.items()})
    block = json.loads(path.read_text())
    for name, source in block["stages"]["clean"]["sources"].items():
        source["path"] = str(tmp_path / f"{name}.jsonl")
    path.write_text(json.dumps(block))
    assert verify(load(str(path), []), None, pairs=100)
    assert "holds" in capsys.readouterr().out
    assert not verify(
        load(str(path), ["clean.dedup.near.bands=2", "clean.dedup.near.rows=20"]), None, pairs=100, recall=0.9
    )
    assert "FAILS" in capsys.readouterr().out


LONG = [chr(0x4E00 + i) for i in range(2000)]
