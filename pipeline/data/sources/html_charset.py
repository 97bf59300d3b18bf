"""Character sets of web pages: the declared one, by the labels of the WHATWG Encoding Standard as in browsers, but
checked against the page's bytes, because many declarations are wrong.

    decode_page(raw, "shift_jis")  ->  Decoded(text, "shift_jis", replaced=0)

Labels are looked up with webencodings (BSD). Python's codecs decode; where they differ from the standard's tables, its
characters are substituted (https://encoding.spec.whatwg.org/).
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.core.errors import UserError
from pipeline.data.sources.text_encoding import INVALID_BYTES, as_invalid_bytes

PRESCAN = 1 << 14  # bytes in which a <meta> may declare the character set; browsers stop at 1,024
# A character set fits if at most this many bytes are invalid: two, or one per twenty characters beyond ASCII.
FEW_INVALID, ONE_IN = 2, 20
# This many characters beyond ASCII that are valid UTF-8 are not another character set by accident: in GB2312, the
# likeliest one, one in seven characters is valid UTF-8.
CERTAIN = 8
FEW_INVALID_UTF8 = 4  # of such a page: one damaged byte makes all bytes of its character invalid
ENOUGH = 20  # characters from whose frequencies a character set is detected reliably (docs/log.md, Correctness 8)
LATIN = {"windows-1250", "windows-1252", "windows-1254", "windows-1257", "windows-1258", "macintosh"} | {
    f"iso-8859-{number}" for number in (2, 3, 4, 10, 13, 14, 15, 16)
}
EAST_ASIAN = {"gbk", "gb18030", "big5", "euc-jp", "shift_jis", "iso-2022-jp", "euc-kr"}
CYRILLIC = {"windows-1251", "koi8-r", "ibm866", "iso-8859-5"}
# Others whose words consist of letters beyond ASCII.
OTHERS = (
    {"windows-874"}
    | {f"iso-8859-{number}" for number in (6, 7, 8)}
    | {f"windows-{number}" for number in (1253, 1255, 1256)}
)
# Rare Latin ones that cannot be distinguished from windows-1252 by a few letters.
RARE = {"windows-1257", "macintosh"} | {f"iso-8859-{number}" for number in (3, 4, 10, 13, 14, 16)}
# The most common characters of Chinese. Decoded with the wrong one of GBK and Big5, a text has hardly any of them.
_COMMON = re.compile(
    "[的一是不了在人有我他这這中大来來上国國个個到说說们們为為子和你地出道也时時年得就那要下以生会"
    "會自着著去之过過家学學对對可她里裡后後小么麼心多天而能好都然没沒日于於起還还发發成事只作当當"
    "想看文无無开開手十用主行方又如前所本见見经經头頭面公同三已老从從动動两兩长長，。、]"
)
_CODECS = {"gbk": "gb18030"}  # "gbk's decoder is gb18030's decoder" (10.1.1); webencodings has Python's gbk
# Browsers refuse these because a script may hide in them; here they are text. Python does not have iso-2022-cn.
_REFUSED = {"hz-gb-2312": "hz", "iso-2022-kr": "iso2022_kr", "csiso2022kr": "iso2022_kr"}
_OTHER_NAMES = {"cp949": "euc-kr", "uhc": "euc-kr", "cp932": "shift_jis", "euc_jp": "euc-jp"}  # resiliparse's

# Python's character -> the standard's, where it is not elsewhere in Python's table.
_GB18030 = "︐︒︑︓︔︕︖︗︘︙"
_FIXES = {
    "gb18030": {
        "\ue5e5": "\u3000",
        "\ue7c7": "ḿ",
        **dict(zip(map(chr, range(0xE78D, 0xE797)), _GB18030, strict=True)),
        **dict(zip("\ue81e\ue826\ue82b\ue82c\ue832\ue843\ue854\ue864", "龴龵龶龷龸龹龺龻", strict=True)),
        "\udc80": "€",
    },
    "big5": dict(zip("•､‾∼♁☉¥¢£", "‧﹑¯～⊕⊙￥￠￡", strict=True)),
    "euc-jp": dict(zip("〜‖−¢£¬", "～∥－￠￡￢", strict=True)),
    "windows-1255": {"\udcca": "\u05ba"},
    "koi8-u": {"╝": "ў", "╬": "Ў"},
    # Python has private characters for four bytes that the standard calls errors
    "shift_jis": {"\uf8f0": "\udca0", "\uf8f1": "\udcfd", "\uf8f2": "\udcfe", "\uf8f3": "\udcff"},
}
_FIXES["gbk"] = _FIXES["gb18030"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """A page as text. `replaced` of its bytes are invalid in `encoding` (a name of the standard) and became replacement
    characters; `characters` of the text are beyond ASCII."""

    text: str
    encoding: str
    replaced: int
    characters: int

    @property
    def fits(self) -> bool:
        """Whether all but a few of the bytes are valid in this character set."""
        return self.replaced <= max(FEW_INVALID, self.characters // ONE_IN)


def decode_page(raw: bytes, header: str = "", html: bool = True) -> Decoded | None:
    """The text of a page, or of a plain text (`html` false), whose server declared the label `header`. None if it is in
    no known character set.

    The byte order mark has priority, then the header, then the page's own <meta>, as in browsers. Unlike in browsers, a
    page that is valid UTF-8 is UTF-8, and a declaration that does not fit the bytes is ignored.
    """
    bom, length = _byte_order_mark(raw)
    raw = raw[length:]
    utf16 = bom if bom.startswith("utf-16") else _utf16_without_mark(raw, header)
    if utf16:
        page = _decode(raw, utf16)
        if page.fits:
            return page
    labels = [bom] if bom else _declared(raw, header, html)
    declared = list(dict.fromkeys(labels))
    if raw.isascii():
        return _decode_ascii(raw, declared)
    utf8 = _decode(raw, "utf-8")
    if utf8.characters >= CERTAIN and (utf8.fits or utf8.replaced <= FEW_INVALID_UTF8):
        return utf8
    if utf8.characters and not utf8.replaced:
        # A Latin character set would make Ã© of é, an East Asian one 茅.
        only_latin_declared = set(declared) <= LATIN
        if only_latin_declared or _WESTERN_TEXT.fullmatch(utf8.text):
            return utf8
    return _declared_or_detected(raw, declared, utf8)


def _declared_or_detected(raw: bytes, declared: list[str], utf8: Decoded) -> Decoded | None:
    """The page in the first declared character set that its bytes do not contradict, or else in the detected one."""
    detected = None if declared[:1] == ["utf-8"] and utf8.fits else _detect(raw)
    misfits = []
    for name in declared:
        page = utf8 if name == "utf-8" else _decode(raw, name)
        if page.fits and not _is_contradicted(raw, page, detected):
            return page
        misfits.append(page)
    detected = detected or _detect(raw)
    # windows-1252 is also the detector's answer for bytes that it knows nothing about
    if detected.encoding != "windows-1252" or not misfits or _looks_western(raw):
        if detected.fits:
            return detected
        misfits.append(detected)
    best = min(misfits, key=lambda page: page.replaced)
    return best if best.replaced <= len(raw) // ONE_IN else None


def charset_label(content_type: str) -> str:
    """The charset that a Content-Type declares."""
    match = re.search(r"charset\s*=\s*(?:\"([^\"]*)\"?|'([^']*)'?|([^\s;\"']*))", content_type, re.I)
    return next(filter(None, match.groups()), "") if match else ""


# ---- declarations ----------------------------------------------------------------------------------------------------


def _byte_order_mark(raw: bytes) -> tuple[str, int]:
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16le"),
        (codecs.BOM_UTF16_BE, "utf-16be"),
    ):
        if raw.startswith(mark):
            return name, len(mark)
    return "", 0


_UTF16_MARKUP = {"utf-16le": re.compile(rb"(?:[\t\n\r ]\0)*<\0"), "utf-16be": re.compile(rb"(?:\0[\t\n\r ])*\0<")}


def _utf16_without_mark(raw: bytes, header: str) -> str:
    """Name of the UTF-16 that a page without a byte order mark is in, or "": ASCII characters have a NUL byte, always
    on the same side. Chinese text has few of them, and one on the other side in each `一`."""
    head = raw[:1000]
    for name, beginning in _UTF16_MARKUP.items():
        if beginning.match(head):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    fewer, more = sorted((even, odd))
    is_one_sided = more >= 8 and more > 4 * fewer
    if not is_one_sided and (even + odd) * 5 < len(head):
        return ""
    declared = _lookup(header)
    if declared.startswith("utf-16") and not is_one_sided:
        return declared
    return "utf-16be" if even > odd else "utf-16le"


def _declared(raw: bytes, header: str, html: bool) -> Iterator[str]:
    """Names of the declared character sets, the most trusted first. An unknown label declares nothing."""
    if name := _lookup(header):
        yield name
    if html and (name := _lookup(_prescan(raw[:PRESCAN]))):
        # a page whose <meta> could be read is not in these ("prescan a byte stream", steps 15 and 16 of a meta)
        yield {"utf-16le": "utf-8", "utf-16be": "utf-8", "x-user-defined": "windows-1252"}.get(name, name)


def _lookup(label: str) -> str:
    """The standard's name of a label; Python's for the labels that browsers refuse; "" for an unknown one."""
    if label.lower() in ("", "utf-8"):  # most pages; WET files need no package
        return label.lower()
    encoding = _webencodings().lookup(label)
    name = encoding.name if encoding else ""
    return _REFUSED.get(label.strip().lower(), "") if name == "replacement" else name


def _webencodings():
    try:
        import webencodings
    except ImportError:
        raise UserError(
            "reading web pages needs webencodings, which is not installed; run pip install 'alma[web]'"
        ) from None
    return webencodings


_TAG = re.compile(rb"<!--|<meta(?=[\s/])|<[!/?]|</?[a-z]", re.I)
_REST_OF_NAME = re.compile(rb"[^\s/>]*")
_ATTRIBUTE = re.compile(rb"""[\s/]*([^\s/>=][^\s/>=]*)\s*(?:=\s*(?:"([^"]*)"|'([^']*)'|([^\s>"'][^\s>]*|)))?""")
_XML = re.compile(rb"""<\?xml[^>]{0,200}?\sencoding\s*=\s*["']([^"']{1,60})["']""")
_CONTENT = re.compile(rb"""charset\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s;"'][^\s;]*))""", re.I)


