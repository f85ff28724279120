"""One evaluation: what its record says, that its rows agree with it, and who is never robust."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.attacks import (
    ATTACKS,
    JointPGD,
    JointPGDConfig,
    Noise,
    NoiseConfig,
    SequentialPGD,
    SequentialPGDConfig,
    TorchattacksConfig,
    TorchattacksPGDL2,
    build_attack,
)
from robustbench_deq.data import Split, SplitName
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.batch import Part
from robustbench_deq.evaluate.batch_judge import BatchJudge
from robustbench_deq.evaluate.evaluation import Evaluation, Progress, evaluate
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.evaluate.summary import _curve
from robustbench_deq.models import Linear, LinearConfig
from robustbench_deq.optimise import Norm
from robustbench_deq.optimise.objectives import CrossEntropy
from robustbench_deq.protocol import Attack, AttackConfig, Batch, Proposal, Recorder
from robustbench_deq.records.record import CostRecord, CurvePoint, to_json
from robustbench_deq.threats import Threat
from tests.attacks.test_contract import SINGLE

NUM = 14
THREAT = Threat(Norm.L2, 0.6)


@pytest.fixture
def setup(make_model, make_images):
    """`setup(family)`: a model and samples of which the model gets all but every fifth right."""

    def make(family: str = "deq-fc", n: int = NUM) -> tuple[EquilibriumModel, Split]:
        model, x = make_model(family, dtype=torch.float32, rtol=1e-5), make_images(n, torch.float32)
        with torch.no_grad():
            y = model(x).argmax(1)
        y[::5] = (y[::5] + 1) % 3
        return model, Split("mine", SplitName.TEST, x, y, 100 + torch.arange(n), "ab12")

    return make


def pgd(**settings: object) -> Attack:
    return SequentialPGD(THREAT, SequentialPGDConfig(steps=5, **settings))


def joint(**settings: object) -> Attack:
    return JointPGD(THREAT, JointPGDConfig(**{"steps": 12, **settings}))


def check_rows_agree_with_record(found: Evaluation) -> None:
    record, rows = found.record, found.samples
    count = record.data.num_samples
    assert len(rows) == count == len(found.x_adv)
    assert record.clean_accuracy == pytest.approx(rows["is_clean_correct"].mean())
    assert record.robust_accuracy == pytest.approx(rows["is_robust"].mean())
    assert record.num_unconverged == int((~rows["is_converged"]).sum())
    assert record.num_failed == int(rows["is_failed"].sum())
    assert record.max_perturbation == pytest.approx(rows["perturbation"].max())
    finite = rows.loc[rows["is_attacked"], "adversarial_loss"].dropna()
    assert record.num_attacked == rows["is_attacked"].sum()
    assert (
        record.adversarial_loss == pytest.approx(finite.mean(), rel=1e-5)
        if len(finite)
        else (record.adversarial_loss is None)
    )
    should = rows["is_clean_correct"] & rows["is_converged"] & ~rows["is_failed"]
    should &= rows["adversarial_prediction"] == rows["label"]
    assert rows["is_robust"].tolist() == should.tolist()


# ---------------------------------------------------------------- the record


def test_record_says_what_ran(setup) -> None:
    model, data = setup()
    attack = pgd(solver="broyden")
    found = evaluate(model, attack, data, model_name="mine", label="PGD", batch_size=4, seed=3, model_sha256="cd34")
    record = found.record
    assert (record.model, record.model_sha256, record.attack, record.label) == ("mine", "cd34", "pgd", "PGD")
    assert record.attack_config == attack.config.model_dump(mode="json") | {"targeted": False}
    assert record.threat.model_dump() == {"norm": "l2", "epsilon": 0.6}
    assert record.data.model_dump() == {"name": "mine", "split": "test", "num_samples": NUM, "digest": "ab12"}
    assert (record.seed, record.batch_size, record.schema_version) == (3, 4, 1)
    assert record.clean_accuracy == pytest.approx(11 / 14)
    assert 0 < record.max_perturbation <= 0.6 * (1 + 1e-5)
    assert {"torch", "python", "device", "num_threads", "commit"} <= record.environment.keys()
    assert record.environment["device"] == "cpu"
    assert evaluate(model, attack, data).record.label == "pgd"


def test_json_of_the_record_holds_the_promised_fields(setup) -> None:
    model, data = setup()
    found = to_json(evaluate(model, joint(), data, num_snapshots=3).record)
    promised = {
        "schema_version", "model", "attack", "threat", "data", "clean_accuracy", "robust_accuracy",
        "robust_accuracy_ci", "adversarial_loss", "num_unconverged", "num_failed", "max_perturbation", "cost", "curve",
        "seed", "environment",
    }  # fmt: skip
    assert promised <= found.keys()
    costs = {"cell_evals", "cell_vjps", "solver_steps", "wall_seconds", "peak_memory_mb", "judge_seconds"}
    assert found["cost"].keys() == costs and all(found["cost"][name] > 0 for name in costs)
    point = {"step", "cell_evals", "cell_vjps", "solver_steps", "wall_seconds", "robust_accuracy"}
    assert [entry.keys() for entry in found["curve"]] == [point] * 3


@pytest.mark.parametrize("attack", [pgd(), joint(), Noise(THREAT, NoiseConfig(restarts=3))], ids=lambda a: a.name)
def test_rows_agree_with_the_record(attack: Attack, setup) -> None:
    model, data = setup()
    found = evaluate(model, attack, data, batch_size=4)
    check_rows_agree_with_record(found)
    rows = found.samples
    assert rows["sample_id"].tolist() == data.sample_ids.tolist() and rows["label"].tolist() == data.y.tolist()
    verdict = judge(model, found.x_adv, data.y)
    assert rows["adversarial_prediction"].tolist() == verdict.prediction.tolist()
    assert rows["is_robust"].tolist() == (verdict.is_correct & judge(model, data.x, data.y).is_correct).tolist()
    size = Norm.L2.size(found.x_adv - data.x)
    torch.testing.assert_close(torch.tensor(rows["perturbation"].values), size, rtol=1e-4, atol=1e-5)
    assert found.record.robust_accuracy < found.record.clean_accuracy


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 50.0])
def test_interval_is_wilsons(epsilon: float, setup) -> None:
    model, data = setup()
    attack = SequentialPGD(Threat(Norm.L2, epsilon), SequentialPGDConfig(steps=20))
    record = evaluate(model, attack, data).record
    share, z = record.robust_accuracy, 1.959963984540054
    centre = (share + z**2 / (2 * NUM)) / (1 + z**2 / NUM)
    half = z / (1 + z**2 / NUM) * math.sqrt(share * (1 - share) / NUM + z**2 / (4 * NUM**2))
    assert record.robust_accuracy_ci == pytest.approx((max(0.0, centre - half), min(1.0, centre + half)), abs=1e-9)


def test_records_of_different_runs_have_different_names(setup) -> None:
    model, data = setup()
    names = {
        evaluate(model, attack, data, seed=seed, is_targeted=aimed).record.record_id
        for attack, seed, aimed in ((pgd(), 0, False), (pgd(), 1, False), (pgd(), 0, True), (joint(), 0, False))
    }
    assert len(names) == 4


def test_targeted_evaluation_aims_at_the_next_class(setup) -> None:
    model, data = setup()
    seen = []

    class Spy(SequentialPGD):
        def run(self, model, batch, record):
            seen.append((batch.labels, batch.targets))
            return super().run(model, batch, record)

    record = evaluate(model, Spy(THREAT, SequentialPGDConfig(steps=2)), data, batch_size=5, is_targeted=True).record
    assert all(torch.equal(targets, (y + 1) % 3) for y, targets in seen) and len(seen) == 3
    assert record.attack_config["targeted"] is True


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("settings", [{}, {"random_start": True, "restarts": 2}], ids=str)
@pytest.mark.parametrize("make", [pgd, joint])
def test_batch_size_does_not_change_a_sample(make, settings: dict, make_model, make_images) -> None:
    model, x = make_model("deq-fc", rtol=1e-8), make_images(NUM)
    y = torch.arange(NUM) % 3
    data = Split("mine", SplitName.TEST, x, y, 100 + torch.arange(NUM), "ab12")
    whole, parts = (evaluate(model, make(**settings), data, batch_size=size) for size in (64, 5))
    torch.testing.assert_close(parts.x_adv, whole.x_adv, rtol=0, atol=1e-6)
    for name in ("is_robust", "is_converged", "adversarial_prediction", "clean_prediction"):
        assert parts.samples[name].tolist() == whole.samples[name].tolist()
    assert parts.record.robust_accuracy == whole.record.robust_accuracy
    assert parts.record.data == whole.record.data


class Fixed(Attack):
    """Counts a known cost: `index` evaluations a sample for the samples of batch `index`."""

    name, summary = "fixed", "test"
    calls = 0

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        type(self).calls += 1
        record.plan(2)
        with torch.no_grad():
            u = model.inject(batch.images)
            for _ in range(self.calls):
                z = model.evaluate(model.initial_state(u), u)
            loss = CrossEntropy(batch.labels)(model.head(z))
        residuals = [float(self.calls), *([8.0] if self.calls == 1 else [])]
        record.watch(1, lambda: (batch.start, loss), torch.tensor(residuals)[:, None].expand(-1, len(batch)))
        diagnostics = {"num_odd": 1.0, "unconverged_solves": 2.0, "mean_of_something": float(self.calls)}
        return Proposal(batch.start, loss, diagnostics=diagnostics)


def test_means_are_weighted_by_the_batch_and_counts_add_up(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = setup()
    monkeypatch.setattr(Fixed, "calls", 0)
    attack = Fixed(THREAT, AttackConfig(stop_at_success=False))
    record = evaluate(model, attack, data, batch_size=6, num_snapshots=2).record  # batches of 6, 6 and 2
    mean = (6 * 1 + 6 * 2 + 2 * 3) / 14
    assert record.cost.cell_evals == pytest.approx(mean)
    assert record.cost.cell_vjps == 0
    assert [point.cell_evals for point in record.curve] == pytest.approx([mean, mean])
    assert record.residuals == pytest.approx([mean, 8.0])  # only the first batch took a second step
    assert record.diagnostics == pytest.approx({"num_odd": 3, "unconverged_solves": 6, "mean_of_something": mean})


class Warns(Attack):
    """Marks samples of even number as behind, those divisible by three as flat; the last batch is finished."""

    name, config_type = "warns", AttackConfig
    is_done, num_finished = False, 0.0

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        return Proposal(
            torch.zeros_like(batch.images),
            torch.zeros(len(batch)),
            is_done=(batch.ids % 4 == 0) & self.is_done,
            is_lagging=batch.ids % 2 == 0,
            is_flat=batch.ids % 3 == 0,
            diagnostics={"num_finished": self.num_finished, "num_audited": 1.0},
        )


class WarnsOfNothing(Warns):
    name = "warns-of-nothing"

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        return Proposal(torch.zeros_like(batch.images), torch.zeros(len(batch)))


@pytest.mark.parametrize("batch_size", [4, NUM])
def test_warnings_of_an_attack_are_counted_over_what_it_attacked(batch_size: int, setup) -> None:
    model, data = setup()
    ids = [number for row, number in enumerate(data.sample_ids.tolist()) if row % 5]
    record = evaluate(model, Warns(THREAT), data, batch_size=batch_size).record
    assert record.num_lagging == sum(number % 2 == 0 for number in ids) > 0
    assert record.num_zero_gradient == sum(number % 3 == 0 for number in ids) > 0
    assert record.finished_by == "joint"
    assert record.diagnostics["num_audited"] == math.ceil(NUM / batch_size)
    assert not {"num_lagging", "num_zero_gradient"} & set(record.diagnostics)


def test_a_sample_that_is_fooled_is_not_warned_of(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge has the last word on who is fooled: here it confirms all."""
    model, data = setup()
    monkeypatch.setattr(Warns, "is_done", True)
    monkeypatch.setattr(BatchJudge, "confirm", lambda self, rows, images: rows >= 0)
    ids = [number for row, number in enumerate(data.sample_ids.tolist()) if row % 5]
    record = evaluate(model, Warns(THREAT), data).record
    assert record.num_lagging == sum(number % 4 == 2 for number in ids) > 0
    assert record.num_zero_gradient == sum(number % 3 == 0 and number % 4 != 0 for number in ids) > 0


