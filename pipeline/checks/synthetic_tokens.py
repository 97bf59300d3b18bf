"""Synthetic text and a tokenizer of any size, packed by stage pack, so that a proof needs no data and no earlier stage.

In three of four cases a word is followed by the next word of the vocabulary, else by any word, low numbers more often.
So there is something to learn.
"""

from pathlib import Path
from types import SimpleNamespace

WORDS = 100  # per document


def write(folder: Path, vocab_size: int, sources: list[str], num_tokens: int, seed: int) -> None:
    """folder/tokenizer with `vocab_size` tokens, and folder/tokens with `num_tokens` training tokens of each source,
    and a tenth of that held out."""
    from pipeline import pack
    from pipeline.core import artifact

    words = _write_tokenizer(folder / "tokenizer", vocab_size)
    for split, split_tokens in (("train", num_tokens), ("heldout", num_tokens // 10)):
        _write_documents(folder / "clean" / split, split, words, sources, split_tokens, seed)
    inputs = {
        "data": artifact.external("data", folder / "clean"),
        "tokenizer": artifact.external("tokenizer", folder / "tokenizer"),
    }
    (folder / "tokens").mkdir()
    output = SimpleNamespace(path=folder / "tokens", note_time=lambda: None)
    pack.run(pack.Config(kind="pack", workers=1), inputs, output)


def _write_tokenizer(folder: Path, vocab_size: int) -> list[str]:
    """Returns the words of the vocabulary, each a token."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    from pipeline.data.tokenizer.special_tokens import SPECIAL
    from pipeline.data.tokenizer.tokenizer_folder import publish

    words = [f"w{number} " for number in range(vocab_size - len(SPECIAL))]
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=words[-1]))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    publish(backend, folder)
    return words


def _write_documents(
    folder: Path, split: str, words: list[str], sources: list[str], num_tokens: int, seed: int
) -> None:
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    from pipeline.core.seeds import derive

    rows: dict[str, list[str]] = {"text": [], "source": [], "id": []}
    for source in sources:
        generator = np.random.default_rng(derive(seed, "synthetic", split, source))
        for number in range(-(-num_tokens // (WORDS + 1))):
            rows["text"].append("".join(words[index] for index in _word_indices(generator, len(words))))
            rows["source"].append(source)
            rows["id"].append(f"{source}/{split}/{number}")
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "part-00000.parquet")


def _word_indices(generator, num_words: int) -> list[int]:
    any_word = (generator.random(WORDS) ** 3 * num_words).astype(int).tolist()
    is_next = (generator.random(WORDS) < 0.75).tolist()
    indices, index = [], 0
    for place in range(WORDS):
        index = (index + 1) % num_words if is_next[place] else any_word[place]
        indices.append(index)
    return indices
