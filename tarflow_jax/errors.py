"""Errors of the caller's making, told in one line; any other exception is a fault of this package."""


class UserError(ValueError):
    """What was given cannot be; the message says what is wrong, what was expected and what to do, in one line."""


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed; the message says how to install it."""


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where there is none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