def _prescan(head: bytes) -> str:
    """The label that a page declares in itself: the standard's "prescan a byte stream to determine its encoding"
    (https://html.spec.whatwg.org/multipage/parsing.html). Comments and values of other tags declare nothing."""
    if xml := _XML.match(head):
        return xml[1].decode("ascii", "replace")
    at = 0
    while tag := _TAG.search(head, at):
        at = tag.end()
        if tag[0] == b"<!--":
            at = head.find(b"-->", at - 2) + 3
            if at < 3:
                return ""
        elif tag[0][1:2] in b"!?" or tag[0] == b"</":
            at = head.find(b">", at)
            if at < 0:
                return ""
        else:
            attributes, at = _attributes(head, at, is_meta=tag[0].lower() == b"<meta")
            if label := _label_of_meta(attributes):
                return label
    return ""


def _attributes(head: bytes, at: int, is_meta: bool) -> tuple[dict[bytes, bytes], int]:
    """The attributes of a <meta>, the first of each name (none for other tags), and the offset of their end."""
    attributes: dict[bytes, bytes] = {}
    if not is_meta:
        at = _REST_OF_NAME.match(head, at).end()
    while attribute := _ATTRIBUTE.match(head, at):
        at = attribute.end()
        if is_meta:
            attributes.setdefault(attribute[1].lower(), attribute[2] or attribute[3] or attribute[4] or b"")
    return attributes, at


