"""Errors are one line: of others' messages, which may be pages, the first is quoted."""


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where there is none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
