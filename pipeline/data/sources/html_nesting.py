"""Pages that are nested more deeply than any page is meant to be, such as those that open tags in a loop and close
none: the time of extractors grows with the square of the depth."""

import re
from typing import Any

MAX_DEPTH = 256  # elements; libxml2's bound. Browsers put what is deeper beside one another, too (Blink: from 512 on)
# Elements that stand open for their text alone; the others of a page are blocks, between which words are apart.
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd mark nobr q ruby rt rp s samp small span"
    " strike strong sub sup time tt u var wbr".split()
)
_UNSEEN = ("script", "style", "noscript", "template")
# Tags that open something, but for those that never hold anything and those that the next one of their kind closes.
_TAG = re.compile(
    r"<(?:/(?!(?:dd|dt|li|option|p|td|th|tr)[\s>])|"
    r"(?!(?:area|base|br|col|dd|dt|embed|hr|img|input|li|link|meta|option|p|param|source|td|th|tr|track|wbr)[\s/>])[a-z])",
    re.I,
)


def may_be_deep(page: str) -> bool:
    """Whether more than MAX_DEPTH elements can be open at a time. Quick, and wrong about some pages that are not."""
    depth = 0
    for tag in _TAG.findall(page):
        depth = depth + 1 if tag != "</" else max(0, depth - 1)
        if 4 * depth > MAX_DEPTH:  # a table has up to three more in it for each of these
            return True
    return False


def flatten(tree: Any) -> int:
    """Put what is nested more deeply than MAX_DEPTH, in order and as paragraphs of text, where the depth is reached.
    `tree` is an HTMLTree of resiliparse; returns how many of its elements were so replaced."""
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
        node = node.next if node is not None else None
    for node in deep:
        _replace(tree, node)
    return len(deep)


def _replace(tree: Any, node: Any) -> None:
    """An element of this depth by paragraphs with its text."""
    from resiliparse.parse.html import TEXT, traverse_dom

    paragraphs, unseen = [[]], 0

    def starts(context: Any) -> None:
        nonlocal unseen
        item = context.node
        if item.type == TEXT:
            if not unseen:
                paragraphs[-1].append(item.text)
        else:
            unseen += item.tag in _UNSEEN
            breaks(item)

    def ends(context: Any) -> None:
        nonlocal unseen
        if context.node.type != TEXT:
            unseen -= context.node.tag in _UNSEEN
            breaks(context.node)

    def breaks(item: Any) -> None:
        if item.tag not in _INLINE and paragraphs[-1]:
            paragraphs.append([])

    traverse_dom(node, starts, ends)
    container = tree.create_element("div")
    for text in map("".join, paragraphs):
        if text.strip():
            paragraph = tree.create_element("p")
            paragraph.append_child(tree.create_text_node(text))
            container.append_child(paragraph)
    node.parent.replace_child(container, node)
