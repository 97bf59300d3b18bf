"""Text from a language model, token by token, as `alma chat` and `alma serve` give it.

    generator = Generator(folder)
    ids = generator.prompt([{"role": "user", "content": "2+2?"}])
    generator.generate(ids, Sampling(temperature=0.7), seeds=[1], on_token=lambda row, token: print(token.text))

`transformers` generates, so every family has its own cache; which token is taken is decided here, in a logits processor
that leaves only that one. So an answer depends on the weights, the prompt and its seed, not on what other threads draw,
and the log-probabilities are known. Draws are those of pipeline/rl/rollout.py.

A token in a message's text stays text: `<|im_end|>` that a user types ends nothing (pipeline/data/chat/quoting.py).
"""

import datetime
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from pipeline.core.errors import UserError
from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat
from pipeline.data.tokenizer.encode import alphabet
from pipeline.data.tokenizer.fast_tokenizer import begin_id, load_tokenizer
from pipeline.models import build
from pipeline.models.publish import generation_settings
from pipeline.rl.rollout import choose, uniform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults choose from the whole distribution at temperature 1."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends; they are not part of it."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are reported at each place."""


@dataclass(frozen=True)
class Token:
    """What one step of a row adds."""

    id: int
    text: str
    """Text that is certain now: empty in the middle of a character, and while a stop text may have begun."""
    logprob: float
    """Under the model, at temperature 1 and before anything is left out."""
    top: list[tuple[int, float]] = field(default_factory=list)
    """The likeliest tokens with their log-probabilities."""
    finish: Literal["stop", "length"] | None = None
    """Why the row ends with this token."""


class Generator:
    """A model, its tokenizer, and how its user and it talk."""

    def __init__(self, folder: Path, device: str = "auto", dtype: str = "auto"):
        """device: auto, cpu or cuda; dtype: a key of DTYPES, or auto: bf16 on a GPU, fp32 on a CPU. Raises
        UserError."""
        from tokenizers import Tokenizer

        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device, self.dtype = device, {"cuda": "bf16", "cpu": "fp32"}[device] if dtype == "auto" else dtype
        self.model = build.load(folder).to(dtype=DTYPES[self.dtype], device=device).eval()
        self.tokenizer = load_tokenizer(folder)
        # A copy that is only read, so that threads may decode while another one encodes.
        self.decoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._added = set(self.tokenizer.added_tokens_decoder)
        self._alphabet = alphabet()
        self._spells_bytes = "ByteLevel" in json.dumps(json.loads(self.decoder.to_str())["decoder"])
        self.settings = generation_settings(folder, self.tokenizer)
        self.chat: Chat | None = None
        if self.tokenizer.chat_template:
            self.chat = Chat(self.tokenizer, trained=False, date=datetime.date.today().isoformat())
        # Else generate() would fill in what a request leaves out from the folder's settings.
        from transformers import GenerationConfig

        self.model.generation_config = GenerationConfig()

    @property
    def positions(self) -> int | None:
        """Most tokens of prompt and answer together; None without a limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def defaults(self) -> dict:
        """Sampling as the model's generation_config.json has it: temperature 0 if it asks for none, as
        transformers' generate does."""
        if not self.settings.get("do_sample", False):
            return {"temperature": 0.0}
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        # 1 and 50 are what transformers takes for settings that only say do_sample
        values = {"temperature": 1.0, "top_k": 50}
        values.update({name: self.settings[name] for name in names if self.settings.get(name) is not None})
        return values

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def prompt(self, messages: list[dict], tools: list[dict] | None = None, options: dict | None = None) -> list[int]:
        """Ids of a conversation that waits for an answer. options: further variables of the chat template. Raises
        UserError for one that the template cannot write, or a model without template."""
        if self.chat is None:
            raise UserError("the model has no chat template: it continues text and answers no messages")
        try:
            return self.chat.prompt(Dialogue(messages, tools, options or {}))
        except ValueError as error:
            raise UserError(str(error)) from None

    def text_prompt(self, text: str) -> list[int]:
        """Ids of a text that is continued, with what the tokenizer puts in front of a text."""
        ids = self.tokenizer(text, split_special_tokens=True).input_ids
        if ids and ids[-1] == self.tokenizer.eos_token_id and self.tokenizer.eos_token_id is not None:
            ids = ids[:-1]  # some tokenizers end every text, and this one goes on
        if ids:
            return ids
        begin = begin_id(self.tokenizer)
        if begin is None:
            raise UserError("the prompt has no tokens, and the tokenizer has none that begins a text; write something")
        return [begin]

    def stop_ids(self) -> list[int]:
        ids = self.settings.get("eos_token_id")
        if ids is None:
            return []
        return ids if isinstance(ids, list) else [ids]

    def room(self, prompt: list[int], wanted: int) -> int:
        """How many of `wanted` tokens have a place after the prompt. Raises UserError if none has."""
        if self.positions is None:
            return wanted
        if len(prompt) >= self.positions:
            raise UserError(f"the prompt has {len(prompt):,} tokens, and the model has {self.positions:,} positions")
        return min(wanted, self.positions - len(prompt))

    def bytes_of(self, index: int) -> bytes:
        """What a token spells, on its own."""
        token = self.decoder.id_to_token(index)
        if token is None:
            return b""
        if index in self._added:
            return token.encode()
        if self._spells_bytes:
            return bytes(self._alphabet[letter] for letter in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    # ---- answers -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        sampling: Sampling,
        seeds: list[int],
        on_token: Callable[[int, Token], None],
        stop_ids: list[int] | None = None,
    ) -> None:
        """One answer for each seed. on_token(row, token) is called at each step of each row that has not ended; what it
        raises ends the generation. stop_ids: instead of the model's own."""
        from transformers import GenerationConfig, StoppingCriteriaList
        from transformers.generation import LogitsProcessorList

        length = self.room(prompt, sampling.max_new_tokens)
        stops = self.stop_ids() if stop_ids is None else stop_ids
        step = _Step(self, prompt, length, sampling, seeds, set(stops), on_token)
        pad = self.tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=pad if pad is not None else (stops or [0])[0],
        )
        ids = torch.tensor([prompt] * len(seeds), device=self.device)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([step]),
            stopping_criteria=StoppingCriteriaList([step.has_ended]),
        )


