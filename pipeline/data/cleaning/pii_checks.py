"""Checks of what the expressions in pii_patterns.py match: checksums, ranges, and the words around a number."""

import ipaddress
import re

_REPOSITORY = re.compile(r"(?:git|hg|svn)@", re.I)


def is_of_a_person(match: re.Match) -> bool:
    """An address that may be a person's: `git@github.com:a/b` is where a repository is."""
    return not _REPOSITORY.match(match[0])


def _has_luhn_checksum(digits: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812-1, annex B)."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


# Prefixes and lengths that issuers use (ISO/IEC 7812; Visa, Mastercard, American Express, Discover, JCB, Diners,
# UnionPay, Mir, Maestro). American Express has 15 digits; sixteen are what generators of test data write.
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d+(?<=^\d{16})"
    r"|3[47]\d{13,14}|(?:6011|64[4-9]\d|65\d\d)\d{12,15}|35(?:2[89]|[3-8]\d)\d{12,15}"
    r"|3(?:0[0-59]|[689]\d)\d{11}|62\d{14,17}|220[0-4]\d{12,15}|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{12,15}"
)


def is_card(match: re.Match) -> bool:
    """A bank card: in the form, with the prefix and with the checksum of cards."""
    digits = re.sub(r"\D", "", match[0])
    if not _ISSUERS.fullmatch(digits) or len(set(digits)) < 2 or not _has_luhn_checksum(digits):
        return False
    if _is_barcode(digits) or not is_not_a_count(match):
        return False
    if digits == match[0]:
        return True
    # Groups within a longer row of such groups are a dump or a table.
    before, after = match.string[max(0, match.start() - 6) : match.start()], match.string[match.end() :][:6]
    sign = re.escape(re.search(r"\D", match[0])[0])
    group = "[0-9A-Fa-f]{4}"
    return not re.search(rf"\b{group}{sign}$", before) and not re.match(rf"{sign}{group}\b", after)


def _is_barcode(digits: str) -> bool:
    """Thirteen digits with the checksum of an EAN (ISO/IEC 15420). One in ten of them has that of cards too, and begins
    as the cards of thirteen digits did, which are no longer issued."""
    total = sum(int(digit) * (1 + 2 * (index % 2)) for index, digit in enumerate(digits))
    return len(digits) == 13 and total % 10 == 0


def is_identity_number(match: re.Match) -> bool:
    """A Chinese identity number (GB 11643-1999): region, date of birth, sequence, ISO 7064 MOD 11-2."""
    number = match[0]
    century, month, day = number[6:8], int(number[10:12]), int(number[12:14])
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    weighted_sum = sum(int(digit) * weight for digit, weight in zip(number[:17], weights, strict=True))
    check_digit = "10X98765432"[weighted_sum % 11]
    is_date = century in ("18", "19", "20") and 1 <= month <= 12 and 1 <= day <= 31
    return is_date and number[17].upper() == check_digit


