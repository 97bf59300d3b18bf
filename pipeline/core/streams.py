"""Standard output and errors that may go away: `alma run r.yaml | head`, a terminal that was closed, `>&-`.

What is printed is for people, and hours of work must not end because nobody reads any more.
"""

import errno
import io
import os
import sys

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class _Unbroken(io.FileIO):
    """A file descriptor whose reader may leave: what is written afterwards goes nowhere, also that of processes that
    are started later."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def keep_open() -> None:
    """Make this process's standard streams safe to write to. Call it first: a file opened while descriptor 1 is closed
    would get its number, and with it what is printed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller; the lowest free number is this one
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _unbroken(1, sys.stdout)
    sys.stderr = _unbroken(2, sys.stderr)


def _unbroken(number: int, stream):
    """A stream on descriptor `number` in place of `stream`, or `stream` itself if it writes elsewhere, such as into a
    buffer of whoever called this program as a library."""
    try:
        if stream is not None and stream.fileno() != number:
            return stream
    except io.UnsupportedOperation:
        return stream
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "backslashreplace")
    if stream:
        stream.flush()
    raw = _Unbroken(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors, line_buffering=number == 2 or raw.isatty(), write_through=number == 2
    )
