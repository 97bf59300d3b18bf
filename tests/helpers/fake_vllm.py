"""A server with the part of vLLM's protocol that rollouts use, which misbehaves when it is told to.

    command = fake_vllm.write(folder)                  # a program for rollout.server.command
    fake_vllm.order(folder, hang=1, die=2)             # the next completion hangs, two more end the server
    fake_vllm.log(folder)                              # what it was asked for: ["start", "/health", ...]

The model is a Llama in numpy and float64, written from its equations, and shares no code with transformers. Tokens are
drawn as pipeline/rl/rollout.py draws them, so a run with this server has the responses of one without it. Importing
neither torch nor transformers, it starts in tenths of a second.
"""

import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

ALWAYS = 10**9


def write(folder: Path) -> Path:
    """Write the program into a folder, in which its orders and its log will be."""
    program = folder / "vllm"
    lines = ["import sys", f"sys.path.insert(0, {str(Path(__file__).parent)!r})"]
    lines += ["import fake_vllm", "fake_vllm.main(sys.argv[1:], __file__)"]
    program.write_text(f"#!{sys.executable}\n" + "\n".join(lines) + "\n")
    program.chmod(0o755)
    return program


def order(folder: Path, **faults: int) -> None:
    """Have each fault happen so many times:

    of completions: hang, error (500), truncated (a body that ends early), die, nan, short (a response that just ends),
    other (the answer to another prompt), refuse (400); of weights: stale (a reload does nothing), liar (nor does this
    one, and the checksums are those of the files); of starts: ends, deaf (it never becomes healthy).
    """
    for name, count in faults.items():
        (folder / f"order.{name}").write_text(str(count))


def log(folder: Path) -> list[str]:
    path = folder / "log"
    return path.read_text().split() if path.exists() else []


def children_of(pid: int) -> set[int]:
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found |= {child} | children_of(child)
    return found


# ---- the model -------------------------------------------------------------------------------------------------------


