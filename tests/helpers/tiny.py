"""A tiny corpus, packed: text in which a letter mostly decides the next word, in two sources, with its tokenizer."""

import random
from pathlib import Path

WORDS = ["ape", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "小猫", "大象"]


def texts(seed: int, count: int) -> list[str]:
    """Each word is followed by the next of the list in nine of ten cases."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        at, words = draw.randrange(len(WORDS)), []
        for _ in range(draw.randrange(20, 60)):
            words.append(WORDS[at])
            at = (at + 1) % len(WORDS) if draw.random() < 0.9 else draw.randrange(len(WORDS))
        found.append(" ".join(words))
    return found


def write_inputs(folder: Path, documents: int = 120, special: list[str] = ()) -> None:
    """folder/clean, folder/tokenizer (with further special tokens, if asked for) and folder/tokens, as the stages of
    these kinds publish them."""
    import pyarrow
    import pyarrow.parquet
    from harness import byte_level, succeed
    from tokenizers import AddedToken

    from pipeline.data.tokenizer.tokenizer_folder import publish

    made = {"train": texts(0, documents), "heldout": texts(1, 30)}
    for split, lines in made.items():
        (folder / "clean" / split).mkdir(parents=True)
        table = {
            "text": lines,
            "source": ["one" if i % 3 else "two" for i in range(len(lines))],
            "id": [f"{split}{i}" for i in range(len(lines))],
        }
        pyarrow.parquet.write_table(pyarrow.table(table), folder / "clean" / split / "part-00000.parquet")
    backend = byte_level(made["train"], 290)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    publish(backend, folder / "tokenizer")
    (folder / "pack.yaml").write_text(
        "name: made\nstages:\n  pack: {inputs: {data: ./clean, tokenizer: ./tokenizer}, workers: 1}\n"
    )
    succeed("pack", "pack.yaml", cwd=folder)
    (folder / "tokens").symlink_to("runs/made/pack/current")


RECIPE = """
name: tiny
seed: 5
model: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
stages:
  pretrain:
    inputs: {tokens: ./tokens, tokenizer: ./tokenizer}
    sequence_length: 32
    batch_size: 8
    steps: 6
    precision: fp32
    mixture: {one: 2, two: 1}
    heldout_rows: 10
    optimizer: {lr: 3e-3, max_grad_norm: 0.7}
    schedule: {kind: cosine, warmup_steps: 2}
    save: {every_steps: 2, keep: 2}
    log: {every_steps: 1}
"""


# From text to a pretrained model, for tests of what surrounds the stages.
CHAIN = """\
name: t
stages:
  clean:
    filters: {max_repeated_shingles: 1.0}
    sources:
      one: {path: one.txt, sample_by: line}
  tokenizer: {vocab_size: 300}
  pack: {}
  pretrain:
    {model: {family: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64},
     steps: 100, batch_size: 4, sequence_length: 64, save: {every_steps: 10}}
"""


def write_chain(folder: Path) -> None:
    """one.txt, and r.yaml with CHAIN."""
    (folder / "one.txt").write_text("\n".join(texts(1, 150)) + "\n", encoding="utf-8")
    (folder / "r.yaml").write_text(CHAIN)
