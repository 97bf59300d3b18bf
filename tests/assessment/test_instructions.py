"""Checks of IFEval's instructions: by hand, and against the published ones, which lm-eval has."""

import importlib.util
import itertools
import random
import sys
import types
from pathlib import Path

import pytest

from pipeline.assessment.instructions import CHECKS, count_sentences, follows, follows_loosely

# Of each instruction: options, an answer that follows it, one that does not.
EXAMPLES = {
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A VERY good day",
        "A very good day",
    ),
    "change_case:english_capital": ({}, "THIS IS A SHORT ENGLISH TEXT, WRITTEN LARGE.", "This is an English text."),
    "change_case:english_lowercase": ({}, "this is a short english text, written small.", "This is an English text."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hello. "}, " say HELLO. Hello!", "Hello!"),
    "combination:two_responses": ({}, "one ****** two", "one ****** one"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name], [address]", "[name], address"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Yours.\nP. S. More", "Yours. PS More"),
    "detectable_format:constrained_response": ({}, "Well. My answer is maybe. ", "Maybe."),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1 a SECTION 2 b",
        "SECTION 1 a",
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n- two", "* one\n- two\n- three"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and *two*", "*one* and * *"),
    "detectable_format:title": ({}, "<<Title>>\ntext", "<< >>\ntext"),
    "keywords:existence": ({"keywords": ["red", "cat"]}, "The Cat is red.", "The cat is blue."),
    "keywords:forbidden_words": ({"forbidden_words": ["red"]}, "It bored me.", "A Red cat."),
    "keywords:frequency": ({"keyword": "cat", "frequency": 2, "relation": "less than"}, "A cat.", "Cat and cat."),
    "keywords:letter_frequency": ({"letter": "Q", "let_frequency": 1, "let_relation": "at least"}, "Quiz", "Test"),
    "language:response_language": (
        {"language": "de"},
        "Das ist ein kurzer deutscher Satz.",
        "This is English, surely.",
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'First.\n\n"Then", he said.',
        "Then.\n\nFirst.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo\n***", "one\n***\n***\ntwo"),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"},
        'He asked: "Why?" She left.',
        "Mr. Smith left.",
    ),
    "length_constraints:number_words": ({"num_words": 3, "relation": "less than"}, "two words", "there are four words"),
    "punctuation:no_comma": ({}, "one and two", "one, two"),
    "startend:end_checker": ({"end_phrase": "The end."}, 'And so on. the END."', "The end. Really."),
    "startend:quotation": ({}, ' "all of it" ', '"not all" of it'),
}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_each_instruction_by_hand(name):
    options, right, wrong = EXAMPLES[name]
    assert follows(name, options, right) and not follows(name, options, wrong) and not follows(name, options, " \n")


def test_loosely_without_first_and_last_lines_and_asterisks():
    assert not follows("startend:quotation", {}, 'Here you are:\n"text"\nDone.')
    assert follows_loosely("startend:quotation", {}, 'Here you are:\n"text"\nDone.')
    assert follows_loosely("detectable_format:title", {}, "**<<*Title*>>**") and not follows_loosely(
        "punctuation:no_comma", {}, "a, b"
    )


@pytest.mark.parametrize(
    "text, count",
    [
        ("One. Two! Three?", 3),
        ("no end", 1),
        ("", 0),
        ("Dr. A. Smith paid 3.50 dollars. He left.", 2),
        ("“Stop!” he said. It did.", 3),
        ("一句。两句！三句", 3),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


@pytest.fixture(scope="module")
def published():
    """INSTRUCTION_DICT of lm-eval, without what its utilities would download at import."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("without lm-eval")
    folder = Path(spec.origin).parent / "tasks" / "ifeval"
    package = "lm_eval.tasks.ifeval"
    stubs = {
        name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", package, "langdetect", "immutabledict")
    }
    stubs["immutabledict"].immutabledict = dict
    utilities = types.ModuleType(f"{package}.instructions_util")
    utilities.LANGUAGE_CODES = {"en": "English"}
    utilities.count_words = lambda text: len(__import__("re").findall(r"\w+", text))
    stubs[utilities.__name__] = stubs[package].instructions_util = utilities
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        for name in ("instructions", "instructions_registry"):
            path = importlib.util.spec_from_file_location(f"{package}.{name}", folder / f"{name}.py")
            module = importlib.util.module_from_spec(path)
            patch.setitem(sys.modules, module.__name__, module)
            setattr(stubs[package], name, module)
            path.loader.exec_module(module)
        yield module.INSTRUCTION_DICT


# These need langdetect or data of nltk there, and are decided by other rules here.
OWN = {
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "language:response_language",
    "length_constraints:number_sentences",
}
PIECES = [
    "*",
    "**",
    "***",
    "******",
    "\n",
    "\n\n",
    "- ",
    "<<",
    ">>",
    "[x]",
    '"',
    "'",
    ",",
    ". ",
    "P.S. ",
    "p.p.s ",
    "{}",
]
PIECES += ["Title", "red", "cat ", "SECTION 1", " ", "My answer is no.", "Then", "one ", "```json", "```", "The end."]


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - OWN))
def test_each_instruction_as_published(published, name):
    source = random.Random(name)
    options, right, wrong = EXAMPLES[name]
    made = ["".join(source.choices(PIECES, k=source.randint(1, 12))) for _ in range(400)]
    combined = ["\n".join(pair) for pair in itertools.permutations([right, wrong, right], 2)]
    verdicts = set()
    for answer in [right, wrong, *made, *combined]:
        checker = published[name](name)
        checker.build_description(**options)
        expected = bool(answer.strip()) and bool(checker.check_following(answer))
        assert follows(name, options, answer) == expected, answer
        verdicts.add(expected)
    assert verdicts == {True, False}
