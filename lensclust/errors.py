"""The one error a user's input can cause."""


class InputError(ValueError):
    """Unusable input: says in one line what was given, what was expected and where.

    The command line prints it and exits with status 2; anything else that escapes is a bug
    or a failed run (status 1).
    """
