"""`alma serve`, asked by the `openai` client and by clients that break rules."""

import asyncio
import concurrent.futures
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
import tuned

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from pipeline.serve.generator import Generator  # noqa: E402
from pipeline.serve.server import App, Limits  # noqa: E402

ASKED = [{"role": "user", "content": "What is a red cat?"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A chat model, and the same without template."""
    base = tuned.base(tmp_path_factory.mktemp("serve"), length=256) / "model"
    chat = Generator(base)
    (base / "chat_template.jinja").unlink()
    return {"runs/x:sft": chat, "base": Generator(base)}


class Served:
    """A server in a thread of this process, and clients of it."""

    def __init__(self, models, key=None, **limits):
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections: what waits for a client
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(App(models, Limits(**limits), key).asgi(), log_level="error", access_log=False)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        self.openai = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="k", max_retries=0, timeout=60)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def chat(self, **fields):
        values = {"model": "runs/x:sft", "messages": ASKED, "max_tokens": 12, "temperature": 0, **fields}
        return self.openai.chat.completions.create(**values)

    def raw(self, body: bytes, route: str = "/v1/chat/completions") -> socket.socket:
        """A connection that has sent a request and has read nothing."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.port))
        head = (
            f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        return connection

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


@pytest.fixture(scope="module")
def served(models):
    with Served(models, max_new_tokens=240) as server:
        yield server


def greedy(generator: Generator, ids: list[int], length: int, stops: list[int]) -> list[int]:
    """By transformers' model alone, without a cache."""
    answer: list[int] = []
    while len(answer) < length and not (answer and answer[-1] in stops):
        with torch.no_grad():
            answer.append(int(generator.model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


def test_chat_with_usage_and_streaming(served, models):
    generator = models["runs/x:sft"]
    prompt = generator.prompt(ASKED)
    ids = greedy(generator, prompt, 12, generator.stop_ids())
    text = generator.tokenizer.decode(ids, skip_special_tokens=True)
    response = served.chat()
    [choice] = response.choices
    assert choice.message.content == text and choice.message.role == "assistant" and choice.finish_reason == "length"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (len(prompt), 12)
    chunks = list(served.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[1:-1]) == text
    assert chunks[-2].choices[0].finish_reason == "length" and not chunks[-1].choices
    assert chunks[-1].usage == response.usage
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " a red cat?"}]
    assert served.chat(messages=[{"role": "user", "content": parts}]).choices[0].message.content == text


def test_choices_seeds_stops_and_logprobs(served, models):
    generator = models["runs/x:sft"]
    how = {"temperature": 1.0, "n": 3, "seed": 7, "logprobs": True, "top_logprobs": 2, "max_tokens": 20}
    first, again = served.chat(**how), served.chat(**how)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) == 3
    assert texts != [choice.message.content for choice in served.chat(**{**how, "seed": 8}).choices]
    streamed = ["", "", ""]
    for chunk in served.chat(**how, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    stop = texts[0][3:6]
    assert served.chat(**how, stop=[stop, "zq"]).choices[0].message.content == texts[0][: texts[0].index(stop)]
    # Log-probabilities of the tokens, against a forward pass over the prompt and the answer
    content = first.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == texts[0]
    prompt, rows = generator.prompt(ASKED), []
    from pipeline.serve.requests import ChatRequest, job

    made = job(ChatRequest(model="x", messages=ASKED, **how), generator, 240)
    generator.generate(prompt, made.sampling, [made.seeds[0][0]], lambda row, token: rows.append(token))
    ids = [token.id for token in rows]
    with torch.no_grad():
        logprobs = generator.model(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    assert len(content) == len(ids)
    for place, (entry, index) in enumerate(zip(content, ids, strict=True), len(prompt) - 1):
        assert entry.logprob == pytest.approx(logprobs[place, index].item(), abs=1e-4)
        expected = logprobs[place].topk(2).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(expected, abs=1e-4)


def test_completions_of_texts_and_ids(served, models):
    generator = models["base"]
    texts = ["What is a", "A 竹子"]
    response = served.openai.completions.create(model="base", prompt=texts, max_tokens=6, temperature=0, logprobs=1)
    for choice, text in zip(response.choices, texts, strict=True):
        prompt = generator.text_prompt(text)
        ids = greedy(generator, prompt, 6, generator.stop_ids())
        assert text + choice.text == generator.tokenizer.decode(prompt + ids, skip_special_tokens=True)
        assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset) == 6
    prompt = generator.text_prompt(texts[0])
    as_ids = served.openai.completions.create(model="base", prompt=prompt, max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in as_ids) == response.choices[0].text
    assert [model.id for model in served.openai.models.list()] == list(models)
    assert served.openai.models.retrieve("runs/x:sft").id == "runs/x:sft"


GOOD = {"model": "runs/x:sft", "messages": ASKED, "max_tokens": 2, "temperature": 0}


@pytest.mark.parametrize(
    "body, status, sentence",
    [
        (b'{"model": ', 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[1]", 400, "the body is a JSON list, expected an object"),
        (b'"' + b"x" * 2_000_000 + b'"', 413, "the body is larger than 1,000,000 bytes"),
        ({**GOOD, "model": "gpt-4"}, 404, "there is no model 'gpt-4' here; this server has runs/x:sft, base"),
        ({**GOOD, "model": "../../etc/passwd"}, 404, "there is no model"),
        ({**GOOD, "model": "base"}, 400, "the model has no chat template"),
        ({"model": "runs/x:sft"}, 400, "messages: Field required"),
        ({**GOOD, "messages": []}, 400, "messages: "),
        ({**GOOD, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages: Input should be 'system'"),
        ({**GOOD, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "is no text"),
        ({**GOOD, "messages": [{"role": "user", "content": "a cat " * 300}]}, 400, "and the model has 256 positions"),
        ({**GOOD, "temperature": -1}, 400, "temperature: "),
        ({**GOOD, "temperature": "hot"}, 400, "temperature: "),
        ({**GOOD, "n": 1000}, 400, "n: "),
        ({**GOOD, "max_tokens": 10**9}, 400, "this server gives at most 240"),
        ({**GOOD, "stop": [""]}, 400, "stop: a text is empty"),
        ({**GOOD, "top_logprobs": 2}, 400, "top_logprobs: needs logprobs"),
        ({**GOOD, "tools": [{}]}, 400, "tools: is not supported by this server"),
        ({**GOOD, "response_format": {"type": "json_object"}}, 400, "response_format: only text is supported"),
        ({**GOOD, "chat_template_kwargs": {"loud": 1}}, 400, "the chat template does not know `loud`"),
    ],
)
def test_mistakes_have_openais_shape(served, body, status, sentence):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = served.http.post("/v1/chat/completions", content=content)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and sentence in error["message"], error
    assert served.http.get("/health").json()["status"] == "ok"


def test_mistakes_are_the_clients_exceptions(served):
    with pytest.raises(openai.NotFoundError) as caught:
        served.chat(model="gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        served.chat(stream=True, max_tokens=10**9)
    for response, status in (
        (served.http.get("/v1/nowhere"), 404),
        (served.http.get("/v1/chat/completions"), 405),
        (served.http.post("/v1/completions", json={"model": "base", "prompt": [99999]}), 400),
        (served.http.post("/v1/completions", json={"model": "base", "prompt": []}), 400),
        (served.http.post("/v1/completions", json={"model": "base", "prompt": "a", "echo": True}), 400),
    ):
        assert response.status_code == status and response.json()["error"]["message"], response.text
    assert served.chat(user="someone", store=False, max_tokens=1).choices  # change nothing here


def test_a_key(models):
    with Served(models, key="secret") as server:
        with pytest.raises(openai.AuthenticationError) as caught:
            server.chat()
        assert caught.value.code == "invalid_api_key" and "secret" not in str(caught.value)
        server.openai.api_key = "secret"
        assert server.chat(max_tokens=1).choices and server.http.get("/health").status_code == 200


@contextlib.contextmanager
def slowed(generator: Generator, seconds: float):
    """Each token takes so long."""
    original = Generator.generate

    def generate(prompt, sampling, seeds, on_token, **rest):
        def later(row, token):
            time.sleep(seconds)
            on_token(row, token)

        original(generator, prompt, sampling, seeds, later, **rest)

    generator.generate = generate
    try:
        yield
    finally:
        del generator.generate


UNREAD = {**GOOD, "n": 2, "max_tokens": 60, "logprobs": True, "top_logprobs": 20, "stream": True}  # 250 kB


def test_a_client_that_does_not_read_stalls_no_other(models):
    """With one place: its answer is generated and waits for it, and the place is free again."""
    with Served(models, max_running=1, timeout=30) as server:
        connection = server.raw(json.dumps(UNREAD).encode())
        for _ in range(3):
            assert server.chat(max_tokens=4).choices
        assert server.http.get("/health").json()["running"] == 0
        received = b""
        while b"[DONE]" not in received:  # nothing of it was lost
            received += connection.recv(1 << 20)
        connection.close()


@pytest.mark.slow
def test_a_connection_that_is_never_read_ends_at_the_deadline(models):
    with Served(models, max_running=1, timeout=4) as server:
        connection = server.raw(json.dumps(UNREAD).encode())
        time.sleep(6)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                received += part
        assert b"HTTP/1.1 200" in received and b"[DONE]" not in received
        assert server.chat(max_tokens=1).choices


@pytest.mark.slow
def test_clients_that_leave_and_answers_that_take_too_long(models):
    generator = models["runs/x:sft"]
    with Served(models, max_running=1, max_waiting=1, timeout=6) as server, slowed(generator, 0.1):
        gone = server.raw(json.dumps({**GOOD, "max_tokens": 200}).encode())
        time.sleep(0.3)
        gone.close()
        assert server.chat(max_tokens=2).choices  # gets the place within its time
        with pytest.raises(openai.APIStatusError) as caught:
            server.chat(max_tokens=200)
        assert caught.value.status_code == 504 and caught.value.body["code"] == "timeout"
        events = list(
            server.http.post("/v1/chat/completions", json={**GOOD, "max_tokens": 200, "stream": True}).iter_lines()
        )
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"


@contextlib.contextmanager
def held(generator):
    """No token is made until the event that this gives is set."""
    generate, event = generator.generate, threading.Event()

    def wait(*words):
        event.wait(60)
        return generate(*words)

    generator.generate = wait
    try:
        yield event
    finally:
        event.set()
        del generator.generate


def until(server, **numbers):
    """Wait for the numbers of /health."""
    deadline = time.time() + 30
    while (health := server.http.get("/health").json()) != {"status": "ok", **numbers}:
        assert time.time() < deadline, health
        time.sleep(0.05)


def test_a_full_queue_and_a_client_that_leaves_it(models):
    """One is answered, one waits, the third is refused; the place of one that leaves is free while the first still
    runs."""
    with (
        Served(models, max_running=1, max_waiting=1) as server,
        held(models["runs/x:sft"]) as event,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(server.chat, max_tokens=2)
        until(server, running=1, waiting=0)
        waiting = server.raw(json.dumps(GOOD).encode())
        until(server, running=1, waiting=1)
        refused = server.http.post("/v1/chat/completions", json=GOOD)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "5"
        waiting.close()
        until(server, running=1, waiting=0)
        second = pool.submit(server.chat, max_tokens=2)
        until(server, running=1, waiting=1)
        event.set()
        assert first.result().choices and second.result().choices
        until(server, running=0, waiting=0)


def test_requests_that_arrive_together_do_not_pass_the_limit_together(models):
    """Ten prompts become tokens while the event loop is busy, so that all ten go on in the same turn of it."""
    app = App(models, Limits(max_running=2, max_waiting=3)).asgi()

    async def ask_all(event) -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            body = {**GOOD, "max_tokens": 2}
            tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(10)]
            await asyncio.sleep(0)
            while not all(task.done() for task in tasks):
                time.sleep(0.2)  # the loop does nothing else
                await asyncio.sleep(0.05)
                if sum(task.done() for task in tasks) == 5:
                    event.set()
            return sorted(task.result().status_code for task in tasks)

    with held(models["runs/x:sft"]) as event:
        assert asyncio.run(asyncio.wait_for(ask_all(event), 40)) == [200] * 5 + [429] * 5


def test_a_fault_of_the_server_is_an_error_of_one_request(served, models, capsys):
    generator = models["runs/x:sft"]

    def fail(*words, **rest):
        raise RuntimeError("out of memory: the secret detail")

    generator.generate = fail
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            served.chat()
    finally:
        del generator.generate
    number = re.search(r"error (\w{8}) in its log", str(caught.value))[1]
    assert "secret" not in str(caught.value)
    assert f"error {number}" in capsys.readouterr().err
    assert served.chat(max_tokens=1).choices


@pytest.mark.slow
def test_a_thousand_requests_with_faults_and_none_is_lost(models):
    """Eight clients: good requests, streams, mistakes, and clients that leave. Every good one has the right answer, and
    the server counts as many as were asked."""
    with Served(models, max_waiting=1000, max_new_tokens=240) as server:
        expected = server.chat(max_tokens=3).choices[0].message.content
        counted = server.metric('alma_requests_total{code="200"}')

        def ask(number: int) -> str:
            kind = ("good", "good", "stream", "bad json", "unknown", "leaves")[number % 6]
            if kind == "good":
                assert server.chat(max_tokens=3).choices[0].message.content == expected
            elif kind == "stream":
                chunks = server.chat(max_tokens=3, stream=True)
                assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
            elif kind == "bad json":
                assert server.http.post("/v1/chat/completions", content=b"{").status_code == 400
            elif kind == "unknown":
                assert server.http.post("/v1/chat/completions", json={**GOOD, "model": "x"}).status_code == 404
            else:
                connection = server.raw(json.dumps({**GOOD, "max_tokens": 200, "stream": True}).encode())
                connection.close()
            return kind

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            kinds = list(pool.map(ask, range(1000)))
        deadline = time.time() + 30
        while server.http.get("/health").json()["running"] and time.time() < deadline:
            time.sleep(0.5)
        health = server.http.get("/health").json()
        assert health == {"status": "ok", "running": 0, "waiting": 0}
        good = sum(kind in ("good", "stream") for kind in kinds)
        answered = server.metric('alma_requests_total{code="200"}') - counted
        assert good <= answered <= good + kinds.count("leaves")
        assert server.metric('alma_requests_total{code="400"}') == kinds.count("bad json")
        assert server.metric('alma_requests_total{code="404"}') == kinds.count("unknown")


@pytest.mark.slow
def test_the_command(models, tmp_path):
    """`alma serve` on a port of its choice, stopped by SIGINT; what cannot be served is refused in one sentence."""
    folder = tuned.base(tmp_path / "w") / "model"
    command = [sys.executable, "-m", "pipeline.cli", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = ""
    while "serving" not in line:
        line = process.stdout.readline()
        assert line, process.stderr.read()
    address = re.search(r"http://127\.0\.0\.1:\d+/v1", line)[0]
    client = openai.OpenAI(base_url=address, api_key="none", timeout=60)
    assert client.chat.completions.create(model=str(folder), messages=ASKED, max_tokens=2).choices
    process.send_signal(2)
    assert process.wait(30) in (0, 130)
    refused = subprocess.run([*command, "--host", "0.0.0.0"], capture_output=True, text=True)
    assert refused.returncode == 2 and "set ALMA_API_KEY, or serve on 127.0.0.1" in refused.stderr
