"""`alma chat`, `alma serve` and `alma push`: their options."""

import json
import os
from typing import Annotated, Literal

import typer

from pipeline.core.errors import UserError
from pipeline.core.optional_packages import require
from pipeline.core.recipe_file import short_repr

TARGET = "The folder of a run with a stage (runs/quickstart:ppo), of a model, or ORG/NAME@REVISION."
LOOPBACK = ("127.0.0.1", "::1", "localhost")
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto: a GPU if there is one.")]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option("--dtype", help="Of the weights; auto: bf16 on a GPU, fp32 on a CPU."),
]


def chat(
    target: Annotated[str, typer.Argument(help=TARGET, metavar="RUN[:STAGE]|MODEL")],
    other: Annotated[
        str | None, typer.Option("--with", help="Another model that answers the same messages.", metavar="RUN[:STAGE]")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", min=0, help="0: the likeliest token. Default: as the model's generation_config.json."
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0.001, max=1, help="Likeliest tokens of this mass.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Likeliest tokens; 0: all.")] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", min=0, max=1, help="Tokens this likely, relative to the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", min=0.01, help="Above 1: less of what was written.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same answers.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends an answer; may be repeated.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", help="Variable of the chat template, such as enable_thinking=false.", metavar="NAME=VALUE"
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="All of standard input is one message.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model on the terminal; through a pipe, each line is a message. Answers go to standard output."""
    from pipeline.serve.target import resolve

    options = template_options(option or [])
    if "" in (stop or []):
        raise UserError("--stop: the text is empty, so that every answer would be; give a text")
    targets = [resolve(name) for name in (target, other) if name is not None]

    from pipeline.serve import chat

    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop or ()),
    }
    speakers = [chat.speaker(one, sampling, options, system, device, dtype) for one in targets]
    chat.run(speakers, seed, once)


def serve(
    target: Annotated[str, typer.Argument(help=TARGET, metavar="RUN[:STAGE]|MODEL")],
    others: Annotated[
        list[str] | None, typer.Option("--with", help="Another model; may be repeated.", metavar="RUN[:STAGE]")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address; others than loopback need ALMA_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")] = 4096,
    max_body: Annotated[int, typer.Option("--max-body", min=100, help="Bytes of a request.")] = 1_000_000,
    max_running: Annotated[int, typer.Option("--max-running", min=1, help="Requests generated at a time.")] = 2,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Requests that wait; more are refused with 429.")
    ] = 64,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds for a request, waiting included.")
    ] = 300,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve models by OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, and /health and /metrics; at / a
    page to chat on. The environment variable ALMA_API_KEY sets a key that clients must give."""
    from pipeline.serve.target import resolve

    key = os.environ.get("ALMA_API_KEY") or None
    if key is None and host not in LOOPBACK:
        raise UserError(f"--host {host}: others could use the model; set ALMA_API_KEY, or serve on 127.0.0.1")
    for package in ("starlette", "uvicorn"):
        require(package, "alma serve")
    targets = {}
    for name in [target, *(others or [])]:
        found = resolve(name)
        targets[found.title] = found

    from pipeline.serve import listen
    from pipeline.serve.server import Limits

    limits = Limits(max_new_tokens, max_body, max_running, max_waiting, timeout)
    listen.run(list(targets.values()), limits, key, host, port, device, dtype)


def push(
    target: Annotated[str, typer.Argument(help=TARGET, metavar="RUN[:STAGE]|MODEL")],
    repository: Annotated[
        str,
        typer.Argument(
            help="Of the Hugging Face hub, or of ModelScope with modelscope: in front.",
            metavar="ORG/NAME|modelscope:ORG/NAME",
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is created, only you can see it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and send nothing.")] = False,
) -> None:
    """Upload an exported model with its card to the Hugging Face hub or ModelScope, in one commit."""
    from pipeline.serve.push import run

    run(target, repository, private, dry_run)


def template_options(words: list[str]) -> dict:
    """NAME=VALUE words; a value that is JSON (true, 3) is one, and any other is text. Raises UserError."""
    options = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(f"--option {short_repr(word)}: expected NAME=VALUE, such as enable_thinking=false")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
