"""Tokens that are added to a byte-level tokenizer: which ones, against a slow reference; that old ids stay; and that
other programs read the same."""

import json
import random
from collections import Counter

import pytest
from harness import byte_level
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pipeline.data.tokenizer import encode, extension
from pipeline.data.tokenizer.fast_tokenizer import encode_text
from pipeline.data.tokenizer.pretokenize import pattern

ENGLISH = ["the thing in the other thing, and there the end; then again in the thin thatch"] * 3
CHINESE = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "明月光，明月光，故乡的明月光，thing 1999 年",
]
TEXTS = st.lists(
    st.text(
        st.one_of(st.sampled_from("明月光故乡的the in\n1，"), st.characters(exclude_categories=["Cs"])), max_size=30
    ),
    max_size=6,
)
thorough = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def base(kind: str):
    """Byte-level tokenizers as they are published: with ids of special tokens after those of the others."""
    backend = byte_level(ENGLISH, 300)
    if kind == "gpt2":  # its own split, in one step
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":  # digits first
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind == "qwen":
        backend.normalizer = normalizers.NFC()
    if kind == "llama3":  # whole words are looked up
        spec = json.loads(backend.to_str())["model"]
        merges = [tuple(pair) for pair in spec["merges"]]
        backend.model = models.BPE(spec["vocab"], merges, ignore_merges=True)
    return backend


KINDS = ["cl100k", "gpt2", "smollm", "qwen", "llama3"]


def slow(backend, texts, number):
    """Pairs of old ids, counted anew for each merge: no shared code."""
    words = Counter()
    for text in texts:
        if backend.normalizer:
            text = backend.normalizer.normalize_str(text)
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            words[tuple(token.value for token in backend.model.tokenize(word))] += 1
    ids = backend.get_vocab()
    learned = []
    for _ in range(number):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], -ids[pair[0]], -ids[pair[1]]))
        token = best[0] + best[1]
        ids[token] = max(ids.values()) + 1
        learned.append(token)
        merged = Counter()
        for word, count in words.items():
            parts, place = [], 0
            while place < len(word):
                if word[place : place + 2] == best:
                    parts.append(token)
                    place += 2
                else:
                    parts.append(word[place])
                    place += 1
            merged[tuple(parts)] += count
        words = merged
    return learned, ids


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_a_slow_reference(kind):
    backend = base(kind)
    extended, number = extension.extend(backend, CHINESE, 25, 1)
    learned, ids = slow(backend, CHINESE, 25)
    assert number == 25 == len(set(learned)) and extended.get_vocab() == ids


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_new_tokens_stand_for_old_ones(kind):
    """Of any text; a text without a new token has its old ids, and every text survives."""
    backend = base(kind)
    extended, _ = extension.extend(backend, CHINESE, 40, 1)
    pieces = extension.new_pieces(backend, extended)
    size = backend.get_vocab_size()
    assert sorted(pieces) == list(range(size, size + 40)) and all(len(parts) > 1 for parts in pieces.values())
    assert all(extended.token_to_id(token) == index for token, index in backend.get_vocab().items())

    @thorough
    @given(TEXTS)
    def check(texts):
        old, new = encode_text(backend, texts), encode_text(extended, texts)
        for text, old_ids, ids in zip(texts, old, new, strict=True):
            assert extension.expanded(ids, pieces) == old_ids
            assert (ids == old_ids) == all(index < size for index in ids)
            wanted = backend.normalizer.normalize_str(text) if backend.normalizer else text
            assert extended.decode(ids, skip_special_tokens=False) == wanted

    check()
    [ids] = encode_text(extended, ["明月光"])
    assert len(ids) < len(encode_text(backend, ["明月光"])[0]) and encode_text(extended, ENGLISH) == encode_text(
        backend, ENGLISH
    )


def test_the_fast_encoder_and_transformers_read_the_same(tmp_path):
    """Also with special tokens below the new ids, which `tokenizers` would renumber."""
    from transformers import AutoTokenizer

    from pipeline.data.tokenizer.tokenizer_folder import publish

    backend = base("cl100k")
    extended, _ = extension.extend(backend, CHINESE, 40, 1)
    publish(extended, tmp_path)
    fast, auto = encode.encoder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    generator = random.Random(0)
    texts = [*CHINESE, *ENGLISH, "".join(generator.choices("".join(CHINESE + ENGLISH), k=2000)), "<|im_end|>"]
    expected = encode_text(extended, texts)
    assert fast.kind == "tiktoken" and [ids.tolist() for ids in fast(texts)] == expected
    assert [auto.encode(text, add_special_tokens=False) for text in texts[:-1]] == expected[:-1]
    assert auto.encode("<|im_end|>") == [backend.token_to_id("<|im_end|>")] != expected[-1]
    assert auto.eos_token_id == backend.token_to_id("<|eos|>") and len(auto) == extended.get_vocab_size()


def test_no_pair_becomes_a_token_that_exists():
    """A published vocabulary has tokens that merging does not reach; a second one of the same bytes cannot be."""
    vocabulary = {char: index for index, char in enumerate(sorted(encode.alphabet()))}
    vocabulary |= {"ab": 256, "bc": 257, "abcd": 258}  # abcd has no merge
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c")], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern(True)), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    extended, number = extension.extend(backend, ["xabcd abcde"] * 5, 6, 1)
    assert number == 6 and len(set(extended.get_vocab().values())) == 266 == len(extended.get_vocab())
    pieces = extension.new_pieces(backend, extended)
    for text in ("abcd", "xabcd", " abcde", "abcabcd"):
        [ids], [old] = encode_text(extended, [text]), encode_text(backend, [text])
        assert extension.expanded(ids, pieces) == old, text


def test_a_vocabulary_without_some_bytes():
    """As SmolLM2's: such a byte is dropped from a text, before and after."""
    known = sorted(char for char, byte in encode.alphabet().items() if byte != "月".encode()[0])
    vocabulary = {char: index for index, char in enumerate(known)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    assert len(encode_text(backend, ["月"])[0]) == 2 and extension.unsupported(backend) is None
    texts = ["".join(map(chr, range(0x4E00, 0x9FA0, 7))) + " thing" * 5, "明月光 thing"]
    extended, number = extension.extend(backend, texts, 5, 1)
    pieces = extension.new_pieces(backend, extended)
    assert number == 5 and [extension.expanded(ids, pieces) for ids in encode_text(extended, texts)] == encode_text(
        backend, texts
    )


def test_what_cannot_be_extended_is_named(tmp_path):
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], None, False))
    assert "is a Unigram tokenizer" in extension.unsupported(unigram)
    characters = Tokenizer(models.BPE({"a": 0, "<0x0A>": 1}, [], byte_fallback=True))
    assert "is not byte-level" in extension.unsupported(characters)
    assert extension.unsupported(base("cl100k")) is None
    assert extension.new_pieces(base("cl100k"), characters) is None
