"""Text that the model continues from fixed prompts while it learns, to logs/samples.jsonl and the terminal.

A sample depends on the weights, the prompt and the recipe's seed alone, and leaves nothing behind in the run:
rl/rollout.py draws its own random numbers.
"""

import json
import os
from contextlib import contextmanager
from typing import Annotated

from pydantic import Field

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.seeds import derive
from pipeline.core.terminal import byte_size, show

FILE = "logs/samples.jsonl"


class Samples(Strict):
    """What is continued, and how often."""

    every_steps: int = Field(ge=1)
    """Steps between samples; the last step always has them."""
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """Beginnings of documents."""
    max_new_tokens: int = Field(64, ge=1)
    """Tokens of a continuation at most; it also ends with the document."""
    temperature: float = Field(0.8, ge=0)
    """Logits are divided by this; 0 takes the likeliest token."""


def encoded(config, tokenizer) -> list[list[int]]:
    """Ids of the prompts, of none where no samples are asked for. Raises UserError for one that leaves no room in a
    row: called before anything expensive, too."""
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    if config.samples is None:
        return []
    # A document begins after the end of another one: so packed rows have it.
    prompts = [[tokenizer.eos_token_id, *ids] for ids in encode_text(tokenizer, config.samples.prompts)]
    longest, new = max(map(len, prompts)), config.samples.max_new_tokens
    if longest + new > config.sequence_length:
        raise UserError(
            f"stage {config.kind}: samples: a prompt of {longest - 1} tokens and {new} new ones are more than"
            f" sequence_length {config.sequence_length}; shorten either"
        )
    return prompts


class Sampler:
    """Call it with each step and whether it is the last; it knows when its turn is. Collective."""

    def __init__(self, config, engine, model_config, parameters: int, tokenizer, output):
        self.config, self.options, self.engine, self.output = config, config.samples, engine, output
        self.model_config, self.bytes, self.tokenizer = model_config, 4 * parameters, tokenizer
        self.begun = False
        self.prompts = encoded(config, tokenizer)

    def __call__(self, step: int, last: bool) -> None:
        from pipeline.rl.rollout import generate
        from pipeline.train import distributed

        if not last and step % self.options.every_steps:
            return
        with self._whole() as model:
            if model is None:
                return
            seeds = [derive(self.config.seed or 0, "sample", number) for number in range(len(self.prompts))]
            eos = self.tokenizer.eos_token_id
            options = {
                "max_new_tokens": self.options.max_new_tokens,
                "temperature": self.options.temperature,
                "stop_ids": [eos],
                "pad_id": eos,
                "seeds": seeds,
            }
            made = generate(model, self.prompts, **options)
        assert distributed.is_main()
        texts = [self.tokenizer.decode([i for i in completion.ids if i != eos]) for completion in made]
        lines = [
            json.dumps({"step": step, "prompt": prompt, "text": text, "ended": completion.stopped}, ensure_ascii=False)
            for prompt, text, completion in zip(self.options.prompts, texts, made, strict=True)
        ]
        self._write(step, lines)
        for prompt, text in zip(self.options.prompts, texts, strict=True):
            show(f"step {step}: {prompt} → {text}")

    def _write(self, step: int, lines: list[str]) -> None:
        path = self.output.path / FILE
        path.parent.mkdir(exist_ok=True)
        if path.exists():  # a resumed run, or one that was rolled back, makes again what stands after its checkpoint
            from pipeline.core.files import write_atomic
            from pipeline.core.tracking import step_of

            before = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in before if step_of(line) < step]
            if len(kept) < len(before):
                write_atomic(path, "".join(line + "\n" for line in kept))
        with open(path, "a", encoding="utf-8") as handle:
            handle.write("".join(line + "\n" for line in lines))

    @contextmanager
    def _whole(self):
        """The whole model on the main process, None on the others and where it cannot be had."""
        import torch

        from pipeline.train import distributed

        main = distributed.is_main()
        # Every length of a cache would be compiled anew.
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autocast(self.engine.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"),
        ):
            if self.engine.model is not None:
                with self.engine.gathered():
                    yield self.engine.model if main else None
            elif distributed.from_main(self._fits() if main else None):
                weights = self.engine.consolidated()
                yield self._built(weights) if main else None
            else:
                yield None

    def _fits(self) -> bool:
        """A pipeline's stages are put together in the main process's memory, which may be too small. Said once."""
        free = _free_memory()
        if self.bytes < free / 2:
            return True
        if not self.begun:
            show(
                f"samples are left out: the whole model takes {byte_size(self.bytes)}, more than half of the"
                f" {byte_size(free)} that are free beside the main process"
            )
            self.begun = True
        return False

    def _built(self, weights: dict):
        import torch
        import transformers

        kind = getattr(transformers, self.model_config.architectures[0])
        with torch.device("meta"):
            model = kind._from_config(self.model_config)
        model.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # what is computed and not learned, such as the frequencies of rotary positions, is no part of the weights
            for part in model.modules():
                if not list(part.parameters(recurse=False)) or list(part.buffers(recurse=False)):
                    model._init_weights(part)
        # the weights lack a tied output layer and buffers, and may lack nothing else
        found = model.load_state_dict(weights, strict=False, assign=True)
        known = {name for name, _ in model.named_buffers()} | (
            set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
        )
        assert not found.unexpected_keys and set(found.missing_keys) <= known, (
            f"samples: the weights do not fit the model: {found}"
        )
        model.tie_weights()
        return model.to(self.engine.device).eval()


def _free_memory() -> float:
    try:
        with open("/proc/meminfo") as handle:
            return next(float(line.split()[1]) * 1024 for line in handle if line.startswith("MemAvailable"))
    except (FileNotFoundError, StopIteration):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
