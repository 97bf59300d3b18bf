"""Verifiers on both sides of what they accept. Each row is a claim that its docstring makes."""

import pytest

from pipeline.rl.verifiers import VERIFIERS, last_number

PERSON = {"type": "object", "required": ["name"], "properties": {"age": {"type": "integer"}}}
ADD = "```python\ndef add(a, b):\n    return a + b\n```"


@pytest.mark.parametrize(
    "name, response, arguments, value",
    [
        ("exact", " 12 \n", {"answer": "12"}, 1),
        ("exact", "12.", {"answer": "12"}, 0),
        ("contains", "so it is 12, I think", {"answer": "12"}, 1),
        ("contains", "so it is 120", {"answer": "12"}, 0),
        ("prefix", "Yes, it is", {"answer": "Yes"}, 1),
        ("number", "First 3, then 1,000.", {"answer": "6 + 994\n#### 1000"}, 1),
        ("number", "First 1,000, then 3.", {"answer": "1000"}, 0),
        ("number", "about -0.51", {"answer": -0.5, "tolerance": 0.02}, 1),
        ("number", "no idea", {"answer": "7"}, 0),
        ("regex", "a\nb", {"pattern": "^a.b$"}, 1),
        ("regex", "xab", {"pattern": "ab", "whole": True}, 0),
        ("json_schema", '{"name": "Ada", "age": 36}', {"schema": PERSON}, 1),
        ("json_schema", '```json\n{"name": "Ada"}\n```', {"schema": PERSON}, 1),
        ("json_schema", '{"name": "Ada", "age": "old"}', {"schema": PERSON}, 0),
        ("json_schema", 'Here: {"name": "Ada"}', {"schema": PERSON}, 0),
        ("sections", "<think>a\nb</think>\n<answer>c</answer>", {"tags": ["think", "answer"]}, 1),
        ("sections", "<answer>c</answer><think>a</think>", {"tags": ["think", "answer"]}, 0),
        ("sections", "<think>a<think>b</think><answer>c</answer>", {"tags": ["think", "answer"]}, 0),
        ("sections", "Well, <think>a</think><answer>c</answer>", {"tags": ["think", "answer"]}, 0),
        ("length", "one two three", {"at_most": 3}, 1),
        ("length", "one two three", {"at_most": 2}, 0),
        ("length", "One. Two! Three?", {"at_least": 3, "at_most": 3, "unit": "sentences"}, 1),
        ("length", "豆腐好吃", {"at_least": 4, "at_most": 4, "unit": "characters"}, 1),
        ("length", "a\n\nb\n \nc", {"at_least": 3, "at_most": 3, "unit": "paragraphs"}, 1),
        ("math", "So it is $\\frac{2}{4}$.", {"answer": "0.5"}, 1),
        ("math", "\\boxed{x^2 + 2x + 1}", {"answer": "(x+1)^2"}, 1),
        ("math", "So it is $\\frac{1}{3}$.", {"answer": "0.5"}, 0),
        ("code", ADD, {"tests": ["assert add(1, 2) == 3"]}, 1),
        ("code", ADD, {"tests": ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]}, 0),
        ("code", ADD, {"tests": ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], "partial": True}, 0.5),
        ("code", "import os\nos._exit(0)", {"tests": "assert False"}, 0),
        ("code", "print('the token')\nexit(0)", {"tests": "assert False"}, 0),
        ("code", "while True: pass", {"tests": "assert True", "seconds": 0.5}, 0),
        ("code", "x = 'a' * (2 << 30)", {"tests": "assert True", "memory": 0.5}, 0),
        ("code", "import os\nassert not os.listdir('.') and 'HOME' not in os.environ", {"tests": "assert True"}, 1),
    ],
)
def test_both_sides(name, response, arguments, value):
    assert VERIFIERS[name](response, **arguments) == value


def test_numbers():
    found = [last_number(text) for text in ("1,000.50 EUR", "1, 2", "x = .5", "\u22123", "none")]
    assert found == [1000.5, 2.0, 0.5, -3.0, None]


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("number", {"answer": "none"}, "the answer has no number"),
        ("length", {"unit": "pages"}, "unit: 'pages', expected words"),
        ("code", {"tests": []}, "tests is empty"),
        ("math", {"answer": ""}, "the answer is not mathematics"),
    ],
)
def test_what_cannot_be_judged_is_an_error(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        VERIFIERS[name]("5", **arguments)
