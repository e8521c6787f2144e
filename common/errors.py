"""The exception for users' mistakes."""


class UserError(ValueError):
    """A user's mistake; the message is one line that says what to do next."""
