"""What stage assess reads: the models, and the held-out rows and prompts that all of them are measured on."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.seeds import derive
from pipeline.core.terminal import plural, say

DEFAULT_LENGTH = 1024  # tokens of a held-out row


@dataclass(frozen=True)
class Candidate:
    """A model to measure, before its weights are loaded."""

    name: str
    folder: Path
    tokenizer: object
    chat: object | None
    """Writes its prompts (data/chat/template.py); None without prompts."""
    vocabulary: int
    positions: int | None
    """Most tokens of a row; None: any number."""
    date: str | None
    """What its chat template is given that asks for today's date (Template in data/chat/rendering.py)."""


def plain_candidate(artifact: Artifact) -> Candidate:
    """A model that is asked no prompts."""
    from transformers import AutoConfig

    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.train.finetune_data import model_folder

    folder = model_folder(artifact)
    vocabulary = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config().vocab_size
    return Candidate("the model", folder, load_tokenizer(folder), None, vocabulary, None, None)


def candidate(name: str, artifact: Artifact, config) -> Candidate:
    from transformers import AutoConfig

    from pipeline.data.chat.template import Chat
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer, use_known_padding
    from pipeline.models.families import positions
    from pipeline.train.finetune_data import model_folder

    folder = model_folder(artifact)
    if not (folder / "config.json").is_file():
        raise UserError(f"inputs.{name}: {folder} has no config.json, so it is not a model; give a model's folder")
    tokenizer = load_tokenizer(folder)
    model_config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    use_known_padding(tokenizer, model_config.vocab_size)
    has_prompts = config.sources or (config.refusals and tokenizer.chat_template)
    chat = Chat(tokenizer, trained=False, date=config.date) if has_prompts else None
    most = positions(model_config)
    return Candidate(name, folder, tokenizer, chat, model_config.vocab_size, most, config.date)


# ---- held-out text ---------------------------------------------------------------------------------------------------


def held_out_rows(config, tokens: Artifact, candidates: list[Candidate]) -> list:
    """Fixed rows of held-out text. Raises UserError for a model to which these tokens are another text, or that has too
    few positions for a row."""
    from pipeline.data.tokens.heldout_rows import heldout_rows

    check_tokens(tokens, candidates)
    for model in candidates:
        if config.sequence_length and model.positions and config.sequence_length > model.positions:
            raise UserError(
                f"sequence_length: {config.sequence_length} is more than the {model.positions} positions of"
                f" {model.name}; use {model.positions} or fewer"
            )
    length = config.sequence_length
    if not length:
        length = min([DEFAULT_LENGTH, *(model.positions for model in candidates if model.positions)])
    return heldout_rows(tokens.path, length, config.max_rows)


def check_tokens(tokens: Artifact, candidates: list[Candidate]) -> None:
    """Raise UserError if packed tokens are another text to a model."""
    from pipeline.data.tokens.store import TokenStore

    store = TokenStore(tokens.path, "heldout")
    packed_with = _tokenizer_of(tokens)
    for model in candidates:
        reason = _difference(store, packed_with, model)
        if reason:
            raise UserError(
                f"inputs.tokens: {tokens.path} was packed with another tokenizer than that of {model.name}: {reason};"
                f" the model would be measured on another text. Measure {model.name} in a stage of its own, with text"
                " packed by its tokenizer, or without held-out text (max_rows: 0)"
            )


def _tokenizer_of(tokens: Artifact):
    """The tokenizer that packed these tokens, if its folder is still where it was, else None."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    parent = tokens.manifest.get("parents", {}).get("tokenizer")
    if not parent:
        return None
    folder = (tokens.path.parent / parent["path"]).resolve()
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def _difference(store, packed_with, model: Candidate) -> str | None:
    """Why packed tokens are another text to this model, in words, or None. A model may have more tokens than the text
    was packed with."""
    import numpy as np

    from pipeline.data.tokenizer.fast_tokenizer import token_bytes

    if model.vocabulary < store.vocab_size:
        return f"they have {store.vocab_size} ids, the model has {model.vocabulary}"
    if packed_with is not None:
        ids = model.tokenizer.get_vocab()
        for token, index in sorted(packed_with.get_vocab().items(), key=lambda entry: entry[1]):
            if ids.get(token) != index:
                return f"{token!r} has the id {index} in one and {ids.get(token)} in the other"
        return None
    sizes = token_bytes(model.tokenizer)[: store.vocab_size]
    if len(sizes) < store.vocab_size:
        return f"they have {store.vocab_size} ids, its tokenizer has {len(sizes)}"
    different = np.flatnonzero(sizes != store.token_bytes)
    if len(different):
        index = int(different[0])
        return f"id {index} spells {store.token_bytes[index]} bytes in one and {sizes[index]} in the other"
    return None


# ---- prompts ---------------------------------------------------------------------------------------------------------


def held_out_prompts(config, candidates: list[Candidate], judge) -> tuple[list, dict[str, int]]:
    """(the prompts that every model answers, how many cannot be used by reason): the first `max_prompts` of the
    held-out ones in an order drawn from the seed, without those that the template of a model or of the judge cannot
    write or that leave no room for an answer."""
    if not config.sources:
        return [], {}
    from pipeline.data.chat.conversations import load_prompts
    from pipeline.data.chat.record_accounting import NOTABLE

    _, heldout, ledger = load_prompts(config.sources, config.holdout)
    ledger.judge(max_bad=1.0)  # nothing is trained here: what is dropped is reported, but is not an error
    chosen: list = []
    reasons: dict[str, int] = {}
    for prompt in sorted(heldout, key=lambda prompt: derive(config.seed, "assess", prompt.id)):
        if len(chosen) == config.max_prompts:
            break
        reason = _why_unusable(prompt, config, candidates, judge)
        if reason is None:
            chosen.append(prompt)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if not chosen:
        raise UserError(
            f"stage {config.kind}: none of {len(heldout)} held-out prompts can be used: {'; '.join(sorted(reasons))}"
        )
    total = len(chosen) + sum(reasons.values())
    for reason, count in reasons.items():
        if count > NOTABLE * total:
            say(
                f"WARNING {config.kind}: {plural(count, 'held-out prompt')} of {total} dropped: {reason}; the figures"
                f" are of the other {len(chosen)}"
            )
    return chosen, reasons


def _why_unusable(prompt, config, candidates: list[Candidate], judge) -> str | None:
    for model in candidates:
        try:
            size = len(model.chat.prompt(prompt.messages)) + config.max_new_tokens
        except ValueError as error:
            return f"{model.name}: {error}"
        if model.positions and size > model.positions:
            return f"{model.name}: longer with its answer than the model's {model.positions} positions"
    if judge is not None:
        try:
            judge.prompt(prompt.messages)
        except ValueError as error:
            return f"reward: {error}"
    return None
