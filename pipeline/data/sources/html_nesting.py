"""Pages that are nested more deeply than any page is meant to be, such as those whose generator opens tags in a loop
and closes none: the time that extractors take grows with the square of the depth."""

import re
from typing import Any

MAX_DEPTH = 256  # elements; libxml2's limit. Browsers flatten what is deeper, too (Blink: from 512 on)
# Elements within a line of text; the others are blocks, between which words are separate.
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd mark nobr q ruby rt rp s samp small span"
    " strike strong sub sup time tt u var wbr".split()
)
_INVISIBLE = ("script", "style", "noscript", "template")
# Tags that open an element, except those that never have content and those that the next one of their kind closes.
_TAG = re.compile(
    r"<(?:/(?!(?:dd|dt|li|option|p|td|th|tr)[\s>])|"
    r"(?!(?:area|base|br|col|dd|dt|embed|hr|img|input|li|link|meta|option|p|param|source|td|th|tr|track|wbr)[\s/>])[a-z])",
    re.I,
)


def may_be_deep(page: str) -> bool:
    """Whether more than MAX_DEPTH elements may be open at a time. Quick, with some false positives."""
    depth = 0
    for tag in _TAG.findall(page):
        depth = depth + 1 if tag != "</" else max(0, depth - 1)
        if 4 * depth > MAX_DEPTH:  # a table may have three more levels for each of these
            return True
    return False


def flatten(tree: Any) -> int:
    """Replace elements that are nested more deeply than MAX_DEPTH by paragraphs of their text, in order. `tree` is an
    HTMLTree of resiliparse; returns how many elements were replaced."""
    deep, node, depth = [], tree.body, 0
    while node is not None:
        child = node.first_child
        if child is not None and depth == MAX_DEPTH:
            deep.append(node)
        elif child is not None:
            node, depth = child, depth + 1
            continue
        while node is not None and node.next is None:
            node, depth = node.parent if depth > 1 else None, depth - 1
        if node is not None:
            node = node.next
    for node in deep:
        _replace(tree, node)
    return len(deep)


class _Paragraphs:
    """Collects the text of an element, a paragraph per block; its methods are callbacks of traverse_dom."""

    def __init__(self, text_type: Any):
        self.text_type = text_type
        self.texts: list[list[str]] = [[]]
        self.invisible_depth = 0

    def enter(self, context: Any) -> None:
        node = context.node
        if node.type == self.text_type:
            if not self.invisible_depth:
                self.texts[-1].append(node.text)
            return
        self.invisible_depth += node.tag in _INVISIBLE
        self._break_at(node)

    def leave(self, context: Any) -> None:
        node = context.node
        if node.type != self.text_type:
            self.invisible_depth -= node.tag in _INVISIBLE
            self._break_at(node)

    def _break_at(self, node: Any) -> None:
        if node.tag not in _INLINE and self.texts[-1]:
            self.texts.append([])


def _replace(tree: Any, node: Any) -> None:
    from resiliparse.parse.html import TEXT, traverse_dom

    paragraphs = _Paragraphs(TEXT)
    traverse_dom(node, paragraphs.enter, paragraphs.leave)
    container = tree.create_element("div")
    for text in map("".join, paragraphs.texts):
        if text.strip():
            paragraph = tree.create_element("p")
            paragraph.append_child(tree.create_text_node(text))
            container.append_child(paragraph)
    node.parent.replace_child(container, node)
