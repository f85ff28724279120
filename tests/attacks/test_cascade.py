"""Sequences of attacks: who is left to which stage, what the judge is asked, and what a stage costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbench_deq import RunError, UsageError, benchmark
from robustbench_deq.attacks import ATTACKS, JointPGD, Noise, standard
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import Attack, AttackConfig, Batch, Cascade, Proposal, Recorder, Stage, cascade
from robustbench_deq.threats import Threat

NUM = 12
THREAT = Threat(Norm.L2, 0.6)


class Claims(Attack[AttackConfig]):
    """Calls the samples with the given ids done, at images that are half black; notes what it was given."""

    name, summary = "claims", "for tests"

    def __init__(self, ids: list[int], is_true: bool = True, loss: float = -1.0) -> None:
        super().__init__(THREAT)
        self.ids, self.loss, self.seen = torch.tensor(ids), loss, []

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        self.seen.append((batch.ids.tolist(), batch.is_again))
        is_done = torch.isin(batch.ids, self.ids)
        x = batch.images
        return Proposal(-0.1 * x, x.new_full((len(x),), self.loss), is_done)


class Sequence(Cascade[AttackConfig]):
    name, summary = "sequence", "for tests"

    def __init__(self, *stages: Stage, threat: Threat = THREAT, **settings: Any) -> None:
        super().__init__(threat, **settings)
        self._stages = stages

    def stages(self, num_classes: int, input_shape: tuple[int, ...]) -> tuple[Stage, ...]:
        return self._stages


@pytest.fixture(scope="module")
def setup(make_model, make_images) -> tuple[EquilibriumModel, Tensor, Tensor]:
    """A model, and images with the classes that it gives them."""
    model, x = make_model("deq-fc", rtol=1e-8), make_images(NUM)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def run(setup: tuple[EquilibriumModel, Tensor, Tensor], *stages: Stage, **options: Any):
    model, x, y = setup
    return Sequence(*stages)(model, x, y, **options)


def agrees(rows: Tensor, images: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


def test_a_stage_gets_what_those_before_have_left(setup) -> None:
    first, second = Claims([1, 4]), Claims([0, 7])
    result = run(setup, Stage("a", (first,)), Stage("b", (second,)), confirm=agrees)
    assert first.seen == [(list(range(NUM)), False)]
    assert second.seen == [([0, 2, 3, 5, 6, 7, 8, 9, 10, 11], False)]
    assert [(stage.name, stage.num_attacked, stage.num_broken) for stage in result.stages] == [
        ("a", 12, 2),
        ("b", 10, 2),
    ]
    assert result.stage_of.tolist() == [1, 0, -1, -1, 0, -1, -1, 1, -1, -1, -1, -1]


def test_who_is_refuted_is_attacked_again_and_goes_on(setup) -> None:
    first, second = Claims([1, 4]), Claims([])
    result = run(setup, Stage("a", (first,)), Stage("b", (second,)), confirm=lambda rows, images: rows == 4)
    assert first.seen[1] == ([1], True)
    assert 1 in second.seen[0][0] and 4 not in second.seen[0][0]
    assert result.stages[0].num_broken == 1 and result.diagnostics["num_refuted"] == 1


def test_the_judge_is_asked_of_those_that_seem_fooled_to_no_one_s_knowledge(setup) -> None:
    asked: list[list[int]] = []

    def confirm(rows: Tensor, images: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return rows < 2

    result = run(setup, Stage("a", (Claims([], loss=0.5),)), confirm=confirm)
    assert asked == [list(range(NUM))]
    assert result.stages[0].num_broken == 2 and result.diagnostics.get("num_refuted", 0) == 0


def test_a_sample_is_refuted_once_however_often_it_is_claimed(setup) -> None:
    attacks = tuple(Claims([1, 4]) for _ in range(5))
    result = run(setup, Stage("a", attacks), confirm=lambda rows, images: torch.zeros(len(rows), dtype=torch.bool))
    assert result.diagnostics["num_refuted"] == 2


class Breaks(Claims):
    """Claims what is no number."""

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        found = super().run(model, batch, record)
        return Proposal(torch.full_like(found.delta, torch.nan), found.loss, found.is_done)


@pytest.mark.parametrize("first", [Breaks([1, 4]), Breaks([], loss=0.0)])
def test_what_is_no_number_breaks_nothing(setup, first: Claims) -> None:
    model, _, y = setup
    second = Claims([])

    def confirm(rows: Tensor, images: Tensor) -> Tensor:
        return ~judge(model, images, y[rows]).is_correct

    result = run(setup, Stage("a", (first,)), Stage("b", (second,)), confirm=confirm)
    assert result.stages[0].num_broken == 0 and second.seen[0][0] == list(range(NUM))
    assert not result.is_failed.any()


def test_an_audit_attacks_its_share_whoever_else_is_left(setup) -> None:
    model, x, y = setup
    audit = Claims([])
    ids = torch.arange(NUM) + 100
    result = Sequence(Stage("audit", (audit,), share=0.5))(model, x, y, sample_ids=ids, confirm=agrees)
    (drawn, _), *_ = audit.seen
    assert 0 < len(drawn) < NUM and result.stages[0].num_attacked == len(drawn)
    alone = Claims([])
    rows = torch.arange(3, NUM)
    Sequence(Stage("audit", (alone,), share=0.5))(model, x[rows], y[rows], sample_ids=ids[rows], confirm=agrees)
    assert alone.seen[0][0] == [number for number in drawn if number >= 103]


@pytest.fixture(scope="module")
def certified_setup(make_model, make_images):
    """A model with a certificate, images with its own classes, and the judge's word on them."""
    model, x = make_model("lben", rtol=1e-8), make_images(NUM)
    with torch.no_grad():
        y = model(x).argmax(1)
    clean = judge_clean(model, x, y).known(model, x, None)
    return model, x, y, clean, model.certified_radii(clean.settled.z, y)


