"""The one exception that birthlens raises for input it cannot use."""


class BirthlensError(ValueError):
    """Say in one sentence what was expected, what came, and what to do.

    The command line turns it into exit status 2; in Python it is a `ValueError`.
    """
