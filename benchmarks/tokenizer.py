"""Tokenizer training and encoding compared with sentencepiece, tokenizers (Hugging Face), rustbpe and tiktoken, in one
run on this machine: 100 MB of English, Chinese and code, vocabulary 32,000.

    python benchmarks/tokenizer.py                        all of it: about ten minutes of CPU
    python benchmarks/tokenizer.py --trainers ours hf     only these
    python benchmarks/tokenizer.py --megabytes 20         less text

Training: CPU seconds, wall-clock seconds and peak memory of whole processes, including start and reading; documents are
read from JSON lines, one at a time. Encoding: CPU seconds of one process on held-out documents, in turn, the smallest
of three. Text: Wikipedia introductions, chats, a Chinese novel, a dictionary and reviews from packages
(benchmarks/corpus.py), and the Python sources of the installed torch and transformers. The last line is one JSON
object.
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
from meter import Cost, measured  # noqa: E402

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
RUSTBPE_PACKAGE = "rustbpe==0.1.0"
TRAINERS = ("ours", "hf", "rustbpe", "sentencepiece")
HELDOUT = 0.03


# ---- text ------------------------------------------------------------------------------------------------------------


def documents(megabytes: float) -> dict[str, list[str]]:
    """Complete documents by language: en, zh and code."""
    by_language = {"en": english() + chats(), "zh": chinese()}
    missing = megabytes * 1e6 - sum(map(size_of, by_language.values()))
    by_language["code"] = code(missing)
    total = sum(map(size_of, by_language.values()))
    share = min(1.0, megabytes * 1e6 / total)
    for language, texts in by_language.items():
        random.Random(language).shuffle(texts)
        by_language[language] = texts[: max(40, round(len(texts) * share))]
    return by_language


def chats() -> list[str]:
    records = json.loads(fetch(*CHATS).read_text(encoding="utf-8"))
    texts = []
    for chat in records.values():
        texts.append("\n".join(turn["text"] for side in chat["messages"] for turn in side))
    return texts


def code(num_bytes: float) -> list[str]:
    import torch
    import transformers

    texts = []
    for package in (torch, transformers):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            size = path.stat().st_size
            if num_bytes > 0 and size > 200:
                texts.append(path.read_text(encoding="utf-8", errors="ignore"))
                num_bytes -= size
    return texts


def size_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def read(path: str):
    with open(path, encoding="utf-8", newline="\n") as handle:
        for line in handle:
            yield json.loads(line)


def write_texts(folder: Path, megabytes: float) -> tuple[dict[str, list[str]], int]:
    """train.jsonl. Returns the held-out documents by language, and the bytes to train on."""
    heldout, train_bytes = {}, 0
    with open(folder / "train.jsonl", "w", encoding="utf-8") as handle:
        for language, texts in documents(megabytes).items():
            num_heldout = max(20, round(len(texts) * HELDOUT))
            heldout[language], training = texts[:num_heldout], texts[num_heldout:]
            for text in training:
                handle.write(json.dumps(text, ensure_ascii=False) + "\n")
            train_bytes += size_of(training)
            report(
                f"{language}: {size_of(training) / 1e6:.1f} MB to train on, {size_of(heldout[language]) / 1e6:.2f} MB"
                " held out"
            )
    return heldout, train_bytes


def report(line: str) -> None:
    print(line, flush=True)


# ---- training, each in its own process -------------------------------------------------------------------------------


def train(name: str, path: str, out: str) -> None:
    """Train on JSON lines and write a tokenizer.json."""
    if name == "ours":
        learned, pairs = byte_bpe.train(read(path), SIZE - len(SPECIAL), False, True, size_of(read(path)))
        ranks = {token: index for index, token in enumerate(learned)}
        byte_bpe.build(ranks, pairs, pretokenize.pattern(False), SPECIAL).save(out)
    elif name == "hf":
        train_hf(path, out)
    elif name == "sentencepiece":
        model = spm_trainer.train_sentencepiece(read(path), SIZE, True, 0.9995, Path(out + ".log"))
        spm_model.to_fast_tokenizer(model).save(out)
    else:
        raise ValueError(name)


def train_hf(path: str, out: str) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(pretokenize.pattern(False)), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=[AddedToken(name, normalized=False, special=True) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read(path), trainer)
    tokenizer.save(out)


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


def rustbpe_python(folder: Path) -> Path:
    """The Python of an environment with rustbpe."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", RUSTBPE_PACKAGE]
        subprocess.run(install, check=True)
    return python