def test_certified_samples_are_left_alone_but_for_a_few(certified_setup) -> None:
    model, x, y, clean, radii = certified_setup
    threat = Threat(Norm.L2, float(radii.median()))
    is_certified = radii > threat.epsilon
    assert 0 < is_certified.sum() < NUM
    drawn = set()
    for seed in range(20):
        first = Claims([])
        result = Sequence(Stage("a", (first,)), threat=threat)(model, x, y, clean=clean, seed=seed, confirm=agrees)
        attacked = set(first.seen[0][0])
        assert set((~is_certified).nonzero()[:, 0].tolist()) <= attacked
        assert torch.equal(result.is_certified, is_certified)
        assert set(result.is_attacked.nonzero()[:, 0].tolist()) == attacked
        drawn |= attacked & set(is_certified.nonzero()[:, 0].tolist())
    assert drawn and len(attacked) < NUM


def test_a_broken_certificate_stops_the_run(certified_setup, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, *_ = certified_setup
    data = Split("own", SplitName.TEST, x, y, torch.arange(NUM), "0" * 64, int(y.max()))
    attack = ATTACKS.get("fast")(Threat(Norm.L2, 20.0))
    assert evaluate(model, attack, data).record.num_certified == 0
    monkeypatch.setattr(cascade, "CERTIFIED_SHARE", 1.0)
    monkeypatch.setattr(type(model), "certified_radii", lambda self, z, y: torch.full((len(z),), 100.0))
    with pytest.raises(RunError, match="certified samples are broken"):
        evaluate(model, attack, data)


def test_targets_are_refused(setup) -> None:
    model, x, y = setup
    with pytest.raises(UsageError, match="sequence: expected no targets"):
        Sequence(Stage("a", (Claims([]),)))(model, x, y, targets=(y + 1) % 3)


def test_what_stages_cost_adds_up(setup) -> None:
    result = run(setup, Stage("noise", (Noise(THREAT),)), Stage("joint", (JointPGD(THREAT, steps=4),)))
    assert [stage.name for stage in result.stages] == ["noise", "joint"]
    assert sum(stage.cost.cell_evals for stage in result.stages) == pytest.approx(result.cost.cell_evals)
    assert result.stages[0].cost.cell_vjps == 0 < result.stages[1].cost.cell_vjps


def test_a_budget_ends_all_stages(setup) -> None:
    model, x, y = setup
    attack = Sequence(*ATTACKS.get("fast")(THREAT).stages(3, (1, 8, 8)), max_evaluations=7)
    result = attack(model, x, y)
    assert result.cost.cell_evals <= 7 and result.diagnostics["stopped_by_budget"] == 1
    assert (result.x_adv - x).flatten(1).norm(dim=1).max() <= THREAT.epsilon * (1 + 1e-5)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_no_more_classes_are_headed_for_than_there_are(num_classes: int) -> None:
    stages = {stage.name: stage.attacks for stage in ATTACKS.get("standard")(THREAT).stages(num_classes, (1, 8, 8))}
    for name in ("toward", "pgd-toward"):
        assert [attack.config.heading for attack in stages[name]] == list(range(1, min(9, num_classes - 1) + 1))


def test_attacks_of_one_stage_are_each_given_what_those_before_have_left(setup) -> None:
    first, second, third = Claims([1, 4]), Claims([0]), Claims([7])
    result = run(setup, Stage("a", (first, second)), Stage("b", (third,)), confirm=agrees)
    assert second.seen == [([0, 2, 3, 5, 6, 7, 8, 9, 10, 11], False)]
    assert [stage[:3] for stage in result.stages] == [("a", 12, 3), ("b", 9, 1)]
    assert result.stage_of.tolist() == [0, 0, -1, -1, 0, -1, -1, 1, -1, -1, -1, -1]


def test_a_heading_that_would_have_no_effect_is_refused(setup) -> None:
    model, x, y = setup
    with pytest.raises(UsageError, match="no objective with heading=2"):
        JointPGD(THREAT, heading=2, objective="margin")
    with pytest.raises(UsageError, match="heading: expected a rank of the wrong classes, 1 to 2"):
        JointPGD(THREAT, heading=3)(model, x, y)
    with pytest.raises(UsageError, match="no targets with a heading"):
        JointPGD(THREAT, heading=2)(model, x, y, targets=(y + 1) % 3)


@pytest.mark.parametrize(
    ("norm", "shape", "has_it"),
    [(Norm.L2, (1, 5, 5), True), (Norm.L2, (1, 4, 4), False), (Norm.L2, (1, 6, 10), False),
     (Norm.LINF, (1, 4, 9), True), (Norm.L1, (1, 8, 8), False)],
)  # fmt: skip
def test_the_audit_is_left_out_where_its_library_fails(norm: Norm, shape: tuple[int, ...], has_it: bool) -> None:
    stages = ATTACKS.get("standard")(Threat(norm, 0.1)).stages(10, shape)
    assert (stages[-1].name == "square-audit") is has_it


def test_settings_cannot_be_chosen() -> None:
    chosen = {"restarts": 2, "random_start": True, "stop_at_success": False, "steps": 3}
    for name, value in (chosen | {"max_evaluations": 7.0, "max_seconds": 1.0}).items():
        for kind in ("fast", "standard"):
            with pytest.raises(UsageError, match=name):
                ATTACKS.get(kind)(THREAT, **{name: value})


def test_what_the_audit_has_broken_stays_broken_when_all_are_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    class BlackBox(ATTACKS.get("standard")):  # type: ignore[misc]  # a class that the registry knows
        def stages(self, num_classes: int, input_shape: tuple[int, ...]) -> tuple[Stage, ...]:
            return self._black_box(input_shape)

    monkeypatch.setattr(standard, "NUM_QUERIES", 10)
    monkeypatch.setattr(standard, "FAB_STEPS", 1)
    model, data = load_model("deq-fc.digits-joint-l2"), load("digits", limit=96)
    audit, final = (
        evaluate(model, BlackBox(Threat("l2", 0.7), black_box=kind), data, seed=1) for kind in ("audit", "all")
    )
    assert audit.record.stages[0].num_broken == final.record.stages[0].num_broken > 0
    assert not (final.samples["is_robust"] & ~audit.samples["is_robust"]).any()


# The record


@pytest.fixture(scope="module")
def data(setup) -> Split:
    _, x, y = setup
    return Split("own", SplitName.TEST, x, y, torch.arange(NUM) + 5, "0" * 64, int(y.max()))


def test_the_record_tells_what_each_stage_broke_and_the_judge_agrees(setup, data: Split) -> None:
    model, _, y = setup
    result = benchmark(model, data, "l2", 0.6, version="fast")
    record, samples = result.record, result.samples
    assert record.protocol == "v1 fast"
    broken = samples.loc[samples["is_clean_correct"] & ~samples["is_robust"], "broken_by"]
    assert sum(stage.num_broken for stage in record.stages) == int((broken != "").sum()) > 0
    assert set(broken) - {""} <= {stage.name for stage in record.stages}
    verdict = judge(model, result.x_adv, y)
    is_broken = torch.tensor((samples["broken_by"] != "").tolist())
    assert not verdict.is_correct[is_broken].any()


def test_batches_do_not_matter_to_verdicts(setup, data: Split) -> None:
    model, _, _ = setup
    attack = ATTACKS.get("fast")(THREAT)
    whole, halves = (evaluate(model, attack, data, batch_size=size) for size in (NUM, 5))
    np.testing.assert_array_equal(whole.samples["is_robust"], halves.samples["is_robust"])
    assert whole.record.stages[0].num_attacked == halves.record.stages[0].num_attacked


def test_other_attacks_have_no_stages(setup, data: Split) -> None:
    model, _, _ = setup
    record = evaluate(model, JointPGD(THREAT, steps=4), data).record
    assert record.protocol is record.stages is None


@pytest.mark.parametrize(
    ("change", "words"),
    [({"version": "slow"}, "fast"), ({"limit": 3}, "pass it to load"), ({"model": 3}, "EquilibriumModel"),
     ({"norm": "l7x"}, "norm"), ({"epsilon": "much"}, "epsilon")],
)  # fmt: skip
def test_what_benchmark_refuses(change: dict[str, Any], words: str, setup, data: Split) -> None:
    given = {"model": setup[0], "data": data, "norm": "l2", "epsilon": 0.6} | change
    with pytest.raises(UsageError, match=words):
        benchmark(**given)
