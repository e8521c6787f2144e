"""The error of a user's mistake."""


class UserError(ValueError):
    """A user's mistake; its message is one line that says what to do next."""
