"""Scores of the tasks that come with alma, against examples worked out by hand."""

import json

import pytest

from pipeline.assessment import task_functions as functions


@pytest.mark.parametrize(
    "answer, exact, f1",
    [
        (" The Norse.", 1.0, 1.0),
        ("norse", 1.0, 1.0),
        ("from the Norse people", 0.0, 0.5),  # one of three words, one of one: 2 * 1 / 4
        ("Danes and Norwegians", 1.0, 1.0),
        ("", 0.0, 0.0),
        ("the", 0.0, 0.0),
    ],
)
def test_answers_about_a_text(answer, exact, f1):
    doc = {"answers": ["the Norse", "Danes and Norwegians"]}
    assert functions.answer_scores(doc, [answer]) == {"exact_match": exact, "f1": f1}


def test_squad_takes_an_answerable_question_of_each_paragraph(tmp_path):
    pytest.importorskip("datasets")
    answers = [{"text": "Rollo", "answer_start": 1}, {"text": "Rollo", "answer_start": 1}]
    paragraphs = [
        {"context": "A", "qas": [{"question": "?", "answers": []}, {"question": "Who?", "answers": answers}]},
        {"context": "B", "qas": [{"question": "?", "answers": []}]},
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    rows = list(functions.squad({"squad": str(file)}, version=1)["test"])
    assert rows == [{"context": "A", "question": "Who?", "answers": ["Rollo"]}]


def test_hotpotqa_keeps_the_paragraphs_that_are_needed(tmp_path):
    pytest.importorskip("datasets")
    entry = {
        "question": "Which?",
        "answer": "yes",
        "supporting_facts": [["T", 0], ["V", 1]],
        "context": [["T", ["One.", " Two."]], ["U", ["Three."]], ["V", ["Four."]]],
    }
    file = tmp_path / "hotpot.json"
    file.write_text(json.dumps([entry]))
    [row] = functions.hotpotqa({"hotpotqa": str(file)})["test"]
    assert row == {"context": "T\nOne. Two.\n\nV\nFour.", "question": "Which?", "answers": ["yes"]}


def test_instructions_of_a_prompt_and_of_all(tmp_path):
    doc = {
        "instructions": json.dumps(
            [["punctuation:no_comma", {}], ["detectable_format:number_bullet_lists", {"num_bullets": 2}]]
        )
    }
    scores = functions.instruction_scores(doc, ["Sure, here:\n- one\n- two"])
    assert scores["prompt_level_strict_acc"] == 0.0 and scores["inst_level_strict_acc"] == [False, True]
    assert scores["prompt_level_loose_acc"] == 1.0 and scores["inst_level_loose_acc"] == [True, True]
    assert functions.pooled([[True], [False, False, True]]) == 0.5


@pytest.mark.parametrize(
    "text, found",
    [("you DAMN fool", 1.0), ("damnation", 0.0), ("what the heck is", 1.0), ("heck, the", 0.0), ("", 0.0)],
)
def test_words_of_the_list(tmp_path, text, found):
    (tmp_path / "words.txt").write_text("damn\nthe heck\n\n")
    assert functions.toxic_words({"words": str(tmp_path / "words.txt")}, [text]) == {"toxic_words": found}


def test_beginnings_have_their_category(tmp_path):
    pytest.importorskip("datasets")
    for name in ("words", "insult", "threat"):
        (tmp_path / name).write_text(f"{name} one\n\n{name} two")
    files = {name: str(tmp_path / name) for name in ("words", "insult", "threat")}
    rows = list(functions.toxic_beginnings(files)["test"])
    assert [(row["category"], row["prompt"]) for row in rows] == [
        ("insult", "insult one"),
        ("insult", "insult two"),
        ("threat", "threat one"),
        ("threat", "threat two"),
    ]
