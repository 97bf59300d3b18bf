"""Exceptions that are messages to the user, a collection of them that is reported at once, and the exit codes of a
stage."""

from collections.abc import Callable
from contextlib import contextmanager

EXIT_USER = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # what a shell gives for SIGINT


class UserError(ValueError):
    """Something the user can fix: names the file, key or row, what was found, what was expected, and what to do.

    `alma` and the stage scripts print it without a traceback and exit with code 2.
    """


class Stopped(BaseException):
    """The run was asked to stop (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP), has saved what was finished, and can be continued
    with the same command. Exit code EXIT_STOPPED.

    Derived from BaseException, like KeyboardInterrupt, so that a library's `except Exception` cannot swallow it."""


class Damaged(UserError):
    """The manifest of an output, or the record of a run, cannot be read. The stage can be run again."""

    def __init__(self, problem: str):
        super().__init__(f"{problem}; run the stage again with --restart")
        self.problem = problem


class UserErrors(UserError):
    """Several mistakes in one message, one line each."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


class Absent(UserErrors):
    """Files or folders that are not on this machine, one line each. A published stage no longer needs them."""

    def __init__(self, *lines: str):
        super().__init__(list(lines))


class Problems:
    """Collects mistakes, so that all of a recipe's are reported at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)

    @contextmanager
    def gather(self, located: Callable[[str], str] = str):
        """Collect a UserError that is raised inside; `located` puts file and line in front of a message."""
        try:
            yield
        except UserError as error:
            self.take(error, located)

    def take(self, error: UserError, located: Callable[[str], str] = str) -> None:
        for line in error.lines if isinstance(error, UserErrors) else [str(error)]:
            self.add(located(line))

    def refuse(self) -> None:
        """Raise a UserError with everything that was collected, if anything was."""
        if len(self.lines) == 1:
            raise UserError(self.lines[0])
        if self.lines:
            raise UserErrors(self.lines)
