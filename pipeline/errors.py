"""The two exceptions that are messages to the person at the keyboard."""


class UserError(ValueError):
    """Something the user can mend: names the file, key or row, what was found, what was expected, and what to do.

    `alma` and the stage scripts print it as one sentence, without a traceback, and exit with code 2.
    """


class Stopped(BaseException):
    """Not an Exception, as KeyboardInterrupt is none: it may be raised anywhere, and no library's `except Exception`
    shall swallow it.

    The run was asked to stop (SIGTERM, SIGUSR1), has saved, and can be continued with the same command. Exit code 75
    (EX_TEMPFAIL)."""
