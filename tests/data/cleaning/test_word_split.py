"""Words against spaCy's; lines and their ends."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.cleaning.normal_form import normalise
from pipeline.data.cleaning.word_split import split_words, word_hashes


def words_of(text: str) -> list[str]:
    batch = split_words([text])
    return [batch.joined[first : first + length] for first, length in zip(batch.first, batch.length, strict=True)]


# What spacy.blank("en") of spaCy 3.8.18 gives, without its tokens of white space.
SPACY = {
    '(see "foo-bar", e.g.) "Don\'t!" Mr. Smith\'s': [
        "(",
        "see",
        '"',
        "foo",
        "-",
        "bar",
        '"',
        ",",
        "e.g.",
        ")",
        '"',
        "Do",
        "n't",
        "!",
        '"',
        "Mr.",
        "Smith",
        "'s",
    ],
    "U.S.A. 3.5% well--then we'll $5.00 a.m. x=y": [
        "U.S.A.",
        "3.5",
        "%",
        "well",
        "--",
        "then",
        "we",
        "'ll",
        "$",
        "5.00",
        "a.m.",
        "x",
        "=",
        "y",
    ],
    'I said: "no." Then... he left.': ["I", "said", ":", '"', "no", ".", '"', "Then", "...", "he", "left", "."],
    "[1] {a} #tag @you & co": ["[", "1", "]", "{", "a", "}", "#", "tag", "@you", "&", "co"],
    "end.Next one,two 10-20 - -x": ["end", ".", "Next", "one", ",", "two", "10", "-", "20", "-", "-x"],
}


@pytest.mark.parametrize("text", SPACY)
def test_words_are_spacys(text):
    assert words_of(text) == SPACY[text]


def test_every_cjk_character_is_a_word():
    assert words_of("中文，好。 and 日本") == ["中", "文", "，", "好", "。", "and", "日", "本"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.text(alphabet=st.sampled_from("aAbZ.é 9.,\n-'’\"…()[]:/%+$中文。！#~s tn"), max_size=60),
        min_size=1,
        max_size=4,
    )
)
@example(["", "A."])
@example(["", "'s"])
def test_words_cover_the_text_and_do_not_depend_on_the_batch(texts):
    texts = [normalise(text) for text in texts]
    batch = split_words(texts)
    for index, text in enumerate(texts):
        mine = slice(batch.words[index], batch.words[index + 1])
        found = [
            batch.joined[first : first + length]
            for first, length in zip(batch.first[mine], batch.length[mine], strict=True)
        ]
        assert "".join(found) == re.sub(r"\s", "", text) and found == words_of(text)
        assert (batch.hash[mine] == word_hashes(found)).all()
