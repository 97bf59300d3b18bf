"""Extraction of pages that would hold a worker: depth, time and memory are bounded (correctness 30)."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from warc import items, page, record, response

from pipeline.data.sources import bounded_call, web_pages
from pipeline.data.sources.formats import Bad
from pipeline.data.sources.records import Record

pytest.importorskip("resiliparse")
WORDS = "Some words of the page that stand in it for a reader."


@pytest.mark.parametrize("extract", ["main", "all"])
@pytest.mark.parametrize(
    "kind, body",
    [
        ("unclosed", "<div>" * 40_000 + f"{WORDS}<div>second {WORDS}<p>third</p>{WORDS}"),
        ("closed", "<div>" * 40_000 + f"{WORDS}" + "</div>" * 20_000 + f"<p>second {WORDS}" + "</div>" * 20_000),
        ("font", "<font color=red>" * 20_000 + f"{WORDS}<p>second {WORDS}"),
        ("quotes", f"<blockquote><p>one {WORDS}</p>" * 3_000 + f"second {WORDS}"),
        ("tables", "<table><tr><td>" * 3_000 + f"{WORDS}<p>second {WORDS}"),
        ("bold", f"<b><i>{WORDS}<script>no(words)</script>" * 3_000 + f"<p>second {WORDS}"),
        ("many", ("<div>" * 400 + f"<p>{WORDS}" + "</div>" * 400) * 40 + f"<p>second {WORDS}"),
    ],
)
def test_a_page_that_is_nested_without_end_keeps_its_text(tmp_path, kind, body, extract):
    """correctness 30: 200 kB of <div> held a worker for 87 s. What is too deep is read as paragraphs, and counted."""
    data = record("response", response(f"<html><body>{body}</body></html>".encode()))
    begun = time.monotonic()
    (item,) = items(tmp_path, data, extract=extract)
    assert time.monotonic() - begun < 40  # 1 to 3 s where nothing else runs
    assert isinstance(item, Record) and item.changed["flattened_elements"] >= 1
    assert re.search(rf"(?m)^\W*(next )?{re.escape(WORDS)}", item.fields["text"]) or kind == "quotes"
    assert f"second {WORDS}" in item.fields["text"] and "reader.second" not in item.fields["text"]
    assert "no(words)" not in item.fields["text"]


@pytest.mark.parametrize(
    "body",
    [
        "<p>" + f"{WORDS}<p>" * 2_000,
        "<ul>" + f"<li>{WORDS}" * 2_000 + "</ul>",
        "<table>" + f"<tr><td>{WORDS}<td>{WORDS}" * 500 + "</table>",
        f"{WORDS}<br><img src=x>" * 2_000,
        "<div>" * 200 + WORDS + "</div>" * 200,
    ],
)
def test_a_page_that_is_not_deep_is_left_as_it_is(tmp_path, body):
    """correctness 30: closing tags may be left out; and 200 elements are not too many."""
    data = record("response", response(f"<html><body>{body}</body></html>".encode()))
    (item,) = items(tmp_path, data, extract="all")
    assert item.changed == {} and WORDS in item.fields["text"]


def test_a_page_that_takes_too_long_costs_itself(tmp_path, monkeypatch):
    """correctness 30: whatever the extractor does with it; this one takes the square of the number of options."""
    monkeypatch.setattr(web_pages, "SECONDS", 1)
    slow = b"<html><body><select>" + b"<option>text" * 60_000
    data = [record("response", response(body)) for body in (page(WORDS * 9), slow, page(WORDS * 9))]
    first, bad, last = items(tmp_path, b"".join(data))
    assert first.fields["text"] == last.fields["text"] and WORDS in first.fields["text"]
    assert isinstance(bad, Bad) and bad.reason == "HTML whose extraction takes too much time"
    assert bad.place == "a.warc:2" and bad.raw.startswith("<html><body><select>")


def test_time_memory_and_crashes_are_bounded():
    """correctness 30: code in C that no signal handler of Python would interrupt."""
    with pytest.raises(bounded_call.OutOfBounds, match="takes too much time"):
        bounded_call.call(re.fullmatch, "(a+)+b", "a" * 60, seconds=1)
    with pytest.raises(bounded_call.OutOfBounds, match="takes too much memory"):
        bounded_call.call(bytes, 3 << 30, seconds=10)
    with pytest.raises(bounded_call.OutOfBounds, match="fails$"):
        bounded_call.call(os.abort, seconds=10)
    with pytest.raises(bounded_call.OutOfBounds, match="ValueError"):
        bounded_call.call(int, "x", seconds=10)
    assert bounded_call.call(int, "12", seconds=10) == 12


def test_the_other_process_is_kept_started_again_and_ends_with_this_one():
    """correctness 30"""
    process = bounded_call.call(os.getpid, seconds=10)
    assert process == bounded_call.call(os.getpid, seconds=10) != os.getpid()
    os.kill(process, signal.SIGKILL)
    assert bounded_call.call(os.getpid, seconds=10) != process
    program = (
        "import os, re\nfrom pipeline.data.sources import bounded_call\nprint(bounded_call.call(os.getpid, seconds=9), flush=True)\n"
        "bounded_call.call(re.fullmatch, '(a+)+b', 'a' * 60, seconds=60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        process = int(parent.stdout.readline())
        time.sleep(1)  # it is in the call that does not end
        parent.kill()
    ends = time.monotonic() + 20
    while time.monotonic() < ends and _runs(process):
        time.sleep(0.1)
    assert not _runs(process)


def _runs(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
