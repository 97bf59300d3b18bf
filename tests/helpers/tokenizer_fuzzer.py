"""Damaged and odd tokenizer files, read as the stages read them. Run by test_tokenizer_fuzz.py in a process of its own,
so that a crash of a library is seen as one.

    python tests/helpers/tokenizer_fuzzer.py FOLDER SEED FIRST LAST      # prints a line per case that ends in "ok" or in what was raised
"""

import contextlib
import copy
import json
import random
import resource
import shutil
import sys
import time
import traceback
from pathlib import Path

TEXTS = ["the ther 1984\n\n床前明月光", " <|im_end|> it's", "", "x" * 50, "\U00020000 \0", "[REF] \u2581"]
ODD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3.5,
        2**31,
        2**32,
        2**63,
        1e308,
        "",
        "x",
        "<|eos|>",
        "\0",
        "\u2581",
        "床" * 40,
        "a" * 5000,
    ),
    *(
        [],
        {},
        [1],
        [[]],
        {"a": 1},
        {"type": "x"},
        {"content": 5},
        ["a", "b"],
        [None],
        "(?i:",
        "(a+)+$",
        "{% for %}",
        "{{ x.y.z }}",
    ),
]
TYPES = (
    "BPE",
    "Unigram",
    "WordLevel",
    "WordPiece",
    "ByteLevel",
    "Metaspace",
    "Split",
    "Sequence",
    "Prepend",
    "NFC",
    "Strip",
)


def mutate_json(value, generator: random.Random):
    """A copy of a JSON value in which one place is odd."""
    value = copy.deepcopy(value)
    places = list(_places(value, generator))
    holder, key = generator.choice(places)
    action = generator.randrange(6)
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif action == 2 and isinstance(holder, dict):
        holder[generator.choice(["", "x", str(2**40), "<|eos|>", key + " "])] = holder[key]
    elif action == 3 and isinstance(holder[key], str):
        holder[key] = generator.choice(TYPES)
    elif action == 4 and isinstance(holder[key], int):
        holder[key] = generator.choice([holder[key] + 1, -holder[key], 10**6, 2**31 - 1, 2**32 - 1, 0])
    else:
        holder[key] = copy.deepcopy(generator.choice(ODD))
    return value


def _places(value, generator: random.Random):
    """(holder, key) of places in a JSON value, few of any long list, so that rare ones have their turn."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    if len(items) > 12:
        items = generator.sample(items, 4)
    for key, child in items:
        yield value, key
        if isinstance(child, dict | list) and child:
            yield from _places(child, generator)


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 3, 20])):
        at = generator.randrange(len(data) + 1)
        action = generator.randrange(5)
        if action == 0:
            del data[at:]
        elif action == 1:
            data[at:at] = generator.randbytes(generator.choice([1, 2, 50]))
        elif action == 2:
            del data[at : at + generator.choice([1, 3, 200])]
        elif action == 3:
            data[at : at + 1] = bytes([generator.randrange(256)])
        else:
            other = generator.randrange(len(data) + 1)
            data[at:at] = data[other : other + generator.choice([1, 10, 300])]
        data = data or bytearray(b"x")
    return bytes(data)


def mutate_model(model: bytes, generator: random.Random) -> bytes:
    """A sentencepiece model in which one field is odd."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for _ in range(generator.choice([1, 1, 5])):
        piece = generator.choice(proto.pieces)
        action = generator.randrange(9)
        if action == 0:
            piece.piece = generator.choice(
                ["", " ", "<unk>", "\u2581", "a\u2581b", "x" * 3000, generator.choice(proto.pieces).piece]
            )
        elif action == 1:
            piece.score = generator.choice([0.0, 1e30, -1e30, float("nan"), float("inf"), float("-inf")])
        elif action == 2:
            piece.type = generator.randint(1, 6)
        elif action == 3:
            del proto.pieces[generator.randrange(len(proto.pieces)) :]
        elif action == 4:
            proto.trainer_spec.model_type = generator.randint(1, 4)
        elif action == 5:
            name = generator.choice(["unk_id", "bos_id", "eos_id", "pad_id", "vocab_size"])
            setattr(proto.trainer_spec, name, generator.choice([-1, 0, 1, 300, 10**6, 2**31 - 1, -(2**31)]))
        elif action == 6:
            name = generator.choice(["unk_piece", "bos_piece", "eos_piece", "pad_piece", "unk_surface"])
            setattr(proto.trainer_spec, name, generator.choice(["", "x", "<s>", "床"]))
        elif action == 7:
            name = generator.choice(["add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"])
            setattr(proto.normalizer_spec, name, not getattr(proto.normalizer_spec, name))
        else:
            proto.normalizer_spec.precompiled_charsmap = generator.randbytes(generator.choice([1, 8, 300]))
        if not proto.pieces:
            break
    return proto.SerializeToString()