def _label_of_meta(attributes: dict[bytes, bytes]) -> str:
    label = attributes.get(b"charset", b"")
    if not label and attributes.get(b"http-equiv", b"").strip().lower() == b"content-type":
        content = _CONTENT.search(attributes.get(b"content", b""))
        label = next(filter(None, content.groups()), b"") if content else b""
    label = label.decode("ascii", "replace")
    return label if _lookup(label) else ""


# ---- detection from the bytes ----------------------------------------------------------------------------------------


def _decode_ascii(raw: bytes, declared: list[str]) -> Decoded:
    """A page whose bytes are all ASCII, but may be escapes for other characters."""
    name = "utf-8"
    if re.search(rb"\x1b\$[@B]", raw):
        name = "iso-2022-jp"
    elif "hz" in declared and b"~{" in raw:
        name = "hz"
    elif "iso2022_kr" in declared and b"\x0e" in raw:
        name = "iso2022_kr"
    page = _decode(raw, name)
    return page if page.fits else _decode(raw, "utf-8")


_RUN = re.compile(rb"[\x80-\xff]+")
_DRAWN = re.compile(rb"([\x80-\xff])\1{2,}")  # a line of dashes or dots, not a word of any language
# What English and its neighbours have beyond ASCII, in windows-1252: quotes, dashes, signs, letters with accents.
_WESTERN = re.compile(
    rb"[\x80\x84\x85\x89\x8b\x8c\x91-\x97\x99\x9b\x9c\xa0\xa3\xa7\xa9\xab\xae\xb0\xb7\xbb\xbc-\xbf\xc0-\xd6\xd8-\xf6\xf8-\xfe]"
    rb"|[\x84\x85\x8c\x91-\x97\x9c\xa0\xab\xbb\xc0-\xd6\xd8-\xf6\xf8-\xfe]{2,3}"
)

