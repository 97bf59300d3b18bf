"""WARC records and HTTP responses, made by hand."""

from pathlib import Path

from pipeline.data.sources.records import read
from pipeline.data.sources.sources import Source


def page(text: str, charset: str = "utf-8", meta: bool = True) -> bytes:
    head = f'<meta charset="{charset}">' if meta else ""
    menu = "".join(f"<li><a href='/{i}'>Menu entry {i}</a></li>" for i in range(9))
    body = (
        f"<html><head>{head}<title>t</title><script>var x ="
        f" {{}};</script></head><body><nav><ul>{menu}</ul></nav><main><h1>Heading</h1><p>{text}</p></main><footer>Copyright"
        " footer</footer></body></html>"
    )
    return body.encode(charset)


def record(kind: str, body: bytes, url: str = "http://a.org/", media: str = "", length: int | None = None) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-02T03:04:05Z\r\n" + (
        f"Content-Type: {media}\r\n" if media else ""
    )
    return (
        head.encode()
        + f"Content-Length: {len(body) if length is None else length}\r\n\r\n".encode()
        + body
        + b"\r\n\r\n"
    )


def response(payload: bytes, media: str = "text/html", status: str = "200 OK", extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\n{extra}\r\n".encode() + payload


def items(folder: Path, data: bytes, name: str = "a.warc", **keys) -> list:
    (folder / name).write_bytes(data)
    return list(read(Source(path=str(folder / name), **keys), "s"))
