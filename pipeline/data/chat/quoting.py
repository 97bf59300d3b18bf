"""Added tokens that are spelled out in a message's text: they stay text, whether marked special or not, else a user
could close their own turn and speak as the assistant.

Each added token has two stand-ins of private-use characters, as long as its spelling, so that a text keeps its length
and its positions: one for its text in a message, one for the token itself where the template writes it. A copy of the
tokenizer knows the tokens by the second ones.
"""

import json
import re
from dataclasses import replace

from pipeline.data.chat.rendering import Dialogue, Unusable

# From a private-use plane of Unicode: two characters for each token.
PRIVATE = 0xF0000
# What a model writes around its reasoning stays a token in an answer even where it is marked special.
REASONING_TOKENS = {"<think>", "</think>"}


class Quoting:
    """Stand-ins of a tokenizer's added tokens."""

    def __init__(self, tokenizer, backend: dict):
        """`backend`: the tokenizer's tokenizer.json."""
        quotable = quotable_tokens(tokenizer, backend)
        self.spelled = any_of(quotable)
        """Finds the spelling of an added token."""
        # stands for the text of a token
        self._quoted = {token: chr(PRIVATE + 2 * i) * len(token) for i, token in enumerate(quotable)}
        # stands for the token itself
        self._named = {token: chr(PRIVATE + 2 * i + 1) * len(token) for i, token in enumerate(quotable)}
        self._texts = {stand_in: token for token, stand_in in self._quoted.items()}
        self._text_of = any_of(self._texts)
        self._private = re.compile(f"[{chr(PRIVATE)}-{chr(PRIVATE + 2 * len(quotable) + 1)}]")
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = special - REASONING_TOKENS
        self._spelled_in_answers = self.spelled
        self.tokenizer = renamed(tokenizer, backend, self._named)
        """The tokenizer that knows added tokens by their stand-ins, without post-processor and padding."""

    def let_answers_write(self, markers: set[str]) -> None:
        """From here on added tokens are also tokens in an answer that spells them, but for special ones and for
        `markers`, those that begin or end a turn."""
        self._spelled_in_answers = any_of([token for token in self._quoted if token in self._special | markers])

    def dialogue(self, dialogue: Dialogue) -> Dialogue:
        """A dialogue with stand-ins for the added tokens that its texts spell. Raises Unusable."""
        messages = [self._message(message) for message in dialogue.messages]
        tools = None if dialogue.tools is None else self._value(dialogue.tools, self.spelled)
        options = {name: self._value(value, self.spelled) for name, value in dialogue.options.items()}
        return replace(dialogue, messages=messages, tools=tools, options=options)

    def _message(self, message: dict) -> dict:
        spelled = self._spelled_in_answers if message["role"] == "assistant" else self.spelled
        return {
            key: value if key in ("role", "weight") else self._value(value, spelled) for key, value in message.items()
        }

    def _value(self, value, spelled: re.Pattern):
        """A text, or the texts at any depth of an object, quoted."""
        if isinstance(value, str):
            return self.text(value, spelled)
        if isinstance(value, dict):
            return {self.text(str(key), spelled): self._value(inner, spelled) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._value(inner, spelled) for inner in value]
        return value

    def text(self, text: str, spelled: re.Pattern | None = None) -> str:
        """A text with stand-ins for the tokens that `spelled` finds, by default those that an answer must not
        write."""
        if self._private.search(text):
            raise Unusable("holds private-use characters that stand for special tokens")
        return (spelled or self._spelled_in_answers).sub(lambda match: self._quoted[match[0]], text)

    def named(self, text: str) -> str:
        """What `tokenizer` encodes for a text that the template wrote: stand-ins for the tokens in it, and as it was
        spelled what messages spell."""
        return self.plain(self.spelled.sub(lambda match: self._named[match[0]], text))

    def plain(self, text: str) -> str:
        """A text that the template wrote, as a person reads it."""
        return self._text_of.sub(lambda match: self._texts[match[0]], text)


def any_of(texts) -> re.Pattern:
    """A pattern that finds any of `texts`, the longest first; of none, nothing."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")


def quotable_tokens(tokenizer, backend: dict) -> list[str]:
    """Added tokens that text must not become by spelling them. All but two kinds, which are ordinary text: runs of
    white space, and what the merges of the vocabulary make of text anyway (Gemma's tokenizer has both)."""
    merged = set()
    for merge in backend["model"].get("merges", []):
        merged.add("".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1))
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or not (token.content.isspace() or token.content in merged)
    ]


def renamed(tokenizer, backend: dict, names: dict[str, str]):
    """The same tokenizer with other spellings of some added tokens, so that text that spells one of the old ones is
    text.

    The merges, the normaliser and the way in which added tokens split a text stay the tokenizer's own: ids of
    ordinary text are equal. `backend` is its tokenizer.json.
    """
    from tokenizers import Tokenizer

    spec = {**backend, "model": dict(backend["model"])}
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in names}
    spec["added_tokens"] = [
        {**token, "content": names.get(token["content"], token["content"])} for token in backend["added_tokens"]
    ]
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, dict):
        spec["model"]["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    else:  # Unigram: [token, score]
        spec["model"]["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if spec["model"].get("unk_token") in names:
        spec["model"]["unk_token"] = names[spec["model"]["unk_token"]]
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    copy = Tokenizer.from_str(json.dumps(spec))
    assert all(copy.token_to_id(names[token]) == index for token, index in ids.items()), "an added token lost its id"
    return copy
