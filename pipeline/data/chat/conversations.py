"""What the tuning stages read: conversations, pairs of answers, judged answers, answers with judged steps, and prompts,
from the same named sources as everything else.

    train, heldout, ledger = load_conversations({"reviews": ChatSource(path="reviews.jsonl", messages=[...])},
    holdout=0.1)

A source says with templates how a record becomes messages; a record that holds a conversation already needs none
(pipeline/data/chat/record_formats.py). Text is kept as it was written. Exact duplicates are dropped. A record is held
out if its own hash says so, and so in every stage; what is like a held-out record is then dropped from training.
Nothing is dropped silently: the ledger counts each reason and names the first places.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.core.errors import UserError
from pipeline.core.terminal import plural
from pipeline.data.chat.chat_sources import (
    ChatSource,
    LabelledSource,
    Message,
    PreferenceSource,
    PromptSource,
    RewardedSource,
    StepSource,
    TuningSource,
)
from pipeline.data.chat.fields import Rejected
from pipeline.data.chat.messages import (
    checked_text,
    comparison_text,
    fields_present,
    parse_messages,
    without_fields,
    without_nulls,
    without_weight,
)
from pipeline.data.chat.record_accounting import EVALUATE, Ledger, key_of
from pipeline.data.chat.record_fields import number, truth_of
from pipeline.data.chat.record_formats import (
    conversation_of,
    conversation_text,
    labelled_of,
    pair_of,
    prompt_of,
    steps_of,
)
from pipeline.data.chat.rendering import Dialogue
from pipeline.data.dedup.decontaminate import Decontaminate, find_contaminated
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import Record, encoding_advice, fraction, read
from pipeline.data.sources.source_checks import has_list, is_join_given, refuse_join
from pipeline.data.sources.templates import MissingField, fields_of, parse_template, render

BY_TEMPLATES = "templates of the recipe"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What all rows have."""

    id: str
    source: str
    place: str
    content: str
    """What the record itself says, without the words of templates: near duplicates are looked for in it."""
    format: str = BY_TEMPLATES
    """The format that the record was recognised to have."""
    tools: list[dict] | None = None
    """Functions that the assistant may call."""
    options: dict = field(default_factory=dict)
    """Variables of the chat template that the record gives."""

    def dialogue_of(self, messages: list[dict]) -> Dialogue:
        """Messages as a chat template gets them."""
        return Dialogue(messages, self.tools, self.options)


@dataclass(frozen=True, kw_only=True)
class Conversation(Row):
    """Messages up to the last answer that is trained on. An answer with `weight: 0` carries no loss."""

    messages: list[dict]
    answer: str | None = None
    rule: str = "prefix"

    @property
    def dialogue(self) -> Dialogue:
        return self.dialogue_of(self.messages)


@dataclass(frozen=True, kw_only=True)
class Pair(Row):
    """Two answers, each one message of the assistant, to the same messages."""

    prompt: list[dict]
    chosen: dict
    rejected: dict
    margin: float = 0.0

    @property
    def dialogues(self) -> tuple[Dialogue, Dialogue]:
        """The prompt with the chosen answer, and with the rejected one."""
        return self.dialogue_of([*self.prompt, self.chosen]), self.dialogue_of([*self.prompt, self.rejected])


@dataclass(frozen=True, kw_only=True)
class Labelled(Row):
    """One answer to messages, and whether it is a good one (KTO)."""

    prompt: list[dict]
    answer: dict
    label: bool

    @property
    def dialogue(self) -> Dialogue:
        return self.dialogue_of([*self.prompt, self.answer])


@dataclass(frozen=True, kw_only=True)
class Stepped(Row):
    """An answer in steps to messages, and whether each step is right. Its `id` is that of its prompt: the many answers
    to one prompt, which such sets have, are held out together."""

    prompt: list[dict]
    steps: list[str]
    labels: list[bool]

    def pieces(self, separator: str) -> list[str]:
        """The parts of the answer: each step but the last with the separator after it."""
        return [f"{step}{separator}" for step in self.steps[:-1]] + self.steps[-1:]

    def dialogue(self, separator: str) -> Dialogue:
        answer = {"role": "assistant", "content": separator.join(self.steps)}
        return self.dialogue_of([*self.prompt, answer])


