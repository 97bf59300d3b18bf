"""What a client may ask of `alma serve`, in OpenAI's form, and the jobs that it becomes.

A field that would change the answer and is not supported is refused; fields that change nothing here are accepted.
"""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.core.errors import UserError
from pipeline.core.seeds import derive
from pipeline.serve.generator import Generator, Sampling

# Change nothing about the answer: who asks, and what OpenAI's servers keep.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_LOGPROBS = 16, 64, 16, 20


class Refused(Exception):
    """A request that is answered with an error, in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param=None, code=None, headers=None
    ):
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = headers or {}

    def body(self) -> dict:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Asked(BaseModel):
    """Fields that both kinds of requests have. null means the default, as at OpenAI."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None
    refusal: None = None

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        texts = []
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise Refused(400, "a part of a message is no text; this model reads text alone", param="messages")
            texts.append(part["text"])
        return "".join(texts)


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Asked):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None


@dataclass(frozen=True)
class Job:
    """What is generated for a request."""

    model: str
    chat: bool
    prompts: list[list[int]]
    sampling: Sampling
    seeds: list[list[int]]
    """For each prompt, of each choice."""
    logprobs: bool
    stream: bool
    stream_usage: bool

    @property
    def num_rows(self) -> int:
        """Choices of all prompts."""
        return sum(map(len, self.seeds))

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def parsed(kind: type[Asked], body: Any) -> Asked:
    """A request. Raises Refused."""
    if not isinstance(body, dict):
        raise Refused(400, f"the body is a JSON {type(body).__name__}, expected an object")
    body = {key: value for key, value in body.items() if key not in IGNORED}
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"][:1])
        if first["type"] == "extra_forbidden":
            place = ".".join(str(part) for part in first["loc"])
            raise Refused(400, f"{place}: is not supported by this server", param=param) from None
        raise Refused(400, f"{param}: {first['msg']}", param=param) from None


def job(request: Asked, generator: Generator, most_tokens: int) -> Job:
    """The job of a request: its prompts as tokens. most_tokens: of an answer. Raises Refused."""
    try:
        chat = isinstance(request, ChatRequest)
        prompts = [_chat_prompt(request, generator)] if chat else _prompts(request, generator)
        sampling = _sampling(request, generator, most_tokens)
        for prompt in prompts:
            generator.room(prompt, 1)
    except UserError as error:
        raise Refused(400, str(error), param="messages" if isinstance(request, ChatRequest) else "prompt") from None
    seed = secrets.randbits(62) if request.seed is None else request.seed
    choices = range(request.n or 1)
    seeds = [[derive(seed, "serve", number, choice) for choice in choices] for number in range(len(prompts))]
    logprobs = request.logprobs is not None and request.logprobs is not False
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    return Job(request.model, chat, prompts, sampling, seeds, logprobs, bool(request.stream), with_usage)


def _chat_prompt(request: ChatRequest, generator: Generator) -> list[int]:
    if (request.response_format or {"type": "text"}).get("type") != "text":
        raise Refused(400, "response_format: only text is supported", param="response_format")
    messages = []
    for message in request.messages:
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": message.text()})
    return generator.prompt(messages, options=request.chat_template_kwargs)


def _prompts(request: CompletionRequest, generator: Generator) -> list[list[int]]:
    if request.best_of not in (None, request.n or 1):
        raise Refused(400, "best_of: is not supported by this server, unless it equals n", param="best_of")
    given = request.prompt
    if isinstance(given, str):
        return [generator.text_prompt(given)]
    if given and isinstance(given[0], int):
        given = [given]
    if not 1 <= len(given) <= MOST_PROMPTS:
        raise Refused(400, f"prompt: has {len(given)} prompts, expected 1 to {MOST_PROMPTS}", param="prompt")
    prompts = []
    for prompt in given:
        ids = generator.text_prompt(prompt) if isinstance(prompt, str) else prompt
        vocabulary = generator.model.get_input_embeddings().num_embeddings
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise Refused(400, f"prompt: token ids are from 0 to {vocabulary - 1}, and at least one", param="prompt")
        prompts.append(ids)
    return prompts


def _sampling(request: Asked, generator: Generator, most_tokens: int) -> Sampling:
    """As the request has it, else as the model's generation_config.json, else OpenAI's default, temperature 1."""
    wanted = request.max_completion_tokens if isinstance(request, ChatRequest) else None
    wanted = wanted or request.max_tokens or (most_tokens if isinstance(request, ChatRequest) else 16)
    if wanted > most_tokens:
        raise Refused(
            400, f"max_tokens: is {wanted:,}, and this server gives at most {most_tokens:,}", param="max_tokens"
        )
    values: dict[str, Any] = generator.defaults() if generator.settings.get("do_sample") else {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = request.model_dump(include=set(names))
    values.update({name: value for name, value in given.items() if value is not None})
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if "" in stop:
        raise Refused(400, "stop: a text is empty, so that every answer would be", param="stop")
    top = request.top_logprobs if isinstance(request, ChatRequest) else request.logprobs
    if isinstance(request, ChatRequest) and top and not request.logprobs:
        raise Refused(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    return Sampling(max_new_tokens=wanted, stop=tuple(stop), top_logprobs=top or 0, **values)
