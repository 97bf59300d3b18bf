"""Expressions that find candidates for personal data and secrets. pii_checks.py decides which of them are real."""

SECRET = (
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
# A text with a secret has one of these. Searching for them takes a hundredth of the expression's time.
SECRET_HINTS = (
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
EMAIL = (
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.){1,8}(?:[A-Za-z]{2,24}|xn--[A-Za-z0-9-]{2,59})(?![A-Za-z0-9-])"
)
# The same at domains with Chinese characters (RFC 6531). Chinese text may follow an address without a space, and its
# sentences may end in a dot, so it is better to miss an odd address than to mask prose:
# * a part of a domain is ASCII, or Chinese characters and digits, at most 20 (the limit of .cn);
# * a top-level domain is one that exists (the 61 Chinese ones of the Public Suffix List of 2026, longest first; of the
#   others those with most Chinese names), and the first one ends the address;
# * no Chinese part follows .com and the like; after an ASCII part, and with a Chinese name before the @, no Chinese
#   text follows the top-level domain (`info@example.com.在线客服`, `转发@张三.中国队`);
# * nothing marks where a Chinese name before the @ begins: at most four characters, the length of persons' names.
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
EMAIL_ZH = (
    rf"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{{0,63}}@{_DOMAIN_ZH}"
    rf"|[{_HAN}]{{2,4}}@{_DOMAIN_ZH}(?![{_HAN}])"
)
# A text with such an address has a Chinese character in what may be a domain of two parts.
_AT_ZH = rf"@[A-Za-z0-9.-]{{0,255}}(?:\.[{_HAN}]|[{_HAN}][0-9{_HAN}-]{{0,62}}\.)"
# The first digit comes before the look-behinds: an expression that begins with a class of characters is only tried at
# such characters.
IP4 = r"\d(?<![\dA-Za-z._\\].)(?<![A-Za-z)]-.)(?<![A-Za-z)]/.)\d{0,2}(?:\.\d{1,3}){3}(?![0-9A-Za-z_]|\.[0-9A-Za-z]*\d)"
IP6 = r"(?<![0-9A-Za-z:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z:])"
# Bare, in groups of four, and as American Express (4-6-5), Diners (4-6-4) and UnionPay (6-13) print them. A group of
# three after them makes 19 digits or is something else, so the longer form is tried first.
_CARD_FOURS = (
    r"[2-6]\d{{3}}(?<![0-9A-Za-z_.,-].{{4}})(?P<by>[ \u00a0-])\d{{4}}(?P=by)\d{{4}}(?P=by)\d{{4}}{}"
    r"(?![\dA-Za-z_*^%]|[-.,]\d)"
)
CARD_LONG = _CARD_FOURS.format(r"(?P=by)\d{3}")
CARD_SHORT = _CARD_FOURS.format("")
CARD = (
    r"[2-6](?<![\dA-Za-z_.,/\\*^%-].)(?:\d{12,18}|\d{3}(?P<a>[ -])\d{6}(?P=a)\d{4,5}|\d{5}(?P<b>[ -])\d{13})"
    r"(?![\dA-Za-z_*^%]|[-.,]\d)"
)
IDENTITY_NUMBER = r"(?<![0-9A-Za-z])[1-8]\d{16}[0-9Xx](?![0-9A-Za-z])"
# The prefixes that are assigned (13x, 145-149, 15x but 154, 162, 165-167, 170-178, 18x, 19x but 194).
MOBILE = (
    r"(?<![0-9A-Za-z._*^%-])(?:(?:\+|00)86[ -]?)?1(?:3\d|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9])"
    r"(?:\d{8}|(?P<by>[ -])\d{4}(?P=by)\d{4})(?![0-9A-Za-z_*^%]|[.-]\d)"
)
MOBILE_AFTER_WORD = r"1[3-9]\d{9}(?<=[A-Za-z.].{11})(?![0-9A-Za-z_*^%]|[.-]\d)"  # TEL13800138000, Mob.13800138000
_DASH = "[-\u2010-\u2015\uff0d]"
_AREA_ZH = "0(?:10|2[0-57-9]|[3-9]\\d{2})"
_NO_MORE = r"(?![0-9A-Za-z_]|[.-]\d)"
# Country codes of ITU-T E.164.
_COUNTRY = (
    r"(?:1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|21[1-368]|22\d|23\d|24\d|25[0-8]|26\d|29[01789]"
    r"|35\d|37\d|38[0-35-79]|42[013]|50\d|59\d|67[02-9]|68[0-35-9]|69[0-2]|80[08]|85[02356]|87[0-48]|88[0-368]"
    r"|96[0-8]|97[0-79]|99[1-68])"
)
PHONE_WITH_COUNTRY = (  # +44 20 7946 0958, 0086-519-5211973
    rf"(?:\+(?<![0-9A-Za-z+.].)|(?<![0-9A-Za-z+.-])00[ -]?(?=86)){_COUNTRY}"
    rf"[ .-]?(?:\(0?\d{{1,4}}\)[ .-]?)?\d{{1,4}}(?:[ .-]?\d{{2,4}}){{1,5}}{_NO_MORE}"
)
# (212) 555-0123 and 212.555.0123, with or without a 1 before them; 010-12345678, (0755) 2671 2345, 021-5555-1234;
# 400-810-6666, 400-8106666.
_NANP = r"(?:\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}[.-]\d{4}|[2-9]\d{2}\.[2-9]\d{2}\.\d{4})"
_LANDLINE = rf"(?:{_AREA_ZH}{_DASH}|[(（]{_AREA_ZH}[)）] ?)(?:[1-9]\d{{6,7}}|[1-9]\d{{2,3}}[ -]\d{{4}})"
PHONE = rf"(?<![0-9A-Za-z+._/\\])(?<!\d-)(?:(?:1[ .-])?{_NANP}|{_LANDLINE}|[48]00-\d{{7}}){_NO_MORE}"
PHONE_AFTER_WORD = (  # 电话 010 8234 5678, 电话02155551234, Tel: 020 7946 0958, 致电 4008106666
    r"[02-9](?<![0-9A-Za-z+._/\\-].)(?:(?<=0)\d{1,4}[ -]\d{3,4}[ -]?\d{3,4}|(?<=[48])00 ?\d{3} ?\d{4}"
    r"|(?<=0)(?:10|2[0-57-9]|[3-9]\d{2})[1-9]\d{6,7}"
    rf"|(?<!0)\d{{2}} \d{{3}}[ -]\d{{4}}){_NO_MORE}"
)
# Expression -> a cheap one: a text without a match of the second has no match of the first.
PREREQUISITES = {
    EMAIL_ZH: _AT_ZH,
    IP6: r":[0-9A-Fa-f]{0,4}:",
    PHONE_WITH_COUNTRY: r"\+[1-9]|00[ -]?86",
    PHONE: rf"\d{_DASH[:-1]}.)）] ?\d{{3}}",
    PHONE_AFTER_WORD: r"\d[ -]\d{3}|00 ?\d{3} ?\d{4}|0\d{9}",
}