@dataclass(frozen=True, kw_only=True)
class Prompt(Row):
    """Messages that wait for an answer."""

    messages: list[dict]
    answer: str | None
    fields: dict = field(default_factory=dict)
    """What rewards get of the record, by name."""

    @property
    def dialogue(self) -> Dialogue:
        return self.dialogue_of(self.messages)

    @property
    def text(self) -> str:
        """The messages for a person to read."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)


def load_conversations(
    sources: dict[str, ChatSource], holdout: float, decontaminate: Decontaminate | None = None
) -> tuple[list[Conversation], list[Conversation], Ledger]:
    """Conversations to train on and held out. Here and below, a source that is named evaluate.NAME is a held-out file:
    all of it is held out, behind what is held out of the others."""
    rows, ledger = _collect(sources, lambda row: _digest([row.messages, row.tools, row.options]), decontaminate)
    return _split(rows, ledger, holdout, lambda row: _prompt_key(row.messages[:-1]))


def load_pairs(
    sources: dict[str, PreferenceSource], holdout: float, decontaminate: Decontaminate | None = None
) -> tuple[list[Pair], list[Pair], Ledger]:
    """Pairs of answers to train on and held out."""
    rows, ledger = _collect(
        sources, lambda row: _digest([row.prompt, row.chosen, row.rejected, row.tools, row.options]), decontaminate
    )
    return _split(rows, ledger, holdout, lambda row: _prompt_key(row.prompt))


def load_labelled(
    sources: dict[str, LabelledSource], holdout: float, decontaminate: Decontaminate | None = None
) -> tuple[list[Labelled], list[Labelled], Ledger]:
    """Judged answers to train on and held out."""
    rows, ledger = _collect(
        sources, lambda row: _digest([row.prompt, row.answer, row.label, row.tools, row.options]), decontaminate
    )
    return _split(rows, ledger, holdout, lambda row: _prompt_key(row.prompt))


def load_stepped(
    sources: dict[str, StepSource], holdout: float, decontaminate: Decontaminate | None = None
) -> tuple[list[Stepped], list[Stepped], Ledger]:
    """Answers with judged steps to train on and held out."""
    rows, ledger = _collect(
        sources, lambda row: _digest([row.prompt, row.steps, row.labels, row.tools, row.options]), decontaminate
    )
    return _split(rows, ledger, holdout, lambda row: _prompt_key(row.prompt))


def load_prompts(
    sources: dict[str, PromptSource], holdout: float, decontaminate: Decontaminate | None = None
) -> tuple[list[Prompt], list[Prompt], Ledger]:
    """Prompts to train on and held out, each prompt once."""
    rows, ledger = _collect(sources, lambda row: _digest([row.messages, row.tools, row.options]), decontaminate)
    train, heldout, ledger = _split(rows, ledger, holdout, lambda row: _prompt_key(row.messages))
    for rows, split in ((train, "train"), (heldout, "heldout")):
        ledger.keep(rows, split, [None] * len(rows))
    ledger.check(holdout)
    return train, heldout, ledger


def first_usable(source: TuningSource, name: str, most: int = 1000, encode: Callable | None = None):
    """The first row that a tuning source gives, looking at no more than `most` records: a Conversation, Pair or Prompt.
    `encode(row)` may say why a row cannot be written with a chat template, or return None. Raises UserError if the
    source has no records, or none of these can be used."""
    _refuse_unused_join(source, name, most)
    ledger = Ledger()
    for row in rows_of(source, name, ledger, most):
        reason = None if encode is None else encode(row)
        if reason is None:
            return row
        ledger.reject(name, row.place, reason)
    _refuse_empty(source, name, ledger)


def _refuse_unused_join(source: TuningSource, name: str, most: int) -> None:
    """Raise UserError for a `join` although the fields of the templates are no lists."""
    if not is_join_given(source):
        return
    names = set().union(*map(fields_of, source.all_templates()))
    looked_at = 0
    for item in itertools.islice(_items(source, name), most):
        if isinstance(item, Record):
            looked_at += 1
            if has_list(names, item.fields):
                return
    if looked_at:
        refuse_join(source, f"sources.{name}", names, looked_at)


def rows_of(source: TuningSource, name: str, ledger: Ledger, most: int | None = None) -> Iterator:
    """The rows of the first `most` records of a source, duplicates included; the ledger counts the records and why
    some of them become none."""
    for item in itertools.islice(_items(source, name), most):
        row = _row(source, name, item, ledger)
        if row is not None:
            yield row


# ---- from a record to a row ------------------------------------------------------------------------------------------


def _conversation(source: ChatSource, common: dict, fields: dict) -> Conversation:
    if source.messages is None:
        parsed = conversation_of(fields, _named(source))
        messages = parsed.messages
        common |= {"content": comparison_text(conversation_text(messages)), "format": parsed.format}
        common |= {"tools": parsed.tools, "options": parsed.options}
    else:
        messages = parse_messages(_filled(source.messages, fields, source.join))
        common["content"] = _template_values([message.content for message in source.messages], fields)
    if all(message["role"] != "assistant" for message in messages):
        raise Rejected("no message of the assistant")
    while messages and (messages[-1]["role"] != "assistant" or messages[-1].get("weight") == 0):
        messages.pop()  # nothing that is learned can see it
    if not messages:
        raise Rejected("all messages of the assistant are marked not to be trained on")
    return Conversation(**common, messages=messages, answer=_known_answer(source, fields), rule=source.rule)


def _pair(source: PreferenceSource, common: dict, fields: dict) -> Pair:
    margin = 0.0
    if source.prompt is None:
        parsed = pair_of(fields, _named(source))
        prompt, chosen, rejected = parsed.messages, parsed.chosen, parsed.rejected
        common |= {
            "content": comparison_text(
                f"{conversation_text(prompt)}\n{conversation_text([chosen])}\n{conversation_text([rejected])}"
            )
        }
        common |= {"format": parsed.format, "tools": parsed.tools, "options": parsed.options}
        margin = parsed.margin or 0.0
    else:
        turns = _turns(source.prompt)
        prompt = parse_messages(_filled(turns, fields, source.join))
        chosen = _answer_of(source.chosen, "chosen", fields, source.join)
        rejected = _answer_of(source.rejected, "rejected", fields, source.join)
        common["content"] = _template_values(
            [*(turn.content for turn in turns), source.chosen, source.rejected], fields
        )
    if not prompt or prompt[-1]["role"] == "assistant":
        raise Rejected("the prompt does not end with the user")
    if chosen == rejected:
        raise Rejected("chosen equals rejected")
    if source.margin is not None:
        margin = number(render(source.margin, fields, "the record", source.join))
    if margin < 0:
        raise Rejected("margin is negative: it says that the rejected answer is better")
    return Pair(**common, prompt=prompt, chosen=chosen, rejected=rejected, margin=margin)


def _labelled(source: LabelledSource, common: dict, fields: dict) -> Labelled:
    if source.prompt is None:
        parsed, label = labelled_of(fields, _named(source))
        *prompt, answer = parsed.messages
        common |= {"content": comparison_text(conversation_text(parsed.messages)), "format": parsed.format}
        common |= {"tools": parsed.tools, "options": parsed.options}
    else:
        turns = _turns(source.prompt)
        prompt = parse_messages(_filled(turns, fields, source.join))
        answer = _answer_of(source.completion, "completion", fields, source.join)
        label = truth_of(render(source.label, fields, "the record", source.join), "label")
        common["content"] = _template_values([*(turn.content for turn in turns), source.completion], fields)
    if not prompt or prompt[-1]["role"] == "assistant":
        raise Rejected("the prompt does not end with the user")
    return Labelled(**common, prompt=[without_weight(message) for message in prompt], answer=answer, label=label)


def _stepped(source: StepSource, common: dict, fields: dict) -> Stepped:
    parsed = steps_of(fields, _named(source))
    prompt = parsed.messages
    if not prompt or prompt[-1]["role"] == "assistant":
        raise Rejected("the prompt does not end with the user")
    content = "\n".join([conversation_text(prompt), *parsed.steps])
    common |= {"content": comparison_text(content), "format": parsed.format, "id": _prompt_key(prompt).hex()}
    common |= {"tools": parsed.tools, "options": parsed.options}
    return Stepped(**common, prompt=prompt, steps=parsed.steps, labels=parsed.labels)


def _prompt(source: PromptSource, common: dict, fields: dict) -> Prompt:
    if source.prompt is None:
        parsed = prompt_of(fields, _named(source))
        messages = parsed.messages
        common |= {"content": comparison_text(conversation_text(messages)), "format": parsed.format}
        common |= {"tools": parsed.tools, "options": parsed.options}
    else:
        turns = _turns(source.prompt)
        messages = parse_messages(_filled(turns, fields, source.join))
        common["content"] = _template_values([turn.content for turn in turns], fields)
    if messages[-1]["role"] == "assistant":
        raise Rejected("the prompt does not end with the user")
    values = _reward_fields(source, fields) if isinstance(source, RewardedSource) else {}
    return Prompt(**common, messages=messages, answer=_known_answer(source, fields), fields=values)


def _answer_of(template: str, name: str, fields: dict, join: str) -> dict:
    """The answer that a template gives."""
    return {"role": "assistant", "content": checked_text(render(template, fields, "the record", join), name)}


def _turns(prompt: str | list[Message]) -> list[Message]:
    return prompt if isinstance(prompt, list) else [Message(role="user", content=prompt)]


def _known_answer(source: ChatSource | PromptSource, fields: dict) -> str | None:
    if source.answer is None:
        return None
    return checked_text(render(source.answer, fields, "the record", source.join), "answer")


def _reward_fields(source: RewardedSource, fields: dict) -> dict:
    """The fields of a record that rewards get."""
    values = {}
    for name in source.reward_fields:
        if fields.get(name) is None:
            raise Rejected(f"the record has no field {name!r}, which reward_fields names")
        try:
            values[name] = json.loads(json.dumps(fields[name]))
        except (TypeError, ValueError):
            raise Rejected(f"the field {name!r}, which reward_fields names, cannot be written as JSON") from None
    return values


def _named(source: TuningSource) -> set[str]:
    """Fields of records that the source gives a meaning: it selects by them, or reads `answer`, `margin` or what
    rewards get from them."""
    fields = [*source.where, *(source.reward_fields if isinstance(source, RewardedSource) else ())]
    for template in source.templates():
        fields += [field for _, field in parse_template(template) if field is not None]
    return {field.partition(".")[0] for field in fields}


MAKERS = {
    ChatSource: _conversation,
    PreferenceSource: _pair,
    LabelledSource: _labelled,
    StepSource: _stepped,
    PromptSource: _prompt,
    RewardedSource: _prompt,
}


def _row(source: TuningSource, name: str, item: Record | Bad, ledger: Ledger):
    """The row that an item of a source becomes; None, and counted, if it becomes none."""
    ledger.count(name, "records")
    if isinstance(item, Bad):
        ledger.reject(name, item.place, item.reason)
        return None
    try:
        fields = item.fields
        if item.columnar:
            fields = {name: without_nulls(value) for name, value in fields.items()}
        if source.ignore:
            fields = without_fields(fields, set(source.ignore))
        common = {"id": item.id, "source": name, "place": item.place}
        return MAKERS[type(source)](source, common, fields)
    except Rejected as error:
        ledger.reject(name, item.place, str(error), error.advice)
    except MissingField as error:
        ledger.reject(name, item.place, str(error).removeprefix("the record: "))
    return None


def _refuse_empty(source: TuningSource, name: str, ledger: Ledger) -> None:
    """Raise UserError for a source none of whose records could be used."""
    if name not in ledger.sources:
        selected = source.where or source.part != (0.0, 1.0)
        raise UserError(f"{key_of(name)}: has no records{' after where, part and limit' if selected else ''}")
    entry = ledger.sources[name]
    if entry["records"] > sum(reason["count"] for reason in entry["rejected"].values()):
        return
    todo = {ledger.advice[reason] for reason in entry["rejected"] if reason in ledger.advice}
    raise UserError(
        f"{key_of(name)}: none of its {plural(entry['records'], 'record')} can be used: {ledger.why(name)}"
        f"{''.join(encoding_advice(source, reason) for reason in entry['rejected'])}"
        f"{''.join(f'; {advice}' for advice in sorted(todo)[:3])}"
    )


# ---- from records to rows --------------------------------------------------------------------------------------------


def _collect(sources: dict, key: Callable, decontaminate: Decontaminate | None) -> tuple[list, Ledger]:
    """Rows of all sources, each text once, and none to train on that has text of an evaluation set. Held-out files come
    first, so that what they have in common with a source is held out."""
    if not sources:
        raise UserError("sources: name at least one source")
    ledger, rows, seen = Ledger(), [], set()
    for name in sorted(sources, key=lambda name: not name.startswith(EVALUATE)):
        source = sources[name]
        absent = set(source.ignore)
        for item in _items(source, name):
            if absent and isinstance(item, Record):
                absent -= fields_present(item.fields, absent)
            row = _row(source, name, item, ledger)
            if row is None:
                continue
            digest = key(row)
            if digest in seen:
                ledger.reject(name, item.place, "duplicate")
            else:
                seen.add(digest)
                rows.append(row)
                ledger.note(name, row.format, _features(row))
        ledger.absent[name] = sorted(absent)
        _refuse_empty(source, name, ledger)
    if decontaminate:
        kept = [row for row in rows if row.source.startswith(EVALUATE)]
        rows = rows[len(kept) :]
        found, ledger.evaluation = find_contaminated(map(_text_of, rows), decontaminate)
        for row, match in zip(rows, found, strict=True):
            if match:
                ledger.reject(row.source, row.place, f"has text of the evaluation set {match}")
            else:
                kept.append(row)
        rows = kept
    return rows, ledger


def _items(source: TuningSource, name: str) -> Iterator[Record | Bad]:
    if name.startswith(EVALUATE):
        return read(source, name.removeprefix(EVALUATE), key=EVALUATE.rstrip("."))
    return read(source, name)


def _split(rows: list, ledger: Ledger, holdout: float, prompt: Callable) -> tuple[list, list, Ledger]:
    """Held-out rows are chosen by their own hash, or are those of held-out files, which come last; training rows that
    answer a held-out prompt, or nearly repeat a held-out row, are dropped."""
    from pipeline.data.dedup.minhash import near_duplicates

    of_files = [row for row in rows if row.source.startswith(EVALUATE)]
    rows = rows[len(of_files) :]
    heldout = [row for row in rows if fraction(row.id) >= 1 - holdout] + of_files
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


def _filled(messages: list[Message], fields: dict, join: str) -> list[dict]:
    return [
        {"role": message.role, "content": render(message.content, fields, "the record", join)} for message in messages
    ]


def _template_values(templates: list[str], fields: dict) -> str:
    """The values that templates take from a record. Their own words, the same in every row, would make short rows
    look like copies of each other."""
    names = [field for template in templates for _, field in parse_template(template) if field is not None]
    return comparison_text("\n".join(render("{" + name + "}", fields) for name in dict.fromkeys(names)))


def _text_of(row) -> str:
    """All that a model is trained on in a row, or reads before it: for evaluation sets also the system's message."""
    messages = row.messages if isinstance(row, (Conversation, Prompt)) else row.prompt
    system = [comparison_text(message["content"]) for message in messages if message["role"] == "system"]
    return "\n".join([*system, row.content])


def _features(row) -> list[str]:
    """What a row has that not all do, for the report."""
    messages = row.messages if isinstance(row, (Conversation, Prompt)) else [*row.prompt]
    if isinstance(row, Pair):
        messages += [row.chosen, row.rejected]
    if isinstance(row, Labelled):
        messages.append(row.answer)
    features = {
        "reasoning": any("reasoning_content" in message for message in messages),
        "tool calls": any("tool_calls" in message for message in messages),
        "tools": bool(row.tools),
        "weights": any("weight" in message for message in messages),
        "template variables": bool(row.options),
    }
    return [name for name, present in features.items() if present]


def _prompt_key(messages: list[dict]) -> bytes:
    """A prompt's key. White space alone does not make it another prompt."""
    return _digest([[message["role"], comparison_text(message["content"])] for message in messages])


def _digest(value) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()
