"""What a published tokenizer is worth, measured through the published folder: round trips, equal ids in all its
forms, bytes and characters per token."""

import json
from collections import defaultdict
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data.tokenizer import spm_trainer
from pipeline.data.tokenizer.encode import encoder, pattern
from pipeline.data.tokenizer.sample import batches

# What breaks tokenizers that are not lossless: joined emoji, hanzi outside the basic plane, NUL, line ends, wide forms,
# right-to-left, long runs, a byte order mark, and text that spells special tokens, byte tokens and sentencepiece's own
# marks.
HARD_TEXTS = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 e\u0301 \u00e9 \ufb01 \U00020000\U0002a6d6",
    "a\0b\r\nc\rd\n\n\n  e\t\tf \n",
    (
        "\uff26\uff35\uff2c\uff2c\u3000\uff37\uff29\uff24\uff34\uff28 \u05e9\u05dc\u05d5\u05dd"
        " \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947"
    ),
    "\ufeff   leading,   runs    of     spaces, trailing   ",
    "<|bos|><|eos|><|pad|><|im_start|>user\n<|im_end|><unk><s></s><0x0A>",
    "x" * 5000 + " " * 5000 + "\u554a" * 5000 + "=" * 5000 + "abaab" * 1000,
    "0123456789 12,345.67 \u0661\u0662\u0663 \u2167 \u00bd",
    "",
    " ",
    "\n",
)
LOSSY_IN_SENTENCEPIECE = "a\u2581b \u2585 c"  # checked for the round trip alone: sentencepiece reads U+2581 as a space


def forms(folder: Path):
    """Name of each further form of the vocabulary in the folder -> a function that gives the ids of a text, or None
    for a text that it is known to read otherwise."""
    found = {}
    if (folder / "tokenizer.model").is_file():
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())
        found["tokenizer.model"] = lambda text: None if spm_trainer.SPACE in text else pieces.encode(text)
    if (folder / "tokenizer.tiktoken").is_file():
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        split = pattern(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
        engine = tiktoken.Encoding(
            "alma",
            pat_str=split,
            mergeable_ranks=load_tiktoken_bpe(str(folder / "tokenizer.tiktoken")),
            special_tokens={},
        )
        found["tokenizer.tiktoken"] = engine.encode_ordinary
    return found


def prove(folder: Path, work: Path, ours: bool) -> dict:
    """Encode and decode held-out text, two megabytes of the training sample and hard texts. A tokenizer that was
    trained here must keep all of them.

    Bytes and characters per token come from the held-out text. `ids_equal`: for each further form, texts on which it
    gives the same ids, of all compared.
    """
    from pipeline.data.cleaning.language import detect
    from pipeline.data.tokens.store import encode_text, load_tokenizer

    tokenizer = load_tokenizer(folder)
    fast, others = encoder(folder), forms(folder)
    special = set(tokenizer.all_special_ids)
    by_source, by_language = defaultdict(lambda: [0, 0, 0]), defaultdict(lambda: [0, 0, 0])
    equal = {name: [0, 0] for name in others}
    checked, lost = 0, []

    def check(batch: list[str]) -> list[int]:
        nonlocal checked
        encoded = encode_text(tokenizer, batch)
        assert all(ids.tolist() == wanted for ids, wanted in zip(fast(batch), encoded, strict=True)), (
            "the fast encoder gives other ids than tokenizer.json"
        )
        for text, ids, back in zip(
            batch, encoded, tokenizer.backend_tokenizer.decode_batch(encoded, skip_special_tokens=False), strict=True
        ):
            checked += 1
            if found := set(ids) & special:
                name = tokenizer.convert_ids_to_tokens(min(found))
                if not ours:
                    raise UserError(
                        f"the adopted tokenizer makes its special token {name!r} of the text {text[:80]!r}; in its"
                        " files, let eos, bos and pad be tokens that no text is spelled with"
                    )
                raise AssertionError(f"text became the special token {name}: {text[:80]!r}")
            if back != text:
                assert not ours, f"round trip changed {text[:80]!r}"
                lost.append(text)
            for name, other in others.items():
                wanted = other(text)
                if wanted is not None:
                    equal[name][0] += 1
                    equal[name][1] += wanted == ids
        return [len(ids) for ids in encoded]

    check([*HARD_TEXTS, LOSSY_IN_SENTENCEPIECE])
    for source, batch in batches(work / "heldout.jsonl", None):
        for text, tokens, code in zip(batch, check(batch), detect(batch)[0], strict=True):
            for table, key in ((by_source, source), (by_language, code)):
                for place, size in enumerate((len(text.encode()), len(text), tokens)):
                    table[key][place] += size
    for _, batch in batches(work / "sample.jsonl", 2_000_000):
        check(batch)

    def rates(table: dict, place: int) -> dict[str, float]:
        return {key: round(sizes[place] / sizes[2], 4) for key, sizes in sorted(table.items()) if sizes[2]}

    total = [sum(sizes[place] for sizes in by_source.values()) for place in range(3)]
    found = {
        "bytes_per_token": round(total[0] / total[2], 4) if total[2] else None,
        "bytes_per_token_by_source": rates(by_source, 0),
        "characters_per_token_by_source": rates(by_source, 1),
        "bytes_per_token_by_language": rates(by_language, 0),
        "characters_per_token_by_language": rates(by_language, 1),
        "round_trip": {"texts": checked, "exact": checked - len(lost)},
        "ids_equal": {name: {"texts": compared, "equal": same} for name, (compared, same) in equal.items()},
        "encoder": fast.kind,
    }
    if lost:
        found["round_trip"]["example"] = min(lost, key=len)[:200]
    return found
