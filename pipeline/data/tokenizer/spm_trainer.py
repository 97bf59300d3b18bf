"""sentencepiece: training on whole documents without losing any, and its model as a fast tokenizer that keeps every
byte. Names of the special tokens of all tokenizers made here."""

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.spm_log import follow

BOS, EOS, PAD, TURN, END_OF_TURN = "<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [BOS, EOS, PAD, TURN, END_OF_TURN]
UNKNOWN = "<unk>"  # sentencepiece insists on one; with byte fallback nothing becomes it

SPACE = "\u2581"  # what sentencepiece writes for a space inside a piece
NEVER = -1e6  # a score below that of any path through a word
# Characters without a space between that unigram is trained on together: what an iteration costs grows with the square
# of a run's length (docs/log.md, 24). Bytes of a run and pieces are those of any other length; only the pieces across
# a cut are not counted.
LONGEST_RUN = 1000
RESERVED = "\u2585"  # sentencepiece's trainer drops every sentence that contains it


def sentences(texts: Iterable[str], longest: int | None = None) -> Iterator[str]:
    """Documents in the form in which sentencepiece's trainer reads all of them.

    A sentence is a whole document with its newlines, so that "\\n\\n" and the like can become pieces. The Python
    iterator of sentencepiece 0.2.3 cuts newlines off the end of a sentence (put in front here), and its trainer drops a
    sentence with U+2585 (cut there; that one character is left to byte fallback). Runs without a space of more than
    `longest` characters are cut into such of `longest`.
    """
    for text in texts:
        for whole in text.split(RESERVED):
            for part in _cut(whole, longest) if longest and len(whole) > longest else [whole]:
                body = part.rstrip("\r\n")
                if body:
                    yield part[len(body) :] + body


def _cut(text: str, longest: int) -> Iterator[str]:
    begin = 0
    for run in re.finditer("[^ ]+", text):
        for at in range(run.start() + longest, run.end(), longest):
            yield text[begin:at]
            begin = at
    yield text[begin:]


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    split_digits: bool,
    character_coverage: float,
    log: Path,
    kind: str = "bpe",
    special: list[str] = (),
    merge_whitespace: bool = True,
) -> bytes:
    """A sentencepiece model of `kind` bpe or unigram as bytes; ids 0-5 are unknown, bos, eos, pad and the marks of a
    turn, then come `special`, then 256 bytes.

    Asserts that the trainer's own count of characters is ours, for it skips what it does not like without an error.
    """
    import sentencepiece

    characters = 0
    meta = re.compile(
        "|".join([*map(re.escape, sorted([UNKNOWN, *SPECIAL, *special], key=len, reverse=True)), "<0x[0-9A-F]{2}>"])
    )

    def counted():
        nonlocal characters
        for sentence in sentences(texts, LONGEST_RUN if kind == "unigram" else None):
            # no parts of pieces: NUL, and spelled special tokens, for which a mark is counted
            characters += (
                len(sentence) - sentence.count("\0") - sum(len(spelled) - 1 for spelled in meta.findall(sentence))
            )
            yield sentence

    model = _Buffer()
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _stderr_to(log), follow(log, vocab_size):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=counted(),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=merge_whitespace,
                split_digits=split_digits,
                max_sentence_length=2**30,  # the default, 4192 bytes, skips longer lines without an error
                # stands in the model file, and threads would add up unigram's expectations in another order; BPE is
                # single-threaded anyway
                num_threads=1,
                # the default, which another training in this process may have changed for all: the count is read from
                # the log
                minloglevel=0,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                unk_piece=UNKNOWN,
                bos_piece=BOS,
                eos_piece=EOS,
                pad_piece=PAD,
                control_symbols=[TURN, END_OF_TURN, *special],
                # Unigram in `tokenizers`: a text that spells a special or byte token can be kept from becoming it
                # (NEVER) if no character of it is unknown.
                required_chars=(
                    "".join(sorted(set("".join((*SPECIAL, *special, UNKNOWN, "<0x0123456789ABCDEF>")))))
                    if kind == "unigram"
                    else ""
                ),
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
        return too_large(vocab_size, int(most.group(1)))
    least = re.search(r"required_chars. \d+ vs (\d+)", message)
    if least:
        return UserError(
            f"vocab_size: {vocab_size} has no room for the characters of this text: {least.group(1)} are needed; set it"
            " higher, or lower character_coverage"
        )
    if "sentences_.empty()" in message:
        return UserError("the training text is empty: there is nothing to learn a vocabulary from")
    return RuntimeError(message)


