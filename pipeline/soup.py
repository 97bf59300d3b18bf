"""Soup: the average of several runs' models, made only of those that lower the held-out loss.

    python pipeline/soup.py recipes/my.yaml

Models that were finetuned from the same weights often lie in one basin of the loss, and their average is better than
each of them (Wortsman et al., 2022). The recipe is their greedy one: from the best model on, each next one is added to
the average, and stays if the loss of the average is lower with it. If no average is better than the best model, that
model is published, and the stage says so. Out: model/ (Hugging Face layout).
"""

from pydantic import Field, model_validator

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import ExternalFiles, PlannedInput, PublishedModel, SourceBlock, StageConfig, refuse_unused
from pipeline.core.errors import UserError
from pipeline.core.output import Output
from pipeline.core.terminal import plural, say
from pipeline.data.chat.chat_sources import ChatSource
from pipeline.data.chat.record_checks import check_chat_records
from pipeline.train import planned_model
from pipeline.train.config import Date

VERSION = 1
INPUTS = {"tokens": ("pack",), "*": ("pretrain", "sft", "dpo", "kto", "ppo", "grpo")}
BATCH = 8  # rows in memory at a time


class Config(StageConfig):
    """Which models are averaged, and what decides."""

    KEPT = "this stage starts over: it has only measured so far"
    MODEL = PublishedModel("model", "chat")

    sources: dict[str, ChatSource] = {}
    """Conversations whose held-out part decides, by the loss of the last answer's tokens; none: the held-out text of
    the input `tokens` decides, in bits per byte."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the conversations that is held out; must be the same as in the stages that trained on them."""
    max_rows: int = Field(256, ge=1)
    """Held-out conversations, or rows of text, that decide."""
    sequence_length: int = Field(1024, ge=8)
    """Tokens of a row of text; fewer if the models have fewer positions. Longer conversations are left out."""
    date: Date = None
    """Today's date for chat templates that write it, as YYYY-MM-DD; use the one of the finetuning stages."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.seed:
            raise ValueError(f"seed: {self.seed} decides nothing, because a soup draws nothing at random; remove it")
        models = set(self.inputs) - {"tokens"}
        if len(models) == 1:
            raise ValueError("inputs: a soup needs two models or more")
        if not self.sources:
            for key in ("holdout", "date"):
                refuse_unused(self, key, "is about conversations, and there are no `sources`")
        elif "tokens" in self.inputs:
            raise ValueError("inputs.tokens: with sources conversations decide, and no text is read; remove one")
        return self

    @classmethod
    def uses_seed(cls, block: dict) -> bool:
        return False

    def unread(self) -> set[str]:
        return {"tokens"} if self.sources else set()

    @classmethod
    def uses_device(cls) -> bool:
        return True

    @classmethod
    def external(cls) -> list[SourceBlock | ExternalFiles]:
        return [SourceBlock("sources", lambda config: config.sources)]

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        models = {key: model for key, model in inputs.items() if key != "tokens"}
        if not set(self.inputs) - {"tokens"} or len(models) < 2:
            raise UserError("inputs: name the models of the soup, two or more")
        planned_model.check_files(models)
        configs = {key: planned_model.config_of(model) for key, model in models.items()}
        known = {key: config for key, config in configs.items() if config is not None}
        for key, config in known.items():
            first = next(iter(known))
            difference = _difference(known[first], config)
            if difference:
                raise UserError(f"inputs: {first} and {key} cannot be averaged: {difference}")

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        if self.sources:
            check_chat_records(self.sources, self.holdout, chat=None, measures_only=True)


def _difference(first, second) -> str | None:
    """Why the weights of two models of these transformers configurations have no average, or None."""
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        values = getattr(first, name, None), getattr(second, name, None)
        if values[0] != values[1]:
            return f"{name} is {values[0]} and {values[1]}"
    return None


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    import torch

    from pipeline.core import distributed
    from pipeline.models.build import load
    from pipeline.models.publish import publish
    from pipeline.train.finetune_data import model_folder

    distributed.choose_device(config, distributed.local_world())
    distributed.setup()
    folders = {name: model_folder(artifact) for name, artifact in inputs.items() if name != "tokens"}
    loss_of = _measure(config, inputs, folders)
    losses: dict[str, float] = {}
    for name, folder in folders.items():
        losses[name] = loss_of(load(folder).to(distributed.device()).eval())
        say(f"soup: {name}: {losses[name]:.5g}")
    ranked = sorted(folders, key=lambda name: (losses[name], name))
    best = load(folders[ranked[0]]).to(distributed.device()).eval()
    total = {name: value.clone() for name, value in best.state_dict().items() if value.is_floating_point()}
    chosen, lowest = [ranked[0]], losses[ranked[0]]
    trials = []
    with torch.no_grad():
        for name in ranked[1:]:
            added = load(folders[name]).state_dict()
            _check_names(total, added, ranked[0], name)
            mean = {key: (value + added[key].to(value)) / (len(chosen) + 1) for key, value in total.items()}
            best.load_state_dict(mean, strict=False)
            loss = loss_of(best)
            kept = loss < lowest
            trials.append({"added": name, "loss": loss, "kept": kept})
            say(f"soup: with {name}: {loss:.5g}, {'kept' if kept else 'left out'}")
            faults.point("work")
            if kept:
                lowest = loss
                chosen.append(name)
                total = {key: value + added[key].to(value) for key, value in total.items()}
        best.load_state_dict({key: value / len(chosen) for key, value in total.items()}, strict=False)
    if len(chosen) == 1:
        say(f"WARNING soup: no average is better than {chosen[0]}, which is published as it is")
    publish(best.cpu().state_dict(), best.config, folders[ranked[0]], output.path / "model")
    unit = "loss" if config.sources else "bits per byte"
    return {
        "losses": losses,
        "trials": trials,
        "models": chosen,
        "loss_before": losses[ranked[0]],
        "loss_after": lowest,
        "summary": {
            "input": plural(len(folders), "model"),
            "output": f"average of {', '.join(chosen)}" if len(chosen) > 1 else f"{chosen[0]} alone",
            "measure": f"{unit} {losses[ranked[0]]:.4f} -> {lowest:.4f}",
        },
    }


def _check_names(ours: dict, theirs: dict, first: str, second: str) -> None:
    for name, value in ours.items():
        if name not in theirs or theirs[name].shape != value.shape:
            raise UserError(f"inputs: {first} and {second} cannot be averaged: {name} differs in shape or is missing")


def _measure(config: Config, inputs: dict[str, Artifact], folders: dict):
    """A function: the loss of a model. Raises UserError if the models read text differently."""
    from pipeline.assessment.inputs import check_tokens, plain_candidate
    from pipeline.assessment.measures import text_loss
    from pipeline.data.tokens.heldout_rows import heldout_rows

    candidates = {name: plain_candidate(artifact) for name, artifact in inputs.items() if name != "tokens"}
    first = next(iter(candidates))
    for name, candidate in candidates.items():
        if candidate.tokenizer.get_vocab() != candidates[first].tokenizer.get_vocab():
            raise UserError(f"inputs: {first} and {name} cannot be averaged: their tokenizers have other tokens")
    length = _length(config, folders)
    if not config.sources:
        check_tokens(inputs["tokens"], list(candidates.values()))
        rows = heldout_rows(inputs["tokens"].path, length, config.max_rows)
        return lambda model: text_loss(model, rows, BATCH)["bits_per_byte"]
    encoded = _conversations(config, candidates[first].tokenizer, length)
    return lambda model: _answer_loss(model, encoded)


def _length(config: Config, folders: dict) -> int:
    from transformers import AutoConfig

    from pipeline.models.families import positions

    limits = [positions(AutoConfig.from_pretrained(folder, local_files_only=True)) for folder in folders.values()]
    return min([config.sequence_length, *(limit for limit in limits if limit)])


def _conversations(config: Config, tokenizer, length: int) -> list:
    """The held-out conversations as the chat template writes them."""
    from pipeline.data.chat.conversations import load_conversations
    from pipeline.data.chat.template import Chat

    chat = Chat(tokenizer, date=config.date)
    _, heldout, ledger = load_conversations(config.sources, config.holdout)
    ledger.judge(max_bad=1.0)  # nothing is trained here: what is dropped is reported, but is not an error
    encoded = [row for row in chat.encode([row.dialogue for row in heldout]) if not isinstance(row, str)]
    usable = [row for row in encoded if len(row.ids) <= length][: config.max_rows]
    if not usable:
        raise UserError(f"soup: none of {len(heldout)} held-out conversations can be used within {length} tokens")
    if len(usable) < min(len(heldout), config.max_rows):
        say(f"WARNING soup: {plural(len(usable), 'held-out conversation')} of {len(heldout)} can be used")
    return usable


def _answer_loss(model, encoded: list) -> float:
    """Mean loss in nats of the answers' tokens."""
    import torch

    from pipeline.core.distributed import device

    total, count = 0.0, 0
    with torch.no_grad():
        for row in encoded:
            ids = torch.tensor([list(row.ids)], device=device())
            mask = torch.tensor(list(row.trained), device=device(), dtype=torch.bool)[1:]
            logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            own = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
            total -= own[mask].sum().item()
            count += int(mask.sum())
    return total / count


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("soup")
