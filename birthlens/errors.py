"""The exception that birthlens raises for input it cannot use."""

LONGEST = 1000
"""The most characters in a message; a longer one is cut in the middle, so that the advice at its end stays."""


class BirthlensError(ValueError):
    r"""One sentence that says what was expected, what was given, and what to do.

    The command line turns it into exit status 2; in Python it is a `ValueError`.

    Example:
        >>> len(str(BirthlensError("a value of\n" + 10_000 * "9" + " is too long.")))
        1000
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        if len(line) > LONGEST:
            end = LONGEST // 3
            line = f"{line[: LONGEST - end - 3]}...{line[-end:]}"
        super().__init__(line)