def too_large(vocab_size: int, most: int) -> UserError:
    advice = (
        f"set vocab_size to at most {most}, or train on more text"
        if most >= 300
        else "the least that vocab_size may be is 300, so train on more text, or adopt a tokenizer"
    )
    return UserError(
        f"vocab_size: {vocab_size} is more than this text supports: all its pairs are merged at {most}; {advice}"
    )


def damaged(model: bytes) -> str | None:
    """Why bytes are no whole sentencepiece model, in words; None if they are one."""
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if not model:
        return "is empty (0 bytes)"
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        return f"is no sentencepiece model, or is cut off ({len(model):,} bytes that do not end where a record ends)"
    # written in this order, so a file that was cut between two records lacks what comes last
    missing = [part for part in ("trainer_spec", "normalizer_spec") if not proto.HasField(part)]
    if missing or not proto.pieces:
        lacks = missing[0] if missing else "pieces"
        return f"is no sentencepiece model, or is cut off ({len(proto.pieces):,} pieces, but no {lacks})"
    if wrong := _odd_pieces(proto):
        return f"is a damaged sentencepiece model: {wrong}"
    try:
        sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        return f"is a damaged sentencepiece model: {str(error)[:200]}"
    return None


def _odd_pieces(proto) -> str | None:
    """What is wrong with the pieces of a model, in words: its own reader looks at some of this only when it encodes."""
    names: dict[str, int] = {}
    for index, piece in enumerate(proto.pieces):
        if not piece.piece or not isinstance(piece.piece, str):  # protobuf gives bytes that are no UTF-8 as bytes
            return f"piece {index} is {piece.piece!r}, expected text"
        if names.setdefault(piece.piece, index) != index:
            return f"piece {piece.piece!r} has the ids {names[piece.piece]} and {index}"
        if not math.isfinite(piece.score):
            return f"piece {index} ({piece.piece!r}) has the score {piece.score}"
        if piece.type == piece.BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", piece.piece):
            return f"piece {index} ({piece.piece!r}) is said to be a byte"
    for key in ("unk_piece", "bos_piece", "eos_piece", "pad_piece"):
        if not isinstance(getattr(proto.trainer_spec, key), str):
            return f"{key} is {getattr(proto.trainer_spec, key)!r}, expected text"
    unknown = [index for index, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN]
    if len(unknown) != 1:
        return f"{len(unknown)} pieces are the unknown one, expected 1"
    return None


def pieces_of(model: bytes) -> list[str]:
    """The pieces of a whole sentencepiece model (see `damaged`) in the order of their ids."""
    from sentencepiece import sentencepiece_model_pb2

    return [piece.piece for piece in sentencepiece_model_pb2.ModelProto.FromString(model).pieces]


def is_unigram(model: bytes) -> bool:
    from sentencepiece import sentencepiece_model_pb2

    trainer = sentencepiece_model_pb2.ModelProto.FromString(model).trainer_spec
    return trainer.model_type == trainer.UNIGRAM


def adds_prefix(model: bytes) -> bool:
    """Does a whole sentencepiece model put a space in front of each text (its default, add_dummy_prefix)?"""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model).normalizer_spec.add_dummy_prefix


