"""A language model as the judge, against a local server in the shape of OpenAI's API: verdicts, swapped positions,
servers that fail, are slow, refuse or write nonsense."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import tuned

from pipeline.assessment import judge as module
from pipeline.assessment.judge import Client, Judge, judge_pair
from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage


class Server(ThreadingHTTPServer):
    """Answers as `reply(question, first, second, number)` says: the text of a verdict, a code, or raw bytes."""

    daemon_threads = True

    def __init__(self, reply):
        self.reply, self.asked, self.headers_seen = reply, [], []
        self.torn = 0  # bytes that an answer announces and does not have
        self.open = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        parts = re.search(r"\[Question\]\n(.*)\n\n\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nReason", text, re.S)
        self.server.asked.append(parts.groups())
        self.server.headers_seen.append(dict(self.headers))
        reply = self.server.reply(*parts.groups(), len(self.server.asked))
        code = reply if isinstance(reply, int) else 200
        content = reply if isinstance(reply, bytes) else json.dumps({"error": {"message": "busy now"}}).encode()
        if isinstance(reply, str):
            content = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) + self.server.torn))
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(reply) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.open.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """The seconds that were slept between tries."""
    found: list[float] = []
    monkeypatch.setattr(module.time, "sleep", found.append)
    return found


def likes_length(question, first, second, number) -> str:
    if len(first) == len(second):
        return "Equal. [[C]]"
    return f"[[C]] at first sight, but [[{'A' if len(first) > len(second) else 'B'}]]"


def options(url: str, **more) -> Judge:
    return Judge(url=url, model="j", timeout=2, tries=3, **more)


ANSWERS = {"a": ["long one", "x", "same", "longer {question}"], "b": ["short", "yy", "four", "[[B]]"]}


def judged(url: str, tmp_path, **more) -> dict:
    config = SimpleNamespace(judge=options(url, **more), seed=0, bootstrap=200)
    prompts = [SimpleNamespace(text=f"Q{number}?") for number in range(4)]
    results = {name: {"texts": texts} for name, texts in ANSWERS.items()}
    output = SimpleNamespace(path=tmp_path)
    return judge_pair(config, Client(config.judge), prompts, results, "a", "b", output)


def test_each_pair_is_judged_in_both_orders(serve, tmp_path):
    server = serve(likes_length)
    found = judged(server.url, tmp_path)
    # a is longer, shorter, equal, longer: 1 + 0 + 0.5 + 1 of 4
    assert found["rate"] == 0.625 and found["ties"] == 0.25 and found["prompts"] == 4
    assert found["consistent"] == 1.0 and found["first_position"] == 0.5 and found["without_verdict"] == 0
    assert found["low"] <= 0.625 <= found["high"] and 0 < found["length_controlled"]["rate"] < 1
    expected = Counter()
    for place, pair in enumerate(zip(*ANSWERS.values(), strict=True)):
        expected.update([(f"Q{place}?", *pair), (f"Q{place}?", *pair[::-1])])
    assert Counter(server.asked) == expected, "braces and verdicts in answers are text"
    lines = [json.loads(line) for line in (tmp_path / "judged/a--b.jsonl").read_text().splitlines()]
    assert lines[0] == {"prompt": "Q0?", "a": "long one", "b": "short", "verdicts": ["A", "B"]}


def test_a_judge_that_prefers_a_position_decides_nothing(serve, tmp_path):
    found = judged(serve(lambda *_: "[[A]]").url, tmp_path)
    assert found["rate"] == 0.5 and found["consistent"] == 0.0 and found["first_position"] == 1.0


def test_without_verdicts(serve, tmp_path, capsys):
    server = serve(lambda question, *_: "I cannot say" if question == "Q1?" else "[[A]]")
    found = judged(server.url, tmp_path)
    assert found["without_verdict"] == 1 and found["prompts"] == 3
    assert "1 pair of 4 without a verdict" in capsys.readouterr().out
    with pytest.raises(UserError, match="gave no verdict on any pair"):
        judged(serve(lambda *_: "both are nice").url, tmp_path / "none")


def test_busy_and_broken_answers_are_tried_again(serve, tmp_path, waits):
    replies = [503, 429, b'{"choices": []}', b"<html>"]
    server = serve(
        lambda question, first, second, number: replies[(number - 1) % 6] if (number - 1) % 6 < 2 else "[[C]]"
    )
    assert judged(server.url, tmp_path)["rate"] == 0.5 and len(server.asked) > 8 and waits
    server = serve(lambda *_: b'{"choices": []}')
    with pytest.raises(UserError, match="has not answered in 3 tries: its answer is not that of a chat completion"):
        Client(options(server.url)).check()


def test_an_answer_that_breaks_off_is_asked_for_again(serve, waits):
    """The server closes the connection before the end that it has announced."""
    server = serve(lambda *_: "[[A]]")
    server.torn = 10
    with pytest.raises(UserError, match="has not answered in 3 tries: IncompleteRead"):
        Client(options(server.url)).check()
    assert waits == [1.0, 2.0] and len(server.asked) == 3


def test_a_judge_that_does_not_answer(serve, waits):
    """A closed port, and a server that accepts and is silent."""
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1 has not answered in 3 tries.*the same command continues"):
        Client(options("http://127.0.0.1:9/v1")).check()
    assert waits == [1.0, 2.0]
    server = serve(lambda *_: server.open.wait(10) and "[[A]]")
    silent = Judge(url=server.url, model="j", timeout=0.2, tries=2)
    with pytest.raises(UserError, match="has not answered in 2 tries: .*timed out"):
        Client(silent).check()


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_pair_that_the_judge_refuses_has_no_verdict(serve, tmp_path, code, capsys):
    """As servers do with a text that is longer than their context. A resumed stage asks a refused pair again, because
    its judge may take longer texts by then, and nothing else."""
    server = serve(lambda question, *_: code if question == "Q1?" else "[[A]]")
    found = judged(server.url, tmp_path, max_refused=0.25)
    assert found["refused"] == found["without_verdict"] == 1 and found["prompts"] == 3
    assert f"the judge refused 1 pair of 4 (prompt 2: code {code}: " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "judged/a--b.jsonl").read_text().splitlines()]
    assert [line["verdicts"] for line in lines] == [["A", "A"], [None, None], ["A", "A"], ["A", "A"]]
    server = serve(lambda *_: "[[B]]")
    found = judged(server.url, tmp_path, max_refused=0.25)
    assert found["refused"] == 0 and [asked[0] for asked in server.asked] == ["Q1?", "Q1?"]
    lines = [json.loads(line) for line in (tmp_path / "judged/a--b.jsonl").read_text().splitlines()]
    assert [line["verdicts"] for line in lines] == [["A", "A"], ["B", "B"], ["A", "A"], ["A", "A"]]


def test_more_refused_pairs_than_the_recipe_allows(serve, tmp_path):
    """The verdicts so far are kept: with a higher bound, only what was refused or not asked yet is asked."""
    server = serve(lambda question, *_: 400 if question in ("Q1?", "Q3?") else "[[A]]")
    with pytest.raises(UserError, match="refused 2 pairs of 4 .*more than judge.max_refused .0.25.*judged is kept"):
        judged(server.url, tmp_path, max_refused=0.25, concurrency=1)
    asked = len(server.asked)
    found = judged(server.url, tmp_path, max_refused=0.5, concurrency=1)
    assert found["refused"] == found["without_verdict"] == 2 and found["prompts"] == 2
    assert [question for question, *_ in server.asked[asked:]].count("Q0?") == 0, "both its verdicts were kept"
    with pytest.raises(UserError, match="refused an easy question with code 400: .*busy now"):
        Client(options(serve(lambda *_: 400).url)).check()


@pytest.mark.parametrize("code", [401, 404, 307])
def test_a_refusal_is_not_tried_again(serve, code, monkeypatch):
    """And the key is sent to the address of the recipe only, and is in no message."""
    monkeypatch.setenv("JUDGE_KEY", "secret-123")
    server = serve(lambda *_: code)
    with pytest.raises(UserError, match=f"refused the request with code {code}: .*busy now") as error:
        Client(options(server.url, key_env="JUDGE_KEY")).check()
    assert len(server.asked) == 1 and "secret-123" not in str(error.value)
    assert server.headers_seen[0]["Authorization"] == "Bearer secret-123"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="JUDGE_KEY is not set"):
        options(server.url, key_env="JUDGE_KEY").check_machine()


RECIPE = """\
name: j
stages:
  assess:
    inputs: {{one: ./base/model, two: ./other/model}}
    sources: {{nouns: {{path: rows.jsonl, prompt: "What is a {{words}} {{noun}}?"}}}}
    max_prompts: 5
    max_new_tokens: 4
    samples: 1
    compare: [[one, two]]
    bootstrap: 200
    judge: {{url: "{url}", model: {model}, tries: 1, concurrency: 1}}
