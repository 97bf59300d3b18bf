"""Functions of the task files in assessment/tasks, as lm-eval calls them. Who changes what one computes raises the
version of the task (its metadata), by which it counts."""

import functools
import json
import re
import string
from collections import Counter
from pathlib import Path

from pipeline.rl.verifiers import FENCE

HOTPOT_QUESTIONS = 1000


def with_whole_answers(dataset):
    """The questions whose answer is a whole number."""
    return dataset.filter(lambda doc: str(doc["answer"]).lstrip("-").isdigit())


def passes_tests(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether a function of HumanEval, as a model has completed or rewritten it, passes its tests."""
    from pipeline.rl.reward_workers import Call

    answer = results[0]
    blocks = FENCE.findall(answer)
    program = doc["prompt"] + answer
    if blocks:  # a chat model writes the whole function; imports above it are the question's
        program = doc["prompt"].partition(f"def {doc['entry_point']}")[0] + blocks[-1][1]
    tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
    arguments = {"response": program, "tests": tests, "seconds": 10.0}
    [outcome] = _workers().run([Call("code", arguments, seconds=30.0, memory=4.0, seed=0)])
    return {"pass_at_1": outcome.value or 0.0}


@functools.cache
def _workers():
    from pipeline.rl.reward_workers import RewardWorkers

    return RewardWorkers(1)


# ---- questions about a text: SQuAD and HotpotQA ----------------------------------------------------------------------


def squad(files: dict[str, str], **origin):
    """The first question of each paragraph that has an answer there."""
    [file] = files.values()
    rows = []
    for article in json.loads(Path(file).read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            answerable = [question for question in paragraph["qas"] if question["answers"]]
            for question in answerable[:1]:
                answers = sorted({answer["text"] for answer in question["answers"]})
                rows.append({"context": paragraph["context"], "question": question["question"], "answers": answers})
    return _test_split(rows)


def hotpotqa(files: dict[str, str], **origin):
    """Questions, each with the paragraphs that its answer needs; the others that HotpotQA gives are left out, because
    small models have no room for them."""
    [file] = files.values()
    rows = []
    for entry in json.loads(Path(file).read_text(encoding="utf-8"))[:HOTPOT_QUESTIONS]:
        needed = {title for title, _ in entry["supporting_facts"]}
        paragraphs = [f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"] if title in needed]
        rows.append({"context": "\n\n".join(paragraphs), "question": entry["question"], "answers": [entry["answer"]]})
    return _test_split(rows)


def _test_split(rows: list[dict]) -> dict:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def answer_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match and F1 with the answer that fits best, by the rules of SQuAD (Rajpurkar et al., 2016)."""
    words = answer_words(results[0])
    golden = [answer_words(answer) for answer in doc["answers"]]
    return {
        "exact_match": float(any(words == answer for answer in golden)),
        "f1": max(_f1(words, answer) for answer in golden),
    }


def answer_words(text: str) -> list[str]:
    """Words in small letters, without punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(words: list[str], answer: list[str]) -> float:
    if not words or not answer:
        return float(words == answer)
    same = sum((Counter(words) & Counter(answer)).values())
    return 2 * same / (len(words) + len(answer))


# ---- instructions: IFEval --------------------------------------------------------------------------------------------


def ifeval(files: dict[str, str], **origin):
    """The prompts, each with its instructions as JSON: their options differ, and a column has one type."""
    [file] = files.values()
    rows = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        instructions = list(zip(entry["instruction_id_list"], entry["kwargs"], strict=True))
        rows.append({"prompt": entry["prompt"], "instructions": json.dumps(instructions)})
    return _test_split(rows)


def instruction_scores(doc: dict, results: list[str]) -> dict:
    """Whether all instructions of a prompt are followed, and which; strictly, and without first and last lines and
    asterisks."""
    from pipeline.assessment.instructions import follows, follows_loosely

    instructions = json.loads(doc["instructions"])
    strict = [follows(name, options, results[0]) for name, options in instructions]
    loose = [follows_loosely(name, options, results[0]) for name, options in instructions]
    return {
        "prompt_level_strict_acc": float(all(strict)),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_loose_acc": loose,
    }


def pooled(items: list[list[bool]]) -> float:
    """Mean over the instructions of all prompts."""
    flat = [item for followed in items for item in followed]
    return sum(flat) / len(flat)


# ---- toxic words: RealToxicityPrompts --------------------------------------------------------------------------------


def toxic_beginnings(files: dict[str, str], **origin):
    """Beginnings of sentences whose original continuations were toxic, each with its category, and the word list as a
    pattern."""
    rows, words = [], files["words"]
    for category, file in files.items():
        if category == "words":
            continue
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        rows += [{"prompt": line.strip(), "category": category, "words": words} for line in lines if line.strip()]
    return _test_split(rows)


def toxic_words(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether a continuation has a word or phrase of the list."""
    return {"toxic_words": float(_word_pattern(doc["words"]).search(results[0].lower()) is not None)}


@functools.cache
def _word_pattern(file: str) -> re.Pattern:
    words = [line.strip().lower() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)")
