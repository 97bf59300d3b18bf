"""Personal data and secrets replaced by a word that says what stood there. Expressions find candidates; checksums
and ranges decide, so that few numbers are taken for what they are not."""

import functools
import ipaddress
import re
from collections.abc import Callable
from typing import Literal

from pydantic import field_validator, model_validator

from pipeline.core.config import Strict, idle

# in the order in which they are looked for: an identity number may pass for a card
KINDS = ("secret", "email", "ip", "id_zh", "card", "mobile_zh", "phone")


class Mask(Strict):
    """What is replaced in the documents that are kept. A kind becomes its name in brackets, such as [EMAIL]."""

    use: list[Literal["secret", "email", "ip", "card", "id_zh", "mobile_zh", "phone"]] = []
    """secret: private keys, tokens of AWS, GitHub, GitLab, Slack, Google, OpenAI, Stripe, npm, PyPI, JSON web
    tokens; email; ip: public addresses, not section numbers and versions; card: bank cards in the form, with the
    prefix and with the checksum that cards have; id_zh: Chinese identity numbers with date and checksum; mobile_zh:
    Chinese mobile numbers; phone: other telephone numbers, written with a country code, an area code in brackets or
    separators. docs/clean.md has the precision of each."""
    form: str = "[{}]"
    """How a kind is written; {} is its name in capitals."""

    @model_validator(mode="after")
    def nothing_idle(self):
        if not self.use:
            idle(self, "form", "says how a mask is written, and use names none")
        return self

    @field_validator("form")
    @classmethod
    def _writes(cls, form: str) -> str:
        try:
            form.format("EMAIL")
        except (ValueError, LookupError, AttributeError):
            raise ValueError("can have {} for the kind's name and no other field; braces are {{ and }}") from None
        return form


def _luhn(digits: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812-1, annex B)."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


# Prefixes and lengths that issuers give (ISO/IEC 7812; Visa, Mastercard, American Express, Discover, JCB, Diners,
# UnionPay, Mir, Maestro). American Express has 15 digits; sixteen are what generators of test data write.
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d+(?<=^\d{16})"
    r"|3[47]\d{13,14}|(?:6011|64[4-9]\d|65\d\d)\d{12,15}|35(?:2[89]|[3-8]\d)\d{12,15}"
    r"|3(?:0[0-59]|[689]\d)\d{11}|62\d{14,17}|220[0-4]\d{12,15}|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{12,15}"
)


def _card(match: re.Match) -> bool:
    found = match[0]
    digits = re.sub(r"\D", "", found)
    if not _ISSUERS.fullmatch(digits) or len(set(digits)) < 2 or not _luhn(digits):
        return False
    if digits == found:
        return True
    # Groups that stand in a longer row of such groups are a dump or a table.
    before, after = match.string[max(0, match.start() - 6) : match.start()], match.string[match.end() :][:6]
    sign = re.escape(re.search(r"\D", found)[0])
    group = "[0-9A-Fa-f]{4}"
    return not re.search(rf"\b{group}{sign}$", before) and not re.match(rf"{sign}{group}\b", after)


def _identity(match: re.Match) -> bool:
    """GB 11643-1999: region, date of birth, sequence, ISO 7064 MOD 11-2."""
    found = match[0]
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    month, day = int(found[10:12]), int(found[12:14])
    check = "10X98765432"[sum(int(digit) * weight for digit, weight in zip(found, weights, strict=False)) % 11]
    return 1 <= month <= 12 and 1 <= day <= 31 and found[6:8] in ("18", "19", "20") and found[17].upper() == check


