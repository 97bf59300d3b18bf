"""The Modelfile's template writes conversations as the chat template does."""

import json
import re

import pytest
import tiny_gguf
import tuned

from pipeline.data.chat.rendering import Dialogue, Template
from pipeline.models.ollama import go_template, modelfile

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is {{ 1 }}?"},
    {"role": "assistant", "content": "A number."},
    {"role": "user", "content": "是什么？"},
]


def executed(template: str, messages: list[dict]) -> str:
    """What Go's text/template writes: the actions that are used here, by their definition (range, if, else if, string
    literals, .Content; {{- trims white space before it)."""
    actions = re.split(r"\{\{(-?) (.*?) \}\}", template)
    text, items = actions[0], list(zip(actions[1::3], actions[2::3], actions[3::3], strict=True))
    assert not text and not any(rest for _, _, rest in items), "all text is in literals"
    begin = next(number for number, item in enumerate(items) if item[1] == "range .Messages")
    ends = [number for number, item in enumerate(items) if item[1] == "end"]
    assert len(ends) == 2 and ends[1] == ends[0] + 1

    def literal(action: str) -> str:
        return json.loads(action)

    written = "".join(literal(action) for _, action, _ in items[:begin])
    for message in messages:
        active = False
        for _, action, _ in items[begin + 1 : ends[0]]:
            condition = re.fullmatch(r'(?:else )?if eq .Role "(\w+)"', action)
            if condition:
                active = condition[1] == message["role"]
            elif active:
                written += message["content"] if action == ".Content" else literal(action)
    return written + "".join(literal(action) for _, action, _ in items[ends[1] + 1 :])


def with_template(folder, template: str, bos: str | None = None):
    made = tuned.tokenizer(folder)
    made.chat_template = template
    if bos:
        made.bos_token = bos
    return made


LLAMA_3 = (
    "{% for m in messages %}{% set text = '<h>' + m['role'] + '</h>\n\n' + m['content'] + '<eot>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", ["own", "chatml", "llama 3"])
def test_the_template_writes_what_the_chat_template_writes(name, adds_bos, tmp_path):
    made = tuned.tokenizer(tmp_path)
    if name == "chatml":
        made.chat_template = tiny_gguf.TEMPLATE
    if name == "llama 3":
        made = with_template(tmp_path / "l", LLAMA_3, "<bos>")
    expected = Template(made).write(Dialogue(CONVERSATION), generation_prompt=True)[0]
    if name == "llama 3" and adds_bos:
        expected = expected.removeprefix("<bos>")
    assert executed(go_template(made, adds_bos), CONVERSATION) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}",  # counts
        "{{ messages[-1]['content'] }}",  # drops
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_that_ollama_cannot_write_gives_none(template, tmp_path):
    made = with_template(tmp_path, template)
    assert go_template(made) is None
    text, remarks = modelfile("m.gguf", made, {"do_sample": True, "temperature": 0.6, "top_k": 20}, [5])
    assert "TEMPLATE" not in text and "has no TEMPLATE" in remarks[0]
    assert text.splitlines()[2:] == ["PARAMETER temperature 0.6", "PARAMETER top_k 20"]