# Borders of words of both languages; \b has none between Chinese and Latin letters.
_BEGIN, _END = r"(?<![0-9A-Za-z_])", r"(?![0-9A-Za-z_])"
# Before a number of four parts that is not an address: a version, or the number of a section, an enzyme, an object.
_NUMBER_WORD = re.compile(
    rf"(?:(?<!-){_BEGIN}(?:v|ver|vers|releases?|rev|revisions?|build|firmware|patchlevel|drivers?|api|dll|sdk"
    rf"|sections?|sect|sec|chapters?|appendix|clauses?|paragraphs?|ec|oid|asn\.1|tables?|tab|figures?|fig|art|articles?"
    rf"|steps?|firefox|chrome|chromium|edge|opera|safari|webkit|openssl|nvidia|postgresql|kernel|jira){_END}\.?"
    rf"|(?<!-)\w{{0,30}}versions?{_END}|§|¶|第|版本|固件|驱动|驅動|升级|升級|更新|图|圖|表|条款|條款|附录|附錄|算法)"
    r"[\s:：=(（\[\"'“‘`#号號/]{0,5}"
    r"(?:(?:is|of|to|from|number|no\.|at|<=|>=|[<>~=]|为|為|是|到|至|从|從)[\s:：\"'“`]{0,3}){0,2}$",
    re.I,
)
# Before or after one that is an address.
_ADDRESS_WORD = re.compile(
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
_ADDRESS_ENDS = re.compile(r":\d{2,5}(?![\d.:])|[ \t]port[ \t]\d|/(?:[89]|[12]\d|3[0-2])(?![\d.])")
_SECTION_ENDS = re.compile(
    r"[ \u00a0]?(?:小?[节節]|[章条條款版%％])|\.?[ \u00a0]?(?:安全)?更新|-[A-Za-z_]|-\d(?!\d{0,2}(?:\.\d{1,3}){3})"
)
_HEADING_ENDS = re.compile(r"\.[ \t]+\S")  # of a number at the beginning of a line: `45.40.50.60. Updates`
_RESOLVERS = ("8.8.8.8", "8.8.4.4", "9.9.9.9")


def is_ipv4_address(match: re.Match) -> bool:
    """A public address, and not a version or the number of a section. Those look like addresses of small numbers, of
    which there are few: seven in a thousand begin below 40 and have two more parts below 32. For these something
    around the number must say that it is an address."""
    text, begin, end = match.string, match.start(), match.end()
    try:
        address = ipaddress.IPv4Address(match[0])
    except ValueError:
        return False
    before = text[max(0, begin - 60) : begin].rpartition("\n")[2]
    after = text[end : end + 20]
    if not address.is_global or address.is_multicast or _NUMBER_WORD.search(before) or _SECTION_ENDS.match(after):
        return False
    if not before.strip() and _HEADING_ENDS.match(after):
        return False
    first, *rest = match[0].split(".")
    has_small_numbers = int(first) < 40 and sum(int(part) < 32 for part in rest) >= 2
    if not has_small_numbers or match[0] in _RESOLVERS:
        return True
    return _ADDRESS_WORD.search(before) is not None or _ADDRESS_ENDS.match(after) is not None


def is_ipv6_address(match: re.Match) -> bool:
    """A global unicast address, 2000::/3, the only kind that is assigned (IANA): other rows of hexadecimal numbers are
    names of devices, fingerprints and the like."""
    try:
        address = ipaddress.IPv6Address(match[0])
    except ValueError:
        return False
    is_year = match[0].strip(":").isdecimal() and match.string[match.end() : match.end() + 1] != "/"  # `in 2004::`
    is_time = re.fullmatch(r"\d{4}(?::\d{1,2}){5,}", match[0])  # 2023:11:20:10:20:30
    return address.is_global and int(address) >> 125 == 1 and not is_year and not is_time


def has_phone_length(match: re.Match) -> bool:
    """A number with its country code: as many digits as telephone numbers have, and not a signed number of a table, a
    formula or a patch."""
    before = match.string[max(0, match.start() - 2000) : match.start()]
    line = before.rpartition("\n")[2]
    if not is_not_a_count(match) or (not line and _PATCH.search(before)):
        return False
    digits = re.sub(r"\D", "", match[0])
    if digits.startswith("1") and not re.fullmatch(r"1[2-9]\d{9}", digits):
        return False
    if re.fullmatch(r"\+\d+\.\d+", match[0]):  # as domain registries write one: `Registrant Phone: +44.2079460958`
        is_said = digits.startswith("86") or _REGISTRY_WORD.search(line) is not None
        return is_said and 10 <= len(digits) <= 15
    return 9 <= len(digits) <= 15


_PATCH = re.compile(r"^(?:@@ |\+\+\+ |diff --git )", re.M)
_REGISTRY_WORD = re.compile(r"(?:phone|fax|tel|mobile|电话|電話|传真|傳真)[^\n]{0,20}$", re.I)
_PHONE_WORD = re.compile(
    rf"(?:{_BEGIN}(?:tel|telephone|phone|mob|mobile|cell|fax|call|hotline){_END}|手机|手機|电话|電話|传真|傳真|热线|熱線|座机|致电|拨打|來電|来电|客服)"
    r"[^\w\n]{0,3}(?:是|为|為|at|number|no)?[^\w\n]{0,4}$",
    re.I,
)


def follows_phone_word(match: re.Match) -> bool:
    """Digits after a word that says that they are a telephone number."""
    return _PHONE_WORD.search(match.string[max(0, match.start() - 30) : match.start()]) is not None


_COUNT_WORD = re.compile(
    r"(?:(?<![A-Za-z])(?:timestamp|time|total|size|bytes?|offset|sector|block|inode|seq|serial|pid|id|order|isbn)"
    r"|[单單编編序]号|[总總][共长長]|人口|[长長]度|时间戳|時間戳|流水[号號]|[订訂][单單]|大小|字[节節])"
    r"[^\w\n]{0,3}$|(?<!phone)(?<!mobile)(?<!tel)[ \t]?=[ \t]?$|[￥¥$€£][ \t]?$",
    re.I,
)
# After a number: what it counts.
_UNIT = re.compile(
    rf"[ \t]{{0,2}}(?:(?:bytes?|octets|[kmgt]i?b|rows|lines|records|users|people|packets){_END}"
    r"|字[节節]|[元万萬亿億吨噸％%]|人(?![\u4e00-\u9fff]))",
    re.I,
)
_FILE_LISTING = re.compile(r"^[-dlbcps][-rwxsStT]{9}[.+@]?[ \t]")  # a line of `ls -l`


def is_not_a_count(match: re.Match) -> bool:
    """Not a size, a time, an amount or a serial number: logs and listings name it before the number or its unit after
    it, or have it in a row of numbers."""
    text, begin, end = match.string, match.start(), match.end()
    line = text[max(0, begin - 200) : begin].rpartition("\n")[2]
    if _COUNT_WORD.search(line[-30:]) or _FILE_LISTING.match(line):
        return False
    after = text[end : end + 200].partition("\n")[0]
    numbers = after.split()  # of a table such as /proc/net/dev, unless they are telephone numbers too
    is_row = len(numbers) > 2 and all(map(str.isdecimal, numbers)) and any(len(number) < 11 for number in numbers)
    return not _UNIT.match(after) and not is_row


def always(_: re.Match) -> bool:
    return True
