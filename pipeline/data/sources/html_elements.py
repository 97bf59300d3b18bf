"""Elements of HTML whose text resiliparse loses, changes or joins with its neighbours, rewritten before it reads a
page: single characters, figures, summaries, readings of characters (ruby), formulas, powers and indices, numbers of
lists."""

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an optional dependency
    from resiliparse.parse.html import DOMNode, HTMLTree

_ANY = re.compile(r"<(?:figure|figcaption|summary|legend|ruby|math|q|su[bp]|ol|script[^>]+math/tex)\b", re.I)
# In the main content resiliparse 2.0.1 drops each text that consists of one character of three bytes, such as a Chinese
# one or a dash in bold type, taking it for a sign of an icon font. MARK, a noncharacter, makes it longer.
MARK = "\ufdd0"
_ALONE = re.compile(r">([ \t\r\n]*)([\u0800-\ud7ff\uf900-\uffef]|&#?\w{2,32};)(?=[ \t\r\n]*<)")
# A figure without any of these is a picture with its caption, which is not part of the main content.
_TEXT = "pre, code, table, p, blockquote, ul, ol, dl, math, ruby"
CAPTIONS = "[data-alma=picture]"
STRUCK = ["del", "s", "strike"]  # what is no longer so: without its line through it, `<s>100</s>80` is 10080
_POWERS = str.maketrans("0123456789+-\u2212=()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁼⁽⁾ⁿ")
_INDICES = str.maketrans("0123456789+-\u2212=()", "₀₁₂₃₄₅₆₇₈₉₊₋₋₌₍₎")
_ROMAN = ((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"))
_ROMAN += ((9, "ix"), (5, "v"), (4, "iv"), (1, "i"))
_DISPLAYED = re.compile(r"\{\\(?:display|text)style\s(.*)\}", re.S)  # how Wikipedia writes each formula


def elements(node: "DOMNode", selector: str) -> "tuple[DOMNode, ...]":
    """The elements that a selector matches. A slice, because each step of an iteration over the result would evaluate
    the selector again."""
    matches = node.query_selector_all(selector)
    return matches[0 : len(matches)]


def mark_single_characters(page: str) -> str:
    """The source of a page with MARK after each character that is a text by itself. Signs of icon fonts, which are in
    the private use area, and spaces get none."""
    return _ALONE.sub(_marked, page)


def _marked(match: re.Match) -> str:
    text = html.unescape(match[2])
    is_single = len(text) == 1 and "\u0800" <= text and not "\ue000" <= text <= "\uf8ff" and not text.isspace()
    return match[0] + MARK if is_single else match[0]


def rewrite(tree: "HTMLTree", page: str) -> None:
    """Rewrite such elements of a page, of which `page` is the source. MARK is to be removed from its text."""
    body = tree.body
    if body is None or not _ANY.search(page):
        return
    _write_formulas(tree, body)
    for ruby in elements(body, "ruby:not(ruby ruby)"):
        ruby.replace_with(tree.create_text_node(_with_reading(ruby) + MARK))
    for quotation in elements(body, "q"):
        if quotation.first_child is not None:
            begin, end = "‘’" if quotation.matches("q q") else "“”"
            quotation.insert_before(tree.create_text_node(begin + MARK), quotation.first_child)
            quotation.append_child(tree.create_text_node(end + MARK))
    for tag, signs in (("sup", _POWERS), ("sub", _INDICES)):
        for node in elements(body, f"{tag}:not(pre {tag}, {tag} {tag})"):
            written = node.text.strip()
            if 0 < len(written) <= 8 and all(ord(sign) in signs for sign in written):
                node.replace_with(tree.create_text_node(written.translate(signs) + MARK))
    for tag in ("figcaption", "summary", "legend", "figure"):
        for node in elements(body, tag):
            block = _replace(tree, node, "div")
            if tag == "figure" and not block.query_selector(_TEXT):
                block.setattr("data-alma", "picture")
    for number_list in elements(body, "ol[start], ol[type], ol[reversed], ol:has(> li[value])"):
        _write_numbers(tree, number_list)


def _replace(tree: "HTMLTree", node: "DOMNode", tag: str) -> "DOMNode":
    """Replace an element by one of another kind with the same content, id and classes."""
    block = tree.create_element(tag)
    for name in ("id", "class"):
        if node.getattr(name):
            block.setattr(name, node.getattr(name))
    while node.first_child is not None:
        block.append_child(node.first_child)
    node.replace_with(block)
    return block


# ---- readings --------------------------------------------------------------------------------------------------------


def _with_reading(ruby: "DOMNode") -> str:
    """`東京(とうきょう)`: the text, and how it is read in brackets, as a browser without ruby shows it."""
    base, reading, brackets = [], [], []
    for child in ruby.child_nodes:
        if child.tag in ("rt", "rtc"):
            reading.append(child.text.strip())
        elif child.tag == "rp":
            brackets.append(child.text.strip())
        else:
            base.append(child.text.strip("\n\t "))
    begin, end = brackets[:2] if len(brackets) > 1 else "()"
    return "".join(base) + (f"{begin}{''.join(reading)}{end}" if any(reading) else "")


# ---- formulas --------------------------------------------------------------------------------------------------------


def _write_formulas(tree: "HTMLTree", body: "DOMNode") -> None:
    """Formulas as TeX between dollar signs, or as MathML says them; once, where a page has them in two forms."""
    for drawn in elements(body, ".katex-mathml + .katex-html, mjx-container > mjx-math, script[type^='math/tex']"):
        text = ""
        if drawn.tag == "script":
            text = _between_dollars(drawn.text, "mode=display" in (drawn.getattr("type") or ""))
        drawn.replace_with(tree.create_text_node(text + MARK))
    for math in elements(body, "math:not(math math)"):
        tex = math.query_selector("annotation[encoding*='tex' i]")
        source = tex.text if tex else math.getattr("alttext") or ""
        is_block = math.getattr("display") == "block"
        text = _between_dollars(source, is_block) if source.strip() else _in_a_line(math)
        math.replace_with(tree.create_text_node(text + MARK))


def _between_dollars(tex: str, is_block: bool) -> str:
    tex = tex.strip()
    if match := _DISPLAYED.fullmatch(tex):
        tex = match[1].strip()
    if not tex or tex[0] == "$":
        return tex
    return f"$${tex}$$" if is_block else f"${tex}$"


def _in_a_line(node: "DOMNode") -> str:
    """MathML (presentation) in a line of text: x^2, (a + b)/c."""
    if node.first_child is None:
        return node.text if node.tag == "#text" else ""
    if node.tag in ("mi", "mn", "mo", "mtext", "ms"):
        return node.text.strip()
    parts = [_in_a_line(child) for child in node.child_nodes if child.tag[0] != "#" and child.tag[:10] != "annotation"]
    if node.tag == "mfrac" and len(parts) == 2:
        return f"{_grouped(parts[0])}/{_grouped(parts[1])}"
    if node.tag in ("msup", "mover") and len(parts) == 2:
        return f"{_grouped(parts[0])}^{_grouped(parts[1])}"
    if node.tag in ("msub", "munder") and len(parts) == 2:
        return f"{_grouped(parts[0])}_{_grouped(parts[1])}"
    if node.tag in ("msubsup", "munderover") and len(parts) == 3:
        return f"{_grouped(parts[0])}_{_grouped(parts[1])}^{_grouped(parts[2])}"
    if node.tag == "mroot" and len(parts) == 2:
        return f"{_grouped(parts[0])}^(1/{parts[1]})"
    if node.tag == "msqrt":
        return f"√{_grouped(''.join(parts))}"
    if node.tag in ("mtr", "mtable"):
        return (" " if node.tag == "mtr" else "; ").join(parts)
    return "".join(parts)


def _grouped(text: str) -> str:
    return text if len(text) < 2 or text.isdecimal() else f"({text})"


# ---- numbers of lists ------------------------------------------------------------------------------------------------


def _write_numbers(tree: "HTMLTree", number_list: "DOMNode") -> None:
    """Blocks that begin with the number that the page shows, in place of a list that resiliparse counts from one."""
    items = [child for child in number_list.child_nodes if child.tag == "li"]
    step = -1 if number_list.hasattr("reversed") else 1
    number = _whole(number_list.getattr("start"), len(items) if step < 0 else 1)
    kind = number_list.getattr("type") or "1"
    for item in items:
        number = _whole(item.getattr("value"), number)
        block = _replace(tree, item, "div")
        mark = tree.create_text_node(f"{_numeral(number, kind)}. ")
        if block.first_child is None:
            block.append_child(mark)
        else:
            block.insert_before(mark, block.first_child)
        number += step
    _replace(tree, number_list, "div")


def _whole(value: str | None, default: int) -> int:
    return int(value) if value and re.fullmatch(r"-?\d{1,9}", value.strip()) else default


def _numeral(number: int, kind: str) -> str:
    if kind not in ("a", "A", "i", "I") or not 0 < number < 4000:
        return str(number)
    text = ""
    if kind in "aA":
        while number:
            number, letter = divmod(number - 1, 26)
            text = chr(ord("a") + letter) + text
    else:
        for value, sign in _ROMAN:
            text += sign * (number // value)
            number %= value
    return text.upper() if kind.isupper() else text
