"""What a model thinks before an answer, where a template writes it in another way than a model has to: templates drop
it from text, write an empty thought, or ask with a prompt that the answered conversation does not have.

`answer_text` finds the answer in such a conversation, and puts it after the prompt that inference asks with.
"""

import re

from pipeline.data.chat.rendering import Unusable

THINK, END_THINK = "<think>", "</think>"
OPEN = r"<(?:\w+:)?think(?:ing)?(?::\w+)?>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought"
CLOSE = r"</(?:\w+:)?think(?:ing)?(?::\w+)?>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>"
# How a prompt ends that leaves a thought open, or that holds a closed one.
ASKED_THOUGHT = re.compile(rf"(?P<open>{OPEN})?\s*(?P<close>{CLOSE})?\s*\Z")
# What an answer may begin with.
OWN_THOUGHT = re.compile(rf"\s*(?P<open>{OPEN})?(?P<thought>.*?)(?P<close>{CLOSE})", re.DOTALL)
EMPTY_THOUGHT = re.compile(rf"(?P<before>\s*(?:{OPEN})?)\s*(?:{CLOSE})")
LONGEST = 100  # characters of the thought that a prompt ends with
# Between what DeepSeek-R1 and its relatives think and what they answer.
AFTER_THOUGHT = "\n\n"
DIFFERENT = (
    "the chat template writes a prompt that waits for an answer differently from one that has it; the model would be"
    " asked what it was never taught"
)


def split(message: dict) -> dict:
    """An answer whose content begins with <think>...</think>, with what it thought as a field of its own."""
    thought, closed, content = message["content"].partition(END_THINK)
    if not closed or not thought.lstrip().startswith(THINK):
        return message
    reasoning = thought.lstrip().removeprefix(THINK)
    return {**message, "reasoning_content": reasoning.strip("\n"), "content": content.lstrip("\n")}


def reasoning_in(message: dict) -> str:
    """What is thought before an answer, in a field or in its content."""
    return split(message).get("reasoning_content", "").strip("\n")


def before_content(answer: str, content: str) -> str:
    """What is written of an answer in front of its content, which may say the same words as its reasoning; all of it,
    if there is no content."""
    at = answer.rfind(content.strip()) if content.strip() else -1
    return answer if at < 0 else answer[:at]


def thinks_twice(asked: str, answer: str) -> bool:
    """Whether an answer has a thought in its text, where the prompt has begun one, or the template an empty one."""
    if THINK not in answer:
        return False
    empty = EMPTY_THOUGHT.match(answer)
    return _is_open(asked) or bool(empty) and answer[empty.end() :].lstrip().startswith(THINK)


def _is_open(asked: str) -> bool:
    """Whether a prompt ends inside of a thought."""
    ending = _ending(asked)
    return ending is not None and not ending["close"]


def _ending(asked: str) -> re.Match | None:
    """The thought that a prompt ends with."""
    match = ASKED_THOUGHT.search(asked, max(0, len(asked) - LONGEST))
    return match if match["open"] or match["close"] else None


def answer_text(asked: str, header: str, said: str, message: dict, switches: list[str]) -> str:
    """The prompt that inference asks with, `asked`, and the answer to it. `header`: what the prompt has behind the
    last message; `said`: what the answered conversation has behind it. `switches`: the template's variables that turn
    reasoning on. Raises Unusable for a difference between the two that is not one of white space or of a thought."""
    if not header:
        raise Unusable(DIFFERENT)
    answer = _behind(header, said, message)
    if answer is not None:
        return asked + answer
    thought = _ending(header)
    answer = _behind(header[: thought.start()], said, message) if thought else None
    if answer is None:
        raise Unusable(DIFFERENT)
    if thought["close"]:
        return asked + _without_thought(answer, message, switches)
    if answer.lstrip().startswith(thought["open"]):  # it writes an empty thought differently
        return asked + answer.lstrip().removeprefix(thought["open"]).lstrip()
    reasoning = message.get("reasoning_content", "").strip("\n")
    if re.match(rf"\s*(?:{CLOSE})", answer):  # it closes the thought that the prompt has opened
        return f"{asked}{reasoning}{answer}"
    if thought["open"] != THINK:
        closing = {"[THINK]": "[/THINK]", "<|START_THINKING|>": "<|END_THINKING|>", "<|channel>thought": "<channel|>"}
        return f"{asked}{reasoning}{closing.get(thought['open'], thought['open'].replace('<', '</'))}{answer}"
    if not reasoning and END_THINK in message["content"]:
        reasoning = message["content"].rpartition(END_THINK)[0].strip().removeprefix(THINK).lstrip()
        return f"{asked}{reasoning}\n{END_THINK}{answer}"
    return f"{asked}{reasoning}\n{END_THINK}{AFTER_THOUGHT}{answer}"


