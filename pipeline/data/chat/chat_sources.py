"""Keys of the sources of tuning stages: where conversations, pairs of answers and prompts are, and the templates that
make them from a record. They are read in pipeline/data/chat/conversations.py."""

from typing import Literal

from pydantic import field_validator, model_validator

from pipeline.core.config import Strict, refuse_unused
from pipeline.data.sources.sources import Source


class Message(Strict):
    """One message of a template."""

    role: Literal["system", "user", "assistant", "tool"]
    """Who speaks."""
    content: str
    """What is said: a template such as `{instruction}`."""


# Fields that hold a conversation, a pair or a prompt without templates.
HOLDING = {"messages", "conversations", "conversation", "prompt", "instruction", "chosen", "rejected", "chat"}


class TuningSource(Source):
    """What sources of all tuning stages have. A record is not a document, so there is no key `text`."""

    UNUSED = frozenset({"text"})

    ignore: list[str] = []
    """Fields of records, messages and content parts that are ignored because they say nothing about what should be
    learned (docs/chat.md lists fields that are ignored anyway)."""

    @field_validator("ignore")
    @classmethod
    def _whole_names(cls, value: list[str]) -> list[str]:
        if carriers := {"role", "content", "from", "value"} & set(value):
            raise ValueError(f"ignore: {min(carriers)!r} carries the conversation itself")
        return value

    def templates(self) -> list[str]:
        """Templates of what is read from a record in addition to its messages."""
        return []

    @model_validator(mode="after")
    def _no_document(self):
        for key in self.UNUSED:
            refuse_unused(
                self, key, "is for documents; conversations come from templates, or from fields of the record"
            )
        if not self.has_templates():
            refuse_unused(self, "join", "separates the items of a list that a template names, and there is no template")
        return self

    def has_templates(self) -> bool:
        return bool(self.templates())

    def all_templates(self) -> list[str]:
        """Templates of everything that is read from a record."""
        keys = {"messages", "prompt", "completion", "chosen", "rejected", "label", "answer", "margin"}
        written = []
        for value in self.model_dump(include=keys, exclude_none=True).values():
            written += [turn["content"] for turn in value] if isinstance(value, list) else [value]
        return written

    def is_record(self, value: dict) -> bool:
        """Whether an object that is alone in a json file is a record: it has a field that holds a conversation, a pair
        or a prompt."""
        return not HOLDING.isdisjoint(value)


class ChatSource(TuningSource):
    """Conversations. Without `messages`, records must hold messages, conversations (ShareGPT), prompt + completion,
    instruction + output (Alpaca), or system + chat (glaive)."""

    messages: list[Message] | None = None
    """Templates of a conversation, in turns."""
    answer: str | None = None
    """Template of the known answer: greedy answers to held-out prompts are then also scored by `rule`."""
    rule: Literal["exact", "contains", "prefix"] = "prefix"
    """How a greedy answer is compared with `answer`."""

    def templates(self) -> list[str]:
        return [] if self.answer is None else [self.answer]

    def has_templates(self) -> bool:
        return self.messages is not None or super().has_templates()

    @model_validator(mode="after")
    def _assistant_speaks(self):
        if self.messages is not None and all(message.role != "assistant" for message in self.messages):
            raise ValueError("messages has none with role: assistant, so there is nothing to learn")
        if self.answer is None:
            refuse_unused(self, "rule", "says how answers are compared with `answer`, and there is none")
        return self


class PreferenceSource(TuningSource):
    """Pairs of answers. Without templates, records must hold prompt, chosen and rejected, as texts or messages (the
    prompt may be implicit in messages), and may hold `margin`."""

    prompt: str | list[Message] | None = None
    """Template of the user's message, or of several messages."""
    chosen: str | None = None
    """Template of the better answer."""
    rejected: str | None = None
    """Template of the worse answer."""
    margin: str | None = None
    """Template of a number that says how much better; by default the record's `margin`, where it has one and no
    templates are given."""

    def templates(self) -> list[str]:
        return [] if self.margin is None else [self.margin]

    def has_templates(self) -> bool:
        return self.prompt is not None or super().has_templates()

    @model_validator(mode="after")
    def _all_or_none(self):
        missing = [key for key in ("prompt", "chosen", "rejected") if getattr(self, key) is None]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"{' and '.join(missing)} is missing: give templates for all of prompt, chosen and rejected, or none"
                " for records that hold these fields"
            )
        return self


class LabelledSource(TuningSource):
    """Judged answers (KTO). Without templates, records must hold a conversation that ends with the answer, and
    `label` (or `kto_tag`): true for a good answer, false for a bad one."""

    prompt: str | list[Message] | None = None
    """Template of the user's message, or of several messages."""
    completion: str | None = None
    """Template of the answer."""
    label: str | None = None
    """Template of the judgement: true, false, 1 or 0."""

    def has_templates(self) -> bool:
        return self.prompt is not None or super().has_templates()

    @model_validator(mode="after")
    def _all_or_none(self):
        missing = [key for key in ("prompt", "completion", "label") if getattr(self, key) is None]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"{' and '.join(missing)} is missing: give templates for all of prompt, completion and label, or none"
                " for records that hold these fields"
            )
        return self


class StepSource(TuningSource):
    """Answers in steps, each judged right or wrong (process reward models). Records must hold `prompt`, `completions`
    (a list of texts) and `labels` (true or false for each), or `input` and `label` as Math-Shepherd has them."""


class PromptSource(TuningSource):
    """Prompts for the model to answer. Without `prompt`, records must hold prompt, instruction, or a conversation,
    of which all before its last answer is the prompt."""

    prompt: str | list[Message] | None = None
    """Template of the user's message, or of several messages."""
    answer: str | None = None
    """Template of the known answer, for scores by rule."""

    def templates(self) -> list[str]:
        return [] if self.answer is None else [self.answer]

    def has_templates(self) -> bool:
        return self.prompt is not None or super().has_templates()


class RewardedSource(PromptSource):
    """Prompts of stages that compute rewards."""

    reward_fields: list[str] = []
    """Fields of records that rewards and tools get by their names, such as tests."""

    @field_validator("reward_fields")
    @classmethod
    def _not_given_anyway(cls, value: list[str]) -> list[str]:
        for name in value:
            if name in ("response", "prompt", "finished"):
                raise ValueError(f"{name!r} is what rewards are given of the response; rename the field")
        return value
