"""The normal form of text, and the scan of a batch that finds which texts are not in it."""

import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.cleaning.characters import code_points
from pipeline.data.cleaning.garbled_text import garbled_share
from pipeline.data.cleaning.normal_form import LOOSE, SUSPECT, normalise, scan


@given(
    st.text(
        alphabet=st.one_of(
            st.characters(exclude_categories=["Cs"]), st.sampled_from("\r\n\t \u00a0\u3000\x00\x85\u2028e\u0301\ufeff")
        )
    )
)
def test_normal_form(text):
    once = normalise(text)
    assert normalise(once) == once and unicodedata.is_normalized("NFC", once)
    assert not re.search(r"[\r\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\u2028\u2029]|\n{3}|[ \t]\n", once)
    # what stood apart may combine when these are gone
    if "\ufeff" not in text and not any(unicodedata.category(c) == "Cc" for c in text):
        assert [c for c in once if c.isalnum()] == [c for c in unicodedata.normalize("NFC", text) if c.isalnum()]


def test_signs_of_windows_that_were_read_as_latin_1_are_not_lost():
    """correctness 8: `it\x92s` became `its`. Against Python's codec."""
    written = "It’s a “quote” – 5 €, Œuvre…"
    assert normalise(written.replace("…", "").encode("cp1252").decode("latin-1")) == written.replace("…", "")
    assert normalise("a\x81b\x8dc\x90\x9dd\x85e") == "abcd\ne"  # not assigned in Windows-1252; a newline


def test_normalise_keeps_what_carries_meaning():
    assert normalise("\ufeffＡＢ，１\r\nx²\x00 \t\n\n\n\n家\u200d\n") == "ＡＢ，１\nx²\n\n家\u200d"
    assert normalise("e\u0301") == "é"


ODD = [
    "a",
    "é",
    "e\u0301",
    " \n",
    "\n\n\n",
    "\r\n",
    "\x00",
    "\u3000\n",
    "Ã©",
    "â€™",
    "锟斤拷",
    "中",
    "\u1161",
    "\uac00\u11a8",
    "𠀀",
    "\ufffd",
    "\u00a0\n",
    "\u212b",
    "\t\n",
    " ",
    "\n",
]


@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=6).map("".join),
        min_size=1,
        max_size=4,
    )
)
def test_a_scan_of_a_batch_misses_nothing(texts):
    """Texts that a scan finds clean are not searched one by one: their normal form and their share of garbage must
    be the same."""
    for text, flags in zip(texts, scan(texts, code_points(texts)), strict=True):
        assert normalise(text, flags) == normalise(text)
        assert flags & SUSPECT or garbled_share(text) == 0


def test_a_scan_misses_no_character():
    """Tables are made from a third of the characters: of the others, none may have a flag."""
    every = [f"a{chr(point)}a" for point in range(1, 0x10000) if not 0xD800 <= point < 0xE000]
    for text, flags in zip(every, scan(every, code_points(every)), strict=True):
        assert normalise(text, flags) == normalise(text)
        assert flags & SUSPECT or garbled_share(text) == 0
        assert flags & LOOSE or not unicodedata.combining(text[1])