# Words of both languages in which no letter or digit goes on; \b would see no border between Chinese and Latin letters.
_BEGIN, _END = r"(?<![0-9A-Za-z_])", r"(?![0-9A-Za-z_])"
# What stands before a number of four parts that is no address: a version, or the number of a section, an enzyme, an
# object.
_NUMBERED = re.compile(
    rf"(?:(?<!-){_BEGIN}(?:v|ver|vers|versions?|releases?|rev|revisions?|build|firmware|patchlevel|drivers?|api|dll|sdk"
    rf"|sections?|sect|sec|chapters?|appendix|clauses?|paragraphs?|ec|oid|asn\.1){_END}\.?"
    r"|§|¶|第|版本|固件|驱动|驅動|升级|升級|更新)"
    r"[\s:：=(（\[\"'“‘`#号號]{0,3}"
    r"(?:(?:is|of|to|from|number|no\.|at|<=|>=|[<>~=]|为|為|是|到|至|从|從)[\s:：\"'“`]{0,3}){0,2}$",
    re.I,
)
# What stands before or behind one that is an address.
_ADDRESSED = re.compile(
    rf"(?:://(?:[^\s/@]{{1,64}}@)?|[0-9A-Za-z_.]@"
    rf"|{_BEGIN}(?:IP|IPs|IPv4|addr|address|addresses|inet|nameserver|resolver|dns|gateway|gw|router|subnet|ping|traceroute"
    rf"|ssh|telnet|curl|nc|dig|src|dst|via|nexthop|whois|peer|remote){_END}[^\w\n]{{0,3}}"
    rf"(?:(?:is|of|at|as|was|on|has|to|from|for|like|server|address|addr|no|in){_END}[^\w\n]{{0,3}}){{0,3}}"
    rf"|{_BEGIN}(?:hosts?|servers?|clients?|proxy|network|bind|listen|connect|destination|source|target)"
    r"[ \t]{0,3}[:=][^\w\n]{0,3}"
    r"|(?:地址|位址|网关|網關|域名|解析|网段|網段)[^\w\n]{0,3}[是为為在到如]?[^\w\n]{0,3}"
    r"|(?:服务器|伺服器|主机|主機|代理)[^\w\n]{0,3}(?:[是为為在：:=])[^\w\n]{0,3})$",
    re.I,
)
_ADDRESS_ENDS = re.compile(r":\d{2,5}(?![\d.:])|/(?:[89]|[12]\d|3[0-2])(?![\d.])")
_SECTION_ENDS = re.compile(r"[ \u00a0]?[节節章条條款版]|-[A-Za-z_]|-\d(?!\d{0,2}(?:\.\d{1,3}){3})")
_RESOLVERS = ("8.8.8.8", "8.8.4.4", "9.9.9.9")


def _ip4(match: re.Match) -> bool:
    """Public, and no version or number of a section. Those look like addresses of small numbers, of which there are
    few: seven in a thousand begin below 40 and have two more parts below 32. These need a sign that they are one."""
    text, begin, end = match.string, match.start(), match.end()
    try:
        address = ipaddress.IPv4Address(match[0])
    except ValueError:
        return False
    before = text[max(0, begin - 60) : begin].rpartition("\n")[2]
    after = text[end : end + 20]
    if not address.is_global or address.is_multicast or _NUMBERED.search(before) or _SECTION_ENDS.match(after):
        return False
    first, *rest = match[0].split(".")
    small = int(first) < 40 and sum(int(part) < 32 for part in rest) >= 2
    if not small or match[0] in _RESOLVERS:
        return True
    return _ADDRESSED.search(before) is not None or _ADDRESS_ENDS.match(after) is not None


def _ip6(match: re.Match) -> bool:
    """Global unicast addresses, 2000::/3, are the only ones that are given to anybody (IANA): other rows of
    hexadecimal numbers are names of devices, fingerprints and the like."""
    try:
        address = ipaddress.IPv6Address(match[0])
    except ValueError:
        return False
    a_year = match[0].strip(":").isdecimal() and match.string[match.end() : match.end() + 1] != "/"  # `in 2004::`
    return address.is_global and int(address) >> 125 == 1 and not a_year


# Country codes of ITU-T E.164.
_COUNTRY = (
    r"(?:1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|21[1-368]|22\d|23\d|24\d|25[0-8]|26\d|29[01789]"
    r"|35\d|37\d|38[0-35-79]|42[013]|50\d|59\d|67[02-9]|68[0-35-9]|69[0-2]|80[08]|85[02356]|87[0-48]|88[0-368]"
    r"|96[0-8]|97[0-79]|99[1-68])"
)


def _abroad(match: re.Match) -> bool:
    """A number with its country code: as many digits as telephone numbers have."""
    digits = re.sub(r"\D", "", match[0])
    if digits.startswith("1") and not re.fullmatch(r"1[2-9]\d{9}", digits):
        return False
    decimal = re.fullmatch(r"\+\d+\.\d+", match[0])  # or as the registries of domains write one: +86.13800138000
    return (10 if decimal else 9) <= len(digits) <= 15