def test_full_solves_have_the_last_word_if_on_any_sample(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = setup()
    monkeypatch.setattr(Warns, "num_finished", 1.0)
    assert evaluate(model, Warns(THREAT), data).record.finished_by == "sequential"


def test_nothing_looked_at_is_missing(setup) -> None:
    model, data = setup()
    record = evaluate(model, WarnsOfNothing(THREAT), data).record
    assert record.num_lagging is record.num_zero_gradient is record.finished_by is None


@pytest.mark.parametrize(("attack", "source"), [(joint(), "joint"), (pgd(), None)])
def test_the_attacks_of_the_package_say_what_they_looked_at(attack: Attack, source: str | None, setup) -> None:
    model, data = setup()
    record = evaluate(model, attack, data).record
    assert record.num_zero_gradient == 0 and record.num_lagging == (0 if source else None)
    assert record.finished_by in ((source, "sequential") if source else (None,))
    assert ("num_audited" in record.diagnostics) == (source is not None)


def test_batch_that_a_budget_ends_before_the_others_stays_in_the_curve_as_it_ended(setup) -> None:
    model, data = setup(n=60)
    whole = evaluate(model, joint(), data, batch_size=20, num_snapshots=8).record
    for share in (0.7, 0.8, 0.9):
        limited = joint(max_evaluations=share * whole.cost.cell_evals)
        record = evaluate(model, limited, data, batch_size=20, num_snapshots=8).record
        values = [point.cell_evals for point in record.curve]
        assert values == sorted(values) and values[-1] <= record.cost.cell_evals
        assert record.curve[-1].robust_accuracy == record.robust_accuracy


def test_parts_of_unlike_length_make_one_curve() -> None:
    def part(accuracies: list[float], evals: float) -> Part:
        points = [
            CurvePoint(step=i, cell_evals=i, cell_vjps=0, solver_steps=0, wall_seconds=i, robust_accuracy=accuracy)
            for i, accuracy in enumerate(accuracies, start=1)
        ]
        cost = CostRecord(cell_evals=evals, cell_vjps=0, solver_steps=0, wall_seconds=evals, peak_memory_mb=1)
        return Part(pd.DataFrame({"is_robust": [True, False]}), cost, points, [], {})

    curve = _curve([part([1.0, 0.5, 0.0], 3.0), part([], 5.0), part([1.0], 2.0)], 6)
    assert [point.step for point in curve] == [1, 2, 3]
    assert [point.cell_evals for point in curve] == pytest.approx([(1 + 5 + 1) / 3, (2 + 5 + 2) / 3, (3 + 5 + 2) / 3])
    assert [point.robust_accuracy for point in curve] == pytest.approx([2.5 / 3, 1.5 / 3, 1.0 / 3])
    assert [point.wall_seconds for point in curve] == [7, 9, 10]
    assert _curve([part([], 1.0)], 2) == []


def test_progress_counts_samples_and_ends_with_the_result(setup) -> None:
    model, data = setup()
    seen = []
    found = evaluate(model, pgd(), data, batch_size=6, progress=seen.append)
    assert [(at.done, at.total) for at in seen if not at.stage] == [(6, 14), (12, 14), (14, 14)]
    assert seen[-1].robust_accuracy == pytest.approx(found.record.robust_accuracy)


def test_progress_moves_within_a_batch_and_names_the_stage(setup) -> None:
    model, data = setup()
    seen: list[Progress] = []
    evaluate(model, pgd(stop_at_success=False), data, batch_size=7, progress=seen.append, num_snapshots=2)
    assert [at.done for at in seen] == sorted(at.done for at in seen)
    stages = list(dict.fromkeys(at.stage for at in seen))
    assert stages == ["clean equilibria", "attack", "judge", ""]
    for begin in (0, 7):
        moved = {at.done for at in seen if at.stage == "attack" and begin < at.done < begin + 7}
        assert len(moved) >= pgd().config.steps
    assert seen[0].robust_accuracy is None


# ---------------------------------------------------------------- curves

CURVED = [
    pgd(),
    joint(),
    joint(steps=3),
    joint(inner_steps=4),
    joint(keep="last"),
    Noise(THREAT, NoiseConfig(restarts=1)),
    TorchattacksPGDL2(THREAT, TorchattacksConfig(steps=4)),
]


@pytest.mark.parametrize("attack", CURVED, ids=lambda a: f"{a.name}-{CURVED.index(a)}")
def test_curve_is_ordered_and_ends_with_the_result(attack: Attack, setup) -> None:
    model, data = setup(n=60)
    found = evaluate(model, attack, data, batch_size=25, num_snapshots=4)
    record, curve = found.record, found.record.curve
    assert 1 <= len(curve) <= 4
    for name in ("step", "cell_evals", "cell_vjps", "wall_seconds"):
        values = [getattr(point, name) for point in curve]
        assert values == sorted(values)
    assert all(point.robust_accuracy <= record.clean_accuracy for point in curve)
    assert curve[-1].robust_accuracy == record.robust_accuracy
    assert curve[-1].wall_seconds <= record.cost.wall_seconds


@pytest.mark.parametrize("make", [pgd, joint])
def test_last_snapshot_is_the_result(make, setup) -> None:
    """The curve promises what stopping after a step would have given; after the last step that is the result."""
    model, data = setup()
    result = make()(model, data.x, data.y, num_snapshots=4)
    torch.testing.assert_close(result.snapshots[-1].delta, result.delta)
    assert result.snapshots[-1].step == make().config.steps


def test_curve_of_restarts_does_not_rise_between_them(setup) -> None:
    model, data = setup(n=60)
    curve = evaluate(model, pgd(restarts=3, random_start=True), data, num_snapshots=2).record.curve
    assert [point.step for point in curve] == [2, 5, 7, 10, 12, 15]
    ends = [point.robust_accuracy for point in curve if point.step % 5 == 0]
    assert ends == sorted(ends, reverse=True)


def test_residuals_fall_along_a_cold_solve(setup) -> None:
    model, data = setup()
    attack = joint(steps=30, step_size=1e-6, warmup_steps=0, stop_at_success=False)
    residuals = list(attack(model, data.x, data.y, num_snapshots=1).residuals)
    assert len(residuals) == 30 + 1  # before every step and after the last
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-3 and residuals[0] == pytest.approx(1, abs=1e-3)
    assert evaluate(model, joint(), data).record.residuals == []


# ---------------------------------------------------------------- never robust


class Escaping(Linear):
    """Images whose first pixel is 1 have no equilibrium: their state moves on by one with every evaluation."""

    def inject(self, x: Tensor) -> Tensor:
        return torch.cat([(x.flatten(1)[:, :1] >= 0.9).to(x), super().inject(x)], dim=1)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.where(u[:, :1] == 1, z + 1, super().cell(z, u[:, 1:]))

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u[:, 1:])


