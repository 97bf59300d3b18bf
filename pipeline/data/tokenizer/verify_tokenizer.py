"""Measures a published tokenizer through its folder: round trips, equal ids in all its forms, bytes and characters per
token."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data.tokenizer import spm_model
from pipeline.data.tokenizer.encode import encoder, pattern
from pipeline.data.tokenizer.fast_tokenizer import encode_text, load_tokenizer
from pipeline.data.tokenizer.sample import batches
from pipeline.data.tokenizer.tokenizer_folder import read_backend

# What breaks tokenizers that are not lossless: joined emoji, hanzi outside the basic plane, NUL, line ends, full-width
# forms, right-to-left text, long runs, a byte order mark, and text that spells special tokens, byte tokens and
# sentencepiece's own marks.
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
LOSSY_IN_SENTENCEPIECE = "a\u2581b \u2585 c"  # only its round trip is checked: sentencepiece reads U+2581 as a space
SAMPLE_CHARACTERS = 2_000_000  # of the training sample that are checked
BYTES, CHARACTERS, TOKENS, TOKENS_BEFORE = range(4)  # of some text

OtherForm = Callable[[str], list[int] | None]


def other_forms(folder: Path) -> dict[str, OtherForm]:
    """File name of each further form of the vocabulary in the folder -> a function that returns the ids of a text, or
    None for a text that this form is known to read differently."""
    forms = {}
    if (folder / "tokenizer.model").is_file():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())
        forms["tokenizer.model"] = lambda text: None if spm_model.SPACE in text else processor.encode(text)
    if (folder / "tokenizer.tiktoken").is_file():
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        ranks = load_tiktoken_bpe(str(folder / "tokenizer.tiktoken"))
        engine = tiktoken.Encoding("alma", pat_str=pattern(spec), mergeable_ranks=ranks, special_tokens={})
        forms["tokenizer.tiktoken"] = engine.encode_ordinary
    return forms


class _Checks:
    """Encodes and decodes texts, and counts what is lost and where other forms give other ids."""

    def __init__(self, folder: Path, trained_here: bool):
        self.tokenizer = load_tokenizer(folder)
        self.special_ids = set(self.tokenizer.all_special_ids)
        self.fast_encode = encoder(folder)
        self.forms = other_forms(folder)
        self.trained_here = trained_here
        self.num_texts = 0
        self.changed_texts: list[str] = []
        self.compared = dict.fromkeys(self.forms, 0)
        self.equal = dict.fromkeys(self.forms, 0)

    def run(self, texts: list[str]) -> list[list[int]]:
        """Check the texts. Returns the ids of each."""
        encoded = encode_text(self.tokenizer, texts)
        for fast_ids, ids in zip(self.fast_encode(texts), encoded, strict=True):
            assert fast_ids.tolist() == ids, "the fast encoder gives other ids than tokenizer.json"
        decoded = self.tokenizer.backend_tokenizer.decode_batch(encoded, skip_special_tokens=False)
        for text, ids, round_trip in zip(texts, encoded, decoded, strict=True):
            self.num_texts += 1
            self._check_special(text, ids)
            if round_trip != text:
                assert not self.trained_here, f"round trip changed {text[:80]!r}"
                self.changed_texts.append(text)
            self._compare_forms(text, ids)
        return encoded

    def _check_special(self, text: str, ids: list[int]) -> None:
        special = set(ids) & self.special_ids
        if not special:
            return
        name = self.tokenizer.convert_ids_to_tokens(min(special))
        if self.trained_here:
            raise AssertionError(f"text became the special token {name}: {text[:80]!r}")
        raise UserError(
            f"the adopted tokenizer encodes the text {text[:80]!r} with its special token {name!r}; change its files"
            " so that eos, bos and pad are tokens that no text is encoded with"
        )

    def _compare_forms(self, text: str, ids: list[int]) -> None:
        for name, encode in self.forms.items():
            other_ids = encode(text)
            if other_ids is not None:
                self.compared[name] += 1
                self.equal[name] += other_ids == ids


class _Before:
    """Encodes texts as the tokenizer did before tokens were added to it, and counts those whose ids are the same."""

    def __init__(self, backend, folder: Path):
        from pipeline.data.tokenizer.extension import new_pieces

        self.backend = backend
        self.pieces = new_pieces(backend, read_backend(folder))
        self.num_unchanged = 0

    def run(self, texts: list[str], encoded: list[list[int]]) -> list[int]:
        """The number of old tokens of each text. encoded: the ids of the texts now, which must be the old ones where
        new tokens are spelled with old ones."""
        from pipeline.data.tokenizer.extension import expanded

        old = encode_text(self.backend, texts)
        for text, old_ids, ids in zip(texts, old, encoded, strict=True):
            assert expanded(ids, self.pieces) == old_ids, f"added tokens change other ids of {text[:80]!r}"
            self.num_unchanged += ids == old_ids
        return [len(ids) for ids in old]


def verify(folder: Path, work: Path, trained_here: bool, before=None) -> dict:
    """Encode and decode held-out text, two million characters of the training sample, and hard texts. A tokenizer that
    was trained here must keep all of them.

    Bytes and characters per token are measured on the held-out text. `ids_equal`: for each further form, the number of
    texts compared, and of those with equal ids. before: the tokenizers.Tokenizer to which tokens were added; the entry
    `before` has what it needs for the same text.
    """
    from pipeline.data.cleaning.language import detect

    checks = _Checks(folder, trained_here)
    earlier = None if before is None else _Before(before, folder)
    hard = [*HARD_TEXTS, LOSSY_IN_SENTENCEPIECE]
    encoded = checks.run(hard)
    if earlier is not None:
        earlier.run(hard, encoded)
        earlier.num_unchanged = 0
    # bytes, characters, tokens, and tokens before
    by_source, by_language = defaultdict(lambda: [0, 0, 0, 0]), defaultdict(lambda: [0, 0, 0, 0])
    num_texts = 0
    for source, texts in batches(work / "heldout.jsonl", None):
        languages, _ = detect(texts)
        encoded = checks.run(texts)
        num_before = [0] * len(texts) if earlier is None else earlier.run(texts, encoded)
        num_texts += len(texts)
        for text, ids, old, language in zip(texts, encoded, num_before, languages, strict=True):
            sizes = (len(text.encode()), len(text), len(ids), old)
            for totals in (by_source[source], by_language[language]):
                for place, size in enumerate(sizes):
                    totals[place] += size
    for _, texts in batches(work / "sample.jsonl", SAMPLE_CHARACTERS):
        checks.run(texts)

    report = _rates(by_source, by_language, TOKENS)
    if earlier is not None:
        report["before"] = _rates(by_source, by_language, TOKENS_BEFORE)
        report["before"]["texts_with_the_same_ids"] = {"texts": num_texts, "equal": earlier.num_unchanged}
    ids_equal = {name: {"texts": checks.compared[name], "equal": checks.equal[name]} for name in checks.forms}
    report |= {
        "round_trip": {"texts": checks.num_texts, "exact": checks.num_texts - len(checks.changed_texts)},
        "ids_equal": ids_equal,
        "encoder": checks.fast_encode.kind,
    }
    if checks.changed_texts:
        report["round_trip"]["example"] = min(checks.changed_texts, key=len)[:200]
    return report


def _rates(by_source: dict[str, list[int]], by_language: dict[str, list[int]], tokens: int) -> dict:
    """Bytes and characters per token. tokens: TOKENS or TOKENS_BEFORE."""
    num_bytes = sum(sizes[BYTES] for sizes in by_source.values())
    num_tokens = sum(sizes[tokens] for sizes in by_source.values())
    return {
        "bytes_per_token": round(num_bytes / num_tokens, 4) if num_tokens else None,
        "bytes_per_token_by_source": _per_token(by_source, BYTES, tokens),
        "characters_per_token_by_source": _per_token(by_source, CHARACTERS, tokens),
        "bytes_per_token_by_language": _per_token(by_language, BYTES, tokens),
        "characters_per_token_by_language": _per_token(by_language, CHARACTERS, tokens),
    }


def _per_token(sizes_of: dict[str, list[int]], place: int, tokens: int) -> dict[str, float]:
    rates = {}
    for name, sizes in sorted(sizes_of.items()):
        if sizes[tokens]:
            rates[name] = round(sizes[place] / sizes[tokens], 4)
    return rates
