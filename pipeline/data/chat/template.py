"""Conversations as token ids, by the tokenizer's own chat template, with the tokens that carry loss.

    chat = Chat(tokenizer)
    # Encoded, or a reason why not
    row = chat.encode([[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]])[0]
    # ids that a model answers to
    prompt = chat.prompt([{"role": "user", "content": "2+2?"}])

Three things differ from `tokenizer.apply_chat_template(..., return_assistant_tokens_mask=True)`, all on purpose. An
added token spelled out in a message's text stays text, whether it is marked special or not (else a user could close
their own turn and speak as the assistant); in an answer this holds for special tokens and those that begin or end a
turn, and not for others such as `<think>`, which the model writes itself. What follows the last token that carries loss
is cut off, because no token that counts can see it. And a template that writes today's date writes a fixed one, so that
the same records give the same tokens on every day.
"""

import datetime
import json
import re
from bisect import bisect_left
from dataclasses import dataclass

from pipeline.core.errors import UserError
from pipeline.data.chat.turns import end_of_turn

# Stand-ins for special tokens, from a private-use plane of Unicode: two characters for each token, so that a string
# keeps its length.
PRIVATE = 0xF0000
# Contents of the messages that show what a template writes around them: private-use characters, which no template has.
PROBES = [chr(0x10FFF1 + index) for index in range(3)]
# The date that a template gets where it asks for today's. Llama 3.2's template itself falls back on this day.
DATE = "2024-07-26"


@dataclass(frozen=True)
class Encoded:
    """One conversation."""

    ids: list[int]
    """Token ids; the last one is the end of the last assistant turn."""
    trained: list[bool]
    """Same length: is this token the assistant's (its answer and the end of its turn)?"""

    @property
    def start(self) -> int:
        """Where the last assistant turn begins: `ids[:start]` is the prompt that it answers."""
        end = len(self.trained)
        while end and self.trained[end - 1]:
            end -= 1
        return end


