"""Rows token by token: the ids and the loss are those that are trained on, TRL's masks agree, and each message's words
have its role."""

import datetime

import published_templates as published
import pytest
from test_template_matrix import CASES, OPEN_THOUGHT, hugging_face

from pipeline.data.chat.conversations import Conversation, Pair, Prompt
from pipeline.data.chat.mask_checks import mask_problem
from pipeline.data.chat.template import Chat
from pipeline.data.chat.token_view import tokens_of

ROW = {"id": "0", "source": "s", "place": "p", "content": ""}


def conversation(dialogue) -> Conversation:
    return Conversation(**ROW, messages=dialogue.messages, tools=dialogue.tools, options=dialogue.options)


def said(tokens, role: str) -> str:
    return "".join(token.text for token in tokens if token.role == role)


@pytest.mark.parametrize("name", ["chatml", "deepseekv3", "gemma3", "gptoss", "llama3_1", "phi3", "qwen3", "smolvlm"])
def test_tokens_are_those_that_are_trained_on(name):
    """Also where one conversation is several rows, and where texts spell special tokens."""
    tokenizer = published.tokenizer("qwen2_5" if name == "chatml" else name)
    chat = Chat(tokenizer)
    for case, dialogue in CASES.items():
        rows = chat.rows([dialogue])[0]
        if isinstance(rows, str):
            with pytest.raises(ValueError, match=rows[:30]):
                tokens_of(chat, conversation(dialogue))
            continue
        for row, (_, tokens) in zip(rows, tokens_of(chat, conversation(dialogue)), strict=True):
            assert [token.id for token in tokens] == row.ids
            assert [token.loss > 0 for token in tokens] == row.trained
            text = tokenizer.decode(row.ids, clean_up_tokenization_spaces=False)
            assert "".join(token.text for token in tokens) == text
            assert all(token.role == "assistant" for token in tokens if token.loss), case
        _, tokens = tokens_of(chat, conversation(dialogue))[-1]
        for role in ("system", "user"):
            contents = [message["content"].strip() for message in dialogue.messages if message["role"] == role]
            assert said(tokens, role).strip() == "".join(contents), (case, role)


@pytest.mark.parametrize("name", published.names(training=True))
def test_loss_and_roles_agree_with_trls_masks(name):
    """With TRL's training template: what carries loss is masked by TRL, and what only TRL masks is the header of a turn
    or follows its end."""
    if name.startswith(OPEN_THOUGHT):
        pytest.skip("TRL's variant teaches an answer that does not close its thought")
    tokenizer = published.tokenizer(name)
    chat = Chat(tokenizer, date=datetime.date.today().isoformat())
    for case in ("single", "system"):
        if isinstance(chat.rows([CASES[case]])[0], str):
            continue
        [(_, tokens)] = tokens_of(chat, conversation(CASES[case]))
        messages = hugging_face(CASES[case])
        if chat.style.parts:
            messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        masked = theirs["assistant_masks"][: len(tokens)]
        assert theirs["input_ids"][: len(tokens)] == [token.id for token in tokens]
        assert all(mask for token, mask in zip(tokens, masked, strict=True) if token.loss)
        only_theirs = [token for token, mask in zip(tokens, masked, strict=True) if mask and not token.loss]
        assert {token.role for token in only_theirs} <= {"template"}


def test_pairs_prompts_and_weights():
    chat = Chat(published.tokenizer("llama3_1"))
    asked = [{"role": "system", "content": "很短"}, {"role": "user", "content": "a"}]
    answers = {key: {"role": "assistant", "content": content} for key, content in (("chosen", "a"), ("rejected", "小"))}
    rows = dict(tokens_of(chat, Pair(**ROW, prompt=asked, **answers)))
    assert list(rows) == ["chosen", "rejected"]
    for name, content in (("chosen", "a"), ("rejected", "小")):
        assert said(rows[name], "assistant") == f"{content}<|eot_id|>" and said(rows[name], "user") == "a"
        assert said([token for token in rows[name] if token.loss], "assistant") == f"{content}<|eot_id|>"
    [(name, tokens)] = tokens_of(chat, Prompt(**ROW, messages=asked, answer=None))
    assert name == "" and said(tokens, "user") == "a" and not any(token.loss for token in tokens)
    messages = [*asked, {**answers["chosen"], "weight": 0}, asked[1], {**answers["rejected"], "weight": 0.5}]
    [(_, tokens)] = tokens_of(chat, Conversation(**ROW, messages=messages))
    assert said(tokens, "assistant") == "a<|eot_id|>小<|eot_id|>"  # the first one is history
    assert {token.loss for token in tokens} == {0.0, 0.5}


BOS, END = 0, 9


@pytest.mark.parametrize(
    "ids, trained, problem",
    [
        ([BOS, 5, 6, END], [0, 0, 1, 1], None),
        ([BOS, 5, 6, END], [0, 0, 0, 0], "none of its tokens carries loss"),
        ([BOS, 6, END], [1, 1, 1], "all of its tokens carry loss"),
        ([BOS, BOS, 6, END], [0, 0, 1, 1], "writes the beginning of text twice"),
        ([BOS, 5, 6, END], [0, 0, 1, 0], "the token that ends its last answer carries no loss"),
        ([BOS, 5, 6, 7], [0, 0, 1, 1], "the token that ends its last answer carries no loss"),
        ([BOS, 5, 6, END, BOS, 5, 7, END], [0, 0, 1, 1, 0, 0, 1, 1], None),
    ],
)
def test_masks_that_are_refused(ids, trained, problem):
    found = mask_problem(ids, list(map(bool, trained)), {END}, BOS)
    assert found is None if problem is None else problem in found
