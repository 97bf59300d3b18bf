"""The byte-level trainer: words are those of the regular expression, merges are those of a slow reference and of
`tokenizers`."""

import random
from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.data.tokenizer.pretokenize import classes, count, pattern

SIGNS = [
    " ",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u3000",
    "\x85",
    "'",
    "'s",
    "'S",
    "'\u017f",
    "'re",
    "'VE",
    "'ll",
    "'lL",
    "'t",
    "1",
    "12",
    "3456",
    "\u0663",
    "a",
    "bc",
    "é",
    "é",
    "床前",
    "。",
    "，",
    "!",
    '"',
    "(",
    "\0",
    "\u0301",
    "\U00020000",
]
TEXT = st.lists(
    st.one_of(st.sampled_from(SIGNS), st.text(max_size=4).map(lambda text: text.encode("utf-8", "ignore").decode())),
    max_size=25,
).map("".join)
POLICIES = [(True, True), (False, True), (True, False)]  # split_digits, merge_whitespace
thorough = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def engines():
    """The expression itself, with the classes of the encoders' engines (Python's regex follows a newer
    Unicode)."""
    from tokenizers import Regex, pre_tokenizers

    return {policy: pre_tokenizers.Split(Regex(pattern(*policy)), "isolated") for policy in POLICIES}


@pytest.mark.parametrize("policy", POLICIES)
def test_words_are_those_of_the_expression(engines, policy):
    def check(texts):
        words, counts = count(texts, *policy)
        expected = Counter(word for text in texts for word, _ in engines[policy].pre_tokenize_str(text))
        assert dict(zip(words.to_pylist(), counts.tolist(), strict=True)) == {
            word.encode(): number for word, number in expected.items()
        }
        assert sum(len(word) * number for word, number in zip(words.to_pylist(), counts.tolist(), strict=True)) == sum(
            len(text.encode()) for text in texts
        ), "a byte was skipped"

    checked = example(["'s", "'re", "a\n", "!\n \n x", "! \n\n\t\ta", "''s x's 1's", "", "\0", " \0 ", "12345 '", "'"])(
        check
    )
    thorough(given(st.lists(TEXT, min_size=1, max_size=4))(checked))()
    generator = random.Random(0)
    for _ in range(20):
        check(["".join(generator.choices(SIGNS, k=3000)) for _ in range(5)])


def test_classes_are_unicodes():
    """Against Python's own tables, which follow another version: so only characters of an older Unicode are
    compared."""
    import unicodedata

    old = [
        point
        for point in range(0x110000)
        if not 0xD800 <= point < 0xE000 and unicodedata.ucd_3_2_0.category(chr(point)) != "Cn"
    ]
    kinds = classes()[old]
    text = "".join(map(chr, old))
    for kind, expression in ((1, r"\p{L}"), (2, r"\p{N}")):
        ours = "".join(char for char, its_kind in zip(text, kinds, strict=True) if its_kind == kind)
        assert ours == "".join(regex.findall(expression, text))
    assert np.bincount(kinds, minlength=6)[3:6].tolist() == [2, 1, 22]


def slow(texts, size, split, longest=128):
    """Count all pairs, merge the best of at most `longest` bytes, from the beginning each time: no shared code."""
    from pipeline.data.tokenizer.encode import alphabet

    order = {byte: index for index, (_, byte) in enumerate(sorted(alphabet().items()))}
    tokens = [bytes([byte]) for byte in order]
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    words = [([order[byte] for byte in word.encode()], number) for word, number in words.items()]
    while len(tokens) < size:
        pairs = Counter()
        for word, number in words:
            for pair in zip(word, word[1:]):
                if len(tokens[pair[0]] + tokens[pair[1]]) <= longest:
                    pairs[pair] += number
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, _ in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [len(tokens)]
                at += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def corpus(seed):
    generator = random.Random(seed)
    syllables = ["ba", "ter", "in", "so", "aaa", "床前", "明月", "光", " ", " ", "\n", "12", "'s", "==", "é", "abab"]
    return ["".join(generator.choices(syllables, weights=range(len(syllables), 0, -1), k=200)) for _ in range(30)]


@pytest.mark.parametrize("floor", [None, 1, 3, 40, 10**9])
@pytest.mark.parametrize("seed", [0, 1])
def test_merges_are_those_of_a_slow_reference(engines, seed, floor):
    from pipeline.data.tokenizer.bpe_merges import train

    texts = corpus(seed)
    assert train(*count(texts, True), 500, floor)[0] == slow(texts, 500, engines[True, True])


@thorough
@given(
    st.lists(st.text(st.sampled_from("aab床 \n"), max_size=80), max_size=5),
    st.sampled_from([None, 1, 2, 5]),
    st.sampled_from([128, 2, 3, 4, 7, 12]),
)
def test_merges_of_any_text(texts, floor, longest):
    from tokenizers import Regex, pre_tokenizers

    from pipeline.data.tokenizer.bpe_merges import train

    tokens, _ = train(*count(texts, False), 300, floor, longest=longest)
    assert tokens == slow(texts, 300, pre_tokenizers.Split(Regex(pattern(False)), "isolated"), longest)
    assert max(map(len, tokens)) <= longest
    assert len(set(tokens)) == len(tokens) and len(set(tokens[:256])) == 256


@pytest.mark.parametrize("longest", [3, 6, 128])
def test_merges_are_those_of_tokenizers(longest):
    """Its max_token_length counts bytes as well, and is the first length that is too long."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    from pipeline.data.tokenizer.bpe_merges import train
    from pipeline.data.tokenizer.encode import alphabet

    texts = [*corpus(5), *corpus(6), "a" * 1000 + " " + "床" * 300]
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern(False)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    peer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=700,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            max_token_length=longest + 1,
        ),
    )
    bytes_of = alphabet()
    expected = [
        bytes(map(bytes_of.__getitem__, token))
        for token, _ in sorted(peer.get_vocab().items(), key=lambda item: item[1])
    ]
    assert train(*count(texts, False), 700, longest=longest)[0] == expected


def test_junk_does_not_become_long_tokens():
    """A run of one letter, base64 without a line end, and a line of Chinese, each repeated: without a bound they are
    tokens of 40,000, 4,000 and 14,000 bytes."""
    from pipeline.data.tokenizer.bpe_merges import LONGEST, train

    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    line = "".join(random.Random(0).choices(letters, k=500))
    junk = ["=" * 40_000, line * 8, "白日依山尽黄河入海流欲穷千里目更上一层楼" * 240]
    unbounded = train(*count(junk, False), 2000, longest=10**6)[0]
    assert {len(token) for token in unbounded} > {40_000, 4_000, 14_400}
    bounded = train(*count(junk + corpus(3), False), 900)[0]
    assert max(map(len, bounded)) == LONGEST


def test_counts_are_wider_than_32_bits():
    """Pair counts beyond 2^31, which `tokenizers` 0.23 wraps around: the commonest pair is then not the first."""
    import pyarrow

    from pipeline.data.tokenizer.bpe_merges import train

    words = pyarrow.array([b"ab", b"cab", b"cd"], pyarrow.binary())
    assert train(words, np.array([2**31 - 1, 2**31 - 1, 2**31 - 2]), 259)[0][256:] == [b"ab", b"cab", b"cd"]
