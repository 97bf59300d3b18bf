"""Records that hold a conversation, a pair of answers, a judged answer or a prompt already, in the formats that are in
use: messages, ShareGPT, prompt + completion, Alpaca, glaive's transcripts, and their pairs.

A reader tries the formats in turn and reports the one that it has recognised. Every field of a record is used, or is
known to change nothing, or rejects the record (pipeline/data/chat/fields.py). Those next to the messages are
read in pipeline/data/chat/record_fields.py.
"""

import re
from dataclasses import dataclass, field

from pipeline.data.chat import tool_calls
from pipeline.data.chat.fields import ANSWERS, JUDGEMENTS, REASONING, REFERENCES, Rejected, snake
from pipeline.data.chat.messages import (
    check_fields,
    checked_text,
    message_text,
    parse_messages,
    role_of,
    weight_fields,
    weight_of,
    without_weight,
)
from pipeline.data.chat.record_fields import (
    LABELS,
    ParsedRecord,
    add_other_fields,
    begins_with,
    multiply_weights,
    number,
    refuse_bad,
    refuse_weight,
    repeated_fields,
    truth_of,
)
from pipeline.data.chat.record_reasons import no_prompt, unrecognised

LISTS = ("messages", "conversations", "conversation")
# What a pair says of its two answers, chosen first: numbers that must not contradict the order.
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("reward_chosen", "reward_rejected"),
    ("chosen_reward", "rejected_reward"),
)
LONG_PROMPT = 20  # characters of a prompt that answers do not begin with by chance
SCORES = {name for names in PAIR_SCORES for name in names}


@dataclass
class ParsedPair(ParsedRecord):
    """Messages that two answers are given to."""

    chosen: dict = field(default_factory=dict)
    rejected: dict = field(default_factory=dict)
    margin: float | None = None


@dataclass
class ParsedSteps(ParsedRecord):
    """Messages that are answered in steps."""

    steps: list[str] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    """Of each step: is it right?"""


# ---- what a reader returns -------------------------------------------------------------------------------------------


def conversation_of(record: dict, named: set[str] = frozenset()) -> ParsedRecord:
    """The conversation of a record. `named` are fields that the source itself gives a meaning. Raises Rejected."""
    fields = _without_nulls(record)
    parsed, used = _conversation(record, fields)
    used |= add_other_fields(parsed, fields)
    refuse_bad(fields, named)
    multiply_weights(parsed.messages, weight_of(fields, "the record"))
    # The rejected answer of a pair, and scores of both, say nothing of the conversation next to them.
    beside_pair = {"rejected", *SCORES} if "chosen" in fields else set()
    used |= named | weight_fields(fields) | set(LABELS) | repeated_fields(fields, parsed.messages)
    check_fields(fields, used, "the record", {"name"} | beside_pair)
    return parsed


def labelled_of(record: dict, named: set[str] = frozenset()) -> tuple[ParsedRecord, bool]:
    """A conversation, and whether its last answer is a good one (KTO). Raises Rejected."""
    fields = _without_nulls(record)
    name = next((name for name in LABELS if name in fields and name not in named), None)
    if name is None:
        raise unrecognised(record, "judged answer")
    label = truth_of(fields[name], f"`{name}`")
    others = [other for other in LABELS if other in fields and other not in named]
    if any(truth_of(fields[other], f"`{other}`") != label for other in others):
        raise Rejected(f"{' and '.join(f'`{other}`' for other in others)} contradict each other")
    parsed, used = _conversation(record, fields)
    used |= add_other_fields(parsed, fields)
    if not parsed.messages or parsed.messages[-1]["role"] != "assistant":
        raise Rejected("the conversation does not end with the answer that `label` is about")
    refuse_weight(parsed.messages[-1].get("weight"), "the answer")
    refuse_weight(weight_of(fields, "the record"), "the record")
    parsed.messages[:] = map(without_weight, parsed.messages)
    used |= named | weight_fields(fields) | set(LABELS) | repeated_fields(fields, parsed.messages)
    check_fields(fields, used, "the record", {"name"})
    parsed.format += f" + {name}"
    return parsed, label


