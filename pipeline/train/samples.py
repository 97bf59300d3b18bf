"""Text that the model continues from fixed prompts during training, to logs/samples.jsonl and the terminal.

A sample depends only on the weights, the prompt and the recipe's seed, and does not affect the run: rl/rollout.py draws
its own random numbers.
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
    """Maximum number of tokens of a continuation; it also ends at the end of its document."""
    temperature: float = Field(0.8, ge=0)
    """Logits are divided by this; 0 takes the likeliest token."""


def encode_prompts(config, tokenizer) -> list[list[int]]:
    """Ids of the prompts; empty if no samples are asked for. Raises UserError for a prompt that leaves no room in a
    row: also called before anything expensive starts."""
    from pipeline.data.tokenizer.fast_tokenizer import encode_text

    if config.samples is None:
        return []
    # As in packed rows, a document begins after the end of another one.
    prompts = [[tokenizer.eos_token_id, *ids] for ids in encode_text(tokenizer, config.samples.prompts)]
    longest, new = max(map(len, prompts)), config.samples.max_new_tokens
    if longest + new > config.sequence_length:
        raise UserError(
            f"stage {config.kind}: samples: a prompt of {longest - 1} tokens and {new} new ones are more than"
            f" sequence_length {config.sequence_length}; shorten either"
        )
    return prompts


class SampleWriter:
    """Called after each step with its number and whether it is the last; writes samples if they are due. Collective."""

    def __init__(self, config, engine, model_config, parameters: int, tokenizer, output):
        self.config, self.options, self.engine, self.output = config, config.samples, engine, output
        self.model_config, self.bytes, self.tokenizer = model_config, 4 * parameters, tokenizer
        self.reported_memory = False
        self.prompts = encode_prompts(config, tokenizer)

    def __call__(self, step: int, last: bool) -> None:
        from pipeline.core import distributed
        from pipeline.rl.rollout import generate

        if not last and step % self.options.every_steps:
            return
        eos = self.tokenizer.eos_token_id
        with self._complete_model() as model:
            if model is None:
                return
            completions = generate(
                model,
                self.prompts,
                max_new_tokens=self.options.max_new_tokens,
                temperature=self.options.temperature,
                stop_ids=[eos],
                pad_id=eos,
                seeds=[derive(self.config.seed or 0, "sample", number) for number in range(len(self.prompts))],
            )
        if not distributed.is_main():
            return
        lines = []
        for prompt, completion in zip(self.options.prompts, completions, strict=True):
            text = self.tokenizer.decode([token for token in completion.ids if token != eos])
            lines.append({"step": step, "prompt": prompt, "text": text, "ended": completion.stopped})
            show(f"step {step}: {prompt} → {text}")
        self._write(step, lines)

    def _write(self, step: int, lines: list[dict]) -> None:
        from pipeline.core.tracking import drop_lines

        path = self.output.path / FILE
        path.parent.mkdir(exist_ok=True)
        # A run that was resumed or rolled back writes the samples after its checkpoint again.
        drop_lines(path, after=step - 1)
        with open(path, "a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    @contextmanager
    def _complete_model(self):
        """The model, complete or sharded, on the processes that sample; None on the others, and if there is no room for
        it."""
        import torch

        from pipeline.core import distributed
        from pipeline.models import row_attention

        is_main = distributed.is_main()
        # In eager mode, because every length of a cache would be compiled again.
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autocast(self.engine.device.type, dtype=torch.bfloat16, enabled=self.config.wide_precision == "bf16"),
        ):
            if self.engine.model is not None:
                with self.engine.sampling() as model, row_attention.padded(self.engine.model):
                    yield model
            elif distributed.from_main(self._has_room() if is_main else None):
                weights = self.engine.consolidated()
                yield self._build(weights) if is_main else None
            else:
                yield None

    def _has_room(self) -> bool:
        """The stages of a pipeline are assembled in the main process's memory, which may be too small. Reported
        once."""
        free = _free_memory()
        if self.bytes < free / 2:
            return True
        if not self.reported_memory:
            show(
                f"samples are skipped: the complete model takes {byte_size(self.bytes)}, more than half of the"
                f" {byte_size(free)} that are free in addition to the main process"
            )
            self.reported_memory = True
        return False

    def _build(self, weights: dict):
        import torch
        import transformers

        model_class = getattr(transformers, self.model_config.architectures[0])
        with torch.device("meta"):
            model = model_class._from_config(self.model_config)
        model.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # Computed values, such as the frequencies of rotary positions, are not part of the weights.
            for module in model.modules():
                if not list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
                    model._init_weights(module)
        # The weights may lack a tied output layer and buffers, and nothing else.
        result = model.load_state_dict(weights, strict=False, assign=True)
        optional = {name for name, _ in model.named_buffers()}
        if model.config.tie_word_embeddings:
            optional.update(model._tied_weights_keys or ())
        assert not result.unexpected_keys and set(result.missing_keys) <= optional, (
            f"samples: the weights do not fit the model: {result}"
        )
        model.tie_weights()
        return model.to(self.engine.device).eval()


def _free_memory() -> float:
    """Bytes."""
    try:
        with open("/proc/meminfo") as handle:
            return next(float(line.split()[1]) * 1024 for line in handle if line.startswith("MemAvailable"))
    except (FileNotFoundError, StopIteration):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
