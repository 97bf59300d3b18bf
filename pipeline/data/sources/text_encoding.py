"""Text in other encodings than UTF-8: brought into UTF-8 on the way in, so that every format is read in one way."""

import codecs
import re
from collections.abc import Iterator
from typing import TypeVar

Other = TypeVar("Other")

# Codecs of Python that no text file is in.
_NO_FILES = {"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"}
# Behind half a character a decoder waits for the rest; where none comes, all that it waited for is an error, newlines
# and lines behind them, too. So the end of a text would be read otherwise than its middle. Behind seven more newlines
# no character is open: the longest, a composed one of euc_kr, has eight bytes.
_CLOSED = b"\n" * 7
KEPT_BYTES = re.compile("[\udc00-\udcff]")  # how text shows bytes that stand for no character: see _keep
_KEPT = re.compile(rb"\xed([\xb0-\xb3])([\x80-\xbf])")


def known_encoding(name: str) -> str | None:
    """Python's own name of an encoding, None for UTF-8. Raises ValueError."""
    try:
        "".encode(name)  # refuses what turns bytes into bytes (zlib, hex)
        found = codecs.lookup(name).name
    except (LookupError, ValueError):
        found = ""
    if not found or found in _NO_FILES:
        raise ValueError(
            f"{name!r} is no encoding that Python knows; expected one such as gb18030, big5, utf-16, shift_jis, latin-1"
        )
    return None if found in ("utf-8", "utf-8-sig") else found


def _keep(error: UnicodeError) -> tuple[str, int]:
    """Bytes that stand for no character become half surrogate pairs, which UTF-8 does not have: the record that they
    are in, and no other, is then found to be invalid. (surrogateescape would leave bytes below 128 an error.)"""
    assert isinstance(error, UnicodeDecodeError)
    return spelled(error.object[error.start : error.end]), error.end


def spelled(raw: bytes) -> str:
    """Bytes as KEPT_BYTES."""
    return "".join(chr(0xDC00 + byte) for byte in raw)


codecs.register_error("alma.keep", _keep)


def transcoded(blocks: Iterator[bytes | Other], encoding: str) -> Iterator[bytes | Other]:
    """The same text in UTF-8, but for bytes that stand for nothing. What is no bytes parts it, and is passed on."""
    decoder = codecs.getincrementaldecoder(encoding)("alma.keep")
    closed = _CLOSED if ends_lines_with_newlines(encoding) else b""
    for block in blocks:
        if isinstance(block, bytes):
            yield decoder.decode(block).encode(errors="surrogatepass")
        else:
            yield _without(decoder.decode(closed, True), closed)
            yield block
    yield _without(decoder.decode(closed, True), closed)


def utf8(raw: bytes, encoding: str | None) -> bytes:
    """Whole lines of a file in an encoding that ends them with newlines, in UTF-8."""
    return _without((raw + _CLOSED).decode(encoding, "alma.keep"), _CLOSED) if encoding else raw


def _without(text: str, closed: bytes) -> bytes:
    return text[: len(text) - len(closed)].encode(errors="surrogatepass")


def ends_lines_with_newlines(encoding: str | None) -> bool:
    """Whether byte 10 ends a line, and nothing before it matters to what follows: not so in UTF-16, nor where escapes
    change the meaning of bytes (ISO 2022, HZ). No codec of Python has byte 10 within a character otherwise."""
    return not encoding or ("\n".encode(encoding) == b"\n" and not encoding.startswith(("iso2022", "hz", "utf-7")))


def shown(raw: bytes | bytearray, encoding: str | None = None) -> str:
    """Bytes for reading; those that stand for nothing as they are in the file."""
    if encoding:
        raw = _KEPT.sub(lambda found: b"\\x%02x" % ((found[1][0] & 3) << 6 | found[2][0] & 63), raw)
    return raw.decode(errors="backslashreplace")


def encodes(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no lone surrogate."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False