_WESTERN_TEXT = re.compile("[\0-\x7f]*(?:[\xa0-\xffŒœ\u2010-\u2026€™][\0-\x7f]*){2,}")


def _looks_western(raw: bytes) -> bool:
    """Whether the bytes beyond ASCII are distributed as in a Western European text in windows-1252: single, or a few
    letters within a word."""
    runs = western = 0
    raw = _DRAWN.sub(rb"\1", raw[: 1 << 18])
    for run in _RUN.finditer(raw):
        runs += 1
        around = raw[max(0, run.start() - 1) : run.start()] + raw[run.end() : run.end() + 1]
        if _WESTERN.fullmatch(run[0]) and (len(run[0]) == 1 or re.search(rb"[A-Za-z]", around)):
            western += 1
    return runs > 0 and western >= 0.9 * runs


def _is_contradicted(raw: bytes, page: Decoded, detected: Decoded | None) -> bool:
    """Whether bytes that are valid in a declared character set look like another one: the one detected from the
    frequencies of characters, or windows-1252."""
    if page.encoding == "utf-8":
        return not page.characters and _looks_western(raw)
    if page.encoding.startswith("utf-16"):
        return b"\0" not in raw  # newlines and tags have one
    if page.encoding in EAST_ASIAN | CYRILLIC | {"x-user-defined", "windows-874"} and _looks_western(raw):
        return True
    if not detected or not detected.fits or detected.characters < ENOUGH:
        return False
    if detected.encoding in OTHERS:
        return page.encoding in EAST_ASIAN | LATIN and _has_long_runs(raw)
    if detected.encoding not in EAST_ASIAN | CYRILLIC or (page.encoding, detected.encoding) == ("koi8-u", "koi8-r"):
        return False
    return page.encoding != detected.encoding and {page.encoding, detected.encoding} != {"gbk", "gb18030"}


def _detect(raw: bytes) -> Decoded:
    """Detects a character set by the frequencies of characters (resiliparse). `html5_compatible` would call Korean
    UTF-8."""
    try:
        from resiliparse.parse.encoding import detect_encoding
    except ImportError:
        raise UserError(
            "a page without a known character set needs resiliparse, which is not installed; run pip install"
            " 'alma[web]'"
        ) from None
    label = detect_encoding(_DRAWN.sub(rb"\1", raw), html5_compatible=False) or ""
    name = _lookup(_OTHER_NAMES.get(label, label)) or "windows-1252"
    if name in EAST_ASIAN | RARE and _looks_western(raw):
        name = "windows-1252"
    if name in ("gbk", "gb18030", "big5"):
        name = _chinese(raw, name)
    return _decode(raw, name)


def _chinese(raw: bytes, name: str) -> str:
    """`name`, or the other one of GB 18030 and Big5, which the detector sometimes confuses."""
    begin = _RUN.search(raw).start()
    part = raw[begin : begin + PRESCAN]
    other_name = "gb18030" if name == "big5" else "big5"
    other = _decode(part, other_name)
    return other_name if other.fits and _common(other) > _common(_decode(part, name)) else name


def _common(page: Decoded) -> int:
    return len(_COMMON.findall(page.text))


