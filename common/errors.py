"""The exception for users' mistakes, and one-line descriptions of other exceptions."""


class UserError(ValueError):
    """A user's mistake; the message is one line that says what to do next."""


def one_line(error: BaseException) -> str:
    """Type and first line of an exception, at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
