"""Prompts as the policy reads them: what ppo and grpo answer."""

from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from pipeline.core.errors import UserError
from pipeline.core.output import Output
from pipeline.data.chat.conversations import Prompt, load_prompts
from pipeline.data.chat.rendering import Dialogue
from pipeline.data.chat.template import Chat
from pipeline.rl.tool_config import Toolbox
from pipeline.train.finetune_data import SPLITS, Arrays, report_records


@dataclass(frozen=True)
class Task:
    """A prompt as the policy reads it."""

    ids: list[int]
    dialogue: Dialogue
    text: str
    """The messages for a person to read."""
    answer: str | None
    fields: dict = field(default_factory=dict)
    """What rewards and tools get of the record, by name."""


class Prompts(NamedTuple):
    """What the models of a run need to know of its prompts."""

    count: int
    """How many are trained on."""
    longest: int
    """Tokens of the longest one, held-out ones included."""


def encoded_prompts(config, policy_chat: Chat, judges: list[Chat], output: Output) -> tuple[Arrays, dict]:
    """Tasks of both splits as JSON, and `counts` of them; writes report.json. For `encode_once`.

    A prompt that does not leave room for `rollout.max_new_tokens` is dropped, and so is one that a chat template cannot
    write. judges: of the models that score responses.
    """
    train, heldout, ledger = load_prompts(config.sources, config.holdout, config.decontaminate)
    heldout.sort(key=lambda prompt: prompt.id)  # a hash: the first of them are a mixture of all sources
    limit = config.sequence_length - config.rollout.max_new_tokens
    others = [chat for chat in judges if not policy_chat.reads_like(chat)]
    toolbox = Toolbox(config.tools)
    extra: dict = {}
    too_long = 0
    for split, prompts in zip(SPLITS, (train, heldout), strict=True):
        tasks = []
        for prompt in prompts:
            _check_answer(config, prompt)
            reason = None
            try:
                dialogue = _with_tools(toolbox, prompt)
                ids = policy_chat.prompt(dialogue)
                for chat in others:
                    chat.prompt(dialogue)
                if len(ids) > limit:
                    reason = f"longer than {limit} tokens (sequence_length - rollout.max_new_tokens)"
                    too_long += 1
            except ValueError as error:  # text that a chat template cannot carry
                reason = str(error)
            if reason is None:
                tasks.append(asdict(Task(ids, dialogue, prompt.text, prompt.answer, prompt.fields)))
            else:
                ledger.withdraw(prompt, split, reason)
        if not tasks:
            reasons = "; ".join(sorted({reason for entry in ledger.sources.values() for reason in entry["rejected"]}))
            raise UserError(f"stage {config.kind}: none of {len(prompts)} {split} prompts can be used: {reasons}")
        extra[split] = tasks
    extra["counts"] = {
        "train_prompts": len(extra["train"]),
        "heldout_prompts": len(extra["heldout"]),
        "prompts_too_long": too_long,
    }
    report_records(ledger, config, output, counts=extra["counts"])
    return {}, extra


def tasks_of(extra: dict, split: str) -> list[Task]:
    tasks = []
    for task in extra[split]:
        dialogue = Dialogue(**task["dialogue"])
        tasks.append(Task(task["ids"], dialogue, task["text"], task["answer"], task.get("fields", {})))
    return tasks


def _with_tools(toolbox: Toolbox, prompt: Prompt) -> Dialogue:
    """A prompt with the recipe's tools, or with those of them that its record describes. Raises ValueError for a record
    that describes another one."""
    if not toolbox.tools:
        return prompt.dialogue
    if prompt.tools is None:
        return replace(prompt.dialogue, tools=toolbox.definitions(prompt.fields))
    for tool in prompt.tools:
        name = tool["function"]["name"]
        if name not in toolbox.tools:
            raise ValueError(f"the record has a tool {name!r} that is not one of the recipe's tools")
    return prompt.dialogue


def _check_answer(config, prompt: Prompt) -> None:
    """Raise UserError for a prompt without a known answer, if `rule` needs one."""
    if config.rule and not (prompt.answer or "").strip():
        raise UserError(
            f"stage {config.kind}: rule: {config.rule} needs an answer to compare with, but source {prompt.source}"
            f" gives none ({prompt.place}); give `answer` for the source, or remove `rule`"
        )
