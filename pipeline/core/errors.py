"""The exceptions that are messages to the person at the keyboard, and a list of them that is reported in one go;
and the exit codes of a stage."""

from collections.abc import Callable
from contextlib import contextmanager

EXIT_USER = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # what a shell gives for SIGINT


class UserError(ValueError):
    """Something the user can mend: names the file, key or row, what was found, what was expected, and what to do.

    `alma` and the stage scripts print it as one sentence, without a traceback, and exit with code 2.
    """


class Stopped(BaseException):
    """Not an Exception, as KeyboardInterrupt is none: it may be raised anywhere, and no library's `except Exception`
    shall swallow it.

    The run was asked to stop (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP), has saved what was finished, and can be continued with
    the same command. Exit code EXIT_STOPPED."""


class Damaged(UserError):
    """A published output's manifest cannot be read. The stage may be run again."""


class UserErrors(UserError):
    """Several mistakes in one message, a line each."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


class Absent(UserErrors):
    """Files or folders that are not on this machine, a line each. A stage that was published needs them no more."""

    def __init__(self, *lines: str):
        super().__init__(list(lines))


class Problems:
    """Mistakes that are collected, so that all of a recipe's are reported at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)

    @contextmanager
    def gather(self, located: Callable[[str], str] = str):
        """Collect what is raised inside as a UserError; `located` puts file and line before a message."""
        try:
            yield
        except UserError as error:
            self.take(error, located)

    def take(self, error: UserError, located: Callable[[str], str] = str) -> None:
        for line in error.lines if isinstance(error, UserErrors) else [str(error)]:
            self.add(located(line))

    def refuse(self) -> None:
        """Raise what was collected, if anything was."""
        if len(self.lines) == 1:
            raise UserError(self.lines[0])
        if self.lines:
            raise UserErrors(self.lines)
