"""Where an answer ends: the token that a tokenizer's chat template writes after what the assistant says."""

SAID = "qz7 said zq7"  # an answer that no template contains


def end_of_turn(tokenizer) -> int | None:
    """Id of the token that the chat template writes right after an assistant's answer, white space aside.

    None without a template, for a template that ends answers with plain text or not at all, and for one that cannot
    write a conversation of one question and one answer. Templates need no generation marks here.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": SAID}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError):  # it wants tools, parts of content or other fields
        return None
    _, found, after = text.rpartition(SAID)
    after = after.lstrip()
    if not found:
        return None
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    written = [content for content in added if content.strip() and after.startswith(content)]
    return added[max(written, key=len)] if written else None
