"""Text that nobody wrote and a tokenizer of any size, packed by the stage that packs, so that a proof needs no data and
no earlier stage.

A word is followed by the next of the vocabulary in three of four cases and by any other, low numbers more often, in the
fourth: there is something to learn.
"""

from pathlib import Path
from types import SimpleNamespace

WORDS = 100  # of a document


def write(folder: Path, vocab_size: int, sources: list[str], tokens: int, seed: int) -> None:
    """folder/tokenizer with `vocab_size` tokens, and folder/tokens with `tokens` training tokens of each source and
    a tenth of that held out."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    from pipeline import pack
    from pipeline.core import artifact
    from pipeline.core.seeds import derive
    from pipeline.data.tokenizer.special_tokens import SPECIAL
    from pipeline.tokenizer import publish

    words = [f"w{number} " for number in range(vocab_size - len(SPECIAL))]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate([*SPECIAL, *words])}, unk_token=words[-1])
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL])
    publish(backend, folder / "tokenizer")

    for split, count in (("train", tokens), ("heldout", tokens // 10)):
        rows: dict[str, list[str]] = {"text": [], "source": [], "id": []}
        for source in sources:
            draw = np.random.default_rng(derive(seed, "synthetic", split, source))
            for number in range(-(-count // (WORDS + 1))):
                any_other = (draw.random(WORDS) ** 3 * len(words)).astype(int)
                follows, at = draw.random(WORDS) < 0.75, 0
                text = []
                for place in range(WORDS):
                    at = (at + 1) % len(words) if follows[place] else int(any_other[place])
                    text.append(words[at])
                rows["text"].append("".join(text))
                rows["source"].append(source)
                rows["id"].append(f"{source}/{split}/{number}")
        (folder / "clean" / split).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / "clean" / split / "part-00000.parquet")
    made = {
        name: artifact.external(name, folder / path) for name, path in (("data", "clean"), ("tokenizer", "tokenizer"))
    }
    (folder / "tokens").mkdir()
    pack.run(pack.Config(kind="pack", workers=1), made, SimpleNamespace(path=folder / "tokens", note_time=lambda: None))
