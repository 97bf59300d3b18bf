"""Addresses of records, for the block list and for deduplication."""

import hashlib
import re

from pipeline.data.sources.records import Record
from pipeline.data.sources.templates import MissingField, render


def url_of(template: str, record: Record) -> str | None:
    """A record's address by a field or a template; None if it has none."""
    try:
        return render(template if "{" in template else "{" + template + "}", record.fields, record.place)
    except MissingField:
        return None


def address_hash(template: str | None, record: Record) -> bytes | None:
    """Hash, 16 bytes, of a record's address without what does not distinguish pages: scheme, `www.`, fragment, closing
    slash, and the case of the host."""
    url = url_of(template, record) if template else None
    if url is None:
        return None
    address = re.sub(r"^[a-zA-Z][a-zA-Z0-9+.-]*://", "", url.strip().partition("#")[0])
    host, slash, path = address.partition("/")
    address = (re.sub(r"^www\.", "", host.lower()) + slash + path).rstrip("/")
    return hashlib.blake2b(address.encode(errors="replace"), digest_size=16).digest() if address else None