def _has_long_runs(raw: bytes) -> bool:
    """Whether letters beyond ASCII make up complete words, as in Thai or Greek and in no Latin script."""
    runs = _RUN.findall(raw, 0, 1 << 18)
    return sum(map(len, runs)) >= 3 * len(runs)


# ---- decoding --------------------------------------------------------------------------------------------------------


def _decode(raw: bytes, name: str) -> Decoded:
    """A page by the standard's decoder of that name."""
    text = _decode_keeping_invalid(raw, name)
    replaced = len(INVALID_BYTES.findall(text))
    characters = len(text) - len(text.encode("ascii", "ignore")) - replaced
    if replaced:
        text = re.sub(f"{INVALID_BYTES.pattern}+", "\ufffd", text)
    return Decoded(text, name, replaced, characters)


def _decode_keeping_invalid(raw: bytes, name: str) -> str:
    """Text in which invalid bytes are INVALID_BYTES."""
    if name == "iso-2022-jp":
        return _decode_iso_2022_jp(raw)
    if name == "utf-8":
        return raw.decode("utf-8", "alma.keep")
    if encoding := _webencodings().lookup(_CODECS.get(name, name)):
        text = encoding.codec_info.decode(raw, "alma.pairs" if name in EAST_ASIAN else "alma.keep")[0]
    else:
        text = raw.decode(name, "alma.keep")
    for python, standard in _FIXES.get(name, {}).items():
        text = text.replace(python, standard)
    if name.startswith("windows-"):  # where these have no character, the standard has a control character
        text = re.sub("[\udc80-\udc9f]", lambda match: chr(ord(match[0]) - 0xDC00), text)
    return text


_TO_FE = range(0x81, 0xFF)  # first bytes of pairs
_LEADS = {"euc_jp": (0x8E, 0x8F, *range(0xA1, 0xFF)), "cp932": (*range(0x81, 0xA0), *range(0xE0, 0xFD))}


def _keep_invalid_pairs(error: UnicodeError) -> tuple[str, int]:
    """Error handler: two bytes that are not a character are one error, so that the pairs after them stay pairs; ASCII
    is never a part of it."""
    assert isinstance(error, UnicodeDecodeError)
    pair = error.object[error.start : error.start + 2]
    if len(pair) == 2 and pair[0] in _LEADS.get(error.encoding, _TO_FE) and pair[1] >= 0x80:
        text = _jis_pair(pair) if error.encoding == "euc_jp" else as_invalid_bytes(pair)
        return text, error.start + 2
    return as_invalid_bytes(pair[:1]), error.start + 1


def _jis_pair(pair: bytes) -> str:
    """Rows 13 and 89 to 92 of JIS X 0208, which Python has in cp932 (NEC's and IBM's characters) and not in EUC-JP."""
    if pair[0] < 0xA1 or pair[1] < 0xA1:
        return as_invalid_bytes(pair)
    row, cell = pair[0] - 0xA1, pair[1] - 0xA1
    if row not in (12, *range(88, 92)):
        return as_invalid_bytes(pair)
    lead = row // 2 + (0x81 if row < 62 else 0xC1)
    trail = cell + 0x9F if row % 2 else cell + 0x40 + (cell >= 63)
    return bytes((lead, trail)).decode("cp932", "alma.pairs")


codecs.register_error("alma.pairs", _keep_invalid_pairs)
_HIGH = bytes(byte | 0x80 if 0x21 <= byte <= 0x7E else byte for byte in range(256))


def _decode_iso_2022_jp(raw: bytes) -> str:
    """Escapes choose the character set of the bytes up to the next escape."""
    texts, state = [], b"(B"
    for number, part in enumerate(re.split(rb"\x1b(\([BJI]|\$[@B])", raw)):
        if number % 2:
            state = part
        elif state.startswith(b"$"):
            texts.append(_decode_keeping_invalid(part.translate(_HIGH), "euc-jp"))
        elif state == b"(I":
            texts.append(part.translate(_HIGH).decode("cp932", "alma.pairs"))
        else:
            text = part.decode("ascii", "alma.keep")
            texts.append(text.replace("\\", "¥").replace("~", "‾") if state == b"(J" else text)
    return "".join(texts)