ALL_KINDS = [
    joint(),
    pgd(),
    Noise(THREAT, NoiseConfig(restarts=2)),
    TorchattacksPGDL2(THREAT, TorchattacksConfig(steps=3)),
]


@pytest.mark.parametrize("attack", ALL_KINDS, ids=lambda a: a.name)
def test_samples_without_an_equilibrium_are_counted_and_never_robust(attack: Attack, make_images) -> None:
    model = Escaping(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=5)).eval()
    x = make_images(9, torch.float32)
    is_lost = torch.arange(9) % 3 == 0
    x[:, 0, 0, 0] = torch.where(is_lost, 1.0, 0.1)
    attack = type(attack)(Threat(Norm.L2, 0.05), attack.config)  # too small to cross 0.9
    for label in range(3):  # whatever the label: a lost sample is right by chance for one of them
        data = Split("mine", SplitName.TEST, x, torch.full((9,), label), torch.arange(9), "ab12")
        found = evaluate(model, attack, data)
        check_rows_agree_with_record(found)
        assert found.record.num_unconverged == 3
        assert found.samples["is_converged"].tolist() == (~is_lost).tolist()
        assert not found.samples["is_robust"][is_lost.numpy()].any()
        assert not found.samples["is_clean_correct"][is_lost.numpy()].any()


