"""Loading a published tokenizer, and encoding raw text with it.

tokenizer = load_tokenizer(folder)         # transformers; every stage uses this loader
ids = encode_text(tokenizer, ["raw text, in which <|im_end|> is ordinary characters"])
"""

import json
import re
from pathlib import Path

import numpy as np

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.special_tokens import BOS
from pipeline.data.tokenizer.tokenizer_folder import CONFIG, check_config, read_backend, readable, recoverable


def load_tokenizer(folder: Path | str):
    """The fast tokenizer (transformers) of a folder, exactly as its tokenizer.json says.
    Raises UserError if there is none, or if it cannot be read.

    AutoTokenizer does the same unless a config.json in the folder names a family whose tokenizer class transformers
    forces (qwen2 in 5.23): that class rebuilds the pre-tokenizer and adds a normalizer, and the ids change.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    backend = read_backend(folder)
    check_config(folder)
    fast = readable(folder, lambda: PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
    for part in ("normalizer", "pre_tokenizer"):
        if _state(getattr(fast.backend_tokenizer, part)) != _state(getattr(backend, part)):
            raise UserError(
                f"{folder}: transformers loads another {part} than tokenizer.json has, so that ids would depend on the"
                f" program; remove the key of {CONFIG} that changes it (fix_mistral_regex), or save the tokenizer again"
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in fast.added_tokens_decoder.values():
        if not token.special and token.content not in added:
            raise UserError(
                f"{folder}: {CONFIG} adds the token {token.content!r}, which tokenizer.json does not have, so that ids"
                " of ordinary text would depend on the program; save the tokenizer again, with both files"
            )
    return fast


def begin_id(tokenizer) -> int | None:
    """The token after which a model with this tokenizer expects the beginning of a text, None if there is none: in
    packed rows of tokenizers trained here the end of the text before (heldout_rows.py), because their bos is in no
    row; elsewhere bos, or eos for tokenizers without one."""
    if tokenizer.bos_token is None or (tokenizer.bos_token == BOS and tokenizer.eos_token is not None):
        return tokenizer.eos_token_id
    return tokenizer.bos_token_id


def use_known_padding(tokenizer, rows: int) -> None:
    """Let the tokenizer pad with a token that a model with `rows` embeddings has: its own pad token, else its end of
    text, else token 0.

    Padding is masked by position, never by id, so any token will do. A pad token that was added without resizing the
    embedding has an id beyond the embedding.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        end = tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end if end is not None and end < rows else 0)


def _state(part) -> bytes | None:
    return None if part is None else part.__getstate__()


def encode_text(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of raw text: documents, and the contents of chat messages. Text never becomes a special token, and none is
    added.

    `tokenizer`: a fast transformers tokenizer or a `tokenizers.Tokenizer`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.no_truncation()
    backend.no_padding()
    previous = backend.encode_special_tokens
    backend.encode_special_tokens = True  # "encode the characters of special tokens": do not recognize them
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except BaseException as error:
        if not recoverable(error):
            raise
        raise UserError(
            f"the tokenizer cannot encode text ({type(error).__name__}: {str(error)[:200]}); its tokenizer.json is"
            " damaged or lacks a part, such as an unknown token; copy it again from where it was published"
        ) from error
    finally:
        backend.encode_special_tokens = previous


def token_bytes(tokenizer) -> np.ndarray:
    """int32 [vocab_size]: bytes of text that each token spells; 0 for special tokens. From the tokenizer's own decoder.

    Exact where decoding is the identity, as for every tokenizer trained here; pack checks it on each document.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    spec = json.loads(backend.to_str())
    decoder = spec["decoder"] or {}
    decoder_types = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
    special = {token["id"] for token in spec["added_tokens"] if token["special"]}
    vocabulary = backend.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if "ByteLevel" in decoder_types:
            sizes[index] = len(token)  # one character per byte
        elif "ByteFallback" in decoder_types and re.fullmatch("<0x..>", token, re.DOTALL):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode())
    return sizes
