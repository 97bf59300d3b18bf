"""Text in encodings other than UTF-8, converted to UTF-8 while it is read, so that every format has one reader."""

import codecs
import re
from collections.abc import Iterator
from typing import TypeVar

Other = TypeVar("Other")

# Codecs of Python that are not used for text files.
_NOT_FOR_FILES = {"idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape"}
# After half a character a decoder waits for the rest. If none comes, everything it waited for is an error, including
# newlines and the lines after them, so the end of a text would be read differently from its middle. After seven more
# newlines no character is open: the longest, a composed one in euc_kr, has eight bytes.
_CLOSING_NEWLINES = b"\n" * 7
# Encodings whose bytes 0x80 to 0x9f are control characters, which no text has: files that are said to be in one of them
# are in Windows' (Encoding Standard, labels), where these bytes are quotes, dashes and the euro.
_WINDOWS = {"iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874"}
# Encodings of which Windows writes a larger one under the same name.
LARGER = {"euc_kr": "cp949", "shift_jis": "cp932", "gb2312": "gb18030", "gbk": "gb18030", "big5": "cp950"}
INVALID_BYTES = re.compile("[\udc00-\udcff]")  # how decoded text holds bytes that are not a character
_INVALID_BYTES_IN_UTF8 = re.compile(rb"\xed([\xb0-\xb3])([\x80-\xbf])")


def known_encoding(name: str) -> str | None:
    """Python's own name of an encoding, None for UTF-8; Windows' for one that has control characters in their place.
    Raises ValueError."""
    try:
        "".encode(name)  # refuses codecs from bytes to bytes (zlib, hex)
        codec = codecs.lookup(name).name
    except (LookupError, ValueError):
        codec = ""
    if not codec or codec in _NOT_FOR_FILES:
        raise ValueError(
            f"{name!r} is not an encoding that Python knows; expected one such as gb18030, big5, utf-16, shift_jis,"
            " latin-1"
        )
    return None if codec in ("utf-8", "utf-8-sig") else _WINDOWS.get(codec, codec)


def _keep_invalid(error: UnicodeError) -> tuple[str, int]:
    """Error handler: invalid bytes become lone surrogates, which UTF-8 cannot hold, so that only the record that
    contains them turns out to be invalid. (surrogateescape does not accept bytes below 128.)"""
    assert isinstance(error, UnicodeDecodeError)
    return as_invalid_bytes(error.object[error.start : error.end]), error.end


def as_invalid_bytes(raw: bytes) -> str:
    """Bytes as the characters that INVALID_BYTES matches."""
    return "".join(chr(0xDC00 + byte) for byte in raw)


codecs.register_error("alma.keep", _keep_invalid)


def to_utf8_blocks(blocks: Iterator[bytes | Other], encoding: str) -> Iterator[bytes | Other]:
    """The same text in UTF-8, invalid bytes excepted. Items that are not bytes separate texts and are passed on."""
    decoder = codecs.getincrementaldecoder(encoding)("alma.keep")
    closing = _CLOSING_NEWLINES if ends_lines_with_newlines(encoding) else b""
    for block in blocks:
        if isinstance(block, bytes):
            yield decoder.decode(block).encode(errors="surrogatepass")
        else:
            yield _encode_without(decoder.decode(closing, True), closing)
            yield block
    yield _encode_without(decoder.decode(closing, True), closing)


def to_utf8(raw: bytes, encoding: str | None) -> bytes:
    """Complete lines of a file, in an encoding that ends lines with newline bytes, as UTF-8."""
    if not encoding:
        return raw
    return _encode_without((raw + _CLOSING_NEWLINES).decode(encoding, "alma.keep"), _CLOSING_NEWLINES)


def _encode_without(text: str, closing: bytes) -> bytes:
    return text[: len(text) - len(closing)].encode(errors="surrogatepass")


def ends_lines_with_newlines(encoding: str | None) -> bool:
    """Whether byte 10 ends a line and the bytes after it can be decoded without those before it. Not so in UTF-16, nor
    where escapes change the meaning of bytes (ISO 2022, HZ). No other codec of Python has byte 10 within a
    character."""
    if not encoding:
        return True
    return "\n".encode(encoding) == b"\n" and not encoding.startswith(("iso2022", "hz", "utf-7"))


def printable(raw: bytes | bytearray, encoding: str | None = None) -> str:
    """Bytes as text for people; invalid bytes are written as \\xNN, as they are in the file."""
    if encoding:
        raw = _INVALID_BYTES_IN_UTF8.sub(_escaped, raw)
    return raw.decode(errors="backslashreplace")


def _escaped(match: re.Match) -> bytes:
    return b"\\x%02x" % ((match[1][0] & 3) << 6 | match[2][0] & 63)


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no lone surrogate."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def printable_name(name) -> str:
    """A name from a record, for a sentence: short, and printable whatever it holds."""
    text = str(name)
    return ascii(text)[1:-1][:60] if not text.isprintable() else text[:60]