class Chat:
    """The chat template of a tokenizer, checked once: it must mark what the assistant says, the end of its turn
    included. With trained=False for questions and answers that nothing is learned from: any template will do, and
    `end_id` is None where it writes no end of a turn."""

    def __init__(self, tokenizer, trained: bool = True, date: str | None = None):
        """`date` is what a template is given that asks for today's date: YYYY-MM-DD, by default DATE. Raises
        UserError for a tokenizer or a template that cannot be used."""
        self.tokenizer = tokenizer
        self.date = datetime.date.fromisoformat(date or DATE)
        self.writes_date = False
        """Whether the template has asked for the date."""
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        if not tokenizer.is_fast:
            raise UserError(
                f"{name}: has no tokenizer.json; a fast tokenizer is needed, for the tokens that carry loss are found"
                " by character offsets"
            )
        if not tokenizer.chat_template:
            raise UserError(
                f"{name}: has no chat template; use a tokenizer made by stage `tokenizer`, or add chat_template.jinja"
            )
        self._template = self._compiled(name)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        quotable = _quotable(tokenizer, backend)
        self._spelled = _any_of(quotable)
        # stands for the text of a token
        self._quoted = {token: chr(PRIVATE + 2 * i) * len(token) for i, token in enumerate(quotable)}
        # stands for the token itself
        self._named = {token: chr(PRIVATE + 2 * i + 1) * len(token) for i, token in enumerate(quotable)}
        self._texts = {stand_in: token for token, stand_in in self._quoted.items()}
        self._text_of = _any_of(self._texts)
        self._private = re.compile(f"[{chr(PRIVATE)}-{chr(PRIVATE + 2 * len(quotable) + 1)}]")
        self._renamed = _renamed(tokenizer, backend, self._named)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        markers = self._markers()
        self._spelled_in_answers = _any_of([token for token in quotable if token in special | markers])
        if trained:
            self._probe(name)
        else:
            self._cuttable, self.end_id = False, end_of_turn(tokenizer)

    def encode(self, conversations: list[list[dict]]) -> list[Encoded | str]:
        """Ids and mask of each conversation, or the reason why it cannot be trained on."""
        found: list[Encoded | str] = []
        rendered: list[tuple[str, list]] = []
        for messages in conversations:
            try:
                rendered.append(self._render(messages))
                found.append("")
            except _Unusable as error:
                rendered.append(("", []))
                found.append(str(error))
        encodings = self._renamed.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for row, (encoding, (text, spans)) in enumerate(zip(encodings, rendered, strict=True)):
            if not found[row]:
                try:
                    found[row] = cut(*self._ids(encoding, text, spans))
                except _Unusable as error:
                    found[row] = str(error)
        return found

    def prompt(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation that waits for the assistant. Raises ValueError if it cannot be written with this
        template."""
        try:
            text, spans = self._render(messages, add_generation_prompt=True)
            return self._ids(self._renamed.encode(text, add_special_tokens=False), text, spans)[0]
        except _Unusable as error:
            raise ValueError(str(error)) from None

    def answered(self, asked: list[dict], answer: str, ended: bool) -> list[int]:
        """Ids of a prompt and its answer, as a reward model reads them. An answer that was cut off (`ended` false)
        stays open; one that ended is followed by the end of its turn or, where the template has no generation marks, by
        all that the template writes. Raises ValueError if the template cannot write it."""
        try:
            text, spans = self._render([*asked, {"role": "assistant", "content": answer}])
        except _Unusable as error:
            raise ValueError(str(error)) from None
        if ended and not spans:
            return self._renamed.encode(text, add_special_tokens=False).ids
        said = self._restored(self._quote({"role": "assistant", "content": answer})["content"])
        ids = self._renamed.encode(said, add_special_tokens=False).ids
        return [*self.prompt(asked), *ids, *([self.end_id] if ended and self.end_id is not None else [])]

    def reads_like(self, other: "Chat") -> bool:
        """Do both read every conversation as the same ids?"""
        return self._reading() == other._reading()

    def _reading(self) -> tuple:
        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        rules = {key: value for key, value in spec.items() if key not in ("truncation", "padding")}
        return rules, self.tokenizer.chat_template, self.tokenizer.special_tokens_map

    def _ids(self, encoding, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """A token carries loss if it lies in a span. None may reach over the edge of one (a newline of the template
        joined with the answer's first word): the model, asked for an answer, would not see that token. Such a text
        is encoded in pieces, cut at the edges."""
        starts = [offset[0] for offset in encoding.offsets]
        edges = sorted({edge for span in spans for edge in span if 0 < edge < len(text)})
        before = [bisect_left(starts, edge) - 1 for edge in edges]
        if any(index >= 0 and encoding.offsets[index][1] > edge for index, edge in zip(before, edges, strict=True)):
            if not self._cuttable:
                raise _Unusable("a token reaches over the edge of an answer")
            return self._pieces(text, spans, edges)
        trained = [False] * len(starts)
        for begin, end in spans:
            first, last = bisect_left(starts, begin), bisect_left(starts, end)
            trained[first:last] = [True] * (last - first)
        return encoding.ids, trained

    def _pieces(self, text: str, spans: list[tuple[int, int]], edges: list[int]) -> tuple[list[int], list[bool]]:
        ids, trained = [], []
        for begin, end in zip([0, *edges], [*edges, len(text)], strict=True):
            piece = self._renamed.encode(text[begin:end], add_special_tokens=False).ids
            ids += piece
            trained += [any(span[0] <= begin and end <= span[1] for span in spans)] * len(piece)
        return ids, trained

    def _render(self, messages: list[dict], add_generation_prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The template's text, added tokens under their stand-ins, and the character spans that carry loss."""
        if any(self._private.search(message["content"]) for message in messages):
            raise _Unusable("holds private-use characters that stand for special tokens")
        text, spans = self._written([self._quote(message) for message in messages], add_generation_prompt)
        text = self._restored(text)
        answers = [message for message in messages if message["role"] == "assistant"]
        if all("train" not in answer for answer in answers):
            return text, spans
        if len(spans) != len(answers):
            raise _Unusable(
                "has answers that are not to be trained on, and the chat template does not mark each answer"
            )
        return text, [span for span, answer in zip(spans, answers, strict=True) if answer.get("train", True)]

    def _restored(self, text: str) -> str:
        """Text with stand-ins for the tokens in it, and as it was spelled where those of _quote are."""
        text = self._spelled.sub(lambda found: self._named[found[0]], text)
        return self._text_of.sub(lambda found: self._texts[found[0]], text)

    def _quote(self, message: dict) -> dict:
        """Role and content of a message, with stand-ins for the added tokens that its text spells."""
        spelled = self._spelled_in_answers if message["role"] == "assistant" else self._spelled
        content = spelled.sub(lambda found: self._quoted[found[0]], message["content"])
        return {"role": message["role"], "content": content}

    def _written(self, messages: list[dict], add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """What the template makes of messages, and the spans of its generation marks. Raises _Unusable."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        try:
            return _render_with_assistant_indices(
                compiled_template=self._template,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise _Unusable(f"the chat template refuses it: {error}") from None
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # what a template computes may fail
            raise _Unusable(f"the chat template fails on it: {type(error).__name__}: {error}") from None

    def _compiled(self, name: str):
        """The tokenizer's template as transformers compiles it, but with a fixed date. Raises UserError."""
        from jinja2 import TemplateError, nodes
        from transformers.utils.chat_template_utils import _compile_jinja_template

        def strftime_now(form: str) -> str:
            self.writes_date = True
            return self.date.strftime(form)

        try:
            source = self.tokenizer.get_chat_template()
        except ValueError:
            raise UserError(
                f"{name}: has several chat templates ({', '.join(sorted(self.tokenizer.chat_template))}) and none of"
                " them is called default; leave the one to train with in chat_template.jinja"
            ) from None
        try:
            environment = _compile_jinja_template(source).environment
            filters = {node.name for node in environment.parse(source).find_all(nodes.Filter)}
        except TemplateError as error:
            raise UserError(f"{name}: its chat template is no valid Jinja: {error}") from None
        if "random" in filters:
            raise UserError(f"{name}: its chat template draws at random, so that rows would differ from run to run")
        return environment.from_string(source, globals={"strftime_now": strftime_now})

    def _markers(self) -> set[str]:
        """Added tokens that begin or end a turn: all that the template writes in front of a user's message, and the
        first that it writes between a user's message and an answer (what follows may be `<think>`). If the template
        changes or refuses the probing messages, all that there are."""
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": content} for role, content in zip(roles, PROBES, strict=True)]
        try:
            text, _ = self._written(messages, add_generation_prompt=False)
        except _Unusable:
            return set(self._quoted)
        before, asked, rest = text.partition(PROBES[0])
        header, answered, rest = rest.partition(PROBES[1])
        between, again, _ = rest.partition(PROBES[2])
        if not (asked and answered and again):
            return set(self._quoted)
        return {*self._spelled.findall(before), *self._spelled.findall(header)[:1], *self._spelled.findall(between)}

    def _probe(self, name: str) -> None:
        messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        try:
            text, spans = self._render(messages)
        except _Unusable as error:
            raise UserError(f"{name}: its chat template cannot be trained with: {error}") from None
        whole = self._renamed.encode(text, add_special_tokens=False).ids
        # Some tokenizers write the beginning of a text differently (a space in front): their texts cannot be cut.
        edges = [edge for span in spans for edge in span if 0 < edge < len(text)]
        self._cuttable = self._pieces(text, spans, edges)[0] == whole
        row = self.encode([messages])[0]
        if isinstance(row, str):
            raise UserError(
                f"{name}: its chat template cannot be trained with: {row}. It must put what the assistant says, the end"
                " of its turn included, between {% generation %} and {% endgeneration %}"
            )
        self.end_id = row.ids[-1]
        """Token that ends the assistant's turn."""
        if (
            self.end_id not in self.tokenizer.added_tokens_decoder
            or not self.tokenizer.added_tokens_decoder[self.end_id].special
        ):
            raise UserError(
                f"{name}: by its chat template the last token that carries loss is"
                f" {self.tokenizer.convert_ids_to_tokens(self.end_id)!r}, which is no special token: the model would"
                " never learn to end its turn. Move the end-of-turn token to before {% endgeneration %}"
            )
        if row.ids[: row.start] != self.prompt(messages[:1]):
            raise UserError(
                f"{name}: its chat template writes a prompt that waits for an answer differently from one that has it;"
                " the model would be asked what it was never taught"
            )


class _Unusable(Exception):
    """Why a conversation cannot be encoded."""


def cut(ids: list[int], trained: list[bool]) -> Encoded | str:
    """Without what follows the last token that carries loss."""
    if not any(trained):
        return "no token of it carries loss: the chat template marks none as the assistant's"
    length = len(ids) - trained[::-1].index(True)
    return Encoded(ids[:length], trained[:length])


def _any_of(texts) -> re.Pattern:
    """A pattern that finds any of `texts`, the longest first; of none, nothing."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or "(?!)")


def _quotable(tokenizer, backend: dict) -> list[str]:
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


def _renamed(tokenizer, backend: dict, names: dict[str, str]):
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
    renamed = Tokenizer.from_str(json.dumps(spec))
    assert all(renamed.token_to_id(names[token]) == index for token, index in ids.items()), "an added token lost its id"
    return renamed
