"""The two BPE trainers, and sentencepiece's model as a fast tokenizer with the same ids.

Both give a `tokenizers.Tokenizer` that keeps every byte: encode, then decode, is the identity on any text.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import UserError

BOS, EOS, PAD, TURN, END_OF_TURN = "<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [BOS, EOS, PAD, TURN, END_OF_TURN]
UNKNOWN = "<unk>"  # sentencepiece insists on one; with byte fallback nothing becomes it

META = re.compile("|".join([*map(re.escape, [UNKNOWN, *SPECIAL]), "<0x[0-9A-F]{2}>"]))

SPACE = "\u2581"  # what sentencepiece writes for a space inside a piece
RESERVED = "\u2585"  # sentencepiece's trainer drops every sentence that contains it

# The split of cl100k_base (tiktoken) in the form that Llama 3 and Qwen 2 publish; only the number of digits in a token is ours to choose.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Documents in the form in which sentencepiece's trainer reads all of them.

    A sentence is a whole document with its newlines, so that "\\n\\n" and the like can become pieces. The Python iterator of
    sentencepiece 0.2.3 cuts newlines off the end of a sentence (put in front here), and its trainer drops a sentence with U+2585
    (cut there; that one character is left to byte fallback).
    """
    for text in texts:
        for part in text.split(RESERVED):
            body = part.rstrip("\r\n")
            if body:
                yield part[len(body) :] + body


def train_sentencepiece(texts: Iterable[str], vocab_size: int, split_digits: bool, character_coverage: float, log: Path) -> bytes:
    """A sentencepiece BPE model as bytes; ids 0-5 are unknown, bos, eos, pad and the marks of a turn, then come 256 bytes.

    Asserts that the trainer's own count of characters is ours, for it skips what it does not like without an error.
    """
    import sentencepiece

    characters = 0

    def counted():
        nonlocal characters
        for sentence in sentences(texts):
            characters += len(sentence) - sentence.count("\0") - sum(len(spelled) - 1 for spelled in META.findall(sentence))  # no parts of pieces: NUL, and spelled special tokens, for which a mark is counted
            yield sentence

    model = _Buffer()
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _stderr_to(log):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=counted(),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                split_digits=split_digits,
                max_sentence_length=2**30,  # the default, 4192 bytes, skips longer lines without an error
                num_threads=1,  # stands in the model file; BPE training is single-threaded anyway
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                unk_piece=UNKNOWN,
                bos_piece=BOS,
                eos_piece=EOS,
                pad_piece=PAD,
                control_symbols=[TURN, END_OF_TURN],
            )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from None
    said = log.read_text(encoding="utf-8", errors="replace")
    read = int(re.findall(r"all chars count=(\d+)", said)[-1])
    assert read == characters, f"sentencepiece read {read} of {characters} characters; see {log}"
    return bytes(model.data)


class _Buffer:
    def __init__(self):
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


@contextlib.contextmanager
def _stderr_to(path: Path):
    """Send what C++ writes to stderr into a file."""
    kept = os.dup(2)
    with open(path, "wb") as handle:
        os.dup2(handle.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _explained(message: str, vocab_size: int) -> Exception:
    most = re.search(r"Please set it to a value <= (\d+)", message)
    if most:
        return _too_large(vocab_size, int(most.group(1)))
    least = re.search(r"required_chars. \d+ vs (\d+)", message)
    if least:
        return UserError(f"vocab_size: {vocab_size} has no room for the characters of this text: {least.group(1)} are needed; set it higher, or lower character_coverage")
    if "sentences_.empty()" in message:
        return UserError("the training text is empty: there is nothing to learn a vocabulary from")
    return RuntimeError(message)


def _too_large(vocab_size: int, most: int) -> UserError:
    return UserError(f"vocab_size: {vocab_size} is more than this text supports: all its pairs are merged at {most}; set vocab_size to at most {most}, or train on more text")


def inexact(model: bytes) -> str | None:
    """Why a sentencepiece model would lose or change text, in words; None if it keeps every byte."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        return "is no sentencepiece model"
    rule, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        return "is neither a BPE nor a unigram model"
    if rule.precompiled_charsmap or rule.normalization_rule_tsv:
        return f"changes characters (normalisation {rule.name or 'of its own'})"
    if rule.remove_extra_whitespaces:
        return "removes spaces (remove_extra_whitespaces)"
    if trainer.treat_whitespace_as_suffix or not rule.escape_whitespaces:
        return "treats spaces in a way that is not supported (treat_whitespace_as_suffix, or spaces not escaped)"
    if sum(piece.type == piece.BYTE for piece in proto.pieces) != 256:
        return "has no tokens for the 256 bytes (byte_fallback)"
    if any(re.search(f"[^{SPACE}]{SPACE}", piece.piece) for piece in proto.pieces if piece.type == piece.NORMAL):
        return "has pieces with a space behind other characters (split_by_whitespace)"
    return None


def from_sentencepiece(model: bytes):
    """A sentencepiece BPE model as a `tokenizers.Tokenizer` that gives the same ids.

    Pieces are stored with real spaces, not with U+2581, so that a U+2581 in a text survives as bytes: sentencepiece itself turns it
    into a space. Everything else is encoded alike.
    """
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary: dict[str, int] = {}
    score: dict[str, float] = {}
    for index in range(len(pieces)):
        piece = pieces.id_to_piece(index)
        if not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index)):
            piece = piece.replace(SPACE, " ")
            score[piece] = pieces.get_score(index)
        vocabulary[piece] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges_of(score), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    # Spaces begin pieces and never follow anything else in one (inexact), so BPE gives the same on the parts; short parts hit the cache.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in (UNKNOWN, *SPECIAL)])
    return tokenizer


def merges_of(score: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces whose joining is a piece, best first.

    sentencepiece joins the adjacent pair whose result has the best score, the leftmost of equals; `tokenizers` ranks the pairs themselves. The two
    could differ only where two splits of one piece overlap in the text (ab+a and a+ba in "ab a ba"). Merging from the best score down does
    not lead there: no difference on all 9,216 strings over {a, b} of 10 and of 13 letters with six vocabularies, and the stage compares (`ids_equal`).
    """
    found = [(-value, piece, cut) for piece, value in score.items() for cut in range(1, len(piece)) if piece[:cut] in score and piece[cut:] in score]
    return [(piece[:cut], piece[cut:]) for _, piece, cut in sorted(found)]


def train_byte_level(texts: Iterable[str], vocab_size: int, split_digits: bool):
    """Byte-level BPE over cl100k's split, with all 256 bytes in its alphabet; ids 0-4 are bos, eos, pad and the marks of a turn."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = PATTERN.replace("DIGITS", "" if split_digits else "{1,3}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [AddedToken(word, normalized=False, special=True) for word in SPECIAL]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=words, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise _too_large(vocab_size, tokenizer.get_vocab_size())
    return tokenizer