_CALLED = re.compile(
    rf"(?:{_BEGIN}(?:tel|telephone|phone|mob|mobile|cell|fax|call|hotline){_END}|手机|手機|电话|電話|传真|傳真|热线|熱線|座机|致电|拨打|來電|来电|客服)"
    r"[^\w\n]{0,3}(?:是|为|為|at|number|no)?[^\w\n]{0,4}$",
    re.I,
)


def _called(match: re.Match) -> bool:
    """Digits that a word before them says are a telephone number."""
    return _CALLED.search(match.string[max(0, match.start() - 30) : match.start()]) is not None


_COUNTED = re.compile(
    r"(?:(?<![A-Za-z])(?:timestamp|time|total|size|bytes?|offset|sector|block|inode|seq|serial|pid|id|order|isbn)|[单單编編序]号|[总總]共"
    r"|时间戳|時間戳|流水[号號]|[订訂][单單]|大小|字[节節])"
    r"[^\w\n]{0,3}$|(?<!phone)(?<!mobile)(?<!tel)=$",
    re.I,
)


def _mobile(match: re.Match) -> bool:
    """No size, time or number of a thing, which a log or a listing names before it."""
    return _COUNTED.search(match.string[max(0, match.start() - 30) : match.start()]) is None


def _always(_: re.Match) -> bool:
    return True


