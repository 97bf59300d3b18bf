"""Every reader of tokenizers reports damaged and odd files: UserError or a tokenizer, no other exception, no crash, not
more than 20 s or 1 GB."""

import subprocess
import sys
from pathlib import Path

import pytest
import tuned
from paths import HELPERS, ROOT
from sentencepiece_model import prefixed

FUZZER = HELPERS / "tokenizer_fuzzer.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Complete tokenizers of every form: ours, and a sentencepiece model with a prefix and marks."""
    from pipeline.data.tokenizer import byte_bpe, encode, spm_model, spm_trainer
    from pipeline.data.tokenizer.tokenizer_folder import publish, read_backend

    home = tmp_path_factory.mktemp("fuzz")
    texts = [f"What is a {row['words']} {row['noun']}?\nA {row['kind']} 是什么？" for row in tuned.rows()] * 2
    tuned.tokenizer(home / "sources/byte")
    import json

    ranks = encode.ranks(json.loads(read_backend(home / "sources/byte").to_str()))
    (home / "sources/byte/tokenizer.tiktoken").write_bytes(byte_bpe.dump(ranks))
    tuned.tokenizer(home / "sources/pieces", sentencepiece=True)
    for name, model in (
        ("unigram", spm_trainer.train_sentencepiece(texts, 330, True, 0.9995, home / "log", "unigram")),
        ("prefixed", prefixed(texts)),
    ):
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        publish(
            spm_model.to_fast_tokenizer(model),
            home / "sources" / name,
            names if name == "prefixed" else None,
            model=model,
        )
    return home


def fuzz(home: Path, seed: int, count: int) -> None:
    ran = subprocess.run(
        [sys.executable, FUZZER, home, str(seed), "0", str(count)],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=ROOT,
        env=None,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("begin ", "case "))]
    cases = [line for line in lines if line.startswith("case ")]
    wrong = [line for line in cases if not line.endswith(" ok")]
    assert not wrong, f"seed {seed}: {len(wrong)} of {len(cases)} cases: " + "\n".join(wrong[:20])
    assert ran.returncode == 0 and len(cases) == count, f"seed {seed}: ended in {lines[-1:]}: {ran.stderr[-2000:]}"


@pytest.mark.slow
def test_a_sample_of_damaged_tokenizers_is_reported(home):
    fuzz(home, 1, 25)


@pytest.mark.slow
def test_two_thousand_damaged_tokenizers_are_reported(home):
    fuzz(home, 2, 2000)
