"""Answers of `alma serve` in OpenAI's form: whole, and in the chunks of a stream."""

import json
import time
import uuid

from pipeline.serve.generator import Generator, Token
from pipeline.serve.requests import Job


class Answer:
    """The JSON of one request's answers. Rows are numbered over prompts and choices."""

    def __init__(self, job: Job, generator: Generator):
        self._job, self._generator = job, generator
        kind = "chat.completion" if job.chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": job.model,
        }
        self.num_tokens = 0

    def usage(self) -> dict:
        asked = self._job.num_prompt_tokens
        return {"prompt_tokens": asked, "completion_tokens": self.num_tokens, "total_tokens": asked + self.num_tokens}

    def complete(self, rows: list[list[Token]]) -> dict:
        choices = []
        for index, tokens in enumerate(rows):
            self.num_tokens += len(tokens)
            text = "".join(token.text for token in tokens)
            choice = {"index": index, "finish_reason": tokens[-1].finish, "logprobs": self._logprobs(tokens, 0)}
            if self._job.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": self.usage()}

    # ---- streams -----------------------------------------------------------------------------------------------------

    def first(self) -> list[str]:
        """Chunks that begin the stream of a chat."""
        if not self._job.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": row, "delta": delta, "finish_reason": None}]) for row in range(self._job.num_rows)
        ]

    def chunk(self, row: int, token: Token, offset: int) -> str:
        """What a token adds to a stream. offset: characters of the row before it."""
        self.num_tokens += 1
        choice = {"index": row, "finish_reason": token.finish, "logprobs": self._logprobs([token], offset)}
        if self._job.chat:
            choice["delta"] = {"content": token.text} if token.text else {}
        else:
            choice["text"] = token.text
        return self._chunk([choice])

    def last(self) -> list[str]:
        usage = [self._chunk([], self.usage())] if self._job.stream_usage else []
        return [*usage, "data: [DONE]\n\n"]

    def _chunk(self, choices: list[dict], usage: dict | None = None) -> str:
        kind = "chat.completion.chunk" if self._job.chat else "text_completion"
        chunk = {**self._head, "object": kind, "choices": choices}
        if self._job.stream_usage:
            chunk["usage"] = usage
        return event(chunk)

    # ---- log-probabilities -------------------------------------------------------------------------------------------

    def _logprobs(self, tokens: list[Token], offset: int) -> dict | None:
        if not self._job.logprobs:
            return None
        ends = set(self._generator.stop_ids())
        tokens = [token for token in tokens if not (token.finish == "stop" and token.id in ends)]
        if self._job.chat:
            content = []
            for token in tokens:
                top = [self._entry(index, logprob) for index, logprob in token.top]
                content.append({**self._entry(token.id, token.logprob), "top_logprobs": top})
            return {"content": content, "refusal": None}
        spelled, offsets, tops = [], [], []
        for token in tokens:
            spelled.append(self._spelled(token.id))
            offsets.append(offset)
            offset += len(token.text)
            tops.append({self._spelled(index): logprob for index, logprob in token.top})
        logprobs = [token.logprob for token in tokens]
        return {"tokens": spelled, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _entry(self, index: int, logprob: float) -> dict:
        data = self._generator.bytes_of(index)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _spelled(self, index: int) -> str:
        return self._generator.bytes_of(index).decode(errors="replace")


def event(value: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
