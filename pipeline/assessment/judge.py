"""A language model as the judge of pairs of answers, by any API like OpenAI's: each pair is judged twice, with the
positions of its answers swapped, because judges prefer a position (Zheng et al., 2023).

    judge = Client(config.judge)
    judge.verdict("What is 1 + 1?", "2", "3")           # "A", "B", "C" for a tie, or None for an answer without verdict
    judge_pair(config, client, prompts, results, ours, theirs, output)
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from pipeline.assessment.win_rates import interval, length_controlled
from pipeline.core.config import EXECUTION, Strict
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.output import Output
from pipeline.core.recipe_file import short_repr
from pipeline.core.terminal import plural, say
from pipeline.core.tracking import Progress

QUESTION = """\
Compare two answers to a question. Say which one is more correct, more helpful and clearer. Neither the order of the \
answers nor their length is a merit.

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

Reason briefly, then end with your verdict: [[A]] if answer A is better, [[B]] if answer B is, [[C]] for a tie."""
VERDICT = re.compile(r"\[\[([ABC])\]\]")
SCORES = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the answer in position A
BUSY = {408, 409, 425, 429}  # codes below 500 that mean: later
ABOUT_THE_TEXT = {400, 413, 422}  # codes of a request that is too long for the judge, or that a filter stops
LONGEST_WAIT = 60.0  # seconds between two tries
NOTABLE = 0.1  # share of pairs without a verdict that is warned of


class Judge(Strict):
    """A language model that judges pairs of answers."""

    url: Annotated[str, EXECUTION]
    """Address of an API like OpenAI's, such as http://127.0.0.1:8000/v1. Only the model decides a result."""
    model: str
    """Name of the judge there."""
    key_env: Annotated[str | None, EXECUTION] = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the API's key."""
    question: str = QUESTION
    """What it is asked, with {question}, {first} and {second}; its verdict is the last [[A]], [[B]] or [[C]] of its
    answer."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of its answer."""
    timeout: Annotated[float, EXECUTION] = Field(120.0, gt=0)
    """Seconds to wait for an answer."""
    tries: Annotated[int, EXECUTION] = Field(5, ge=1)
    """Tries before a request is given up; the waiting time between them doubles from a second on."""
    concurrency: Annotated[int, EXECUTION] = Field(4, ge=1)
    """Requests at a time."""
    max_refused: Annotated[float, EXECUTION] = Field(0.1, ge=0, le=1)
    """Largest share of the pairs that the judge may refuse, because they are too long for it or a filter stops them.
    They are pairs without a verdict. The stage ends if there are more."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if not re.match(r"https?://[^/\s]+", value):
            raise ValueError(f"{short_repr(value)} is not an address; write for example http://127.0.0.1:8000/v1")
        return value.rstrip("/")

    @field_validator("question")
    @classmethod
    def _has_places(cls, value: str) -> str:
        for place in ("{question}", "{first}", "{second}"):
            if value.count(place) != 1:
                raise ValueError(f"must have {place} once")
        return value

    def check_machine(self) -> None:
        """Raises UserError if the key is not there."""
        if self.key_env and not os.environ.get(self.key_env):
            raise UserError(
                f"assess.judge.key_env: the environment variable {self.key_env} is not set here; set it to the API's"
                " key"
            )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key must not be sent to another address than that of the recipe."""

    def redirect_request(self, *_):
        return None


