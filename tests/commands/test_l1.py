"""L1 from the command line to the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click.testing
import pandas as pd
import pytest

from robustbench_deq.attacks import ATTACKS
from robustbench_deq.commands import main as cli
from robustbench_deq.records.store import load_records
from robustbench_deq.threat_spec import ThreatSpec
from robustbench_deq.threats import Threat

MODEL = "deq-fc.digits-joint-l2"
OF_ALL_NORMS = [
    "fast",
    *(
        "joint-pgd",
        "pgd",
        "apgd",
        "apgd-t",
        "fgsm",
        "fmn",
        "intermediate-pgd",
        "joint-apgd",
        "joint-fmn",
        "noise",
        "yopo",
    ),
]
OF_ANOTHER = {"torchattacks-pgd": "linf", "torchattacks-pgdl2": "l2"}
SUITE = f"""
name: three-norms
models: [{MODEL}]
threats:
  - {{norm: l1, epsilons: [2.0]}}
  - {{norm: l2, epsilons: [0.5]}}
attacks:
  - {{name: joint-pgd, config: {{steps: 6}}}}
  - {{name: pgd, config: {{steps: 4}}}}
limit: 16
batch_size: 8
num_snapshots: 2
"""


def invoke(*args: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.main, [str(arg) for arg in args])


def test_every_attack_is_of_all_norms_or_says_of_which() -> None:
    assert {*OF_ALL_NORMS, *OF_ANOTHER, "standard"} == set(ATTACKS)  # the last is of the parts of others


@pytest.mark.parametrize("name", OF_ALL_NORMS)
def test_attacks_run_in_l1(name: str) -> None:
    steps = () if name in ("fast", "fgsm", "noise") else ("--steps", 20)
    result = invoke(
        "attack", MODEL, "--attack", name, "--norm", "l1", "--epsilon", 2, "--limit", 24, *steps, "--seed", 0, "--json"
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["threat"] == {"norm": "l1", "epsilon": 2.0}
    assert 0 < record["max_perturbation"] <= 2.0 * (1 + 1e-5)
    assert record["num_failed"] == record["num_unconverged"] == 0
    assert 0 <= record["robust_accuracy"] <= record["clean_accuracy"]
    if name != "noise":
        assert record["robust_accuracy"] < record["clean_accuracy"]


@pytest.mark.parametrize(("name", "norm"), OF_ANOTHER.items())
def test_attacks_of_another_norm_refuse_in_one_line(name: str, norm: str) -> None:
    result = invoke("attack", MODEL, "--attack", name, "--norm", "l1", "--epsilon", 2, "--json")
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.fullmatch(rf"Error: .*{name}.*expected norm {norm}, got l1.*--norm {norm}.*", line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a suite in two norms, with its report."""
    place = tmp_path_factory.mktemp("l1")
    (place / "suite.yaml").write_text(SUITE)
    for args in (("bench", place / "suite.yaml", "--out", place / "out"), ("report", place / "out")):
        result = invoke(*args)
        assert result.exit_code == 0, result.output
    return place / "out"


def test_records_of_a_suite_keep_to_the_radius(folder: Path) -> None:
    records = load_records(folder)
    assert sorted((record.threat.norm, record.attack) for record in records) == [
        (norm, attack) for norm in ("l1", "l2") for attack in ("joint-pgd", "pgd")
    ]
    for record in records:
        assert 0 < record.max_perturbation <= record.threat.epsilon * (1 + 1e-5)
        samples = pd.read_parquet(folder / "samples" / f"{record.record_id}.parquet")
        assert float(samples["perturbation"].max()) == pytest.approx(record.max_perturbation)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("*.md", "L1, ε = 2"), ("*.tex", r"L1, $\varepsilon$ = 2"), ("*.html", "L1, ε = 2")],
)
def test_reports_name_it_as_papers_do(pattern: str, text: str, folder: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in (folder / "report").rglob(pattern)]
    assert any(text in page for page in pages), sorted(path.name for path in (folder / "report").rglob("*"))
    assert not any(re.search(r"\bl1, ", page) for page in pages)


def test_tables_for_programs_name_it_as_the_command_line_does(folder: Path) -> None:
    tables = [pd.read_csv(path) for path in (folder / "report").rglob("*.csv")]
    norms = [set(table["norm"]) for table in tables if "norm" in table.columns]
    assert norms and all(found == {"l1", "l2"} for found in norms)


def test_cards_may_name_it() -> None:
    spec = ThreatSpec(norm="L1", epsilon="5/2")
    assert (spec.norm, spec.epsilon, str(spec)) == ("l1", 2.5, "l1 2.5")
    built = spec.build()
    assert isinstance(built, Threat) and (built.norm.name, built.epsilon) == ("l1", 2.5)


def test_models_may_be_asked_for_by_it() -> None:
    result = invoke("models", "--threat", "l1")
    assert result.exit_code == 2 and "--threat l1, got none" in result.stderr
