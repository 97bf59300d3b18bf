"""Training and encoding beside sentencepiece, tokenizers (Hugging Face), rustbpe and tiktoken, in one run on this
machine: 100 MB of English, Chinese and code, vocabulary 32,000.

    python benchmarks/tokenizer.py                        everything: about ten minutes of CPU
    python benchmarks/tokenizer.py --trainers ours hf     these alone
    python benchmarks/tokenizer.py --megabytes 20         less text

Training: CPU seconds and peak memory of whole processes, start and reading included; documents are read from JSON
lines, one at a time. Encoding: CPU seconds of one process on held-out documents, in turn, the smallest of three. Text:
Wikipedia introductions, chats, Chinese novel, dictionary and reviews out of packages (benchmarks/corpus.py), and the
Python sources of the installed torch and transformers. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from corpus import chinese, english  # noqa: E402
from meter import measured  # noqa: E402

from pipeline.data.sources.packages import fetch  # noqa: E402
from pipeline.data.tokenizer import byte_bpe, pretokenize, spm_model, spm_trainer  # noqa: E402
from pipeline.data.tokenizer.special_tokens import SPECIAL  # noqa: E402

SIZE = 32_000
CHATS = (
    "chitchat-dataset==0.9.0",
    "chitchat_dataset/dataset.json",
    "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    "wheel",
)
PEER = "rustbpe==0.1.0"
TRAINERS = ("ours", "hf", "rustbpe", "sentencepiece")
HELDOUT = 0.03


def documents(megabytes: float) -> dict[str, list[str]]:
    """en, zh and code, whole documents."""
    chats = json.loads(fetch(*CHATS).read_text(encoding="utf-8"))
    found = {
        "en": (
            english()
            + ["\n".join(turn["text"] for side in chat["messages"] for turn in side) for chat in chats.values()]
        ),
        "zh": chinese(),
        "code": [],
    }
    left = megabytes * 1e6 - sum(len(text.encode()) for texts in found.values() for text in texts)
    import torch
    import transformers

    for package in (torch, transformers):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            if left > 0 and path.stat().st_size > 200:
                found["code"].append(path.read_text(encoding="utf-8", errors="ignore"))
                left -= path.stat().st_size
    share = min(1.0, megabytes * 1e6 / sum(len(text.encode()) for texts in found.values() for text in texts))
    for name, texts in found.items():
        random.Random(name).shuffle(texts)
        found[name] = texts[: max(40, round(len(texts) * share))]
    return found


def read(path: str):
    with open(path, encoding="utf-8", newline="\n") as handle:
        for line in handle:
            yield json.loads(line)


# ---- training, each in a process of its own --------------------------------------------------------------------------


def train(name: str, path: str, out: str) -> None:
    if name == "ours":
        total = sum(len(text.encode()) for text in read(path))
        learned, pairs = byte_bpe.train(read(path), SIZE - len(SPECIAL), False, True, total)
        byte_bpe.build(
            {token: index for index, token in enumerate(learned)}, pairs, pretokenize.pattern(False), SPECIAL
        ).save(out)
    elif name == "hf":
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(pretokenize.pattern(False)), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        words = [AddedToken(word, normalized=False, special=True) for word in SPECIAL]
        tokenizer.train_from_iterator(
            read(path),
            trainers.BpeTrainer(
                vocab_size=SIZE,
                special_tokens=words,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        tokenizer.save(out)
    elif name == "sentencepiece":
        model = spm_trainer.train_sentencepiece(read(path), SIZE, True, 0.9995, Path(out + ".log"))
        spm_model.to_fast_tokenizer(model).save(out)
    else:
        raise ValueError(name)


RUSTBPE = """
import base64, json, sys, rustbpe
def read(path):
    with open(path, encoding="utf-8", newline="\\n") as handle:
        for line in handle:
            yield json.loads(line)
tokenizer = rustbpe.Tokenizer()
tokenizer.train_from_iterator(read(sys.argv[1]), int(sys.argv[3]), pattern=sys.argv[4])
with open(sys.argv[2], "w") as handle:
    for token, rank in tokenizer.get_mergeable_ranks():
        handle.write(base64.b64encode(bytes(token)).decode() + " " + str(rank) + "\\n")
"""


def peer(folder: Path) -> Path:
    """The Python of rustbpe's environment."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PEER], check=True)
    return python


def trained(name: str, folder: Path, python: Path | None) -> Path:
    """The tokenizer.json of one trainer; prints what it cost."""
    out = folder / name / "tokenizer.json"
    out.parent.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name == "rustbpe":
        cost = measured(
            [
                str(python),
                "-c",
                RUSTBPE,
                str(folder / "train.jsonl"),
                str(out.with_suffix(".tiktoken")),
                str(SIZE - len(SPECIAL)),
                pretokenize.pattern(False),
            ],
            env=environment,
        )
        tokens = byte_bpe.load(out.with_suffix(".tiktoken"))
        byte_bpe.build(tokens, byte_bpe.merges_of(tokens), pretokenize.pattern(False), SPECIAL).save(str(out))
    else:
        cost = measured(
            [sys.executable, __file__, "--worker", name, str(folder / "train.jsonl"), str(out)], env=environment
        )
    print(f"train {name}: {cost.cpu:.1f} CPU-s, {cost.peak:.2f} GB", flush=True)
    COSTS[name] = cost
    return out.parent