class _Later(Exception):
    """A request that may succeed when it is sent again, after `wait` seconds if the server has said so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class Refused(Exception):
    """A request that the server refuses because of its text; that of another pair may be accepted."""


class Client:
    """Asks a judge. Safe to use from several threads."""

    def __init__(self, options: Judge):
        self.options = options
        self.opener = urllib.request.build_opener(_NoRedirects)

    def check(self) -> None:
        """Ask one easy question, so that hours are not spent before it turns out that nobody answers. Raises
        UserError."""
        try:
            verdict = self.verdict("What is 1 + 1?", "2", "3")
        except Refused as error:
            raise UserError(f"assess.judge: {self.options.url} refused an easy question with {error}") from None
        if verdict is None:
            say(f"WARNING assess: {self.options.model} gave no verdict on an easy question; see judge.question")

    def verdict(self, question: str, first: str, second: str) -> str | None:
        """A, B, C, or None for an answer without a verdict. Raises Refused for a text that the judge does not take, and
        UserError if there is no answer."""
        text = self.options.question
        parts = {"{question}": question, "{first}": first, "{second}": second}
        text = re.sub(r"\{(?:question|first|second)\}", lambda place: parts[place[0]], text)
        found = VERDICT.findall(self._answer(text))
        return found[-1] if found else None

    def _answer(self, text: str) -> str:
        reason = ""
        for number in range(self.options.tries):
            try:
                return self._post(text)
            except _Later as error:
                reason = str(error)
                if number + 1 < self.options.tries:
                    time.sleep(min(LONGEST_WAIT, error.wait or 2.0**number))
        raise UserError(
            f"assess.judge: {self.options.url} has not answered in {plural(self.options.tries, 'try/tries')}: {reason}."
            " What was judged is kept: when it answers again, the same command continues"
        )

    def _post(self, text: str) -> str:
        body = {
            "model": self.options.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.options.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.options.key_env:
            headers["Authorization"] = f"Bearer {os.environ[self.options.key_env]}"
        address = f"{self.options.url}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request, timeout=self.options.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            message = _message(error)
            if error.code >= 500 or error.code in BUSY:
                raise _Later(f"code {error.code} {message}", _seconds(error.headers.get("Retry-After"))) from None
            if error.code in ABOUT_THE_TEXT:
                raise Refused(f"code {error.code}: {message}") from None
            raise UserError(f"assess.judge: {address} refused the request with code {error.code}: {message}") from None
        # also a timeout, and a connection that was closed, perhaps in the middle of an answer
        except (OSError, http.client.HTTPException) as error:
            raise _Later(str(getattr(error, "reason", None) or error or type(error).__name__)) from None
        try:
            answer = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise _Later(f"its answer is not that of a chat completion: {content[:200]!r}") from None
        return answer if isinstance(answer, str) else ""


def _message(error: urllib.error.HTTPError) -> str:
    """What a server writes beside a code, as far as it can be read."""
    try:
        text = error.read(2000)
    except (OSError, http.client.HTTPException) as broken:
        return f"(its message broke off: {broken})"
    return " ".join(text.decode("utf-8", errors="replace").split())[:300]


def _seconds(text: str | None) -> float | None:
    return float(text) if text and re.fullmatch(r"\d+(\.\d+)?", text) else None


# ---- pairs -----------------------------------------------------------------------------------------------------------


def judge_pair(config, client: Client, prompts: list, results: dict, ours: str, theirs: str, output: Output) -> dict:
    """How often the judge prefers the answers of `ours` to those of `theirs`, with intervals. Each verdict is kept as
    soon as it is known. Refusals are not kept, because the judge may be another one when the stage is resumed. Raises
    UserError for a judge that does not answer, or that refuses more pairs than `max_refused`."""
    texts = (results[ours]["texts"], results[theirs]["texts"])
    kept = output.path / "work" / "judge" / f"{ours}--{theirs}.jsonl"
    verdicts = _read(kept)
    missing = [(place, order) for place in range(len(prompts)) for order in (0, 1) if (place, order) not in verdicts]

    refusals: dict[int, str] = {}  # place of the prompt -> why

    def ask(place: int, order: int) -> tuple[int, int, str | None, str | None]:
        pair = (texts[0][place], texts[1][place])
        try:
            verdict = client.verdict(prompts[place].text, *(pair if order == 0 else pair[::-1]))
        except Refused as error:
            return place, order, None, str(error)
        return place, order, verdict, None

    kept.parent.mkdir(parents=True, exist_ok=True)
    name = f"{ours} over {theirs}, by {config.judge.model}"
    pool = ThreadPoolExecutor(config.judge.concurrency)
    try:
        with open(kept, "a", encoding="utf-8") as file, Progress(name, len(missing), "verdicts") as bar:
            file.write("\n" if kept.stat().st_size else "")  # after a line that a killed process has cut off
            futures = [pool.submit(ask, place, order) for place, order in missing]
            for future in as_completed(futures):
                place, order, verdict, refusal = future.result()
                verdicts[place, order] = verdict
                if refusal is not None:
                    refusals[place] = refusal
                    _check_refusals(config.judge, refusals, len(prompts), name)
                else:
                    file.write(json.dumps([place, order, verdict]) + "\n")
                    file.flush()
                bar.update(1)
    finally:
        pool.shutdown(cancel_futures=True)  # at most `concurrency` requests are under way, and are waited for
    lines = []
    for place, prompt in enumerate(prompts):
        line = {"prompt": prompt.text, ours: texts[0][place], theirs: texts[1][place]}
        line["verdicts"] = [verdicts[place, 0], verdicts[place, 1]]
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(output.path / "judged" / f"{ours}--{theirs}.jsonl", "".join(lines))
    if refusals:
        say(f"WARNING assess: {name}: {_refused(refusals, len(prompts))}; they are pairs without a verdict")
    return _measured(config, verdicts, texts, f"{ours}/{theirs}", name) | {"refused": len(refusals)}


def _check_refusals(judge: Judge, refusals: dict[int, str], pairs: int, name: str) -> None:
    if len(refusals) > judge.max_refused * pairs:
        raise UserError(
            f"assess.judge: {name}: {_refused(refusals, pairs)}, more than judge.max_refused ({judge.max_refused:g});"
            " use a judge that takes longer texts, shorter answers (max_new_tokens), or a higher max_refused. What was"
            " judged is kept"
        )


def _refused(refusals: dict[int, str], pairs: int) -> str:
    place = min(refusals)
    return f"the judge refused {plural(len(refusals), 'pair')} of {pairs} (prompt {place + 1}: {refusals[place]})"


def _read(path: Path) -> dict[tuple[int, int], str | None]:
    """The verdicts that an earlier start has kept, by place of the prompt and order."""
    verdicts: dict[tuple[int, int], str | None] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                place, order, verdict = json.loads(line)
            except ValueError:  # empty, or cut off
                continue
            verdicts[place, order] = verdict
    return verdicts


def _measured(config, verdicts: dict, texts: tuple[list[str], list[str]], seed: str, name: str) -> dict:
    outcomes, lengths, same, first, decided = [], [], 0, 0, 0
    places = range(len(texts[0]))
    for place in places:
        both = (verdicts[place, 0], verdicts[place, 1])
        if None in both:
            continue
        scores = (SCORES[both[0]], 1 - SCORES[both[1]])  # of ours: in position A, then in position B
        outcomes.append(sum(scores) / 2)
        same += scores[0] == scores[1]
        lengths.append((len(texts[0][place]), len(texts[1][place])))
        first += both.count("A")
        decided += 2 - both.count("C")
    dropped = len(places) - len(outcomes)
    if not outcomes:
        raise UserError(
            f"assess.judge: {config.judge.model} gave no verdict on any pair, in either order; its answers must end"
            " with [[A]], [[B]] or [[C]] (judge.question, judge.max_tokens)"
        )
    if dropped > NOTABLE * len(places):
        say(f"WARNING assess: {name}: {plural(dropped, 'pair')} of {len(places)} without a verdict are left out")
    return interval(outcomes, config, seed) | {
        "length_controlled": length_controlled(outcomes, lengths, config, seed),
        "consistent": same / len(outcomes),
        "first_position": first / decided if decided else None,
        "without_verdict": dropped,
        "judge": config.judge.model,
    }