_SECRET = (
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{0,20000}?"
    r"-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"|(?<![A-Za-z0-9])(?:A3T[A-Z0-9]|AKIA|ASIA|AGPA|AROA|AIPA|ANPA|ANVA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255}"
    r"|glpat-[A-Za-z0-9_-]{20,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35}"
    r"|sk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}|[rs]k_live_[A-Za-z0-9]{20,}"
    r"|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,}|hf_[A-Za-z0-9]{34,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"
    r"|(?i:(?<=aws_secret_access_key)[\"' ]{0,3}[=:][\"' ]{0,3}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+]))"
)
# What must stand in a text before the expression of a kind is worth running: reading a text for a sign costs a
# hundredth of it.
_HINTS = (
    "-----BEGIN",
    "AKIA",
    "ASIA",
    "A3T",
    "AGPA",
    "AROA",
    "AIPA",
    "ANPA",
    "ANVA",
    "ghp_",
    "gho_",
    "ghu_",
    "ghs_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "xox",
    "AIza",
    "sk-",
    "k_live_",
    "npm_",
    "pypi-",
    "hf_",
    "eyJ",
    "secret_access_key",
    "SECRET_ACCESS_KEY",
)
_EMAIL = (
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.){1,8}(?:[A-Za-z]{2,24}|xn--[A-Za-z0-9-]{2,59})(?![A-Za-z0-9-])"
)
# The same at domains with Chinese characters (RFC 6531). Chinese text goes on behind an address without a space, and
# its sentences may end in a dot, so an address that is odd is rather missed than prose taken for it:
# * a part of a domain is of ASCII alone, or of Chinese characters and digits alone, at most 20 (the limit of .cn);
# * a top-level domain is one that exists (the 61 Chinese ones of the Public Suffix List of 2026, longest first; of the
#   others those that sell Chinese names most), and the first one ends the address;
# * behind .com and the like no Chinese part follows; behind a part of ASCII, and behind a Chinese name before the @, no
#   Chinese text follows the top-level domain (`info@example.com.在线客服`, `转发@张三.中国队`);
# * nothing says where a Chinese name before the @ begins: at most four characters go, as long as names of persons are.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_TOP_ZH = (
    "嘉里大酒店|组织机构|電訊盈科|香格里拉|中文网|亚马逊|天主教|我爱你|新加坡|淡马锡|飞利浦"
    "|世界|中信|中国|中國|企业|佛山|信息|健康|八卦|公司|公益|台湾|台灣|商城|商店|商标"
    "|嘉里|在线|大拿|娱乐|家電|广东|微博|慈善|手机|招聘|政务|政府|新闻|时尚|書籍|机构"
    "|游戏|澳門|澳门|点看|移动|网址|网店|网站|网络|联通|臺灣|谷歌|购物|通販|集团|食品"
    "|餐厅|香港"
)
_PART = rf"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?|[0-9{_HAN}](?:[0-9{_HAN}-]{{0,18}}[0-9{_HAN}])?)\."
_REGION = r"(?:cn|hk|tw)(?![A-Za-z0-9-])"
_DOMAIN_ZH = (
    rf"{_PART}(?:(?!(?i:com|net|org|edu|gov|info|biz|[a-z]{{2}})\.[0-9]*[{_HAN}]){_PART}){{0,7}}?"
    rf"(?:(?<=[A-Za-z0-9]\.)(?:{_TOP_ZH})(?![{_HAN}])|(?<=[{_HAN}]\.)(?:{_TOP_ZH}"
    rf"|(?i:(?:com|net|org|edu|gov)\.{_REGION}|(?:com|net|org|info|biz|asia|top|vip|xyz|cc|tv|cn|hk|tw|sg|mo"
    rf"|xn--[a-z0-9-]{{2,59}})(?![A-Za-z0-9-])))(?!\.{_REGION}))"
)
_EMAIL_ZH = (
    rf"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{{0,63}}@{_DOMAIN_ZH}"
    rf"|[{_HAN}]{{2,4}}@{_DOMAIN_ZH}(?![{_HAN}])"
)
# What must stand in a text before that is worth running: a Chinese character in what may be a domain of two parts.
_AT_ZH = rf"@[A-Za-z0-9.-]{{0,255}}(?:\.[{_HAN}]|[{_HAN}][0-9{_HAN}-]{{0,62}}\.)"
# The digit comes before what must not stand before it: an expression that begins with a class of characters is tried
# only there.
_IP4 = r"\d(?<![\dA-Za-z._\\].)(?<![A-Za-z)]-.)(?<![A-Za-z)]/.)\d{0,2}(?:\.\d{1,3}){3}(?![0-9A-Za-z_]|\.[0-9A-Za-z]*\d)"
_IP6 = r"(?<![0-9A-Za-z:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z:])"
# Bare, in groups of four, and as American Express (4-6-5), Diners (4-6-4) and UnionPay (6-13) print them. With a group
# of three behind them they have 19 digits, or the three are something else: so the longer is asked about first.
_CARD_FOURS = (
    r"[2-6]\d{{3}}(?<![0-9A-Za-z_.,-].{{4}})(?P<by>[ \u00a0-])\d{{4}}(?P=by)\d{{4}}(?P=by)\d{{4}}{}"
    r"(?![\dA-Za-z_*^%]|[-.,]\d)"
)
_CARD_LONG = _CARD_FOURS.format(r"(?P=by)\d{3}")
_CARD_SHORT = _CARD_FOURS.format("")
_CARD = (
    r"[2-6](?<![\dA-Za-z_.,/\\*^%-].)(?:\d{12,18}|\d{3}(?P<a>[ -])\d{6}(?P=a)\d{4,5}|\d{5}(?P<b>[ -])\d{13})"
    r"(?![\dA-Za-z_*^%]|[-.,]\d)"
)
_ID = r"(?<![0-9A-Za-z])[1-8]\d{16}[0-9Xx](?![0-9A-Za-z])"
# The prefixes that are given out (13x, 145-149, 15x but 154, 162, 165-167, 170-178, 18x, 19x but 194).
_MOBILE = (
    r"(?<![0-9A-Za-z._*^%-])(?:(?:\+|00)86[ -]?)?1(?:3\d|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9])"
    r"(?:\d{8}|(?P<by>[ -])\d{4}(?P=by)\d{4})(?![0-9A-Za-z_*^%]|[.-]\d)"
)
_MOBILE_CALLED = r"1[3-9]\d{9}(?<=[A-Za-z.].{11})(?![0-9A-Za-z_*^%]|[.-]\d)"  # TEL13800138000, Mob.13800138000
_DASH = "[-\u2010-\u2015\uff0d]"
_AREA_ZH = "0(?:10|2[0-57-9]|[3-9]\\d{2})"
_NO_MORE = r"(?![0-9A-Za-z_]|[.-]\d)"
_PHONE_ABROAD = (  # +44 20 7946 0958, 0086-519-5211973
    rf"(?:\+(?<![0-9A-Za-z+.].)|(?<![0-9A-Za-z+.-])00[ -]?(?=86)){_COUNTRY}"
    rf"[ .-]?(?:\(0?\d{{1,4}}\)[ .-]?)?\d{{1,4}}(?:[ .-]?\d{{2,4}}){{1,5}}{_NO_MORE}"
)
# (212) 555-0123 and 212.555.0123, with 1 before them or without; 010-12345678, (0755) 2671 2345, 021-5555-1234;
# 400-810-6666, 400-8106666.
_NANP = r"(?:\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}[.-]\d{4}|[2-9]\d{2}\.[2-9]\d{2}\.\d{4})"
_LANDLINE = rf"(?:{_AREA_ZH}{_DASH}|[(（]{_AREA_ZH}[)）] ?)(?:[1-9]\d{{6,7}}|[1-9]\d{{2,3}}[ -]\d{{4}})"
_PHONE = rf"(?<![0-9A-Za-z+._/\\])(?<!\d-)(?:(?:1[ .-])?{_NANP}|{_LANDLINE}|[48]00-\d{{7}}){_NO_MORE}"
_PHONE_CALLED = (  # 电话 010 8234 5678, 电话02155551234, Tel: 020 7946 0958, 致电 4008106666
    r"[02-9](?<![0-9A-Za-z+._/\\-].)(?:(?<=0)\d{1,4}[ -]\d{3,4}[ -]?\d{3,4}|(?<=[48])00 ?\d{3} ?\d{4}"
    r"|(?<=0)(?:10|2[0-57-9]|[3-9]\d{2})[1-9]\d{6,7}"
    rf"|(?<!0)\d{{2}} \d{{3}}[ -]\d{{4}}){_NO_MORE}"
)
_RULES: dict[str, list[tuple[str, Callable[[re.Match], bool]]]] = {
    "secret": [(_SECRET, _always)],
    "email": [(_EMAIL_ZH, _always), (_EMAIL, _always)],  # a@mail.shop.例子.中国 is more than its beginning
    "ip": [(_IP4, _ip4), (_IP6, _ip6)],
    "card": [(_CARD_LONG, _card), (_CARD_SHORT, _card), (_CARD, _card)],
    "id_zh": [(_ID, _identity)],
    "mobile_zh": [(_MOBILE, _mobile), (_MOBILE_CALLED, _called)],
    "phone": [(_PHONE_ABROAD, _abroad), (_PHONE, _always), (_PHONE_CALLED, _called)],
}
# What must stand in a text before an expression is worth running over it.
_WORTH = {
    _EMAIL_ZH: _AT_ZH,
    _IP6: r":[0-9A-Fa-f]{0,4}:",
    _PHONE_ABROAD: r"\+[1-9]|00[ -]?86",
    _PHONE: rf"\d{_DASH[:-1]}.)）] ?\d{{3}}",
    _PHONE_CALLED: r"\d[ -]\d{3}|00 ?\d{3} ?\d{4}|0\d{9}",
}
_compiled = functools.cache(re.compile)  # when first used: 0.05 CPU-s of every process, and most recipes mask nothing
_SEVEN = re.compile(r"\d(?:[^\w\n]{0,2}\d){6}")


