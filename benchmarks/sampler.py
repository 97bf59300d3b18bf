"""How many tokens a second the row sampler hands out: one process, tokens in the page cache, CPU time.

    python benchmarks/sampler.py

`measure()` gives the figures to other benchmarks. Documents have lengths as on the web (log-normal, 605 tokens in the
mean), in two sources; nothing is trained.
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
    """A folder as stage pack writes it, of random tokens: the sampler does not read them."""
    from pipeline.core.files import write_json

    draw = np.random.default_rng(0)
    index: dict = {"vocab_size": VOCABULARY, "eos_id": EOS, "dtype": "uint16", "splits": {"train": {}, "heldout": {}}}
    (folder / "train").mkdir(parents=True)
    for source in ("one", "two"):
        lengths = np.maximum(1, draw.lognormal(5.8, 1.1, int(millions * 1e6 / 2 / 605))).astype(np.int64)
        ends = np.cumsum(lengths)
        tokens = draw.integers(5, VOCABULARY, ends[-1], dtype=np.uint16)
        tokens[ends - 1] = EOS
        names = [b"%d" % number for number in range(len(ends))]
        arrays = {
            "tokens": tokens,
            "documents": np.stack([ends, 4 * lengths], axis=1),
            "ids": np.frombuffer(b"".join(names), np.uint8),
            "id_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        }
        for name, array in arrays.items():
            np.save(folder / f"train/{source}-00000.{name}.npy", array)
        counts = {
            "tokens": len(tokens),
            "documents": len(ends),
            "bytes": int(4 * len(tokens)),
            "id_bytes": len(arrays["ids"]),
        }
        index["splits"]["train"][source] = [{"file": f"train/{source}-00000", **counts}]
    np.save(folder / "token_bytes.npy", np.full(VOCABULARY, 4, np.int32))
    write_json(folder / "index.json", index)


def measure(sequence_length: int = 2048, millions: float = 40.0, rows: int = 12_000) -> dict:
    """Millions of tokens per second of CPU time, by packing; `sampler_mtok_s` is the default, concat.
    best_fit_plan_s: CPU seconds to pack a million documents."""
    from pipeline.data.tokens.fim import Cutter
    from pipeline.data.tokens.row_sampler import RowSampler
    from pipeline.data.tokens.store import TokenStore

    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "tokens", millions)
        store = TokenStore(Path(folder) / "tokens")
        fim = Cutter(0.5, 0.5, None, (2, 3, 4), 7)
        for name, options in (
            ("sampler", {}),
            ("best_fit", {"packing": "best_fit"}),
            ("fim", {"packing": "best_fit", "fim": fim}),
        ):
            begun = time.process_time()
            sampler = RowSampler(store, sequence_length, {"one": 0.7, "two": 0.3}, 0, **options)
            if name == "best_fit":
                documents = sum(store.num_documents(source) for source in store.sources)
                found["best_fit_plan_s"] = round((time.process_time() - begun) / documents * 1e6, 2)
            for index in range(500):
                sampler.row(index)
            begun = time.process_time()
            for index in range(500, 500 + rows):
                sampler.row(index)
            found[f"{name}_mtok_s"] = round(rows * sequence_length / (time.process_time() - begun) / 1e6, 1)
    return {"sequence_length": sequence_length, **found}


if __name__ == "__main__":
    for length in (512, 2048, 8192):
        print(json.dumps(measure(length)), flush=True)
