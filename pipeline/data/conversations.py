"""What the tuning stages read: conversations, pairs of answers, and prompts, from the same named sources as everything
else.

    train, heldout, ledger = load_conversations({"reviews": ChatSource(path="reviews.jsonl", messages=[...])},
    holdout=0.1)

A source says with templates how a record becomes messages; a record that holds a conversation already needs none
(messages, ShareGPT conversations, prompt + completion, Alpaca's instruction + input + output). Text is normalised as in
cleaning. Exact duplicates are dropped. A record is held out if its own hash says so, and so in every stage; what is
like a held-out record is then dropped from training. Nothing is dropped silently: the ledger counts each reason and
names the first places.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.decontaminate import Decontaminate, contaminated
from pipeline.data.formats import Bad
from pipeline.data.messages import Rejected, clean_text, messages_of, normal, normalised, pair_of, prompt_of
from pipeline.data.records import fraction, other_encoding, read
from pipeline.data.templates import MissingField, render
from pipeline.data.tuning_ledger import Ledger
from pipeline.data.tuning_sources import ChatSource, Message, PreferenceSource, PromptSource
from pipeline.errors import UserError
from pipeline.plural import many


@dataclass(frozen=True)
class Conversation:
    """Messages up to the last one of the assistant."""

    id: str
    source: str
    place: str
    messages: list[dict]
    content: str
    """What the record itself says, without the words of templates: near duplicates are looked for in it."""
    answer: str | None = None
    rule: str = "prefix"


@dataclass(frozen=True)
class Pair:
    """Two answers, each one message of the assistant, to the same messages."""

    id: str
    source: str
    place: str
    prompt: list[dict]
    chosen: str
    rejected: str
    content: str
    margin: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """One message of the user."""

    id: str
    source: str
    text: str
    answer: str | None
    place: str = ""
    content: str = ""


def load_conversations(
    sources: dict[str, ChatSource], holdout: float, decontaminate: Decontaminate | None = None
) -> tuple[list[Conversation], list[Conversation], Ledger]:
    """Conversations to train on and held out."""

    def make(source: ChatSource, name: str, record) -> Conversation:
        if source.messages is None:
            messages = normalised(messages_of(record.fields))
            content = _said(messages)
        else:
            messages = normalised(_filled(source.messages, record.fields))
            content = _brought([message.content for message in source.messages], record.fields)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise Rejected("no message of the assistant")
        answer = (
            None if source.answer is None else clean_text(render(source.answer, record.fields, "the record"), "answer")
        )
        return Conversation(record.id, name, record.place, messages, content, answer, source.rule)

    rows, ledger = _gathered(sources, make, lambda row: _key(row.messages), decontaminate)
    return _split(rows, ledger, holdout, lambda row: _key(row.messages[:-1]))


def load_pairs(
    sources: dict[str, PreferenceSource], holdout: float, decontaminate: Decontaminate | None = None
) -> tuple[list[Pair], list[Pair], Ledger]:
    """Pairs of answers to train on and held out."""

    def make(source: PreferenceSource, name: str, record) -> Pair:
        templates = (source.prompt, source.chosen, source.rejected)
        if all(template is None for template in templates):
            prompt, chosen, rejected = pair_of(record.fields)
            prompt = normalised(prompt)
            content = f"{_said(prompt)}\n{chosen}\n{rejected}"
        else:
            turns = source.prompt if isinstance(source.prompt, list) else [Message(role="user", content=source.prompt)]
            prompt = normalised(_filled(turns, record.fields))
            chosen, rejected = (
                render(template, record.fields, "the record") for template in (source.chosen, source.rejected)
            )
            content = _brought([*(turn.content for turn in turns), source.chosen, source.rejected], record.fields)
        chosen, rejected = clean_text(chosen, "chosen"), clean_text(rejected, "rejected")
        if not prompt or prompt[-1]["role"] == "assistant":
            raise Rejected("the prompt does not end with the user")
        if chosen == rejected:
            raise Rejected("chosen equals rejected")
        return Pair(
            record.id, name, record.place, prompt, chosen, rejected, content, _number(source.margin, record.fields)
        )

    rows, ledger = _gathered(sources, make, lambda row: _key([row.prompt, row.chosen, row.rejected]), decontaminate)
    return _split(rows, ledger, holdout, lambda row: _key(row.prompt))


def load_prompts(
    sources: dict[str, PromptSource], holdout: float, decontaminate: Decontaminate | None = None
) -> tuple[list[Prompt], list[Prompt], Ledger]:
    """Prompts to train on and held out, each prompt once."""

    def make(source: PromptSource, name: str, record) -> Prompt:
        if source.prompt is None:
            messages = normalised(prompt_of(record.fields))
            if [message["role"] for message in messages[:2]] not in (["user"], ["user", "assistant"]) or sum(
                m["role"] == "user" for m in messages
            ) > 1:
                raise Rejected("the prompt is not one message of the user")
            text = content = messages[0]["content"]
        else:
            text = clean_text(render(source.prompt, record.fields, "the record"), "prompt")
            content = _brought([source.prompt], record.fields)
        answer = (
            None if source.answer is None else clean_text(render(source.answer, record.fields, "the record"), "answer")
        )
        return Prompt(record.id, name, text, answer, record.place, content)

    rows, ledger = _gathered(sources, make, lambda row: _key(row.text), decontaminate)
    train, heldout, ledger = _split(rows, ledger, holdout, lambda row: _key(row.text))
    for rows, split in ((train, "train"), (heldout, "heldout")):
        ledger.keep(rows, split, [None] * len(rows))
    ledger.check(holdout)
    return train, heldout, ledger


def prompt_ids(tokenizer, text: str) -> list[int]:
    """Token ids of one message of the user, up to where the assistant begins."""
    return _chat(tokenizer).prompt([{"role": "user", "content": text}])


@functools.lru_cache(4)
def _chat(tokenizer):
    from pipeline.data.chat import Chat

    return Chat(tokenizer, trained=False)


# ---- from records to rows --------------------------------------------------------------------------------------------


def _gathered(sources: dict, make: Callable, key: Callable, decontaminate: Decontaminate | None) -> tuple[list, Ledger]:
    """Rows of all sources, in order, each text once, and none that has text of an evaluation set."""
    if not sources:
        raise UserError("sources: name at least one source")
    ledger, rows, seen = Ledger(), [], set()
    for name, source in sources.items():
        for item in read(source, name):
            ledger.count(name, "records")
            if isinstance(item, Bad):
                ledger.reject(name, item.place, item.reason)
                continue
            try:
                row = make(source, name, item)
            except (Rejected, MissingField) as error:
                ledger.reject(name, item.place, str(error).removeprefix("the record: "))
                continue
            digest = key(row)
            if digest in seen:
                ledger.reject(name, item.place, "duplicate")
            else:
                seen.add(digest)
                rows.append(row)
        if name not in ledger.sources:
            raise UserError(
                f"sources.{name}: has no"
                f" records{' after where, part and limit' if source.where or source.part != (0.0, 1.0) else ''}"
            )
        if ledger.sources[name]["records"] == sum(
            reason["count"] for reason in ledger.sources[name]["rejected"].values()
        ):
            raise UserError(
                f"sources.{name}: none of its {many(ledger.sources[name]['records'], 'record')} can be used:"
                f" {ledger.why(name)}"
                f"{''.join(other_encoding(source, reason) for reason in ledger.sources[name]['rejected'])}"
            )
    if decontaminate:
        found, ledger.evaluation = contaminated(map(_read, rows), decontaminate)
        for row, match in zip(rows, found, strict=True):
            if match:
                ledger.reject(row.source, row.place, f"has text of the evaluation set {match}")
        rows = [row for row, match in zip(rows, found, strict=True) if not match]
    return rows, ledger


def _split(rows: list, ledger: Ledger, holdout: float, prompt: Callable) -> tuple[list, list, Ledger]:
    """Held-out rows are chosen by their own hash; training rows that answer a held-out prompt, or nearly repeat a
    held-out row, are dropped."""
    from pipeline.data.dedup import near_duplicates

    heldout = [row for row in rows if fraction(row.id) >= 1 - holdout]
    asked = {prompt(row) for row in heldout}
    train = []
    for row in rows:
        if fraction(row.id) < 1 - holdout:
            if prompt(row) in asked:
                ledger.reject(row.source, row.place, "its prompt is held out")
            else:
                train.append(row)
    cluster = near_duplicates([row.content for row in heldout] + [row.content for row in train])
    taken = set(cluster[: len(heldout)].tolist())
    fresh = []
    for row, label in zip(train, cluster[len(heldout) :].tolist(), strict=True):
        if label in taken:
            ledger.reject(row.source, row.place, "near duplicate of a held-out row")
        else:
            fresh.append(row)
    return fresh, heldout, ledger


def _filled(messages: list[Message], fields: dict) -> list[dict]:
    return [{"role": message.role, "content": render(message.content, fields, "the record")} for message in messages]


def _brought(templates: list[str], fields: dict) -> str:
    """The values that templates take from a record. Their own words, the same in every row, would make short rows
    look like copies of each other."""
    names = [
        name
        for template in templates
        for name in re.findall(r"\{([^{}]+)\}", template.replace("{{", "").replace("}}", ""))
    ]
    return normal("\n".join(render("{" + name + "}", fields) for name in dict.fromkeys(names)))


def _said(messages: list[dict]) -> str:
    """What is said in a conversation, but for the system's message, which many rows share."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def _read(row) -> str:
    """All that a model is trained on in a row, or reads before it: for evaluation sets also the system's message."""
    messages = row.messages if isinstance(row, Conversation) else row.prompt if isinstance(row, Pair) else []
    return "\n".join([*(message["content"] for message in messages if message["role"] == "system"), row.content])


def _key(value) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def _number(template: str | None, fields: dict) -> float:
    if template is None:
        return 0.0
    text = render(template, fields, "the record")
    try:
        return float(text)
    except ValueError:
        raise Rejected("margin is no number") from None
