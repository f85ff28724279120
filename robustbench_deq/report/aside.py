"""Work that is done aside: in a second process, while this one goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_inherited: Callable[[], Any]


@contextlib.contextmanager
def aside(work: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Begin `work`; yields what waits for it and gives its result, or raises what it raised.

    The process is a fork of this one, which has all that `work` needs at hand. Where other threads run, whose locks a
    fork would keep for ever, and where nothing can be forked, the work is done here, when its result is asked for.
    """
    if threading.active_count() > 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield work
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, mp_context=fork, initializer=_inherit, initargs=(work,)) as pool:
        yield pool.submit(_work).result


def _inherit(work: Callable[[], Any]) -> None:
    global _inherited
    _inherited = work


def _work() -> Any:
    return _inherited()