def is_mark(piece: str) -> bool:
    """Is a user-defined piece a mark, such as [REF] or <tool>? Marks become special tokens, which no text is encoded
    as; sentencepiece itself reads them in any text."""
    return len(piece) > 2 and (piece[0], piece[-1]) in (("<", ">"), ("[", "]"), ("{", "}"))


def for_words(model: bytes) -> bytes:
    """The model as it encodes a word inside a text: no space in front, and marks never read in the word."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    for piece in proto.pieces:
        if piece.type == piece.USER_DEFINED and is_mark(piece.piece):
            piece.type = piece.CONTROL
    return proto.SerializeToString()


def inexact(model: bytes) -> str | None:
    """Why a whole sentencepiece model (see `damaged`) would lose or change text, in words; None if it keeps every
    byte."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
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
    if any(piece.type == piece.UNUSED for piece in proto.pieces):
        return "has pieces that are not to be used (set_vocabulary)"
    known = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
    if trainer.model_type == trainer.UNIGRAM and any(
        set(piece.piece) - known for piece in proto.pieces if piece.type in (piece.CONTROL, piece.BYTE, piece.UNKNOWN)
    ):
        return (
            "has no tokens for the characters of some special tokens' names, so that text could become a special token"
        )
    if any(re.search(f"[^{SPACE}]{SPACE}", piece.piece) for piece in proto.pieces if piece.type == piece.NORMAL):
        return "has pieces with a space behind other characters (split_by_whitespace)"
    return None


def from_sentencepiece(model: bytes):
    """A sentencepiece model for which `inexact` finds nothing, as a `tokenizers.Tokenizer` that gives the same ids.

    Pieces are stored with real spaces, not with U+2581, so that a U+2581 in a text survives as bytes: sentencepiece
    itself turns it into a space. A space in front of each text (add_dummy_prefix) is added and, in decoding, removed;
    as in Llama's own tokenizer.json, what follows a special token gets one as well. User-defined pieces are read in
    text as sentencepiece does, but for marks (`is_mark`). Everything else is encoded alike.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    vocabulary: dict[str, int] = {}
    score: dict[str, float] = {}
    added = []
    for index, piece in enumerate(proto.pieces):
        text = piece.piece
        if piece.type in (piece.CONTROL, piece.UNKNOWN) or piece.type == piece.USER_DEFINED and is_mark(text):
            added.append(AddedToken(text, normalized=False, special=True))
        elif piece.type == piece.USER_DEFINED:
            text = text.replace(SPACE, " ")
            added.append(AddedToken(text, normalized=False, special=False))
        elif piece.type != piece.BYTE:
            text = text.replace(SPACE, " ")
            score[text] = piece.score
        vocabulary[text] = index
    unknown = next(index for index, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        # A text that spells a special token or a byte token must not become it: their scores, 0 in the model, are such
        # that no path goes through them.
        scored = [(piece, score.get(piece, NEVER)) for piece in vocabulary]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=True))
    else:
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges_of(score),
                unk_token=proto.pieces[unknown].piece,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    # Spaces begin pieces and never follow anything else in one (inexact), so the parts are encoded as the whole is;
    # short parts hit the cache.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+"), behavior="isolated")
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        tokenizer.normalizer = normalizers.Prepend(" ")
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    return tokenizer


def merges_of(score: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces whose joining is a piece, best first.

    sentencepiece joins the adjacent pair whose result has the best score, the leftmost of equals; `tokenizers` ranks
    the pairs themselves. The two could differ only where two splits of one piece overlap in the text (ab+a and a+ba in
    "ab a ba"). Merging from the best score down does not lead there: no difference on all 9,216 strings over {a, b} of
    10 and of 13 letters with six vocabularies, and the stage compares (`ids_equal`).
    """
    found = [
        (-value, piece, cut)
        for piece, value in score.items()
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    return [(piece[:cut], piece[cut:]) for _, piece, cut in sorted(found)]
