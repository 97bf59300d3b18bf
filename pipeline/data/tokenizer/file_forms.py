"""Which form a tokenizer's file has, by its content. Its name does not say: Llama 3's tokenizer.model is a tiktoken
file, and the files in tiktoken's own cache have no suffix."""

import re
from pathlib import Path

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* +\d+\r?(\n|$)")  # base64 of a token's bytes and its rank
# a model begins with its first piece: field 1 with a length, and in it field 1 with a length (the piece's text)
SENTENCEPIECE_HEAD = re.compile(rb"\n[\x02-\x7f]\n", re.DOTALL)


def form_of(file: Path) -> str | None:
    """ "sentencepiece" or "tiktoken"; None for anything else."""
    with open(file, "rb") as handle:
        head = handle.read(4096)
    if TIKTOKEN_LINE.match(head.lstrip()):
        return "tiktoken"
    if SENTENCEPIECE_HEAD.match(head):
        return "sentencepiece"
    return None