def steps_of(record: dict, named: set[str] = frozenset()) -> ParsedSteps:
    """An answer in steps, each judged right or wrong: prompt + completions + labels, as TRL has them, or the two texts
    of Math-Shepherd. Raises Rejected."""
    fields = _without_nulls(record)
    if "prompt" in fields and "completions" in fields and "labels" in fields:
        used = {"prompt", "completions", "labels"}
        steps, labels = fields["completions"], fields["labels"]
        if not isinstance(steps, (list, tuple)) or not isinstance(labels, (list, tuple)):
            raise Rejected("`completions` or `labels` is not a list")
        if len(steps) != len(labels):
            raise Rejected(f"{len(steps)} completions have {len(labels)} labels")
        raw = _prompt_messages(fields["prompt"])
        form = f"{_format_name(raw, 'prompt')} + completions + labels"
        judged = [truth_of(label, "a label") for label in labels]
        texts = [checked_text(step, "a step") for step in steps]
        parsed = ParsedSteps(parse_messages(raw), form, steps=texts, labels=judged)
    elif isinstance(fields.get("input"), str) and isinstance(fields.get("label"), str):
        used, parsed = {"input", "label"}, _math_shepherd(fields["input"], fields["label"])
    else:
        raise unrecognised(record, "answer with judged steps")
    if not parsed.steps:
        raise Rejected("the answer has no steps")
    refuse_weight(weight_of(fields, "the record"), "the record")
    parsed.messages[:] = map(without_weight, parsed.messages)
    used |= add_other_fields(parsed, fields, thoughts=False)
    used |= named | weight_fields(fields) | repeated_fields(fields, parsed.messages)
    check_fields(fields, used, "the record", {"name"} | REFERENCES)
    return parsed


# Math-Shepherd (Wang et al., 2024): a step ends with STEP_END in one text, with + or - in the other.
STEP_END = "ки"
FIRST_STEP = re.compile(r"\s*(?=Step 1\s*:)")


def _math_shepherd(text: str, judged: str) -> ParsedSteps:
    pieces = text.split(STEP_END)
    *pieces, rest = pieces
    labels, at = [], 0
    for piece in pieces:
        end = at + len(piece)
        if judged[at:end] != piece or judged[end : end + 1] not in ("+", "-"):
            raise Rejected(f"`label` is not `input` with + or - in place of each {STEP_END}")
        labels.append(judged[end] == "+")
        at = end + 1
    if judged[at:].strip() != rest.strip():
        raise Rejected(f"`label` is not `input` with + or - in place of each {STEP_END}")
    if rest.strip():
        raise Rejected(f"`input` does not end with {STEP_END}: its last step has no label")
    question, *first = FIRST_STEP.split("".join(pieces[:1]), maxsplit=1)
    if not first:
        raise Rejected("`input` has no `Step 1:`, where the answer begins")
    steps = [checked_text(step, "a step").strip() for step in [first[0], *pieces[1:]]]
    messages = parse_messages([{"role": "user", "content": question}])
    return ParsedSteps(messages, "Math-Shepherd (input, label)", steps=steps, labels=labels)


def pair_of(record: dict, named: set[str] = frozenset()) -> ParsedPair:
    """A pair of answers. Raises Rejected."""
    fields = _without_nulls(record)
    if "chosen" not in fields or "rejected" not in fields:
        raise unrecognised(record, "pair")
    if any(isinstance(fields[key], (str, list, dict)) and not fields[key] for key in ("chosen", "rejected")):
        raise Rejected("an empty answer")
    for key in ("chosen", "rejected"):
        if isinstance(fields[key], str):
            fields[key] = _spelled_messages(fields[key], f"`{key}`")
    _refuse_repeated_prompt(fields)
    prompt, used, form = _prompt_of_pair(fields)
    answers = {
        key: _answer_messages(_answer_after(fields.get("prompt"), fields[key]), key) for key in ("chosen", "rejected")
    }
    if prompt is None:
        if isinstance(fields["chosen"], str) and isinstance(fields["rejected"], str):
            form, answers = "transcripts (Human, Assistant)", {key: _transcript(fields, key) for key in answers}
        elif isinstance(fields["chosen"], str) or isinstance(fields["rejected"], str):
            raise no_prompt(fields)
        prompt = answers["chosen"][: _common_length(answers["chosen"], answers["rejected"])]
    for key, answer in answers.items():
        if prompt and answer[: len(prompt)] == prompt:  # the answers repeat the prompt
            answer = answers[key] = answer[len(prompt) :]
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise Rejected(f"{key} is not one message of the assistant")
        refuse_weight(answer[0].get("weight"), key)
    refuse_weight(weight_of(fields, "the record"), "the record")
    messages = [without_weight(message) for message in prompt]
    parsed = ParsedPair(
        messages, form, chosen=without_weight(answers["chosen"][0]), rejected=without_weight(answers["rejected"][0])
    )
    used |= add_other_fields(parsed, fields, thoughts=False)
    used |= named | weight_fields(fields) | {"chosen", "rejected", "margin"} | _ordered(fields)
    used |= repeated_fields(fields, [*parsed.messages, parsed.chosen])
    check_fields(fields, used, "the record", {"name"} | REFERENCES)
    if "margin" in fields:
        parsed.margin = number(fields["margin"])
    return parsed


