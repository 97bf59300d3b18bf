"""What is known of a stage's input model before any stage runs: its positions, its tokenizer and its chat template."""

import functools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.config import PlannedInput
from pipeline.core.errors import Problems
from pipeline.core.recipe_file import short_repr
from pipeline.data.chat.named_templates import with_template
from pipeline.data.chat.template import Chat
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pipeline.train.finetune_config import FinetuneConfig


def check_files(models: dict[str, PlannedInput], tokenizer: bool = True) -> None:
    """Raise UserError for an input, by its name, whose folder from outside of the recipe has no model that can be
    loaded, or no `tokenizer` with it. What stages publish is checked by its hashes."""
    from pipeline.models import model_files

    problems = Problems()
    for key, model in models.items():
        if model.config is None and model.folder is not None and os.path.isdir(model.folder):
            with problems.gather(functools.partial("inputs.{}: {}".format, key)):
                folder = _model_folder(model.folder)
                model_files.check(folder)
                if tokenizer:
                    model_files.check_tokenizer(folder)
    problems.refuse()


def num_positions(model: PlannedInput) -> int | None:
    """Most tokens of a row that a model has positions for; None if there is no limit or it is not known."""
    if model.config is not None:
        return model.config.planned_positions(model.inputs)
    if model.folder is None:  # not downloaded yet
        return None
    from transformers import AutoConfig

    from pipeline.models.families import positions

    try:
        config = AutoConfig.from_pretrained(_model_folder(model.folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # the stage that reads it reports what is wrong
        return None
    return positions(config.get_text_config())


def check_positions(models: Iterable[PlannedInput], num_tokens: int, advice: str = "") -> None:
    """Raise UserError if a model has fewer positions than a row has tokens. advice: what else to do."""
    problems = Problems()
    for model in models:
        longest = num_positions(model)
        if longest is None or num_tokens <= longest:
            continue
        if model.config is None:
            reason = f"{num_tokens} is more than the {longest} positions of the model in {short_repr(model.name)}"
        else:
            reason = f"{num_tokens} tokens are more than the {longest} positions that {model.name} gives its model"
        problems.add(
            f"sequence_length: {reason}; use {longest} or fewer, or a model that was pretrained with more{advice}"
        )
    problems.refuse()


@dataclass(frozen=True)
class Vocabulary:
    """Stands for a tokenizer of which only the size is known."""

    size: int
    bos_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 2

    def __len__(self) -> int:
        return self.size


def vocabulary_of(planned: PlannedInput) -> int | None:
    """Tokens in the vocabulary of a tokenizer, of packed tokens or of a model; None if it is not known."""
    if planned.config is not None:
        return planned.config.planned_vocabulary(planned.inputs)
    index = planned.folder / "index.json"
    if index.is_file():  # packed tokens
        return json.loads(index.read_text(encoding="utf-8"))["vocab_size"]
    tokenizer = tokenizer_of(planned)
    return len(tokenizer) if tokenizer else None


def config_of(model: PlannedInput) -> Any:
    """transformers' configuration of a model that another stage will publish, or of a folder; None if it is not
    known."""
    from pipeline.train.config import TrainConfig

    if isinstance(model.config, TrainConfig):
        return model.config.planned_model_config(model.inputs)
    if model.folder is None:
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_model_folder(model.folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # the stage that reads it reports what is wrong
        return None


def tokenizer_of(model: PlannedInput) -> Any:
    """The tokenizer of a model, or of a stage that publishes one, if its files are there already; else None."""
    if model.folder is not None:
        folder = _model_folder(model.folder)
        return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return model.config.planned_tokenizer(model.inputs) if model.config else None


def chat_of(models: Iterable[PlannedInput], config: "FinetuneConfig", problems: Problems) -> Chat | None:
    """The chat template that the stage will use with the first of these models whose tokenizer is there already. Those
    that cannot be used are added to `problems`."""
    chats = []
    for model in models:
        with problems.gather():
            tokenizer = tokenizer_of(model)
            if tokenizer is not None:
                tokenizer, _ = with_template(tokenizer, config.chat_template, config.chat_template_kwargs)
                chats.append(Chat(tokenizer, date=config.date))
    return chats[0] if chats else None


def _model_folder(folder: Path) -> Path:
    return folder / "model" if (folder / "model").is_dir() else folder
