"""The exception for users' mistakes, and text that is fit to be shown in a terminal."""

import re

# Control characters, line separators and bidirectional overrides: with these a name or a model's
# answer could change the terminal, or look like lines of the program.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class UserError(ValueError):
    """A user's mistake; the message is one line that says what to do next."""


# What huggingface_hub raises over an answer of another form, such as a network's log-in page.
MALFORMED_ANSWER = (AssertionError, AttributeError, KeyError)
MALFORMED_ANSWER += (RecursionError, TypeError, ValueError)


def one_line(error: BaseException) -> str:
    """Type and first line of an exception, at most 200 characters."""
    return printable(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def printable(text: object, keep: str = "") -> str:
    """`str(text)` with UNPRINTABLE characters as escapes like \\x1b, except those in `keep`."""
    return UNPRINTABLE.sub(
        lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode(),
        str(text),
    )
