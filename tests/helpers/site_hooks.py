"""Hooks of MkDocs (`hooks` in mkdocs.yml), for pages to mean on the site what they mean as files.

* On a Chinese page a link to `sft.md` leads to the English page. The plugin for languages would take the Chinese one, to
  which `sft.zh.md` leads.
* A `|` in the code of a table needs a backslash on GitHub; Python-Markdown would show it.
* A line break in a Chinese sentence is nothing; a browser would show a space.
"""

import posixpath
import re
from pathlib import Path

CELL = re.compile(r"<td.*?</td>", re.DOTALL)
PREFORMATTED = re.compile(r"(<pre.*?</pre>)", re.DOTALL)
INLINE = "a|code|em|strong"
HAN, AFTER = r"[\u3001-\u303f\u4e00-\u9fff\uff01-\uffef]", "[，。；：、？！）》」”]"
# Between two Chinese characters, and after Chinese punctuation, which has its own space.
BREAK = re.compile(
    rf"((?:{HAN}(?:</(?:{INLINE})>)*)\n(?=(?:<(?:{INLINE})\b[^>]*>)*{HAN})|{AFTER}(?:</(?:{INLINE})>)*\n)"
)
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)*[\w/-]+)\.md(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """The text of a page, in which such links are HTML, which neither MkDocs nor the plugin changes."""
    source = page.file.src_uri
    if not source.endswith(".zh.md"):
        return markdown
    folder = posixpath.dirname(source)

    def english(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        if not (Path(config.docs_dir) / f"{target}.zh.md").exists():
            return link[0]  # there is only the English page
        address = posixpath.relpath(f"{target}.html", posixpath.join("zh", folder))
        return f'<a href="{address}{link[3] or ""}">{link[1]}</a>'

    return LINK.sub(english, markdown)


def on_page_content(html: str, *, page, **_) -> str:
    html = CELL.sub(lambda cell: cell[0].replace(r"\|", "|"), html)
    return joined(html) if page.file.src_uri.endswith(".zh.md") else html


def joined(html: str) -> str:
    """A page without the line breaks inside Chinese sentences; code blocks stay as they are."""
    parts = PREFORMATTED.split(html)
    parts[::2] = [BREAK.sub(lambda line: line[0].removesuffix("\n"), part) for part in parts[::2]]
    return "".join(parts)
