"""The one error a user's input can cause, and how text of unknown content is shown."""


def shown(text: object) -> str:
    r"""A text on one line of a terminal: what cannot be printed is escaped.

    >>> print(shown("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class InputError(ValueError):
    """Unusable input: says in one line what was given, what was expected and where.

    The command line prints it and exits with status 2; anything else that escapes is a bug
    or a failed run (status 1).
    """

    def __str__(self) -> str:
        return shown(super().__str__())
