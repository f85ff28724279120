"""Ctrl-C while modules are imported: one line, and the process ends at once.

There is nothing to keep yet, and an exception in the midst of an import can be swallowed or turned into another one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within, Ctrl-C prints one line and ends the process. Nothing changes where a caller handles or ignores it."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    with contextlib.suppress(ValueError):  # only the main thread may, and only it is interrupted
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os.write(2, b"Error: interrupted\n")
    os._exit(1)