class _Step:
    """A logits processor that chooses the next token of each row and leaves only that one."""

    def __init__(self, generator, prompt, length, sampling, seeds, stop_ids, on_token):
        from transformers.generation import LogitsProcessorList
        from transformers.generation import logits_process as warpers

        self._prompt_length, self._length, self._sampling = len(prompt), length, sampling
        self._stop_ids, self._on_token = stop_ids, on_token
        self._draws = torch.from_numpy(uniform(seeds, length)).to(generator.device)
        self._rows = [_Text(generator.decoder, prompt, sampling.stop) for _ in seeds]
        self._ended = torch.zeros(len(seeds), dtype=torch.bool, device=generator.device)
        self._warpers = LogitsProcessorList()
        if sampling.temperature > 0:
            if sampling.temperature != 1:
                self._warpers.append(warpers.TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self._warpers.append(warpers.TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(warpers.TopPLogitsWarper(sampling.top_p))
            if sampling.min_p > 0:
                self._warpers.append(warpers.MinPLogitsWarper(sampling.min_p))
        self._repetition = None
        if sampling.repetition_penalty != 1:
            self._repetition = warpers.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [rows, tokens so far], scores [rows, vocabulary] -> scores: 0 for the chosen tokens, else -inf."""
        t = input_ids.shape[1] - self._prompt_length
        scores = scores.float()
        logprobs = scores.log_softmax(-1)
        if self._repetition is not None:
            scores = self._repetition(input_ids, scores)
        scores = self._penalised(input_ids[:, self._prompt_length :], scores)
        if self._sampling.temperature == 0:
            chosen = scores.argmax(-1)
        else:
            chosen, _ = choose(self._warpers(input_ids, scores), 1.0, self._draws[:, t])
        chosen_logprobs = logprobs.gather(-1, chosen[:, None])[:, 0].tolist()
        tops = self._tops(logprobs)
        for row, index in enumerate(chosen.tolist()):
            if not self._ended[row]:
                self._take(row, index, chosen_logprobs[row], tops[row], t + 1 == self._length)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)

    def has_ended(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """A stopping criterion: [rows] of bool."""
        return self._ended

    def _penalised(self, answered: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Less for tokens that the answer already has, by OpenAI's formula."""
        sampling = self._sampling
        if not (sampling.presence_penalty or sampling.frequency_penalty):
            return scores
        counts = torch.zeros_like(scores).scatter_add_(-1, answered, torch.ones_like(answered, dtype=scores.dtype))
        return scores - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)

    def _tops(self, logprobs: torch.Tensor) -> list[list[tuple[int, float]]]:
        if not self._sampling.top_logprobs:
            return [[] for _ in range(len(logprobs))]
        values, ids = logprobs.topk(min(self._sampling.top_logprobs, logprobs.shape[-1]), dim=-1)
        return [
            list(zip(row_ids, row_values)) for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    def _take(self, row: int, index: int, logprob: float, top: list, is_last: bool) -> None:
        text = self._rows[row]
        finish = None
        if index in self._stop_ids:
            finish = "stop"
        else:
            text.add(index)
            if text.stopped:
                finish = "stop"
            elif is_last:
                finish = "length"
        if finish:
            self._ended[row] = True
        self._on_token(row, Token(index, text.certain(finish is not None), logprob, top, finish))


class _Text:
    """The text of tokens as they come after a prompt, up to a stop text."""

    def __init__(self, backend, prompt: list[int], stop: tuple[str, ...]):
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        # With the prompt, because some decoders drop the space in front of a text's first word.
        self._stream = DecodeStream(ids=prompt, skip_special_tokens=True)
        self._asked = self._backend.decode(prompt, skip_special_tokens=True)
        self._stop = stop
        self._ids = list(prompt)
        self._text = ""  # decoded so far
        self._num_given = 0  # characters of it that were returned
        self.stopped = False

    def add(self, index: int) -> None:
        self._ids.append(index)
        self._append(self._stream.step(self._backend, index) or "")

    def _append(self, new: str) -> None:
        longest = max(map(len, self._stop), default=0)
        begin = max(0, len(self._text) - longest)
        self._text += new
        places = [place for stop in self._stop if (place := self._text.find(stop, begin)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True

    def certain(self, is_end: bool) -> str:
        """Text since the last call that no later token changes."""
        if is_end and not self.stopped:
            # The beginning of a character that never came is shown as its replacement, as everywhere.
            complete = self._backend.decode(self._ids, skip_special_tokens=True)
            before = self._asked + self._text
            if complete.startswith(before):
                self._append(complete[len(before) :])
        held = 0
        if not is_end:
            for stop in self._stop:
                lengths = [n for n in range(1, len(stop)) if self._text.endswith(stop[:n])]
                held = max([held, *lengths])
        end = max(self._num_given, len(self._text) - held)
        text = self._text[self._num_given : end]
        self._num_given = end
        return text
