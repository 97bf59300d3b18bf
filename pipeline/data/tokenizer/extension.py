"""More tokens for an existing byte-level BPE tokenizer, learned on other text: its merges go on where they ended.

    reason = unsupported(backend)                        # why it cannot be extended, in words, or None
    extended, number = extend(backend, texts, 8000, total)   # tokenizers.Tokenizer, and how many it has more
    pieces = new_pieces(old, new)                        # id of a new token -> ids of the old tokens that spell it

What holds: the ids of any text are its old ids, in which some runs of neighbours are replaced by new tokens; a text in
which no new token occurs has its old ids. Proof: merging always takes the applicable pair that comes first in the list,
and the new pairs are at its end, so a word is first merged as before. Then new pairs apply, and what they make is in no
old pair, so none of those becomes applicable again. And the old tokens that spell a new one are always the same: no
merge crossed the ends of its stretch of text, so its bytes alone are merged alike (the argument of encode.py).
`expanded` undoes the replacements; the stage checks with it that all held-out text has its old ids.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from pipeline.data.tokenizer import bpe_merges, encode, pretokenize
from pipeline.data.tokenizer.fast_tokenizer import encode_text


def unsupported(backend) -> str | None:
    """Why a tokenizers.Tokenizer cannot be extended, in words, or None."""
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        return f"is a {model['type']} tokenizer, whose tokens are chosen all together"
    changing = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if any(model.get(option) for option in changing):
        return f"has a BPE model with {', '.join(option for option in changing if model.get(option))}"
    if not _is_byte_level(spec):
        return "is not byte-level (it has sentencepiece's characters and byte tokens)"
    return None


def _is_byte_level(spec: dict) -> bool:
    step = spec["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    return any(step.get("type") == "ByteLevel" for step in steps)


def extend(
    backend, texts: Iterable[str], number: int, total: int, longest: int = bpe_merges.LONGEST
) -> tuple[object, int]:
    """(the tokenizer with at most `number` more tokens, how many there are): learned from texts of `total` bytes, with
    ids after the largest one, none longer than `longest` bytes. Ids, special tokens and the split into words stay.
    Shows progress."""
    from pipeline.core.tracking import Progress

    spec = json.loads(backend.to_str())
    known = _token_bytes(spec, backend)
    with Progress("tokenizer: words", total, unit="bytes") as bar:
        words, counts = _with_known_bytes(*_counted(backend, spec, texts, bar.update), known)
    with Progress("tokenizer: merges", number, unit="merges") as bar:
        encoded = _encoded(backend, words)
        tokens, pairs = bpe_merges.go_on(words, counts, known, encoded, number, advance=bar.update, longest=longest)
    return _with_tokens(spec, known, tokens, pairs, backend), len(tokens)


def _token_bytes(spec: dict, backend) -> list[bytes]:
    """Bytes of each token by id; b"" for added tokens, which no text is encoded with."""
    byte_of = encode.alphabet()
    added = {token["content"] for token in spec["added_tokens"]}
    known = [b""] * (max(backend.get_vocab().values()) + 1)
    for token, index in spec["model"]["vocab"].items():
        if token not in added and all(char in byte_of for char in token):
            known[index] = bytes(map(byte_of.__getitem__, token))
    return known


def _counted(backend, spec: dict, texts: Iterable[str], advance: Callable[[int], None]):
    """(words, counts) of the texts as the tokenizer splits them, as pretokenize.count returns them."""
    expression = encode.pattern(spec)
    for policy in ((True, True), (False, True), (True, False), (False, False)):  # split_digits, merge_whitespace
        if expression == pretokenize.pattern(*policy):
            return pretokenize.count(texts, *policy, advance)
    return _counted_by_tokenizers(backend, texts, advance)


def _counted_by_tokenizers(backend, texts: Iterable[str], advance: Callable[[int], None]):
    """The same with the tokenizer's own normalizer and splitting, a tenth as fast."""
    import pyarrow

    byte_of = encode.alphabet()
    counter: Counter[str] = Counter()
    for text in texts:
        advance(len(text.encode()))
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        counter.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    words = [bytes(map(byte_of.__getitem__, word)) for word in counter]
    return pyarrow.array(words, pyarrow.binary()), np.fromiter(counter.values(), np.int64, len(counter))


def _with_known_bytes(words, counts: np.ndarray, known: list[bytes]):
    """The words all of whose bytes have a token: SmolLM2 lacks 21 bytes, and drops them from a text."""
    import pyarrow

    missing = {byte for byte in range(256) if bytes([byte]) not in set(known)}
    if not missing:
        return words, counts
    kept = np.array([missing.isdisjoint(word.as_py()) for word in words], bool)
    return words.filter(pyarrow.array(kept)), counts[kept]


def _encoded(backend, words) -> Iterator[list[int]]:
    """The ids of each word: the old merges."""
    char_of = [""] * 256
    for char, byte in encode.alphabet().items():
        char_of[byte] = char
    model = backend.model
    for word in words:
        spelled = "".join([char_of[byte] for byte in word.as_py()])
        yield [token.id for token in model.tokenize(spelled)]


def _with_tokens(spec: dict, known: list[bytes], tokens: list[bytes], pairs: list[tuple[int, int]], backend):
    """The tokenizer with further tokens, the first of which has the id len(known)."""
    from tokenizers import Tokenizer

    char_of = {byte: char for char, byte in encode.alphabet().items()}
    model = spec["model"]
    # `tokenizers` ignores the declared id of an added token and counts instead, unless the model has it.
    for token in spec["added_tokens"]:
        model["vocab"][token["content"]] = token["id"]
    spelled = ["".join(map(char_of.__getitem__, token)) for token in (*known, *tokens)]
    for index, (left, right) in enumerate(pairs, len(known)):
        model["vocab"][spelled[index]] = index
        model["merges"].append([spelled[left], spelled[right]])
    extended = Tokenizer.from_str(json.dumps(spec))
    expected = backend.get_vocab() | {spelled[index]: index for index in range(len(known), len(spelled))}
    assert extended.get_vocab() == expected, "the extended tokenizer has other ids"
    return extended


# ---- from new ids to old ones ----------------------------------------------------------------------------------------


def new_pieces(old, new) -> dict[int, list[int]] | None:
    """Id of each token that `new` has and `old` has not -> the ids of the old tokens that spell it, of two
    tokenizers.Tokenizer; None if an old token has another id in `new`."""
    before, after = old.get_vocab(), new.get_vocab()
    if any(after.get(token) != index for token, index in before.items()):
        return None
    special = {token.content for token in new.get_added_tokens_decoder().values()}
    model = old.model
    pieces = {}
    for token, index in sorted(after.items(), key=lambda item: item[1]):
        if token in before:
            continue
        if token in special:
            [pieces[index]] = encode_text(old, [token])
        else:
            pieces[index] = [part.id for part in model.tokenize(token)]
    return pieces


def expanded(ids: list[int], pieces: dict[int, list[int]]) -> list[int]:
    """Ids in which each new token is replaced by its old pieces."""
    old: list[int] = []
    for index in ids:
        old += pieces.get(index, (index,))
    return old