@pytest.mark.parametrize("name", [*SINGLE, "fast"])
def test_a_radius_beyond_all_bounds_is_one_that_covers_the_pixel_box(
    name: str, setup, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = setup()
    norm, most = (Norm.LINF, 1.0) if name == "torchattacks-pgd" else (Norm.L2, 4.0)
    settings = {"steps": 5} if "steps" in ATTACKS.get(name).config_type.model_fields else {}
    covering, huge = (evaluate(model, build_attack(name, Threat(norm, e), settings), data) for e in (most, 1e30))
    assert torch.equal(huge.x_adv, covering.x_adv) and bool((huge.x_adv != data.x).any())
    assert huge.record.cost.cell_evals == covering.record.cost.cell_evals
    assert huge.record.robust_accuracy < huge.record.clean_accuracy and huge.record.num_failed == 0
    assert caplog.text.count("any image into any other") == 2 and "epsilon 1e+30 in" in caplog.text
    caplog.clear()
    evaluate(model, Noise(THREAT), data)
    assert not caplog.text


class Pushes(Attack):
    """Moves the first pixel of every image to 1."""

    name, summary = "pushes", "test"

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        delta = torch.zeros_like(batch.images)
        delta[:, 0, 0, 0] = 1 - batch.images[:, 0, 0, 0]
        return Proposal(delta, torch.zeros(len(batch)))


def test_a_sample_that_only_loses_its_equilibrium_under_attack_is_not_robust(make_images) -> None:
    model = Escaping(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=5)).eval()
    x = 0.8 * make_images(9, torch.float32)
    data = Split("mine", SplitName.TEST, x, judge(model, x, torch.zeros(9).long()).prediction, torch.arange(9), "ab12")
    found = evaluate(model, Pushes(Threat(Norm.LINF, 1.0)), data)
    check_rows_agree_with_record(found)
    assert found.record.clean_accuracy == 1 and found.record.robust_accuracy == 0
    assert found.record.num_unconverged == 9 and found.record.num_failed == 0


