"""The exception for users' mistakes, and one-line descriptions of other exceptions."""


class UserError(ValueError):
    """A user's mistake; the message is one line that says what to do next."""


# What huggingface_hub raises over an answer of another form, such as a network's log-in page.
MALFORMED_ANSWER = (
    *(AssertionError, AttributeError, KeyError, RecursionError, TypeError, ValueError),
)


def one_line(error: BaseException) -> str:
    """Type and first line of an exception, at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