def mutated(source: Path, target: Path, generator: random.Random) -> str:
    """A copy of a tokenizer's folder in which one file is damaged or odd. Returns what was done."""
    shutil.copytree(source, target)
    files = [path for path in sorted(target.iterdir()) if path.suffix in (".json", ".model", ".tiktoken", ".jinja")]
    file = generator.choice([*files, *[path for path in files if path.suffix == ".json"]])
    if file.suffix == ".json" and generator.random() < 0.8:
        value = json.loads(file.read_text(encoding="utf-8"))
        for _ in range(generator.choice([1, 1, 2])):
            value = mutate_json(value, generator) if isinstance(value, dict | list) and value else value
        file.write_text(json.dumps(value), encoding="utf-8")
        return f"{file.name}, JSON"
    if file.suffix == ".model" and generator.random() < 0.7:
        file.write_bytes(mutate_model(file.read_bytes(), generator))
        return f"{file.name}, fields"
    file.write_bytes(mutate_bytes(file.read_bytes(), generator))
    return f"{file.name}, bytes"


def read(folder: Path, out: Path, generator: random.Random | None = None) -> None:
    """Everything that reads a tokenizer, or two of these readers. Raises what they raise, UserError aside."""
    from pipeline.core.errors import UserError
    from pipeline.data.tokenizer import export_tokenizer
    from pipeline.data.tokenizer.encode import encoder
    from pipeline.data.tokenizer.fast_tokenizer import encode_text, load_tokenizer, token_bytes
    from pipeline.tokenizer import Config, adopt
    from pipeline.train.finetune import tokenizer_of

    def use(place: Path) -> None:
        tokenizer = load_tokenizer(place)
        ids = encode_text(tokenizer, TEXTS)
        tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
        token_bytes(tokenizer)

    def take_over(place: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        adopt(Config(adopt=str(place)), out)
        use(out)
        encoder(out)(TEXTS)

    def hand_over() -> None:
        shutil.rmtree(out, ignore_errors=True)
        export_tokenizer.write(load_tokenizer(folder), folder, out, 400)

    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": 1000}')
    steps = [lambda: use(folder), lambda: encoder(folder)(TEXTS), lambda: tokenizer_of(folder, 16)]
    steps += [lambda: take_over(folder), hand_over]
    steps += [
        lambda file=file: take_over(file) for file in sorted(folder.glob("*.model")) + sorted(folder.glob("*.tiktoken"))
    ]
    for step in generator.sample(steps, 2) if generator else steps:
        with contextlib.suppress(UserError), contextlib.redirect_stdout(None):
            step()


def main(home: Path, seed: int, first: int, last: int) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    sources = sorted(path for path in (home / "sources").iterdir() if path.is_dir())
    for source in sources:  # a case starts with everything imported
        shutil.rmtree(home / "copy", ignore_errors=True)
        shutil.copytree(source, home / "copy")
        read(home / "copy", home / "out")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, last):
        generator = random.Random(f"{seed}/{number}")
        shutil.rmtree(home / "copy", ignore_errors=True)
        what = mutated(generator.choice(sources), home / "copy", generator)
        print("begin", number, what, flush=True)
        began = time.process_time()
        try:
            read(home / "copy", home / "out", generator)
            result = "ok"
        except BaseException as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            result = f"{type(error).__name__} {str(error)[:150]!r} at {Path(line.filename).name}:{line.lineno}"
        if time.process_time() - began > 20:
            result = f"took {time.process_time() - began:.0f} s"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) / 2**20
        print("\ncase", number, what, result if grown < 1 else f"took {grown:.1f} GB", flush=True)
        if grown >= 1:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
