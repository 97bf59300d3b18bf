"""Personal data and secrets replaced by a word that says what stood there. Expressions find candidates; checksums
and ranges decide, so that few numbers are taken for what they are not."""

import functools
import ipaddress
import re
from collections.abc import Callable
from typing import Literal

from pydantic import field_validator

from pipeline.recipe import Strict

# in the order in which they are looked for: an identity number may pass for a card
KINDS = ("secret", "email", "ip", "id_zh", "card", "mobile_zh", "phone")


class Mask(Strict):
    """What is replaced in the documents that are kept. A kind becomes its name in brackets, such as [EMAIL]."""

    use: list[Literal["secret", "email", "ip", "card", "id_zh", "mobile_zh", "phone"]] = []
    """secret: private keys, tokens of AWS, GitHub, GitLab, Slack, Google, OpenAI, Stripe, npm, PyPI, JSON web
    tokens; email; ip: addresses that are not private or reserved; card: credit cards with Luhn's checksum; id_zh:
    Chinese identity numbers with date and checksum; mobile_zh: Chinese mobile numbers; phone: other numbers in a
    form that is dialled."""
    form: str = "[{}]"
    """How a kind is written; {} is its name in capitals."""

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


def _card(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    # Prefixes of the issuers that have 13 to 19 digits (Visa, Mastercard, American Express, Discover, JCB, Diners,
    # UnionPay).
    return (
        13 <= len(digits) <= 19
        and re.match("4|5[1-5]|2[2-7]|3[4-9]|6", digits) is not None
        and len(set(digits)) > 1
        and _luhn(digits)
    )


def _identity(found: str) -> bool:
    """GB 11643-1999: region, date of birth, sequence, ISO 7064 MOD 11-2."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    month, day = int(found[10:12]), int(found[12:14])
    check = "10X98765432"[sum(int(digit) * weight for digit, weight in zip(found, weights, strict=False)) % 11]
    return 1 <= month <= 12 and 1 <= day <= 31 and found[6:8] in ("18", "19", "20") and found[17].upper() == check


def _address(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _phone(found: str) -> bool:
    """A country code, or brackets or separators where a person puts them: bare runs of digits are more often
    something else."""
    digits = re.sub(r"\D", "", found)
    return 7 <= len(digits) <= 15 and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", found)


def _always(_: str) -> bool:
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
_IP4 = r"\d(?<![\d.vV].)(?<!ersion .)(?<!版本.)(?<!版本 .)\d{0,2}(?:\.\d{1,3}){3}(?![\d.]*\d)"
_IP6 = (
    r"(?<![0-9A-Za-z:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::|[0-9A-Fa-f]{1,4})(?:[0-9A-Fa-f:]*[0-9A-Fa-f])?(?![0-9A-Za-z:])"
)
_CARD = r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-]*\d)"
# The same where a date or a security number stands beside it: a bare run of digits or groups of four, at the beginning
# or at the end of a row of numbers.
_CARD_FORM = r"(?:\d{{13,19}}|\d{{4}}(?P<{0}>[ -])\d{{4}}(?P={0})\d{{4}}(?P={0})\d{{4}})"
_CARD_BESIDE = (
    r"(?<![\d.-])(?<!\d )"
    + _CARD_FORM.format("a")
    + r"(?![\d-]*\d)|(?<![\d.-])"
    + _CARD_FORM.format("b")
    + r"(?![\d-]*\d| \d)"
)
_ID = r"(?<![0-9A-Za-z])[1-8]\d{16}[0-9Xx](?![0-9A-Za-z])"
_MOBILE = r"(?<![0-9A-Za-z.-])(?:(?:\+|00)86[ -]?)?1[3-9]\d(?:\d{8}|[ -]\d{4}[ -]\d{4})(?![0-9A-Za-z]|[.-]\d)"
_PHONE = (
    # +44 20 7946 0958
    r"(?<![0-9A-Za-z+.])(?:\+[1-9]\d{0,2}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[-.]\d{3}[-.]\d{4}"  # (212) 555-0123
    r"|0\d{2,3}[- ]\d{7,8}|[48]00-\d{3}-\d{4})(?![0-9A-Za-z]|-\d)"  # 010-12345678, 400-123-4567
)
_RULES: dict[str, list[tuple[str, Callable[[str], bool]]]] = {
    "secret": [(_SECRET, _always)],
    "email": [(_EMAIL_ZH, _always), (_EMAIL, _always)],  # a@mail.shop.例子.中国 is more than its beginning
    "ip": [(_IP4, _address), (_IP6, _address)],
    "card": [(_CARD, _card), (_CARD_BESIDE, _card)],
    "id_zh": [(_ID, _identity)],
    "mobile_zh": [(_MOBILE, _always)],
    "phone": [(_PHONE, _phone)],
}
_WORTH = {_IP6: r":[0-9A-Fa-f]{0,4}:", _EMAIL_ZH: _AT_ZH}
_compiled = functools.cache(re.compile)  # when first used: 0.05 CPU-s of every process, and most recipes mask nothing
_SEVEN = re.compile(r"\d(?:[^\w\n]{0,2}\d){6}")


def masked(text: str, mask: Mask) -> tuple[str, dict[str, int]]:
    """The text with what `mask.use` names replaced, and how often each kind was."""
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
                if not true(match[0]):
                    return match[0]
                found += 1
                return word

            text = _compiled(expression).sub(replace, text)
            if found:
                counts[kind] = counts.get(kind, 0) + found
    return text, counts