def prompt_of(record: dict, named: set[str] = frozenset()) -> ParsedRecord:
    """The prompt of a record: of a conversation, all up to where the assistant gives the last answer. Raises
    Rejected."""
    fields = _without_nulls(record)
    name = next((name for name in ("prompt", *LISTS) if name in fields), None)
    if name is not None:
        raw = list(_prompt_messages(fields[name]) if name == "prompt" else _list_of_messages(fields[name], name))
        while name != "prompt" and raw and role_of(raw[-1]) == "assistant":
            raw.pop()
        messages, used, form = parse_messages(raw), {name}, _format_name(raw, name)
    elif (alpaca := _alpaca(fields)) is not None:
        messages, used = alpaca
        form = "Alpaca (instruction, input)"
    else:
        raise unrecognised(record, "prompt")
    parsed = ParsedRecord([without_weight(message) for message in messages], form)
    used |= add_other_fields(parsed, fields, thoughts=False)
    messages = parsed.messages
    if all(message["role"] != "user" for message in messages) or messages[-1]["role"] == "assistant":
        raise Rejected("the prompt does not end with the user")
    used |= named | repeated_fields(fields, messages)
    # Next to a prompt, another shape of the same record holds its answer too.
    used |= {other for other in LISTS if begins_with(fields.get(other), messages)}
    check_fields(fields, used, "the record", {"name", "ability"} | ANSWERS | JUDGEMENTS | REASONING | SCORES)
    return parsed


# ---- conversations ---------------------------------------------------------------------------------------------------


def _conversation(record: dict, fields: dict) -> tuple[ParsedRecord, set[str]]:
    """(the messages of a record, the fields that they are in)."""
    name = next((name for name in LISTS if name in fields), None)
    if name is not None:
        raw = _list_of_messages(fields[name], name)
        return ParsedRecord(parse_messages(raw), _format_name(raw, name)), {name}
    if "prompt" in fields and "completion" in fields:
        raw = [
            *_prompt_messages(fields["prompt"]),
            *_as_list(_answer_after(fields["prompt"], fields["completion"]), "assistant", "`completion`"),
        ]
        return ParsedRecord(parse_messages(raw), "prompt + completion"), {"prompt", "completion"}
    if isinstance(fields.get("output"), str) and (prompt := _alpaca(fields)) is not None:
        messages, used = prompt
        messages += parse_messages([{"role": "assistant", "content": fields["output"]}])
        return ParsedRecord(messages, "Alpaca (instruction, input, output)"), used | {"output"}
    if isinstance(fields.get("chat"), str) and isinstance(fields.get("system", ""), str):
        raw, tools = tool_calls.glaive(fields.get("system", ""), fields["chat"])
        return ParsedRecord(parse_messages(raw), "glaive (system, chat)", tools or None), {"system", "chat"}
    if name := next((name for name in LISTS if name in record), None):
        raise Rejected(f"`{name}` is not a list of messages")
    raise unrecognised(record, "conversation")


def _format_name(messages: list, name: str) -> str:
    """How the format of a list of raw messages is reported."""
    if messages and isinstance(messages[0], dict) and "from" in messages[0] and "role" not in messages[0]:
        return f"ShareGPT ({name}: from, value)"
    return f"{name} (role, content)" if name in LISTS else name


def _as_list(value, role: str, what: str) -> list:
    """Raw messages of a field that holds a text, a message, or a list of messages, which may be JSON text."""
    if isinstance(value, str):
        value = _spelled_messages(value, what)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return value
    raise Rejected(f"{what} is not text")


# How a text begins that spells messages, as JSON or as Python.
SPELLED = re.compile(r"\s*\[?\s*\{\s*['\"](role|from|content|value)['\"]\s*:")
ROLE = re.compile(r"['\"](role|from)['\"]\s*:")


def _spelled_messages(text: str, what: str):
    """The message or the list of messages that a JSON text spells; any other text as it is. Raises Rejected for a text
    that spells messages in another way."""
    if not SPELLED.match(text) or not ROLE.search(text) or text.rstrip()[-1] not in "]}":
        return text
    try:
        value = tool_calls.from_json(text, what)
    except Rejected:
        raise Rejected(f"{what} is a text of messages that is not JSON") from None
    items = value if isinstance(value, list) else [value]
    return value if all(role_of(item) is not None for item in items) else text


def _list_of_messages(value, name: str) -> list:
    """The raw messages of a field of LISTS."""
    value = _spelled_messages(value, f"`{name}`") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise Rejected(f"`{name}` is not a list of messages")
    return value


def _prompt_messages(value) -> list:
    """The raw messages of a prompt: also of a transcript that waits for the assistant's answer."""
    if not isinstance(value, str) or not _is_transcript(value):
        return _as_list(value, "user", "`prompt`")
    turns = _transcript_turns(value.lstrip())
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def _is_transcript(text: str) -> bool:
    """Whether a text begins with Human: and goes on with Assistant:, as Anthropic's hh-rlhf has them."""
    return text.lstrip().startswith("Human:") and re.search(r"\n\nAssistant:", text) is not None


