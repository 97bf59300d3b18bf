"""Hooks of MkDocs (`hooks` in mkdocs.yml), for pages to mean on the site what they mean as files.

* On a Chinese page a link to `sft.md` leads to the English page. The plugin for languages would take the Chinese one, to
  which `sft.zh.md` leads.
* A `|` in the code of a table needs a backslash on GitHub; Python-Markdown would show it.
"""

import posixpath
import re
from pathlib import Path

CELL = re.compile(r"<td.*?</td>", re.DOTALL)
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


def on_page_content(html: str, **_) -> str:
    return CELL.sub(lambda cell: cell[0].replace(r"\|", "|"), html)
