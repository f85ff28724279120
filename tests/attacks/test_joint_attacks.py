"""What joint attacks do where the joint iteration is not to be believed: states that run away or lag, an audit of those
that would be called robust; samples without a slope; and settings that would do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from robustbench_deq.attacks import JointFMN, JointPGD, JointPGDConfig, build_attack
from robustbench_deq.attacks.joint import AUDIT_KEY, AUDIT_STEPS, AUDITED_SHARE, FULL_STEPS
from robustbench_deq.attacks.joint_pgd import KeepRule
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.models import Linear, LinearConfig
from robustbench_deq.optimise import JIIORule, Joint, Mixing, Norm, Optimum, Schedule
from robustbench_deq.optimise.objectives import Margin
from robustbench_deq.protocol import ATTACKS, Attack, AttackConfig, AttackResult, Batch, Clean, Proposal, Recorder
from robustbench_deq.randomness import keyed_uniform
from robustbench_deq.solvers import SOLVERS
from robustbench_deq.threats import Threat
from tests.attacks.test_contract import SINGLE

LABELS = torch.tensor([0, 1, 2, 0])


class Switched(Linear):
    """`f(z, u) = c z + u` with c = 0.4, but `factor` for images whose first pixel is above one half."""

    factor = -4.0

    def inject(self, x: Tensor) -> Tensor:
        return torch.cat([torch.where(x.flatten(1)[:, :1] > 0.5, self.factor, 0.4), super().inject(x)], dim=1)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return u[:, :1] * z + u[:, 1:]

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u[:, 1:])


@pytest.fixture
def switched(make_images) -> Callable[[float], tuple[Switched, Tensor, Tensor, Tensor]]:
    """`switched(factor)`: model, images, labels, and which images are on the other side of the switch."""

    def make(factor: float) -> tuple[Switched, Tensor, Tensor, Tensor]:
        model = Switched(LinearConfig(input_shape=(1, 4, 4), num_classes=2, hidden=5)).double().eval()
        model.factor = factor
        x = 0.4 + 0.2 * make_images(6)
        is_hard = torch.tensor([False, True, False, True, True, False])
        x[:, 0, 0, 0] = is_hard.double()
        return model, x, torch.tensor([0, 1, 0, 1, 0, 1]), is_hard

    return make


def optimum_of(model: Switched, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """The strongest L2 perturbation of the margin, for a first pixel on the limit of the box."""
    factor = torch.where(x[:, 0, 0, 0] > 0.5, model.factor, 0.4)[:, None]
    matrix = (model.readout.weight @ model.injection.weight).detach()
    gradient = ((matrix[1 - y] - matrix[y]) / (1 - factor)).view_as(x)
    points_out = (gradient[:, 0, 0, 0] > 0) == (x[:, 0, 0, 0] > 0.5)
    gradient[:, 0, 0, 0] = torch.where(points_out, 0.0, gradient[:, 0, 0, 0])
    return threat.epsilon * threat.ball(x).direction(gradient)


def counts_of(result: AttackResult) -> dict[str, float]:
    return {key: value for key, value in result.diagnostics.items() if key.startswith("num_")}


@pytest.mark.parametrize(
    ("factor", "steps", "num_finished"),
    [
        (-1.3, 80, 0),  # damped on the way, they come back
        (-1.3, 20, 0),
        (-4.0, 80, 3),
        (-4.0, 3, 3),
        (-40.0, 80, 3),
    ],
)
def test_states_that_run_away_are_finished_with_full_solves_and_judged_all_the_same(
    factor: float, steps: int, num_finished: int, switched
) -> None:
    model, x, y, is_hard = switched(factor)
    settings = {"step_size": 1.0, "objective": "margin", "stop_at_success": False}
    threat, config = Threat(Norm.L2, 0.2), JointPGDConfig(steps=steps, **settings)
    result = JointPGD(threat, config)(model, x, y)
    assert counts_of(result) == {"num_finished": num_finished, "num_lagging": 0, "num_zero_gradient": 0}
    assert not bool(result.is_failed.any())
    clean, verdict = judge(model, x, y), judge(model, result.x_adv, y)
    assert bool(clean.is_converged.all()) and bool(verdict.is_converged.all())
    best = judge(model, x + optimum_of(model, x, y, threat), y)
    gain = (verdict.loss - clean.loss) / (best.loss - clean.loss)
    assert bool((gain > 0.97).all()), gain
    # Both kinds are what they are without the other.
    for rows, expected in ((~is_hard, 0), (is_hard, num_finished)):
        alone = JointPGD(threat, config)(model, x[rows], y[rows])
        assert alone.diagnostics["num_finished"] == expected
        torch.testing.assert_close(result.x_adv[rows], alone.x_adv, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stop_at_success", [False, True])
def test_contractive_models_need_no_full_solves_but_the_audits(stop_at_success: bool, make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    with torch.no_grad():
        y = model(x).argmax(1)
    config = JointPGDConfig(stop_at_success=stop_at_success)
    result = JointPGD(Threat(Norm.L2, 1e-3), config)(model, x, y)  # so short that nobody is fooled
    expected = {"num_finished": 0, "num_lagging": 0, "num_zero_gradient": 0}
    if stop_at_success:
        expected |= {"num_audited": int(is_drawn(torch.arange(4), 0).sum()), "num_audit_fooled": 0}
    assert counts_of(result) == expected
    assert result.diagnostics["perturbation_steps"] == 20


@pytest.mark.parametrize(
    "settings",
    [{}, {"inner_steps": 3}, {"inner_steps": None}, {"inner_steps": None, "accelerator": "anderson"}],
    ids=str,
)
def test_a_state_of_nans_does_not_disturb_the_others(settings: dict, switched) -> None:
    model, x, y, is_lost = switched(torch.nan)
    attack = JointPGD(Threat(Norm.L2, 0.2), JointPGDConfig(steps=20, **settings))
    result, alone = attack(model, x, y), attack(model, x[~is_lost], y[~is_lost])
    torch.testing.assert_close(result.x_adv[~is_lost], alone.x_adv, rtol=0, atol=1e-9)
    assert bool(torch.isfinite(result.x_adv).all())
    assert result.diagnostics["num_finished"] == result.diagnostics["num_lagging"] == 3  # no solve brings them back
    assert alone.diagnostics["num_finished"] == alone.diagnostics["num_lagging"] == 0
    verdict = judge(model, result.x_adv, y)
    assert verdict.is_converged.tolist() == (~is_lost).tolist()
    assert not bool(verdict.is_correct[is_lost].any())


def test_published_preset_runs_and_yields_to_other_keys(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    config = JointPGDConfig(preset="jiio-2021", steps=40, stop_at_success=False)
    assert config.steps == 40 and config.keep is KeepRule.JIIO and config.schedule is Schedule.DROP
    assert isinstance(config.rule(), JIIORule)
    source = config.source()
    assert source.accelerator.history_size == 20 and source.mixing is Mixing.ALL
    assert (source.damping_z, source.damping_mu, source.warmup, source.has_loss_start) == (0.8, 0.6, None, False)
    result = JointPGD(Threat(Norm.L2, 0.5), config)(model, x, LABELS)
    clean, verdict = judge(model, x, LABELS), judge(model, result.x_adv, LABELS)
    assert bool((verdict.loss > clean.loss).all())


@pytest.mark.parametrize("mixing", ["state", "all"])
@pytest.mark.parametrize("inner_steps", [2, None])
@pytest.mark.parametrize("accelerator", [name for name in SOLVERS if not SOLVERS.get(name)().needs_jvp])
def test_every_solver_without_jvps_accelerates(
    accelerator: str, inner_steps: int | None, mixing: str, make_model, make_images
) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    mixed = {"accelerator": accelerator, "inner_steps": inner_steps, "mixing": mixing}
    config, reference = (JointPGDConfig(steps=40, stop_at_success=False, **more) for more in (mixed, {}))
    result = JointPGD(Threat(Norm.L2, 0.3), config)(model, x, LABELS)
    plain = JointPGD(Threat(Norm.L2, 0.3), reference)(model, x, LABELS)
    assert not bool(result.is_failed.any())
    losses = [judge(model, found.x_adv, LABELS).loss for found in (result, plain)]
    clean = judge(model, x, LABELS).loss
    assert bool((losses[0] > clean).all())
    torch.testing.assert_close(losses[0], losses[1], rtol=0.2, atol=0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 4, "inner_steps": 5}, r"inner_steps of at most steps \(4\): the perturbation never moves"),
        ({"accelerator": "anderson"}, "inner_steps above 1 or null, or mixing=all, with an accelerator"),
        ({"max_lag": 2.0}, "no max_lag with inner_steps, which is fixed, which does not use it"),
        ({"max_inner_steps": 3}, "no max_inner_steps with inner_steps"),
        ({"history_size": 3}, "no history_size with accelerator=None"),
        ({"history_size": 3, "accelerator": "picard", "inner_steps": 2}, "no history_size with accelerator=picard"),
        ({"mixing": "all"}, "no mixing with accelerator, which is null"),
        ({"keep": "last", "keep_residual": 0.1}, "no keep_residual with keep=last"),
        ({"warmup_steps": 0, "warmup_tolerance": 0.1}, "no warmup_tolerance with warmup_steps=0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        JointPGDConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"preset": "jiio-2021"},
        {"preset": "jiio-2021", "accelerator": None},
        {"inner_steps": None, "max_lag": 2.0},
    ],
)
def test_resolved_settings_are_accepted_again(values: dict) -> None:
    config = JointPGDConfig(**values)
    assert JointPGDConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize("keep", ["last", "jiio", "loss"])
def test_a_lost_state_has_no_say_in_what_is_returned(keep: str, switched) -> None:
    """Far from its equilibrium a state can show any loss; the solves that find the equilibrium must win."""
    model, x, y, is_hard = switched(-4.0)
    threat = Threat(Norm.L2, 0.2)
    config = JointPGDConfig(steps=80, step_size=1.0, objective="margin", keep=keep, stop_at_success=False)
    result = JointPGD(threat, config)(model, x, y)
    assert result.diagnostics["num_finished"] == 3
    clean, verdict = judge(model, x, y), judge(model, result.x_adv, y)
    best = judge(model, x + optimum_of(model, x, y, threat), y)
    gain = (verdict.loss - clean.loss) / (best.loss - clean.loss)
    assert bool((gain[is_hard] > 0.97).all()), gain
    torch.testing.assert_close(result.loss[is_hard], margin_of(model, result.x_adv, y)[is_hard], rtol=1e-3, atol=1e-3)


def margin_of(model, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return Margin(y)(model(x))


# ---------------------------------------------------------------- audit


def is_drawn(ids: Tensor, seed: int) -> Tensor:
    """Samples that the audit looks at though their cell is not hard."""
    return keyed_uniform(ids, seed, AUDIT_KEY) < AUDITED_SHARE


class Hidden(EquilibriumModel):
    """A cell of two numbers, of which the second creeps:

        a <- 0.3 a + 0.7 (p_0 + 1),     b <- b + w (p_1 + 0.4 p_0 - b),     margin: 0.2 a + max(b - 0.1, 0) - 0.4

    with p the image's pixels above one half. From a clean image b seems to stand still, and the margin to grow along
    the first pixel alone, which does not suffice; at the equilibrium that leads to it grows along the second.
    """

    input_shape, num_classes, creep = (1, 1, 2), 2, 2e-3

    def inject(self, x: Tensor) -> Tensor:
        return x.flatten(1) - 0.5

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        a = 0.3 * z[:, 0] + 0.7 * (u[:, 0] + 1.0)
        b = z[:, 1] + self.creep * (u[:, 1] + 0.4 * u[:, 0] - z[:, 1])
        return torch.stack([a, b], dim=1)

    def head(self, z: Tensor) -> Tensor:
        margin = 0.2 * z[:, 0] + torch.relu(z[:, 1] - 0.1) - 0.4
        return torch.stack([-margin, margin], dim=1)

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


def hidden(num: int, level: float) -> tuple[Hidden, Tensor, Tensor]:
    """Model, images and labels; the second component of the states is `level`."""
    model, x = Hidden().double().eval(), torch.full((num, 1, 1, 2), 0.5, dtype=torch.float64)
    x[..., 1] += level
    return model, x, torch.zeros(num, dtype=torch.long)


def known_of(attack, model: EquilibriumModel, x: Tensor, y: Tensor) -> Clean:
    return judge_clean(model, x, y).known(model, x, attack.first_objective(y, None))


HIDDEN_THREAT = Threat(Norm.L2, 0.35)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_audit_that_fools_finishes_all_that_are_left(seed: int) -> None:
    """Clean states say nothing of what creeps here: the audit looks at its share, all of which it fools."""
    model, x, y = hidden(64, 0.0)
    attack, ids = JointPGD(HIDDEN_THREAT, JointPGDConfig()), torch.arange(64) + 100
    num_drawn = int(is_drawn(ids, seed).sum())
    assert 2 <= num_drawn <= 12
    clean = known_of(attack, model, x, y)
    assert not bool(clean.settled.contraction.is_hard.any()) and bool(clean.is_correct.all())
    result = attack(model, x, y, clean=clean, sample_ids=ids, seed=seed)
    expected = {"num_finished": 64 - num_drawn, "num_audited": num_drawn, "num_audit_fooled": num_drawn}
    assert counts_of(result) == expected | {"num_lagging": 0, "num_zero_gradient": 0}
    verdict = judge(model, result.x_adv, y)
    assert bool(verdict.is_converged.all()) and not bool(verdict.is_correct.any())
    trusting = JointPGD(HIDDEN_THREAT, JointPGDConfig(has_fallback=False))
    believed = judge(model, trusting(model, x, y, clean=clean, sample_ids=ids, seed=seed).x_adv, y)
    assert bool(believed.is_correct.all())  # as robust as the joint iteration would have called it


def test_one_that_the_audit_fools_is_no_alarm() -> None:
    """Of one sample that it looks at, or of many: more than one in twenty, and one more, must be fooled."""
    model, x, y = hidden(3, 0.0)
    ids = torch.arange(1000)
    drawn, others = ids[is_drawn(ids, 0)], ids[~is_drawn(ids, 0)]
    attack = JointPGD(HIDDEN_THREAT, JointPGDConfig())
    for num_drawn, num_finished in ((0, 0), (1, 0), (2, 1), (3, 0)):
        result = attack(
            model, x, y, clean=known_of(attack, model, x, y), sample_ids=torch.cat([drawn[:num_drawn], others])[:3]
        )
        found = {"num_finished": num_finished, "num_audited": num_drawn, "num_audit_fooled": num_drawn}
        assert counts_of(result) == found | {"num_lagging": 0, "num_zero_gradient": 0}
        num_fooled = num_drawn + num_finished
        assert int((~judge(model, result.x_adv, y).is_correct).sum()) == num_fooled


def test_hard_samples_are_all_audited() -> None:
    """Of a clean state that shows that it creeps."""
    model, x, y = hidden(16, 0.05)
    attack = JointPGD(HIDDEN_THREAT, JointPGDConfig())
    clean = known_of(attack, model, x, y)
    assert bool(clean.settled.contraction.is_hard.all()) and bool(clean.is_correct.all())
    result = attack(model, x, y, clean=clean)
    assert counts_of(result) == {
        "num_finished": 0,
        "num_audited": 16,
        "num_audit_fooled": 16,
        "num_lagging": 0,
        "num_zero_gradient": 0,
    }
    assert not bool(judge(model, result.x_adv, y).is_correct.any())


def test_whom_the_audit_looks_at_is_decided_by_seed_and_sample_alone(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(40)
    with torch.no_grad():
        y = model(x).argmax(1)
    attack, ids = JointPGD(Threat(Norm.L2, 1e-4), JointPGDConfig(steps=2, rounds=1)), torch.arange(40) * 7 + 3
    for seed in (0, 1, 2):
        parts = [torch.arange(40), torch.arange(40).flip(0), *torch.arange(40).split(13)]
        audited = [
            attack(model, x[rows], y[rows], sample_ids=ids[rows], seed=seed).diagnostics["num_audited"]
            for rows in parts
        ]
        expected = [int(is_drawn(ids[rows], seed).sum()) for rows in parts]
        assert audited == expected and expected[0] == expected[1] == sum(expected[2:])
    many = torch.arange(40_000)
    assert float(is_drawn(many, 5).double().mean()) == pytest.approx(AUDITED_SHARE, abs=4 * 0.0012)
    both = is_drawn(many, 5) & is_drawn(many, 6)
    assert float(both.double().mean()) == pytest.approx(AUDITED_SHARE**2, abs=4 * 0.0003)


class Scripted(JointPGD):
    """Its joint search does what it is told to, and what it is asked for is written down."""

    def search(self, model, batch, source, step, keep, num_steps, record=None) -> Optimum:
        self.asked.append((type(source).__name__, batch.ids.tolist(), num_steps))
        found = super().search(model, batch, source, step, keep, num_steps, record)
        if not isinstance(source, Joint):
            return found
        return found._replace(**{name: part[batch.ids] for name, part in self.claims.items()})


def test_who_is_searched_again_with_what(make_model, make_images) -> None:
    """Ten samples: 0 and 1 fooled, 2 and 3 lag, 4 is on its way in both rounds and 5 in the first one alone, the others
    stand still; all but those that lag are contractive, and the audit finds nothing in so small a ball."""
    model, x = make_model("deq-fc", rtol=1e-8), make_images(10)
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = Scripted(Threat(Norm.L2, 1e-5), JointPGDConfig(steps=5))
    attack.asked, rows = [], torch.arange(10)
    attack.claims = {
        "is_done": rows < 2,
        "residual": torch.where((rows == 2) | (rows == 3), 0.2, 0.0).double(),
        "loss": torch.full((10,), -1.0).double(),
        "gain": torch.where((rows == 4) | (rows == 5), 2.5, 0.5).double(),
    }
    seed = next(seed for seed in range(100) if is_drawn(rows, seed).tolist()[6:] == [True, False, False, False])
    result = attack(model, x, y, seed=seed)
    audited = [row for row in rows[is_drawn(rows, seed)].tolist() if row > 3]
    assert attack.asked == [
        ("Joint", list(range(10)), 5),
        ("Joint", [4, 5], 10),
        ("Joint", [4, 5], 20),
        ("Solved", [2, 3], FULL_STEPS),
        ("Solved", audited, AUDIT_STEPS),
    ]
    assert counts_of(result) == {
        "num_finished": 2,
        "num_audited": len(audited),
        "num_audit_fooled": 0,
        "num_lagging": 0,
        "num_zero_gradient": 0,
    }


# ---------------------------------------------------------------- no slope


class Gated(Linear):
    """An injection of rectified units that are all dead for images whose first pixel is above one half."""

    def inject(self, x: Tensor) -> Tensor:
        return torch.relu(super().inject(x) + torch.where(x.flatten(1)[:, :1] > 0.5, -100.0, 3.0))


@pytest.mark.parametrize("is_known", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("name", [name for name in SINGLE if ATTACKS.get(name).is_gradient_based])
def test_samples_without_a_slope_are_counted(name: str, is_known: bool, make_images) -> None:
    model = Gated(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=5)).double().eval()
    x, is_dead = 0.3 + 0.4 * make_images(7), torch.tensor([True, False, False, True, True, False, False])
    x[:, 0, 0, 0] = is_dead.double()
    with torch.no_grad():
        y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 3  # wrong, and dead: attacked only where nothing is known
    threat = Threat(Norm.LINF if name == "torchattacks-pgd" else Norm.L2, 0.03)
    attack = build_attack(name, threat, {} if name == "fgsm" else {"steps": 4})
    clean = known_of(attack, model, x, y) if is_known else None
    result = attack(model, x, y, clean=clean)
    # A sample that is done need not be climbed: it is fooled.
    is_wrong_counted = not is_known and name.startswith(("torchattacks", "joint-fmn", "fmn"))  # there nobody leaves
    assert result.diagnostics["num_zero_gradient"] == 2 + is_wrong_counted
    has_moved = (result.delta != 0).flatten(1).any(1)
    assert torch.equal(has_moved, ~is_dead)


class Flat(Attack[AttackConfig]):
    """Its first run has no slope on even samples, its second one none on multiples of three."""

    name, summary, num_runs = "flat", "test", 0

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        self.num_runs += 1
        is_flat = batch.ids % (1 + self.num_runs) == 0
        return Proposal(torch.zeros_like(batch.images), torch.zeros(len(batch)), is_flat=is_flat)


def test_a_slope_in_one_of_several_runs_is_one(make_images) -> None:
    model, x = Linear(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=5)).double().eval(), make_images(13)
    result = Flat(Threat(Norm.L2, 0.1), AttackConfig(restarts=2))(model, x, torch.zeros(13, dtype=torch.int64))
    assert result.diagnostics["num_zero_gradient"] == 3  # 0, 6 and 12


@pytest.mark.parametrize("name", ["joint-pgd", "pgd"])
def test_saturated_logits_have_a_slope(name: str, make_model, make_images) -> None:
    model, x = make_model("deq-fc", dtype=torch.float32, rtol=1e-5), make_images(8, torch.float32)
    attack = build_attack(name, Threat(Norm.L2, 0.3), {"objective": "cross-entropy", "stop_at_success": False})
    with torch.no_grad():
        y = model(x).argmax(1)
        plain = attack(model, x, y)
        model.readout.weight.mul_(1e5)
        model.readout.bias.mul_(1e5)
    sure = attack(model, x, y)
    assert sure.diagnostics["num_zero_gradient"] == plain.diagnostics["num_zero_gradient"] == 0
    torch.testing.assert_close(sure.delta, plain.delta, rtol=0, atol=5e-3)


class Lagging(JointFMN):
    """All of its states lag at the end of the search."""

    def climb(self, model: EquilibriumModel, batch: Batch, *rest: Any) -> Proposal:
        search = self.search

        def lagging(*args: Any) -> Optimum:
            self.first = search(*args)._replace(residual=torch.ones(len(batch)).double())
            vars(self).pop("search")  # attacks with full solves are what they are
            return self.first

        self.search = lagging  # type: ignore[method-assign]  # for this one call
        return super().climb(model, batch, *rest)


def test_the_smallest_norm_that_is_found_is_kept_though_the_state_lags(make_model, make_images) -> None:
    """A full solve for each of many steps would find a success of a larger norm."""
    model, x = make_model("test-linear"), make_images(8)
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = Lagging(Threat(Norm.L2, 0.2), steps=60)
    result = attack(model, x, y)
    has_success = attack.first.loss > 0
    assert 0 < int(has_success.sum()) < 8
    assert result.diagnostics["num_finished"] == int((~has_success).sum())
    torch.testing.assert_close(result.delta[has_success], attack.first.variable[has_success], rtol=1e-6, atol=1e-8)