"""


@pytest.mark.slow
def test_the_stage_continues_where_the_judge_stopped_answering(serve, tmp_path, monkeypatch):
    """The judge dies after six of ten verdicts; the same command asks the other four."""
    monkeypatch.chdir(tmp_path)
    tuned.base(tmp_path / "base")
    tuned.base(tmp_path / "other", hidden=32)
    tuned.write_rows(tmp_path / "rows.jsonl")
    server = serve(
        lambda question, first, second, number: 500 if number == 8 else likes_length(question, first, second, 0)
    )
    recipe = RECIPE.replace("{{", "{").replace("}}", "}").replace("{url}", server.url).replace("{model}", "j")
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(UserError, match="has not answered in 1 try: code 500"):
        run_stage(load("r.yaml"), "assess")
    artifact = run_stage(load("r.yaml"), "assess")
    easy = [asked for asked in server.asked if asked[0] == "What is 1 + 1?"]
    # the request that failed was asked twice, and the one that was under way when it failed
    assert 11 <= len(server.asked) - len(easy) <= 12 and len(easy) == 2
    found = artifact.metrics["win_rates"]
    assert list(found) == ["one over two, by j"] and found["one over two, by j"]["prompts"] == 5
    assert "one over two, by j: " in artifact.metrics["summary"]["measure"]


@pytest.mark.parametrize(
    "word, message",
    [
        ("assess.judge.url=localhost:8000", "is not an address"),
        ("assess.judge.question='Which?'", "must have {question} once"),
        ("assess.compare=[]", "judges the pairs of `compare`"),
    ],
)
def test_mistakes_in_the_recipe(tmp_path, word, message):
    recipe = RECIPE.replace("{{", "{").replace("}}", "}").replace("{url}", "http://x/v1").replace("{model}", "j")
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(UserError, match=re.escape(message)):
        load(tmp_path / "r.yaml", [word])
