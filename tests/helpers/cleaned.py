"""What a cleaning stage published, read without the code under test."""

import json
import re
import unicodedata
from pathlib import Path

import zstandard


def published(folder: Path) -> Path:
    return folder / "runs/t/clean/current"


def ledger(folder: Path, source: str) -> list[dict]:
    raw = (
        zstandard.ZstdDecompressor()
        .stream_reader((published(folder) / "rejected" / f"{source}.jsonl.zst").read_bytes())
        .read()
    )
    return [json.loads(line) for line in raw.decode().splitlines()]


def plain_tokens(text: str) -> list[str]:
    """The token rule in words: a CJK character, or a run of other letters, marks and numbers, lower case."""
    found, run = [], ""
    for c in text.lower():
        cjk = re.match(
            "[\u3005-\u3007\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]",
            c,
        )
        if not cjk and unicodedata.category(c)[0] in "LMN":
            run += c
            continue
        found += ([run] if run else []) + ([c] if cjk else [])
        run = ""
    return found + ([run] if run else [])
