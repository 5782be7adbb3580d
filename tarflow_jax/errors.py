"""Errors caused by the user, with one-line messages; any other exception is a bug of this package."""


class UserError(ValueError):
    """An error caused by the user. Its message is one line: what is wrong, what was expected, what to do."""


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed; the message says how to install it."""


def one_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its type if there is no message."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
