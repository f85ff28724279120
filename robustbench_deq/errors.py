"""The two ways a call can go wrong.

`UsageError`  the caller gave something unusable; the message says what was expected, what came, and how to fix it.
`RunError`    the input was fine and the work failed; the message says what failed and what was kept.

The command line turns the first into exit code 2 and the second into exit code 1.
"""


class UsageError(ValueError):
    """A wrong name, value, file or config. One line: expected, got, how to fix."""

    @classmethod
    def of(cls, what: str, *, expected: str, got: object, fix: str) -> "UsageError":
        return cls(f"{what}: expected {expected}, got {got}; {fix}")


class RunError(RuntimeError):
    """The work itself failed, for instance because training diverged."""
