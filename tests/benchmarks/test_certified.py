"""Certified <= robust <= clean: in the kept table, and in a row that is measured again."""

from __future__ import annotations

import json

import pytest

from benchmarks.certified import MODELS, THREATS, measure
from benchmarks.timing import RESULTS
from robustbench_deq.data import load
from robustbench_deq.errors import RunError
from robustbench_deq.models import load_model
from robustbench_deq.threats import Threat

SHARES = ("by the card %", "certified %", "robust %", "clean %")


def test_kept_rows_are_in_order() -> None:
    rows = json.loads((RESULTS / "certified.json").read_text())["rows"]
    assert len(rows) == len(MODELS) * len(THREATS)
    for row in rows:
        assert [row[name] for name in SHARES] == sorted(row[name] for name in SHARES) and row["certified %"] > 0


def test_a_row_is_in_order_and_a_break_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    name, threat, data = "mondeq-fc.digits-joint-l2", Threat("l2", 0.15), load("digits", limit=16)
    model = load_model(name)
    row = measure(name, model, data, threat, steps=8)
    assert 0 < row["certified %"] <= row["robust %"] <= row["clean %"]
    monkeypatch.setattr(model, "certified_radii", lambda z, y: (y + 1).double())
    with pytest.raises(RunError, match="a certified sample was broken"):
        measure(name, model, data, Threat("l2", 0.8), steps=8)
