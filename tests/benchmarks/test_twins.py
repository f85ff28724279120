"""DEQs and their explicit twins, from the committed records of the suite `fashion`."""

from __future__ import annotations

import json

import pytest

from benchmarks.timing import RESULTS
from benchmarks.twins import compare, read_contenders, twins_of

FAMILIES = {"deq-fc", "deq-conv", "mdeq", "mondeq-fc", "mondeq-conv", "mondeq-multi", "lben"}


@pytest.fixture(scope="module")
def contenders():
    return read_contenders(RESULTS / "fashion")


@pytest.mark.parametrize("training", ["l2", "none"])
def test_every_family_meets_its_own_cell_unrolled(contenders, training: str) -> None:
    met = {
        contenders[name].described.family: {contenders[twin].described.family for twin in twins_of(name, contenders)}
        for name in contenders
        if contenders[name].described.card.trained_against == training and twins_of(name, contenders)
    }
    assert {family for family in met if "unrolled" in met[family]} - {"unrolled"} == FAMILIES
    assert "resnet" in met["deq-conv"]


def test_the_kept_table_is_that_of_the_kept_records(contenders) -> None:
    for row in json.loads((RESULTS / "twins.json").read_text())["rows"]:
        again = compare(row["DEQ"], row["twin"], contenders)
        assert {key: again[key] for key in ("only DEQ", "only twin", "DEQ robust %")} == {
            key: row[key] for key in ("only DEQ", "only twin", "DEQ robust %")
        }