def with_dropped(begin: int, text: str, message: dict, removes: bool, switches: list[str]) -> str:
    """The text of a conversation whose last answer begins at `begin`, with what was thought before it, which the
    template has dropped: in the empty thought that it writes, or, if it `removes` thoughts from texts, as
    <think>...</think> in front. Text in which nothing is missing, or cannot be put, is returned as it is. Raises
    Unusable if the prompt asks for an answer without reasoning."""
    asked, answer = text[:begin], text[begin:]
    reasoning = reasoning_in(message)
    if not reasoning.strip() or reasoning.strip() in before_content(
        answer, message["content"].rpartition(END_THINK)[2]
    ):
        return text
    empty = EMPTY_THOUGHT.match(answer)
    if empty and (empty["before"].strip() or _is_open(asked)):
        at = len(empty["before"].rstrip())
        return f"{asked}{answer[:at]}{reasoning}{answer[at:]}"
    ending = _ending(asked)
    if ending is not None and ending["close"]:
        raise _without_reasoning(switches)
    if _is_open(asked) or not removes:
        return text
    content = message["content"]
    if END_THINK not in content:
        return f"{asked}{THINK}\n{reasoning}\n{END_THINK}{AFTER_THOUGHT}{answer}"
    head, _, rest = content.rpartition(END_THINK)
    space = rest[: len(rest) - len(rest.lstrip())]
    return f"{asked}{head}{END_THINK}{space}{answer.lstrip()}"


def _behind(header: str, said: str, message: dict) -> str | None:
    """What follows a header in a text; None if the text does not begin with it. The header may have other white
    space in it there, or lack what is before one of its tokens."""
    if said.startswith(header):
        return said[len(header) :]
    pattern = r"\s*".join(re.escape(word) for word in header.split())
    match = re.match(rf"\s*{pattern}", said)
    if not match:
        for token in re.finditer(r"<|\[", header):
            rest = header[token.start() :]
            if token.start() and said.startswith(rest):
                return said[len(rest) :]
        return None
    space, rest = header[len(header.rstrip()) :], said[match.end() :]
    content = message["content"]
    own = content[: len(content) - len(content.lstrip())]
    gap = rest[: len(rest) - len(rest.lstrip())].removesuffix(own)
    return rest[len(gap) :] if space else rest


def _without_thought(answer: str, message: dict, switches: list[str]) -> str:
    """An answer after a prompt that has closed its thought. Raises Unusable if it has one."""
    own = OWN_THOUGHT.match(answer)
    if own and (own["open"] or not own["thought"].strip()):
        if own["thought"].strip():
            raise _without_reasoning(switches)
        answer = answer[own.end() :]
    if reasoning_in(message).strip():
        raise _without_reasoning(switches)
    return answer


def _without_reasoning(switches: list[str]) -> Unusable:
    switch = next((name for name in ("enable_thinking", "thinking", *switches) if name in switches), "enable_thinking")
    return Unusable(
        "the chat template asks for answers without reasoning, and this one has some; let it think"
        f" (chat_template_kwargs: {{{switch}: true}})"
    )
