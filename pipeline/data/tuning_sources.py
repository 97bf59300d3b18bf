"""What a recipe says of the sources of tuning stages: conversations, pairs of answers, prompts, and the templates that
make them of a record. They are read in pipeline/data/conversations.py."""

from typing import Literal

from pydantic import model_validator

from pipeline.data.sources import Source
from pipeline.recipe import Strict


class Message(Strict):
    """One message of a template."""

    role: Literal["system", "user", "assistant", "tool"]
    """Who speaks."""
    content: str
    """What is said: a template such as `{instruction}`."""


class ChatSource(Source):
    """Conversations. Without `messages`, records must hold messages, conversations (ShareGPT), prompt + completion,
    or instruction + output (Alpaca)."""

    messages: list[Message] | None = None
    """Templates of a conversation, in turns."""
    answer: str | None = None
    """Template of the known answer: greedy answers to held-out prompts are then also scored by `rule`."""
    rule: Literal["exact", "contains", "prefix"] = "prefix"
    """How a greedy answer is compared with `answer`."""

    @model_validator(mode="after")
    def _assistant_speaks(self):
        if self.messages is not None and all(message.role != "assistant" for message in self.messages):
            raise ValueError("messages has none with role: assistant, so there is nothing to learn")
        return self


class PreferenceSource(Source):
    """Pairs of answers. Without templates, records must hold prompt, chosen and rejected, as texts or messages (the
    prompt may be implicit in messages)."""

    prompt: str | list[Message] | None = None
    """Template of the user's message, or of several messages."""
    chosen: str | None = None
    """Template of the better answer."""
    rejected: str | None = None
    """Template of the worse answer."""
    margin: str | None = None
    """Template of a number that says how much better."""

    @model_validator(mode="after")
    def _all_or_none(self):
        missing = [key for key in ("prompt", "chosen", "rejected") if getattr(self, key) is None]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"{' and '.join(missing)} is missing: give templates for all of prompt, chosen and rejected, or none"
                " for records that hold these fields"
            )
        return self


class PromptSource(Source):
    """Prompts for the model to answer. Without `prompt`, records must hold prompt, instruction, or a conversation
    that begins with the user."""

    prompt: str | None = None
    """Template of the user's message."""
    answer: str | None = None
    """Template of the known answer, for scores by rule."""
