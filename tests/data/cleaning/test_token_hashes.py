"""Hashed tokens and shingles against plain Python."""

import random

import numpy as np
from cleaned import plain_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.cleaning.characters import code_points
from pipeline.data.cleaning.token_hashes import shingles, tokens

EN = (
    "the of river water king stone light under over winter summer bread house market table letter number people morning"
    " evening garden".split()
)
HAN = "天地人山水火木金土日月星风雨雪春夏秋冬东西南北上下左右大小多少高低远近红黄蓝白黑书画琴棋诗酒花草鱼鸟虫马牛羊"
ANY = st.text(
    alphabet=st.one_of(
        st.sampled_from("aAéß 9.,\n中文字かな한글𠀀"), st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    )
)


@settings(max_examples=200, deadline=None)  # the first call builds tables
@given(st.lists(ANY, min_size=1, max_size=5))
def test_hashed_tokens_are_the_plain_tokens(texts):
    hashed, known = tokens(texts), {}
    for ours, again in zip(vars(hashed).values(), vars(tokens(texts, code_points(texts))).values(), strict=True):
        assert (ours == again).all()
    for i, text in enumerate(texts):
        expected = plain_tokens(text)
        found = hashed.hashes[hashed.starts[i] : hashed.starts[i + 1]].tolist()
        assert len(found) == len(expected), (text, expected)
        for token, value in zip(expected, found, strict=True):
            assert known.setdefault(token, value) == value
    assert len(set(known.values())) == len(known)


def plain_shingles(text: str) -> set:
    words = plain_tokens(text)
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def test_hashed_shingles_are_the_plain_shingles():
    rng = random.Random(1)
    texts = ["", "one", "中文"]
    for _ in range(60):
        texts.append(
            " ".join(rng.choices(EN, k=rng.randrange(60))) + "".join(rng.choices(HAN[:6], k=rng.randrange(30)))
        )
    hashes, starts = shingles(tokens(texts))
    for i, text in enumerate(texts):
        assert len(set(hashes[starts[i] : starts[i + 1]].tolist())) == len(plain_shingles(text))
    assert len(set(hashes.tolist())) == len(set().union(*map(plain_shingles, texts)))


@given(st.lists(st.text("abcXé漢σΣ \n0", max_size=80), min_size=1, max_size=5))
def test_a_token_has_one_hash_whatever_stands_beside_it(texts):
    """Also in a batch with a character beyond the first plane, which is looked at in another width, and with runs of
    more than 32 characters; different tokens have different ones."""
    together, wide = tokens(texts), tokens([*texts, "\U0001d49c" + "b" * 40])
    assert np.array_equal(together.hashes, wide.hashes[: len(together.hashes)])
    known = [token for text in texts for token in plain_tokens(text)]
    assert (
        len(set(together.hashes.tolist()))
        == len(set(known))
        == len(set(zip(known, together.hashes.tolist(), strict=True)))
    )