def masked(text: str, mask: Mask) -> tuple[str, dict[str, int]]:
    """The text with what `mask.use` names replaced, and how often each kind was."""
    counts: dict[str, int] = {}
    # What was a part of a longer number may be one by itself once its neighbour is replaced. Bounded, for `form` may be
    # an address itself.
    for _ in range(4):
        text, found = _masked_once(text, mask)
        if not found:
            break
        for kind, number in found.items():
            counts[kind] = counts.get(kind, 0) + number
    return text, counts


def _masked_once(text: str, mask: Mask) -> tuple[str, dict[str, int]]:
    counts: dict[str, int] = {}
    numbers = None
    for kind in KINDS if mask.use else ():
        if kind not in mask.use:
            continue
        if kind == "secret":
            if not any(hint in text for hint in _HINTS):
                continue
        elif kind == "email":
            if "@" not in text:
                continue
        elif kind != "ip":
            numbers = _SEVEN.search(text) is not None if numbers is None else numbers
            if not numbers:
                continue
        word = mask.form.format(kind.upper())
        for expression, true in _RULES[kind]:
            if expression in _WORTH and not _compiled(_WORTH[expression]).search(text):
                continue
            found = 0

            def replace(match: re.Match) -> str:
                nonlocal found
                if not true(match):
                    return match[0]
                found += 1
                return word

            text = _compiled(expression).sub(replace, text)
            if found:
                counts[kind] = counts.get(kind, 0) + found
    return text, counts
