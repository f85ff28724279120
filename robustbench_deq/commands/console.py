"""The consoles of the command line. They show names as they are: rich would read `[x]` as markup, `:x:` as an emoji."""

from __future__ import annotations

import sys

from rich.console import Console


def plain_console(*, is_error: bool = False, width: int | None = None) -> Console:
    """Without markup, emoji codes and colours of numbers.

    Args:
        is_error: writes to standard error, where progress goes; else to standard output.
        width: in columns; None: the terminal's.
    """
    return Console(file=sys.stderr if is_error else sys.stdout, width=width, markup=False, emoji=False, highlight=False)
