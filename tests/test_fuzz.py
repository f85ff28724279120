"""A few seconds of the fuzz driver; thousands of calls by `python -m tests.fuzz`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from robustbench_deq.commands import main as cli
from tests.fuzz import MAX_SECONDS, make_material, outcome

NUM_PARTS, NUM_CASES = 3, 25
SLOW = {"report", "train"}
"""Left to the long run, but for what they have in common with others."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material") / "whole"
    make_material(folder)
    return folder


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_bad_input_ends_in_one_line(part: int, material: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)

    def stop(*_: object) -> None:
        raise TimeoutError("a hang")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for number in range(part * NUM_CASES, (part + 1) * NUM_CASES):
            signal.alarm(3 * MAX_SECONDS)
            found = outcome(number, 0, material, leave_out=SLOW)
            assert found is None or not found.complaint, (number, *found)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