def measured_training(name: str, folder: Path, rustbpe: Path | None) -> tuple[Path, Cost]:
    """The folder with the tokenizer.json of one trainer, and its cost."""
    out = folder / name / "tokenizer.json"
    out.parent.mkdir()
    texts = str(folder / "train.jsonl")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if name == "rustbpe":
        ranks_file, pattern = out.with_suffix(".tiktoken"), pretokenize.pattern(False)
        words = [str(rustbpe), "-c", RUSTBPE, texts, str(ranks_file), str(SIZE - len(SPECIAL)), pattern]
        cost = measured(words, env=environment)
        ranks = byte_bpe.load(ranks_file)
        byte_bpe.build(ranks, byte_bpe.merges_of(ranks), pattern, SPECIAL).save(str(out))
    else:
        cost = measured([sys.executable, __file__, "--worker", name, texts, str(out)], env=environment)
    report(f"train {name}: {cost.cpu:.1f} CPU-s, {cost.wall:.1f} s, {cost.peak:.2f} GB")
    return out.parent, cost


# ---- encoding --------------------------------------------------------------------------------------------------------


def compression(folder: Path, heldout: dict[str, list[str]]) -> dict[str, float]:
    """Bytes per token by language."""
    from pipeline.data.tokenizer.encode import encoder

    encode = encoder(folder)
    rates = {}
    for language, texts in heldout.items():
        rates[language] = size_of(texts) / sum(map(len, encode(texts)))
    return rates


def encoding(folder: Path, heldout: dict[str, list[str]]) -> dict:
    """MB per CPU-second of our encoder, of tokenizers' batch encoder and of tiktoken alone; and whether the ids are
    equal on every document."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tiktoken
    from tokenizers import Tokenizer

    from pipeline.data.tokenizer.encode import encoder, ranks

    texts = [text for language_texts in heldout.values() for text in language_texts]
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine = tiktoken.Encoding(
        "bench",
        pat_str=pretokenize.pattern(False),
        mergeable_ranks=ranks(json.loads(backend.to_str())),
        special_tokens={},
    )
    encoders = {
        "ours": lambda encode: encode(texts),
        "hf": lambda _: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)],
        "tiktoken": lambda _: [engine.encode_ordinary(text) for text in texts],
    }
    seconds, ids = dict.fromkeys(encoders, float("inf")), {}
    for _ in range(3):
        for name, run in encoders.items():
            fresh = encoder(folder)  # with an empty cache of words
            began = time.process_time()
            ids[name] = run(fresh)
            seconds[name] = min(seconds[name], time.process_time() - began)
    megabytes = size_of(texts) / 1e6
    for name in encoders:
        report(f"encode {name}: {megabytes / seconds[name]:.1f} MB per CPU-s")
    num_equal = sum(ours.tolist() == theirs for ours, theirs in zip(ids["ours"], ids["hf"], strict=True))
    report(f"ids equal on {num_equal} of {len(texts)} documents")
    return {
        "encode_mb_per_cpu_s": megabytes / seconds["ours"],
        "encode_ratio_hf": seconds["hf"] / seconds["ours"],
        "encode_ratio_tiktoken": seconds["tiktoken"] / seconds["ours"],
        "ids_equal": num_equal == len(texts),
    }


# ---- the whole benchmark ---------------------------------------------------------------------------------------------


def benchmark(trainers: list[str], megabytes: float, rustbpe_folder: Path | None) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        heldout, train_bytes = write_texts(folder, megabytes)
        figures: dict = {"train_mb": train_bytes / 1e6}
        rustbpe = rustbpe_python(rustbpe_folder or folder / "rustbpe-environment") if "rustbpe" in trainers else None
        costs, rates = {}, {}
        for name in trainers:
            trained, costs[name] = measured_training(name, folder, rustbpe)
            rates[name] = compression(trained, heldout)
            report(f"bytes per token {name}: {', '.join(f'{key} {rate:.3f}' for key, rate in rates[name].items())}")
        if "ours" in trainers:
            figures["train_cpu_s"] = costs["ours"].cpu
            figures["train_peak_gb"] = costs["ours"].peak
            figures["bytes_per_token_en"] = rates["ours"]["en"]
            figures["bytes_per_token_zh"] = rates["ours"]["zh"]
            figures.update(encoding(folder / "ours", heldout))
            for name in trainers:
                if name != "ours":
                    figures[f"train_ratio_{name}"] = costs[name].cpu / costs["ours"].cpu
        if {"ours", "hf"} <= set(trainers):
            figures["compression_vs_hf"] = min(rates["ours"][key] / rates["hf"][key] for key in ("en", "zh"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--peer", type=Path, help="folder for an environment with rustbpe, made if it does not exist")
    args = parser.parse_args()
    if args.worker:
        train(*args.worker)
        return
    figures = benchmark(args.trainers, args.megabytes, args.peer)
    import sampler

    figures["sampler_mtok_s"] = sampler.measure()["sampler_mtok_s"]
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps(rounded))


if __name__ == "__main__":
    main()