class ReturnsNaN(SequentialPGD):
    """Breaks on every third sample."""

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        proposal = super().run(model, batch, record)
        delta = proposal.delta.clone()
        delta[::3] = torch.nan
        return Proposal(delta, proposal.loss)


def test_samples_that_the_attack_failed_on_are_counted_and_never_robust(setup) -> None:
    model, data = setup()
    data = Split("mine", SplitName.TEST, data.x, judge(model, data.x, data.y).prediction, data.sample_ids, "ab12")
    found = evaluate(model, ReturnsNaN(Threat(Norm.L2, 1e-4), SequentialPGDConfig(steps=1)), data, num_snapshots=1)
    check_rows_agree_with_record(found)
    assert found.record.clean_accuracy == 1
    assert found.record.num_failed == 5 and found.record.num_unconverged == 0
    assert found.record.robust_accuracy == pytest.approx(9 / 14)
    assert found.samples["is_robust"].tolist() == [index % 3 != 0 for index in range(14)]
    assert bool(torch.isfinite(found.x_adv).all())


def test_broken_logits_are_never_robust(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = setup()
    head = model.head
    monkeypatch.setattr(model, "head", lambda z: head(z) * torch.nan)
    found = evaluate(model, pgd(), data)
    check_rows_agree_with_record(found)
    assert found.record.robust_accuracy == found.record.clean_accuracy == 0
    assert found.record.adversarial_loss is None
    assert (found.record.num_unconverged, found.record.num_nonfinite) == (0, NUM)
    assert not found.samples["is_readable"].any()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("joint-pgd", {}),
        ("joint-fmn", {"steps": 20}),
        ("noise", {}),
        ("torchattacks-pgdl2", {}),
        ("pgd", {"objective": "cross-entropy", "stop_at_success": False}),
        ("pgd", {"objective": "dlr"}),
    ],
)
def test_a_masked_class_changes_no_result(name: str, settings: dict, setup, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = setup()
    attack = build_attack(name, THREAT, settings)
    plain, head = evaluate(model, attack, data), model.head
    monkeypatch.setattr(model, "num_classes", 4)
    monkeypatch.setattr(model, "head", lambda z: F.pad(head(z), (0, 1), value=-torch.inf))
    masked = evaluate(model, attack, data)
    assert masked.record.num_nonfinite == masked.record.num_unconverged == 0
    assert masked.samples["is_robust"].tolist() == plain.samples["is_robust"].tolist()
    torch.testing.assert_close(masked.x_adv, plain.x_adv, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda logits: (logits, logits), "head: expected one tensor (batch, ...), got tuple"),
        (lambda logits: {"logits": logits}, "head: expected one tensor (batch, ...), got dict"),
        (lambda logits: logits[:, :2], "head: expected (2, 3), a column a class, got (2, 2); return (2, 3) from head"),
        (lambda logits: F.pad(logits, (0, 997)), "head: expected (2, 3), a column a class, got (2, 1000)"),
        (lambda logits: logits[:, :, None], "head: expected (2, 3), a column a class, got (2, 3, 1)"),
        (lambda logits: logits.double(), "head: expected float32, as the images are, got float64"),
        (lambda logits: logits.bfloat16(), "head: expected float32, as the images are, got bfloat16"),
        (lambda logits: logits.argmax(1, keepdim=True).expand(-1, 3), "got int64"),
        (lambda logits: 1 / 0, "head: expected a result, got ZeroDivisionError: division by zero, in tests"),
    ],
)
@pytest.mark.parametrize("name", ["joint-pgd", "noise"])
def test_what_a_head_returns_is_looked_at_before_anything_runs(
    name: str, spoil: Callable, said: str, setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = setup()
    head, cells = model.head, []
    cell = model.cell
    monkeypatch.setattr(model, "head", lambda z: spoil(head(z)))
    monkeypatch.setattr(model, "cell", lambda z, u: cells.append(len(z)) or cell(z, u))
    attack = build_attack(name, THREAT, {})
    for call in (lambda: evaluate(model, attack, data), lambda: attack(model, data.x, data.y)):
        with pytest.raises(UsageError) as caught:
            call()
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert cells == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_type_is_refused_with_the_cure(dtype: torch.dtype, setup) -> None:
    model, data = setup()
    said = f"weights: expected float32, as the images are, got {str(dtype).removeprefix('torch.')}; convert the model"
    with pytest.raises(UsageError, match=said):
        evaluate(model.to(dtype), joint(), data)
    if dtype is not torch.float64:
        with pytest.raises(UsageError, match="images: expected float32 or float64"):
            joint()(model, data.x.to(dtype), data.y)


# ---------------------------------------------------------------- refused


def test_data_that_does_not_fit_the_model_is_refused(setup) -> None:
    model, data = setup()
    for x, y in (
        (data.x.repeat(1, 3, 1, 1), data.y),
        (data.x * 2, data.y),
        (data.x.where(data.x > 0.9, torch.nan), data.y),
        (data.x, data.y + 3),
        (data.x[:3], data.y),
    ):
        with pytest.raises(UsageError, match="expected"):
            evaluate(model, pgd(), Split("mine", SplitName.TEST, x, y, data.sample_ids[: len(x)], "ab12"))


@pytest.mark.parametrize("model", [torch.nn.Linear(3, 3), len], ids=["a module", "a function"])
def test_a_thing_that_is_no_equilibrium_model_is_refused(model: object, setup) -> None:
    with pytest.raises(UsageError, match="model: expected an EquilibriumModel, got"):
        evaluate(model, pgd(), setup()[1])


def test_a_model_without_a_gradient_is_refused_but_for_noise(setup) -> None:
    model, data = setup()
    model.inject = torch.no_grad()(model.inject)
    for attack in (pgd(), joint(), TorchattacksPGDL2(THREAT, TorchattacksConfig(steps=3))):
        with pytest.raises(UsageError, match="expected a gradient with respect to the image"):
            evaluate(model, attack, data)
    assert evaluate(model, Noise(THREAT), data).record.max_perturbation > 0


def test_a_bad_pixel_in_a_late_batch_is_refused_before_any_work(setup) -> None:
    model, data = setup()
    x = data.x.clone()
    x[-1, 0, 0, 0] = 2.0
    done = []
    with pytest.raises(UsageError, match="pixels in"):
        evaluate(
            model,
            pgd(),
            Split("mine", SplitName.TEST, x, data.y, data.sample_ids, "ab12"),
            batch_size=4,
            progress=done.append,
        )
    assert done == []
