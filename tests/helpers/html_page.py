"""An HTML page as a browser's parser sees it, as far as tests ask."""

import json
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """tags: (name, attributes) of every element; rows: text of the cells of every table row, by the row's data-*
    attribute; scripts: contents of the <script> elements."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.rows: dict[str, list[str]] = {}
        self.all_rows: list[list[str]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text = ""
        self.open: list[str] = []
        self._key = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((attributes, ""))
        if tag == "tr":
            self._key = attributes.get("data-stage") or attributes.get("data-band") or ""
            self.all_rows.append([])
        if tag in ("td", "th"):
            self.all_rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "tr" and self._key:
            self.rows[self._key] = self.all_rows[-1]

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
            return
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.all_rows[-1][-1] += data

    @property
    def figures(self) -> dict[str, dict]:
        [data] = [text for attributes, text in self.scripts if attributes.get("id") == "page-data"]
        return json.loads(data)["figures"]

    def curve(self, chart: str, name: str) -> dict:
        [trace] = [trace for trace in self.figures[f"plot-{chart}"]["data"] if trace["name"] == name]
        return trace
