"""Rewards that are computed and not estimated: does a response give the known answer, have the asked form, pass tests?

Each function gets the text of one response as `response`, fields of its record (such as `answer`) and arguments of the
recipe, all by name, and returns a number. They run in a process of their own (reward_worker.py), which imports no
torch.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile

from pipeline.rl import rules

FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+\u2212]?\.\d+")


def exact(response: str, answer: str) -> float:
    """The whole response is the answer (rules.score: white space does not count)."""
    return rules.score("exact", response, str(answer))


def contains(response: str, answer: str) -> float:
    """The answer is in the response, as whole words."""
    return rules.score("contains", response, str(answer))


def prefix(response: str, answer: str) -> float:
    """The response begins with the answer."""
    return rules.score("prefix", response, str(answer))


def number(response: str, answer: str | float, tolerance: float = 0.0) -> float:
    """The last number in the response equals the last one in the answer, which may be a whole solution such as those
    of GSM8K ("... #### 42"). 1,000 is one number. tolerance: absolute difference that is allowed."""
    wanted, given = last_number(str(answer)), last_number(response)
    if wanted is None:
        raise ValueError(f"the answer has no number: {answer!r}")
    return float(given is not None and abs(given - wanted) <= tolerance)


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    if not found:
        return None
    return float(found[-1].replace(",", "").replace("\u2212", "-"))


def regex(response: str, pattern: str, whole: bool = False) -> float:
    """The regular expression is found in the response; `.` is any character, also the end of a line. whole: it is the
    whole response, without white space at its ends."""
    if whole:
        return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)
    return float(re.search(pattern, response, re.DOTALL) is not None)


def json_schema(response: str, schema: dict | str) -> float:
    """The response is one JSON value, alone or in a ```json block, that the JSON schema accepts (package
    jsonschema)."""
    import jsonschema

    fenced = FENCE.fullmatch(response.strip())
    try:
        value = json.loads(fenced[2] if fenced else response)
    except ValueError:
        return 0.0
    wanted = json.loads(schema) if isinstance(schema, str) else schema
    return float(jsonschema.validators.validator_for(wanted)(wanted).is_valid(value))


def sections(response: str, tags: list[str]) -> float:
    """The response is made of <TAG>...</TAG> in this order, each tag once, and nothing but white space between them:
    tags: [think, answer] as in DeepSeek-R1."""
    text = response.strip()
    parts = [rf"<{re.escape(tag)}>(?:(?!</?{re.escape(tag)}>).)*</{re.escape(tag)}>" for tag in tags]
    once = all(text.count(f"<{tag}>") == 1 and text.count(f"</{tag}>") == 1 for tag in tags)
    return float(once and re.fullmatch(r"\s*".join(parts), text, re.DOTALL) is not None)


def length(response: str, at_least: int = 0, at_most: int | None = None, unit: str = "words") -> float:
    """The response has so many words, characters, sentences, lines or paragraphs (`unit`). Words are runs without
    white space; Chinese text is counted in characters."""
    counts = {
        "words": lambda: len(response.split()),
        "characters": lambda: len(response.strip()),
        "sentences": lambda: len(re.findall(r"[^.!?。！？]*[^\s.!?。！？][^.!?。！？]*(?:[.!?。！？]+|$)", response)),
        "lines": lambda: len([line for line in response.splitlines() if line.strip()]),
        "paragraphs": lambda: len([part for part in re.split(r"\n\s*\n", response) if part.strip()]),
    }
    if unit not in counts:
        raise ValueError(f"unit: {unit!r}, expected {', '.join(counts)}")
    count = counts[unit]()
    return float(count >= at_least and (at_most is None or count <= at_most))


def math(response: str, answer: str) -> float:
    """The response's mathematical answer equals the known one as an expression, not as text (package math-verify). What
    is in \\boxed{} counts first."""
    from math_verify import parse, verify

    # Its own timeouts use the alarm signal and do not stop every expression; the process has a deadline.
    wanted = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=None)
    if not wanted:
        raise ValueError(f"the answer is not mathematics: {answer!r}")
    return float(verify(wanted, parse(response, parsing_timeout=None), timeout_seconds=None))


# ---- code ------------------------------------------------------------------------------------------------------------

# Runs in an isolated interpreter. What a program prints goes nowhere; the token at the end shows that all tests were
# reached, because a program may end the process itself with exit code 0.
DRIVER = """
import json, os, resource, sys
task = json.loads(sys.stdin.read())
report = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
size = int(task["memory"] * 2**30)
limits = ((resource.RLIMIT_AS, size), (resource.RLIMIT_FSIZE, 2**20), (resource.RLIMIT_CORE, 0),
          (resource.RLIMIT_CPU, int(task["seconds"]) + 1))
for kind, limit in limits:
    resource.setrlimit(kind, (limit, limit))
scope = {"__name__": "__main__"}
exec(compile(task["program"], "program.py", "exec"), scope)
for test in task["tests"]:
    exec(compile(test, "test.py", "exec"), scope)
os.write(report, task["token"].encode())
"""


def code(
    response: str, tests: str | list[str], seconds: float = 5.0, memory: float = 1.0, partial: bool = False
) -> float:
    """The last ```block of the response (or all of it) is Python that passes the tests: statements such as `assert
    add(1, 2) == 3`, as text or as a list. partial: the share of the list that passes, each test in a run of its own.

    It runs in an isolated interpreter in an empty folder that is removed, without this process's environment, within
    seconds and GiB of memory, and cannot write files above 1 MiB. That protects a run from mistakes, not a machine from
    attacks: network and readable files are open to it, so use a container for models that you do not trust.
    """
    blocks = FENCE.findall(response)
    program = blocks[-1][1] if blocks else response
    cases = [tests] if isinstance(tests, str) else list(tests)
    if not cases:
        raise ValueError("tests is empty, which every program would pass")
    if not partial:
        return float(_passes(program, cases, seconds, memory))
    return sum(_passes(program, [case], seconds, memory) for case in cases) / len(cases)


def _passes(program: str, tests: list[str], seconds: float, memory: float) -> bool:
    token = secrets.token_hex(16)
    task = {"program": program, "tests": tests, "token": token, "seconds": seconds, "memory": memory}
    with tempfile.TemporaryDirectory(prefix="alma-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        )
        try:
            output, _ = process.communicate(json.dumps(task).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:  # processes that the program left are ended by the worker
            process.kill()
            process.wait()
    return output == token.encode()


VERIFIERS = {
    "exact": exact,
    "contains": contains,
    "prefix": prefix,
    "number": number,
    "regex": regex,
    "json_schema": json_schema,
    "sections": sections,
    "length": length,
    "code": code,
    "math": math,
}
PACKAGES = {"json_schema": "jsonschema", "math": "math_verify"}