class Llama:
    def __init__(self, folder: Path):
        from safetensors.numpy import load_file

        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of the token after the last one, [V]."""
        config, width = self.config, self.config["hidden_size"]
        heads, count = config["num_attention_heads"], len(ids)
        groups = config.get("num_key_value_heads", heads)
        size = config.get("head_dim") or width // heads
        rope = config.get("rope_parameters") or config
        frequencies = rope.get("rope_theta", 10000.0) ** (-np.arange(0, size, 2) / size)
        angles = np.arange(count)[:, None] * np.concatenate([frequencies, frequencies])
        x = self._weight("model.embed_tokens.weight")[ids]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            h = self._norm(x, f"{name}.input_layernorm")
            q, k, v = (h @ self._weight(f"{name}.self_attn.{part}_proj.weight").T for part in "qkv")
            q, k, v = (part.reshape(count, -1, size).swapaxes(0, 1) for part in (q, k, v))
            q, k = (part * np.cos(angles) + _turned(part) * np.sin(angles) for part in (q, k))
            k, v = (np.repeat(part, heads // groups, axis=0) for part in (k, v))
            scores = q @ k.swapaxes(1, 2) / np.sqrt(size)
            scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
            mixed = (_softmax(scores) @ v).swapaxes(0, 1).reshape(count, -1)
            x = x + mixed @ self._weight(f"{name}.self_attn.o_proj.weight").T
            h = self._norm(x, f"{name}.post_attention_layernorm")
            gate, up = (h @ self._weight(f"{name}.mlp.{part}_proj.weight").T for part in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self._weight(f"{name}.mlp.down_proj.weight").T
        return self._norm(x[-1:], "model.norm")[0] @ self._weight("lm_head.weight").T

    def _weight(self, name: str) -> np.ndarray:
        return self.weights[name].astype(np.float64)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean = (x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"]
        return x / np.sqrt(mean) * self._weight(f"{name}.weight")

    def respond(self, prompt: list[int], *, seed, max_tokens, temperature, stop_token_ids) -> tuple[list, list]:
        ids, logprobs = [], []
        for draw in _draws(seed, max_tokens):
            logits = self.logits(prompt + ids)
            scores = np.log(_softmax(logits / (temperature or 1.0)))
            chosen = int(logits.argmax())
            if temperature:
                chosen = int(np.searchsorted(np.exp(scores).cumsum(), draw, side="right"))
            ids.append(chosen)
            logprobs.append(float(scores[chosen]))
            if chosen in stop_token_ids:
                break
        return ids, logprobs

    def checksums(self) -> dict[str, str]:
        """As vLLM names them: matrices of attention and MLP are joined, embeddings are padded."""
        found = {}
        for name, value in self.weights.items():
            if value.ndim == 1 or "down_proj" in name or "o_proj" in name:
                found[f"dp0:pp0:pcp0:tp0:ep0:{name}"] = hashlib.sha256(value.tobytes()).hexdigest()
        return found


def _draws(seed: int, count: int) -> np.ndarray:
    """As rollout.uniform."""
    from pipeline.core.seeds import splitmix64

    with np.errstate(over="ignore"):
        steps = np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
        state = splitmix64(np.uint64(seed) + steps)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _turned(x: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    return np.concatenate([-x[..., half:], x[..., :half]], -1)


# ---- the server ------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, folder: Path, home: Path):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.home, self.lock = folder, home, threading.Lock()
        self.note("start")
        if self.takes("ends"):
            print("out of memory: the fake server has none", flush=True)
            os._exit(1)
        self.is_deaf = self.takes("deaf")
        self.model = self.shown = Llama(folder)

    def takes(self, name: str) -> bool:
        """Whether a fault was ordered; it is used up."""
        with self.lock:
            path = self.home / f"order.{name}"
            left = int(path.read_text()) if path.exists() else 0
            if left:
                partial = path.with_suffix(".tmp")  # a kill must not leave an empty file
                partial.write_text(str(left - 1))
                partial.replace(path)
            return left > 0

    def note(self, words: str) -> None:
        with self.lock, (self.home / "log").open("a") as file:
            file.write(words + "\n")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.server.is_deaf:
            time.sleep(1000)
        self._send(200 if self.path == "/health" else 404, None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.note(self.path)
        if self.path == "/v1/completions":
            self._complete(body)
        elif self.path == "/collective_rpc" and body == {"method": "reload_weights"}:
            if server.takes("liar"):
                server.shown = Llama(server.folder)
            elif not server.takes("stale"):
                server.model = server.shown = Llama(server.folder)
            self._send(200, {"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self._send(200, None)
        elif self.path == "/weight_checker" and body == {"action": "checksum"}:
            self._send(200, {"checksums": server.shown.checksums()})
        else:
            self._send(404, {"detail": "Not Found"})

    def _complete(self, body: dict) -> None:
        server, prompt = self.server, body["prompt"]
        assert body["ignore_eos"] and body["return_token_ids"] and (body["top_p"], body["top_k"]) == (1, -1)
        if server.takes("hang"):
            time.sleep(1000)
        if server.takes("die"):
            os._exit(9)
        if server.takes("error"):
            return self._send(500, {"error": "EngineDeadError"})
        if server.takes("refuse"):
            return self._send(400, {"error": {"message": "prompt is too long"}})
        options = {key: body[key] for key in ("seed", "max_tokens", "temperature", "stop_token_ids")}
        ids, logprobs = server.model.respond(prompt, **options)
        if server.takes("nan"):
            logprobs[-1] = None
        if server.takes("short"):
            ids, logprobs = [prompt[0]], [-1.0]
        if server.takes("other"):
            prompt = prompt[::-1] + [3]
        choice = {"token_ids": ids, "prompt_token_ids": prompt, "logprobs": {"token_logprobs": logprobs}}
        self._send(200, {"choices": [choice]}, is_cut=server.takes("truncated"))

    def _send(self, status: int, content, is_cut: bool = False) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if is_cut else data)
        if is_cut:
            self.close_connection = True


def main(words: list[str], program: str) -> None:
    assert words[0] == "serve" and words[2:4] == ["--host", "127.0.0.1"] and os.environ["VLLM_SERVER_DEV_MODE"] == "1"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "PYTHONPATH"} & set(os.environ)
    Server(int(words[words.index("--port") + 1]), Path(words[1]), Path(program).parent).serve_forever()
