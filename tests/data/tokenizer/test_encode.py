"""The fast encoders give the ids of tokenizer.json, on any text, for any tokenizer that they accept."""

import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.data.tokenizer import spm_model, spm_trainer
from pipeline.data.tokenizer.encode import LONG_RUN, encoder
from pipeline.data.tokenizer.fast_tokenizer import encode_text
from pipeline.data.tokenizer.pretokenize import pattern
from pipeline.data.tokenizer.special_tokens import SPECIAL
from pipeline.data.tokenizer.verify_tokenizer import HARD_TEXTS

PARTS = [
    "it's",
    "IT'S",
    "\u017f",
    "'\u017f",
    "ab",
    "ba",
    "aba",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u3000",
    "\x1c",
    "\x85",
    "123",
    "4",
    "\u0662",
    "床前",
    "明月光",
    "，",
    "。",
    "\u0301",
    "\U00020000",
    "<|im_end|>",
    "<|eos|>",
    "\u2581",
    "<0x0A>",
    "!?",
    "=",
    "\0",
]
ANY_TEXT = st.lists(
    st.one_of(st.sampled_from(PARTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), max_size=20
).map("".join)
thorough = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def texts(seed: int, number: int = 400) -> list[str]:
    generator = random.Random(seed)
    return [
        "".join(
            generator.choices(
                PARTS,
                weights=[5 if part.isascii() and part.isalpha() else 2 for part in PARTS],
                k=generator.randrange(60),
            )
        )
        for _ in range(number)
    ]


def byte_level(folder, splits, **model):
    """A byte-level tokenizer trained by `tokenizers` itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = splits
    tokenizer.decoder = decoders.ByteLevel()
    words = [AddedToken(word, normalized=False, special=True) for word in SPECIAL]
    tokenizer.train_from_iterator(
        texts(0),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=words,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def build(kind, folder):
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    if kind == "sentencepiece":
        model = spm_trainer.train_sentencepiece(texts(0), 420, True, 1.0, folder / "log")
        (folder / "tokenizer.model").write_bytes(model)
        spm_model.to_fast_tokenizer(model).save(str(folder / "tokenizer.json"))
    elif kind == "gpt2":
        byte_level(folder, pre_tokenizers.ByteLevel(add_prefix_space=False))
    else:
        split = pre_tokenizers.Split(Regex(pattern(False)), behavior="isolated")
        byte_level(
            folder, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        )
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["cl100k", "gpt2", "sentencepiece"])
def test_ids_are_those_of_tokenizer_json(kind, tmp_path):
    backend = build(kind, tmp_path)
    encode = encoder(tmp_path)
    assert encode.kind == ("sentencepiece" if kind == "sentencepiece" else "tiktoken")

    def same(batch):
        arrays = encode(batch)
        assert all(ids.dtype == np.int32 for ids in arrays)
        assert [ids.tolist() for ids in arrays] == encode_text(backend, batch)

    same([*HARD_TEXTS, *texts(1), "a\u2581b"])
    same(["a" + " " * (LONG_RUN + 1) + "b", "\n" * 200_000, "x" * 200_000, "\u554a" * 50_000])
    thorough(given(ANY_TEXT)(lambda text: same([text])))()


def test_a_million_spaces_do_not_crash_the_encoder(tmp_path):
    build("cl100k", tmp_path)
    [ids] = encoder(tmp_path)([" " * 1_000_000 + "a"])
    assert len(ids) > 1000


def _change(folder, action):
    spec = json.loads((folder / "tokenizer.json").read_text())
    action(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def test_other_ids_than_the_merges_order_are_translated(tmp_path):
    """Ids permuted: tiktoken takes the smallest id for the first merge, tokenizer.json the order of its list."""
    backend = build("cl100k", tmp_path)
    vocabulary = backend.get_vocab()
    shuffled = list(range(5, len(vocabulary)))
    random.Random(2).shuffle(shuffled)

    def permute(spec):
        for token, index in vocabulary.items():
            spec["model"]["vocab"][token] = index if index < 5 else shuffled[index - 5]

    _change(tmp_path, permute)
    from tokenizers import Tokenizer

    encode = encoder(tmp_path)
    assert encode.kind == "tiktoken"
    assert [ids.tolist() for ids in encode(texts(3))] == encode_text(
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")), texts(3)
    )


@pytest.mark.parametrize("change", ["merge from other parts", "missing merge", "normaliser", "added token"])
def test_a_tokenizer_that_tiktoken_would_encode_differently_stays_with_tokenizers(change, tmp_path):
    build("cl100k", tmp_path)

    def action(spec):
        model = spec["model"]
        # a token of three parts is merged from its last two first, to which its own merges never lead
        if change == "merge from other parts":
            at = next(
                i
                for i, (left, right) in enumerate(model["merges"])
                if len(left) > 1 and len(right) == 1 and left[1:] + right not in model["vocab"]
            )
            left, right = model["merges"][at]
            other = left[1:] + right
            model["vocab"][other] = len(model["vocab"])
            model["merges"][at] = [left[0], other]
            model["merges"].append([left[1:], right] if left[1:] in model["vocab"] else [left[1], right])
        elif change == "missing merge":
            model["merges"].pop(7)
        elif change == "normaliser":
            spec["normalizer"] = {"type": "NFC"}
        else:
            spec["added_tokens"].append(
                {
                    "id": len(model["vocab"]),
                    "content": "aba",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": False,
                }
            )

    _change(tmp_path, action)
    assert encoder(tmp_path).kind == "tokenizers"


def test_a_lone_surrogate_is_refused_with_its_place(tmp_path):
    build("cl100k", tmp_path)
    with pytest.raises(UserError, match=r"text 1 of a batch has a lone surrogate \(U\+D800\) at character 2"):
        encoder(tmp_path)(["good", "ab\ud800c"])


def test_both_engines_class_every_code_point_alike():
    """If this fails after an upgrade, the libraries follow other Unicode versions, and texts with the characters of
    the difference must go through `tokenizers`."""
    import tiktoken
    from tokenizers import Regex, pre_tokenizers

    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for expression in (r"\p{L}", r"\p{N}", r"\s", "(?i:[sdmtrevl])"):
        one = tiktoken.Encoding(
            "x", pat_str=expression, mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
        )
        other = pre_tokenizers.Split(Regex(expression), "removed")
        for begin in range(0, len(points), 4096):
            text = "".join(points[begin : begin + 4096])
            not_matching = {char for part, _ in other.pre_tokenize_str(text) for char in part}
            assert set(one.decode(one.encode_ordinary(text))) == set(text) - not_matching
