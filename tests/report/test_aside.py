"""Work that is done in a second process, or here where that is not safe."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator

import pytest

from robustbench_deq.report.aside import aside


@pytest.fixture
def alone(monkeypatch) -> None:
    """As in a program without threads, which a test under xdist is not."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


@pytest.fixture(params=["threads", "no fork"])
def unsafe(request, monkeypatch) -> Iterator[None]:
    if request.param == "threads":
        monkeypatch.setattr(threading, "active_count", lambda: 2)
    else:
        monkeypatch.setattr(threading, "active_count", lambda: 1)
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    yield


def fail() -> None:
    raise ValueError("no luck")


def test_work_is_done_in_another_process(alone) -> None:
    here = os.getpid()
    with aside(lambda: (os.getpid(), here)) as result:
        process, inherited = result()
    assert process != here == inherited


def test_work_is_done_here_where_a_fork_is_not_safe(unsafe) -> None:
    with aside(os.getpid) as result:
        assert result() == os.getpid()


def test_what_the_work_raises_is_raised_here(alone) -> None:
    with pytest.raises(ValueError, match="no luck"), aside(fail) as result:
        result()


def test_what_is_raised_here_is_not_hidden(alone) -> None:
    with pytest.raises(KeyError), aside(os.getpid):
        raise KeyError
