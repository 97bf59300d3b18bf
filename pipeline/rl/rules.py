"""Scores by rule: does a response give the known answer? For tasks whose answer can be checked, in addition to a reward
model that only estimates."""

import re
from typing import Literal

Rule = Literal["exact", "contains", "prefix"]


def score(rule: Rule, response_text: str, answer: str) -> float:
    """1.0 if `response_text` gives `answer` under the rule, else 0.0.

    exact: the whole response is the answer. prefix: the response begins with it. contains: it is anywhere in the
    response. Runs of white space count as one space, and those at the ends do not count; case counts. `prefix` and
    `contains` compare whole words and numbers, so that 12 is not found in 120; Chinese, which has no spaces, is found
    anywhere.
    """
    response, expected = " ".join(response_text.split()), " ".join(answer.split())
    assert expected, "an empty answer would be found in every response"
    if rule == "exact":
        return float(response == expected)
    before = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", expected) else ""
    after = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", expected) else ""
    pattern = before + re.escape(expected) + after
    match = re.match(pattern, response) if rule == "prefix" else re.search(pattern, response)
    return float(match is not None)