def _answer_after(prompt, answer):
    """An answer to a prompt. After a transcript that ends with `Assistant:` its first space is the transcript's."""
    if isinstance(prompt, str) and isinstance(answer, str) and _is_transcript(prompt) and prompt.endswith("Assistant:"):
        return answer.removeprefix(" ")
    return answer


def _alpaca(fields: dict) -> tuple[list[dict], set[str]] | None:
    """Alpaca's prompt: the turns of `history`, then the instruction with, on a line of its own, its input."""
    if not isinstance(fields.get("instruction"), str):
        return None
    more = fields.get("input")
    if not (more is None or isinstance(more, str)):
        raise Rejected("`input` is not text")
    messages = []
    history = fields.get("history") or []
    for turn in history if isinstance(history, (list, tuple)) else [history]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Rejected("`history` is not a list of [question, answer]")
        messages += parse_messages([{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}])
    asked = fields["instruction"]
    if more and more.strip():
        asked = f"{asked}\n{more}" if asked.strip() else more
    messages += parse_messages([{"role": "user", "content": asked}])
    return messages, {"instruction", "input", "history"}


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _answer_messages(value, key: str) -> list[dict]:
    return parse_messages(_as_list(value, "assistant", f"`{key}`"))


def _prompt_of_pair(fields: dict) -> tuple[list[dict] | None, set[str], str]:
    """(the prompt that a pair gives by itself, the fields that it is in, how the format is reported)."""
    for name in ("prompt", *LISTS):
        if name in fields:
            raw = _prompt_messages(fields[name]) if name == "prompt" else _pair_conversation(fields[name], name)
            return parse_messages(raw), {name}, f"{_format_name(raw, name)} + chosen + rejected"
    alpaca = _alpaca(fields)
    if alpaca is not None:
        return *alpaca, "Alpaca (instruction, input) + chosen + rejected"
    return None, set(), "chosen + rejected, which begin with the prompt"


def _pair_conversation(value, name: str) -> list:
    """The raw messages of a field of LISTS that a pair answers. It may be one message."""
    return [value] if isinstance(value, dict) else _list_of_messages(value, name)


def _refuse_repeated_prompt(fields: dict) -> None:
    """Raise Rejected for texts of answers that begin with the text of the prompt: where they do not, the prompt would
    be learned as a part of the answer."""
    prompt, answers = fields.get("prompt"), [fields["chosen"], fields["rejected"]]
    if not all(isinstance(text, str) for text in [prompt, *answers]) or not prompt.strip():
        return
    prompt = prompt.strip()
    if not all(answer.lstrip().startswith(prompt) for answer in answers):
        return
    rests = [answer.lstrip()[len(prompt) :] for answer in answers]
    # A short prompt, such as a greeting, may be the first words of its answers.
    if len(prompt) >= LONG_PROMPT or all(rest.startswith("\n") for rest in rests):
        raise Rejected(
            "chosen and rejected begin with the text of the prompt",
            "give templates for prompt, chosen and rejected, or fields without the prompt",
        )


def _common_length(one: list[dict], other: list[dict]) -> int:
    """How many messages two conversations have in common at their beginning, but for the last of each."""
    count = 0
    while count < min(len(one), len(other)) - 1 and one[count] == other[count]:
        count += 1
    return count


SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _transcript(fields: dict, key: str) -> list[dict]:
    """The messages of a field such as `\\n\\nHuman: ...\\n\\nAssistant: ...` (Anthropic's hh-rlhf)."""
    turns = _transcript_turns(fields[key])
    if len(turns) < 2:
        raise no_prompt(fields)
    return parse_messages(turns)


def _transcript_turns(text: str) -> list[dict]:
    """The raw messages of a transcript; none of a text that is not one."""
    head, *rest = SPEAKER.split(text)
    if head.strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(rest[::2], rest[1::2], strict=True)]


def _ordered(fields: dict) -> set[str]:
    """Scores of both answers. Raises Rejected unless they say that the chosen one is better."""
    names = {snake(name): name for name in fields}
    used = set()
    for better, worse in PAIR_SCORES:
        if better in names and worse in names:
            difference = number(fields[names[better]], better) - number(fields[names[worse]], worse)
            if difference < 0:
                raise Rejected(f"{better} is below {worse}")
            if difference == 0:
                raise Rejected(f"{better} equals {worse}: neither answer is better")
            used |= {names[better], names[worse]}
    return used


def conversation_text(messages: list[dict]) -> str:
    """What is said in a conversation, but for the system's message, which many rows share."""
    return "\n".join(message_text(message) for message in messages if message["role"] != "system")


def _without_nulls(fields: dict) -> dict:
    """Without fields that hold nothing, as columns of parquet do where another row has a value."""
    return {name: value for name, value in fields.items() if value is not None}
