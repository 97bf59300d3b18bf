"""sentencepiece models as bytes: is one complete, does it keep every byte of a text, and the same ids as a fast
tokenizer.

    reason = damage(model) or inexactness(model)     # why it cannot be used, in words, or None
    tokenizer = to_fast_tokenizer(model)             # tokenizers.Tokenizer
"""

import math
import re

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece
NEVER = -1e6  # a score below that of any path through a word


def parsed(model: bytes):
    """The protobuf message of a complete sentencepiece model (see `damage`)."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)


def damage(model: bytes) -> str | None:
    """Why these bytes are not a complete sentencepiece model, in words; None if they are one."""
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    if not model:
        return "is empty (0 bytes)"
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        size = f"{len(model):,} bytes that do not end where a record ends"
        return f"is not a sentencepiece model, or is truncated ({size})"
    # fields are written in this order, so a file that was cut between two records lacks the last ones
    missing = [part for part in ("trainer_spec", "normalizer_spec") if not proto.HasField(part)]
    if not missing and not proto.pieces:
        missing = ["pieces"]
    if missing:
        return f"is not a sentencepiece model, or is truncated ({len(proto.pieces):,} pieces, but no {missing[0]})"
    reason = _damaged_piece(proto)
    if reason:
        return f"is a damaged sentencepiece model: {reason}"
    try:
        sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        return f"is a damaged sentencepiece model: {str(error)[:200]}"
    return None


def _damaged_piece(proto) -> str | None:
    """What is wrong with the pieces of a model, in words. sentencepiece itself checks some of this only when it
    encodes."""
    names: dict[str, int] = {}
    for index, piece in enumerate(proto.pieces):
        if not piece.piece or not isinstance(piece.piece, str):  # protobuf returns bytes that are not UTF-8 as bytes
            return f"piece {index} is {piece.piece!r}, expected text"
        if names.setdefault(piece.piece, index) != index:
            return f"piece {piece.piece!r} has the ids {names[piece.piece]} and {index}"
        if not math.isfinite(piece.score):
            return f"piece {index} ({piece.piece!r}) has the score {piece.score}"
        if piece.type == piece.BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", piece.piece):
            return f"piece {index} ({piece.piece!r}) is declared as a byte"
    for key in ("unk_piece", "bos_piece", "eos_piece", "pad_piece"):
        value = getattr(proto.trainer_spec, key)
        if not isinstance(value, str):
            return f"{key} is {value!r}, expected text"
    num_unknown = sum(piece.type == piece.UNKNOWN for piece in proto.pieces)
    if num_unknown != 1:
        return f"{num_unknown} pieces have the type UNKNOWN, expected 1"
    return None


def inexactness(model: bytes) -> str | None:
    """Why a complete sentencepiece model (see `damage`) would lose or change text, in words; None if it keeps every
    byte."""
    proto = parsed(model)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        return "is neither a BPE nor a unigram model"
    if normalizer.precompiled_charsmap or normalizer.normalization_rule_tsv:
        return f"changes characters (normalization {normalizer.name or 'with rules of its own'})"
    if normalizer.remove_extra_whitespaces:
        return "removes spaces (remove_extra_whitespaces)"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "handles spaces in an unsupported way (treat_whitespace_as_suffix, or spaces that are not escaped)"
    if sum(piece.type == piece.BYTE for piece in proto.pieces) != 256:
        return "has no tokens for the 256 bytes (byte_fallback)"
    if any(piece.type == piece.UNUSED for piece in proto.pieces):
        return "has unused pieces (set_vocabulary)"
    normal = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
    special_types = (proto.SentencePiece.CONTROL, proto.SentencePiece.BYTE, proto.SentencePiece.UNKNOWN)
    special = [piece.piece for piece in proto.pieces if piece.type in special_types]
    if trainer.model_type == trainer.UNIGRAM and any(set(name) - normal for name in special):
        return "has no tokens for some characters of its special tokens, so that text could become a special token"
    if any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece in normal):
        return "has pieces with a space after other characters (split_by_whitespace)"
    return None


def pieces_of(model: bytes) -> list[str]:
    """The pieces of a complete sentencepiece model in the order of their ids."""
    return [piece.piece for piece in parsed(model).pieces]


def different_piece(model: bytes, backend) -> tuple[int, str, str | None] | None:
    """The first id at which a complete sentencepiece model and a tokenizers.Tokenizer differ: (id, piece, token); None
    if there is none."""
    for index, piece in enumerate(pieces_of(model)):
        token = backend.id_to_token(index)
        if token is None or piece.replace(SPACE, " ") != token.replace(SPACE, " "):
            return index, piece, token
    return None


def is_unigram(model: bytes) -> bool:
    trainer = parsed(model).trainer_spec
    return trainer.model_type == trainer.UNIGRAM


def adds_prefix(model: bytes) -> bool:
    """Does it put a space in front of each text (sentencepiece's default, add_dummy_prefix)?"""
    return parsed(model).normalizer_spec.add_dummy_prefix


def is_mark(piece: str) -> bool:
    """Is a user-defined piece a mark, such as [REF] or <tool>? Marks become special tokens, and text is never encoded
    as one; sentencepiece itself recognizes them in any text."""
    return len(piece) > 2 and (piece[0], piece[-1]) in (("<", ">"), ("[", "]"), ("{", "}"))


def for_words(model: bytes) -> bytes:
    """The model as it encodes a word inside a text: no space in front, and marks are not recognized."""
    proto = parsed(model)
    proto.normalizer_spec.add_dummy_prefix = False
    for piece in proto.pieces:
        if piece.type == piece.USER_DEFINED and is_mark(piece.piece):
            piece.type = piece.CONTROL
    return proto.SerializeToString()


def to_fast_tokenizer(model: bytes):
    """A sentencepiece model without `inexactness` as a `tokenizers.Tokenizer` that gives the same ids.

    Pieces are stored with real spaces, not with U+2581, so that a U+2581 in a text survives as bytes; sentencepiece
    itself turns it into a space. A space in front of each text (add_dummy_prefix) is added, and removed in decoding; as
    in Llama's own tokenizer.json, text after a special token gets one as well. User-defined pieces are recognized in
    text as sentencepiece does, except marks (`is_mark`).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = parsed(model)
    vocabulary: dict[str, int] = {}
    scores: dict[str, float] = {}
    special, added = [], []
    for index, piece in enumerate(proto.pieces):
        text = piece.piece
        if piece.type in (piece.CONTROL, piece.UNKNOWN) or piece.type == piece.USER_DEFINED and is_mark(text):
            special.append(AddedToken(text, normalized=False, special=True))
        elif piece.type == piece.USER_DEFINED:
            text = text.replace(SPACE, " ")
            added.append(AddedToken(text, normalized=False, special=False))
        elif piece.type != piece.BYTE:
            text = text.replace(SPACE, " ")
            scores[text] = piece.score
        vocabulary[text] = index
    unknown = next(index for index, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        # Text that spells a special token or a byte token must not become it. In the model such a token has the score
        # 0; here it has one that no best path uses.
        pieces = [(piece, scores.get(piece, NEVER)) for piece in vocabulary]
        algorithm = models.Unigram(pieces, unk_id=unknown, byte_fallback=True)
    else:
        unknown_token = proto.pieces[unknown].piece
        algorithm = models.BPE(
            vocab=vocabulary, merges=merges_of(scores), unk_token=unknown_token, fuse_unk=True, byte_fallback=True
        )
    tokenizer = Tokenizer(algorithm)
    # Spaces begin pieces and never follow another character in one (see `inexactness`), so encoding the words one by
    # one gives the ids of the whole text, and short words hit the cache of `tokenizers`.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" *[^ ]+"), behavior="isolated")
    decoding = [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        tokenizer.normalizer = normalizers.Prepend(" ")
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    return tokenizer


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that together are a piece, in the order of the merged pieces' scores, best first.

    sentencepiece merges the adjacent pair whose result has the best score, the leftmost of equal ones; `tokenizers`
    ranks the pairs themselves. The two could differ only where two splits of one piece overlap in the text (ab+a and
    a+ba in "ab a ba"). Merging from the best score down does not lead there: no difference on all 9,216 strings over
    {a, b} of 10 and of 13 letters with six vocabularies, and the stage compares the ids (`ids_equal`).
    """
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((-score, piece, cut))
    return [(piece[:cut], piece[cut:]) for _, piece, cut in sorted(merges)]
