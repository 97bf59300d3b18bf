"""Tokens per CPU-second that the row sampler produces: one process, tokens in the page cache.

    python benchmarks/sampler.py

benchmarks/tokenizer.py calls `measure()`. Documents have lengths as on the web (log-normal, mean 605 tokens), in two
sources; nothing is trained.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

VOCABULARY, EOS = 32_000, 1


def write_tokens(folder: Path, millions: float) -> None:
    """A folder as stage pack writes it, of random tokens."""
    from pipeline.core.files import write_json

    generator = np.random.default_rng(0)
    index: dict = {"vocab_size": VOCABULARY, "eos_id": EOS, "dtype": "uint16", "splits": {"train": {}, "heldout": {}}}
    (folder / "train").mkdir(parents=True)
    for source in ("one", "two"):
        num_documents = int(millions * 1e6 / 2 / 605)
        lengths = np.maximum(1, generator.lognormal(5.8, 1.1, num_documents)).astype(np.int64)
        ends = np.cumsum(lengths)
        tokens = generator.integers(5, VOCABULARY, ends[-1], dtype=np.uint16)
        tokens[ends - 1] = EOS
        ids = [b"%d" % number for number in range(num_documents)]
        arrays = {
            "tokens": tokens,
            "documents": np.stack([ends, 4 * lengths], axis=1),
            "ids": np.frombuffer(b"".join(ids), np.uint8),
            "id_ends": np.cumsum([len(id_) for id_ in ids], dtype=np.int64),
        }
        for name, array in arrays.items():
            np.save(folder / f"train/{source}-00000.{name}.npy", array)
        entry = {
            "file": f"train/{source}-00000",
            "tokens": len(tokens),
            "documents": num_documents,
            "bytes": int(4 * len(tokens)),
            "id_bytes": len(arrays["ids"]),
        }
        index["splits"]["train"][source] = [entry]
    np.save(folder / "token_bytes.npy", np.full(VOCABULARY, 4, np.int32))
    write_json(folder / "index.json", index)


def measure(sequence_length: int = 2048, millions: float = 40.0, rows: int = 12_000) -> dict:
    """Millions of tokens per CPU-second, by packing; `sampler_mtok_s` is the default, concat. best_fit_plan_s: CPU
    seconds to pack a million documents."""
    from pipeline.data.tokens.fim import Cutter
    from pipeline.data.tokens.row_sampler import RowSampler
    from pipeline.data.tokens.store import TokenStore

    fim = Cutter(0.5, 0.5, None, (2, 3, 4), 7)
    settings = {"sampler": {}, "best_fit": {"packing": "best_fit"}, "fim": {"packing": "best_fit", "fim": fim}}
    figures: dict = {"sequence_length": sequence_length}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "tokens", millions)
        store = TokenStore(Path(folder) / "tokens")
        num_documents = sum(store.num_documents(source) for source in store.sources)
        for name, options in settings.items():
            began = time.process_time()
            sampler = RowSampler(store, sequence_length, {"one": 0.7, "two": 0.3}, 0, **options)
            if name == "best_fit":
                figures["best_fit_plan_s"] = round((time.process_time() - began) / num_documents * 1e6, 2)
            for index in range(500):
                sampler.row(index)
            began = time.process_time()
            for index in range(500, 500 + rows):
                sampler.row(index)
            figures[f"{name}_mtok_s"] = round(rows * sequence_length / (time.process_time() - began) / 1e6, 1)
    return figures


if __name__ == "__main__":
    for length in (512, 2048, 8192):
        print(json.dumps(measure(length)), flush=True)