COSTS: dict = {}


# ---- encoding --------------------------------------------------------------------------------------------------------


def compression(folder: Path, heldout: dict[str, list[str]]) -> dict[str, float]:
    from pipeline.data.tokenizer.encode import encoder

    encode = encoder(folder)
    return {
        name: sum(len(text.encode()) for text in texts) / sum(map(len, encode(texts)))
        for name, texts in heldout.items()
    }


def encoding(folder: Path, heldout: dict[str, list[str]]) -> dict:
    """MB per CPU-second of our encoder, of tokenizers' batch encoder and of tiktoken alone; and whether ids are
    equal on every document."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tiktoken
    from tokenizers import Tokenizer

    from pipeline.data.tokenizer.encode import encoder, ranks

    backend, texts = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        [text for texts in heldout.values() for text in texts],
    )
    engine = tiktoken.Encoding(
        "bench",
        pat_str=pretokenize.pattern(False),
        mergeable_ranks=ranks(json.loads(backend.to_str())),
        special_tokens={},
    )
    ways = {
        "ours": lambda encode: encode(texts),
        "hf": lambda _: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)],
        "tiktoken": lambda _: [engine.encode_ordinary(text) for text in texts],
    }
    spent, ids = dict.fromkeys(ways, 1e9), {}
    for _ in range(3):
        for name, way in ways.items():
            encode = encoder(folder)  # a fresh one: no words remembered
            begun = time.process_time()
            ids[name] = way(encode)
            spent[name] = min(spent[name], time.process_time() - begun)
    size = sum(len(text.encode()) for text in texts) / 1e6
    equal = sum(mine.tolist() == theirs for mine, theirs in zip(ids["ours"], ids["hf"], strict=True))
    for name, seconds in spent.items():
        print(f"encode {name}: {size / seconds:.1f} MB per CPU-s", flush=True)
    print(f"ids equal on {equal} of {len(texts)} documents", flush=True)
    return {
        "encode_mb_per_cpu_s": size / spent["ours"],
        "encode_ratio_hf": spent["hf"] / spent["ours"],
        "encode_ratio_tiktoken": spent["tiktoken"] / spent["ours"],
        "ids_equal": equal == len(texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--peer", type=Path, help="rustbpe's environment, made there if it does not exist")
    args = parser.parse_args()
    if args.worker:
        return train(*args.worker)
    with tempfile.TemporaryDirectory() as scratch:
        folder, heldout, size = Path(scratch), {}, 0
        with open(folder / "train.jsonl", "w", encoding="utf-8") as handle:
            for name, texts in documents(args.megabytes).items():
                cut = max(20, round(len(texts) * HELDOUT))
                heldout[name] = texts[:cut]
                for text in texts[cut:]:
                    handle.write(json.dumps(text, ensure_ascii=False) + "\n")
                part = sum(len(text.encode()) for text in texts[cut:])
                size += part
                print(
                    f"{name}: {part / 1e6:.1f} MB to train on,"
                    f" {sum(len(text.encode()) for text in heldout[name]) / 1e6:.2f} MB held out",
                    flush=True,
                )
        python = peer(args.peer or folder / "peer") if "rustbpe" in args.trainers else None
        found, rates = {"train_mb": size / 1e6}, {}
        for name in args.trainers:
            made = trained(name, folder, python)
            rates[name] = compression(made, heldout)
            print(
                f"bytes per token {name}: " + ", ".join(f"{key} {rate:.3f}" for key, rate in rates[name].items()),
                flush=True,
            )
        if "ours" in rates:
            found |= {
                "train_cpu_s": COSTS["ours"].cpu,
                "train_peak_gb": COSTS["ours"].peak,
                "bytes_per_token_en": rates["ours"]["en"],
                "bytes_per_token_zh": rates["ours"]["zh"],
            }
            found |= encoding(folder / "ours", heldout)
        for name in set(rates) - {"ours"} if "ours" in rates else ():
            found[f"train_ratio_{name}"] = COSTS[name].cpu / COSTS["ours"].cpu
        if {"ours", "hf"} <= set(rates):
            found["compression_vs_hf"] = min(rates["ours"][key] / rates["hf"][key] for key in ("en", "zh"))
    import sampler

    found["sampler_mtok_s"] = sampler.measure()["sampler_mtok_s"]
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}))


if __name__ == "__main__":
    main()
