"""The doctor finds every defect in a model that has it, says how to fix it, and finds none in a sound one."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustbench_deq.adjoints import Implicit
from robustbench_deq.attacks import build_attack
from robustbench_deq.data import Split, SplitName
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate import doctor
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.doctor import Finding, Grade, examine
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import FAMILIES
from robustbench_deq.optimise import Classification, Joint, Norm
from robustbench_deq.optimise.objectives import Margin
from robustbench_deq.records.record import Record
from robustbench_deq.solvers import SOLVERS, Anderson, Picard, Solve
from robustbench_deq.threats import Threat
from tests.evaluate.patients import Sound, having, labelled

CHECKS = ["parts", *doctor.NEAR_THE_START, "equilibrium", *doctor.AT_EQUILIBRIA]
GOOD, NOTE, BAD = Grade.GOOD, Grade.NOTE, Grade.BAD


SAMPLES = labelled(Sound())


def found_in(model: EquilibriumModel, data: Split = SAMPLES) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(model, data)}


def bad_in(model: EquilibriumModel) -> list[str]:
    findings = found_in(model)
    assert all(finding.fix for finding in findings.values() if finding.grade is not GOOD)
    return [check for check, finding in findings.items() if finding.is_bad]


def assert_all_but_these_left_out(findings: list[Finding], grades: dict[str, Grade]) -> None:
    """Every check is listed, those in `grades` with these, the others with what to fix first: the only bad one."""
    (cause,) = [finding.check for finding in findings if finding.is_bad]
    assert [finding.check for finding in findings] == CHECKS
    for finding in findings:
        if finding.check in grades:
            assert finding.grade is grades[finding.check] and finding.found != "not examined"
        else:
            assert finding[:3] == (NOTE, "not examined", f"fix {cause} first")


# ---------------------------------------------------------------- sound models


def test_a_sound_model_gets_one_good_finding_a_check() -> None:
    findings = examine(Sound(), SAMPLES)
    assert [finding.check for finding in findings] == CHECKS
    assert {finding.grade for finding in findings} == {GOOD}
    by_check = {finding.check: finding.found for finding in findings}
    assert by_check["accuracy"] == f"100% of {doctor.NUM_IMAGES} images"
    assert "spectral radius 0.50, at most 0.50" in by_check["contraction"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_registered_family_has_a_bad_finding(family: str, make_model) -> None:
    model = make_model(family, torch.float32, rtol=1e-5)
    findings = examine(model, labelled(model, 8))
    assert [finding.check for finding in findings] == CHECKS
    assert [finding for finding in findings if finding.is_bad] == []


def test_the_model_and_the_global_state_are_left_as_they_were() -> None:
    model = having(cell=lambda self, z, u: self.norm(z @ self.a + torch.rand(()) * u)).train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    examine(model, SAMPLES)
    assert model.training and model.drop.training and not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: {"x": data.x[:, :, :3]}, "expected a float tensor (batch, 1, 4, 4)"),
        (lambda data: {"x": 255 * data.x}, "expected pixels in [0, 1]"),
        (lambda data: {"y": data.y + 3}, "labels: expected classes 0 to 2"),
    ],
)
def test_data_that_do_not_fit_are_the_callers_mistake(change: Callable, said: str) -> None:
    changed = {**vars(SAMPLES), **change(SAMPLES)}
    with pytest.raises(UsageError) as caught:
        examine(Sound(), Split(**changed))
    assert said in str(caught.value)


# ---------------------------------------------------------------- parts


def fails(*_: object) -> Tensor:
    raise RuntimeError("no such weights\nsecond line")


@pytest.mark.parametrize("name", ["inject", "initial_state", "cell", "head"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (fails, "raises RuntimeError: no such weights"),
        (lambda output: output.log() / 0, "gives NaN or infinity"),
        (lambda output: (output, output), "gives tuple"),
        (lambda output: output[:1], "gives (1, "),
        (lambda output: output.sum(), "gives ()"),
    ],
    ids=["raises", "nan", "tuple", "one row", "scalar"],
)
def test_a_part_that_does_not_work_is_named(name: str, spoil: Callable, said: str) -> None:
    whole = getattr(Sound, name)
    findings = examine(having(**{name: lambda self, *parts: spoil(whole(self, *parts))}), SAMPLES)
    assert_all_but_these_left_out(findings, {"parts": BAD})
    assert f"{name} {said}" in findings[0].found and "second line" not in findings[0].found
    assert findings[0].fix


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"cell": lambda self, z, u: torch.cat([z, u], 1)}, "cell gives (32, 12)"),
        ({"head": lambda self, z: z}, "head gives (32, 6)"),
    ],
)
def test_a_part_of_the_wrong_width_is_named(methods: dict, said: str) -> None:
    findings = examine(having(**methods), SAMPLES)
    assert_all_but_these_left_out(findings, {"parts": BAD})
    assert findings[0].found == said


def test_a_model_without_its_shape_is_told_so() -> None:
    class Shapeless(EquilibriumModel):
        inject, cell, head, initial_state = Sound.inject, Sound.cell, Sound.head, Sound.initial_state

    findings = examine(Shapeless(), SAMPLES)
    assert_all_but_these_left_out(findings, {"parts": BAD})
    assert findings[0].found == "no input_shape and no num_classes"


# ---------------------------------------------------------------- near the start


def remembers(self: Sound, x: Tensor) -> Tensor:
    self.calls += 1
    return Sound.inject(self, x) + self.size * self.calls


def test_dropout_that_eval_mode_does_not_stop_is_caught_and_the_only_cause() -> None:
    findings = examine(having(inject=lambda self, x: F.dropout(Sound.inject(self, x), 0.3)), SAMPLES)
    assert_all_but_these_left_out(findings, {"parts": GOOD, "deterministic": BAD})
    assert "inject" in findings[1].fix


@pytest.mark.parametrize(("size", "grade"), [(0.1, BAD), (1e-6, NOTE), (0.0, GOOD)])
def test_what_is_kept_between_calls_is_caught(size: float, grade: Grade) -> None:
    assert found_in(having(inject=remembers, size=size))["deterministic"].grade is grade


def test_a_state_that_forward_keeps_is_caught() -> None:
    def forward(self: Sound, x: Tensor) -> Tensor:
        self.kept = self.equilibrium(x, getattr(self, "kept", None)).value
        return self.head(self.kept)

    finding = found_in(having(forward=forward))["deterministic"]
    assert finding.grade is not GOOD and finding.found.startswith("forward")


@pytest.mark.parametrize(
    ("cell", "is_noted"),
    [
        (lambda self, z, u: self.drop(z @ self.a + u), True),
        (lambda self, z, u: self.norm(z @ self.a + u), True),
        (lambda self, z, u: F.dropout(z @ self.a + u, 0.5, training=False), False),
    ],
    ids=["dropout", "batch norm", "dropout switched off"],
)
def test_what_only_train_mode_does_is_a_note(cell: Callable, is_noted: bool) -> None:
    model = having(cell=cell)
    assert bad_in(model) == []
    finding = found_in(model)["modes"]
    assert (finding.grade is NOTE) == is_noted
    assert ("train mode changes cell" in finding.found) == is_noted


def batch_norm(self: Sound, z: Tensor) -> Tensor:
    return F.batch_norm(z, None, None, training=True)


@pytest.mark.parametrize(
    ("name", "spoiled"),
    [
        ("inject", lambda self, x: Sound.inject(self, x - x.mean())),
        ("inject", lambda self, x: batch_norm(self, Sound.inject(self, x))),
        ("cell", lambda self, z, u: (z - z.mean(0)) @ self.a + u),
        ("cell", lambda self, z, u: batch_norm(self, z @ self.a / 4 + u)),
        ("head", lambda self, z: Sound.head(self, z) - Sound.head(self, z).mean(0)),
        ("initial_state", lambda self, u: u.mean(0).expand(u.shape)),
    ],
)
def test_rows_that_interact_are_caught_and_the_part_is_named(name: str, spoiled: Callable) -> None:
    findings = examine(having(**{name: spoiled}), SAMPLES)
    finding = findings[CHECKS.index("batch")]
    modes = findings[CHECKS.index("modes")].grade
    assert_all_but_these_left_out(findings, {"parts": GOOD, "deterministic": GOOD, "modes": modes, "batch": BAD})
    assert f"batch mates change {name} by" in finding.found and name in finding.fix


def test_a_part_that_only_takes_one_size_of_batch_is_caught() -> None:
    assert bad_in(having(cell=lambda self, z, u: (z @ self.a).view(doctor.NUM_IMAGES, 6) + u)) == ["batch"]


def test_one_image_has_no_batch_mates() -> None:
    data = Split(**{**vars(SAMPLES), "x": SAMPLES.x[:1], "y": SAMPLES.y[:1]})
    findings = found_in(Sound(), data)
    assert findings["batch"].grade is NOTE
    assert not [finding for finding in findings.values() if finding.is_bad]


# ---------------------------------------------------------------- at equilibria


def flips(z: Tensor) -> Tensor:
    """No fixed point: every number is sent to one of the other sign."""
    return torch.where(z >= 0, -1.0, 1.0)


def test_a_cell_without_an_equilibrium_ends_the_examination() -> None:
    findings = examine(having(cell=lambda self, z, u: flips(z) + 0 * u), SAMPLES)
    assert_all_but_these_left_out(
        findings, {"parts": GOOD, "deterministic": GOOD, "modes": GOOD, "batch": GOOD, "equilibrium": BAD}
    )
    found = findings[CHECKS.index("equilibrium")].found
    assert found == "the judge finds one for 0 of 32 images (its solvers ran out of steps on 32)"


def test_images_without_an_equilibrium_are_counted_and_left_out() -> None:
    def cell(self: Sound, z: Tensor, u: Tensor) -> Tensor:
        return torch.where(u[:, :1] > 0, Sound.cell(self, z, u), flips(z))

    model = having(cell=cell)
    with torch.no_grad():
        num_sound = int((model.inject(SAMPLES.x[: doctor.NUM_IMAGES])[:, 0] > 0).sum())
    assert 0 < num_sound < doctor.NUM_IMAGES
    findings = found_in(model)
    assert bad_in(model) == ["equilibrium"]
    assert f"for {num_sound} of {doctor.NUM_IMAGES} images" in findings["equilibrium"].found
    assert findings["accuracy"].found == f"100% of {num_sound} images"


class NoJVP(torch.autograd.Function):
    """Twice the input, with a backward alone."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    def backward(ctx, v: Tensor) -> Tensor:
        return 2 * v


def test_a_cell_without_forward_mode_derivatives_is_sound() -> None:
    sound = found_in(having(cell=lambda self, z, u: NoJVP.apply(z / 2) @ self.a + u))
    assert sound["gradient"].grade is sound["solver"].grade is GOOD
    assert "newton-krylov" in sound["solver"].found
    unsound = found_in(having(cell=lambda self, z, u: flips(NoJVP.apply(z))))
    assert unsound["equilibrium"].is_bad and "finds one for 0 of" in unsound["equilibrium"].found
    assert unsound["solver"].fix == "fix equilibrium first"


def test_a_solver_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SOLVERS.get("newton-krylov"), "step", fails)
    finding = found_in(Sound())["solver"]
    assert finding.grade is NOTE and "newton-krylov raises" in finding.found and "any batch" in finding.fix


def test_a_forward_that_detaches_in_eval_mode_is_caught() -> None:
    def forward(self: Sound, x: Tensor) -> Tensor:
        logits = Sound.forward(self, x)
        return logits if self.training else logits.detach()

    model = having(forward=forward)
    assert bad_in(model) == ["forward"]
    assert found_in(model)["forward"].found == "no gradient in eval mode"


@pytest.mark.parametrize(
    ("forward", "grade", "said"),
    [
        (lambda self, x: Sound.forward(self, x).detach() + 0 * x.sum(), BAD, "no gradient"),
        (lambda self, x: Sound.forward(self, x) / 0, BAD, "NaN or infinity"),
        (lambda self, x: Sound.forward(self, x)[:3], BAD, "raises RuntimeError"),
        (fails, BAD, "raises RuntimeError: no such weights"),
        (lambda self, x: 1.5 * Sound.forward(self, x), NOTE, "logits 50.0% off"),
        (lambda self, x: 9 * Sound.forward(self, x), BAD, "0 of 32 predictions are not the equilibrium's; logits more"),
        (lambda self, x: 0.5 * Sound.forward(self, x).roll(1, 1), BAD, "another model: 32 of 32 predictions"),
        (lambda self, x: 2 * Sound.forward(self, x).detach() - Sound.forward(self, x), NOTE, "a cosine of -1.00"),
    ],
    ids=["zero", "nan", "shape", "raises", "other logits", "far logits", "other classes", "other gradient"],
)
def test_a_forward_that_is_not_the_models_is_caught(forward: Callable, grade: Grade, said: str) -> None:
    finding = found_in(having(forward=forward))["forward"]
    assert finding.grade is grade and said in finding.found


@pytest.mark.parametrize(("max_steps", "grade"), [(1, BAD), (5, NOTE), (30, GOOD)])
def test_a_forward_solved_loosely_is_noted_and_one_that_is_hardly_solved_is_bad(max_steps: int, grade: Grade) -> None:
    model = Sound()
    model.solve = Solve(Picard(), rtol=1e-5, max_steps=max_steps)
    finding = found_in(model)["forward"]
    assert finding.grade is grade
    assert ("model.solve" in finding.fix) == (grade is not GOOD)
    assert bad_in(model) == (["forward"] if grade is BAD else [])


class Expansive(Sound):
    """An equilibrium that the judge finds by Newton's method and `forward`, by plain iteration, runs away from."""

    solve = Solve(Picard(), rtol=1e-4, max_steps=30)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return u - 1.5 * z


def test_a_forward_that_does_not_reach_the_judges_equilibrium_is_another_model() -> None:
    data = labelled(having(cell=Expansive.cell))
    findings = found_in(Expansive(), data)
    assert [check for check, finding in findings.items() if finding.is_bad] == ["forward"]
    assert findings["forward"].found.startswith("another model: ")
    assert "model.solve" in findings["forward"].fix
    assert findings["accuracy"].fix == "fix forward first"


@pytest.mark.parametrize("name", ["inject", "cell", "head"])
def test_a_part_that_gives_no_gradient_is_told_once(name: str) -> None:
    whole = getattr(Sound, name)
    findings = found_in(having(**{name: lambda self, *parts: whole(self, *parts).detach()}))
    assert [check for check, finding in findings.items() if finding.is_bad] == ["gradient"]
    assert findings["forward"].fix == "fix gradient first"


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, v: Tensor) -> Tensor:
        return v


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"inject": lambda self, x: Sound.inject(self, x.detach())}, "none reaches the image"),
        ({"head": lambda self, z: Sound.head(self, z if self.training else z.detach())}, "none reaches the image"),
        ({"inject": lambda self, x: Sound.inject(self, (x * 8).round() / 8)}, "none reaches the image"),
        ({"inject": lambda self, x: Sound.inject(self, StraightThrough.apply(x))}, "finite differences differ"),
        ({"cell": lambda self, z, u: Sound.cell(self, z.detach(), u)}, "finite differences differ"),
        ({"head": lambda self, z: Sound.head(self, z.detach()) / 2 + Sound.head(self, z) / 2}, "differ by 50%"),
    ],
    ids=["injection detached", "head detached", "rounding", "straight-through", "state detached", "half of it"],
)
def test_a_part_without_its_gradient_is_caught(methods: dict, said: str) -> None:
    finding = found_in(having(**methods))["gradient"]
    assert finding.is_bad and said in finding.found


SEEN = SAMPLES.x[: doctor.NUM_IMAGES]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("from -1 to 1", lambda x: (x + 1) / 2),
        ("from 0 to 255", lambda x: x / 255),
        ("of mean 0 and deviation 1", lambda x: SEEN.mean() + SEEN.std() * x),
    ],
)
def test_a_model_for_pixels_of_another_range_is_caught(name: str, change: Callable) -> None:
    def wave(x: Tensor) -> Tensor:
        """Away from [0, 1] it goes up and down."""
        return torch.sin(5 * x) / 2 + 0.5

    sound = having(inject=lambda self, x: Sound.inject(self, wave(x)))
    data = labelled(sound)
    assert found_in(sound, data)["accuracy"].grade is GOOD
    finding = found_in(having(inject=lambda self, x: Sound.inject(self, wave(change(x)))), data)["accuracy"]
    assert finding.is_bad and name in finding.fix
    assert finding.found.endswith(f"but 100% for pixels {name}")


def test_chance_is_a_note_and_a_model_may_refuse_other_pixels() -> None:
    def inject(self: Sound, x: Tensor) -> Tensor:
        self.check_images(x.detach())
        return Sound.inject(self, x)

    model = having(inject=inject)
    assert found_in(model)["accuracy"].grade is GOOD
    shuffled = Split(**{**vars(SAMPLES), "y": (SAMPLES.y + 1) % 3})
    finding = found_in(model, shuffled)["accuracy"]
    assert finding.grade is NOTE and finding.found.startswith("0% of 32 images")


def test_a_cell_that_does_not_contract_is_a_note_with_its_radius() -> None:
    findings = found_in(having(cell=lambda self, z, u: u - 1.5 * z))
    assert findings["equilibrium"].grade is GOOD
    assert findings["contraction"].grade is NOTE
    assert "spectral radius 1.50, at most 1.50" in findings["contraction"].found
    assert "on 0% of the images" in findings["contraction"].found
    assert "picard" not in findings["solver"].found.replace("damped-picard", "")


def damped(weight: float) -> EquilibriumModel:
    return having(cell=lambda self, z, u: torch.lerp(z, z @ self.a + u, weight))


def attacked(model: EquilibriumModel, threat: Threat) -> Record:
    """The record of joint-pgd on the samples that the doctor looks at."""
    parts = (part[: doctor.NUM_IMAGES] for part in (SAMPLES.x, SAMPLES.y, SAMPLES.sample_ids))
    data = Split("mine", SplitName.VALIDATION, *parts, "")
    return evaluate(model, build_attack("joint-pgd", threat, {}), data).record


def test_a_fast_cell_has_no_plan() -> None:
    assert found_in(Sound())["contraction"].fix == ""


def test_a_slow_cell_is_relaxed_as_the_doctor_says() -> None:
    """`I - J` of the cell has a spectrum around 1, that of its damped copy one around the weight."""
    finding = found_in(damped(0.05))["contraction"]
    said = re.fullmatch(
        r"joint-pgd relaxes the states of (\d+) of (\d+) images, by (\S+) in the median(;.*)?", finding.fix
    )
    assert said and said[1] == said[2] == str(doctor.NUM_IMAGES)
    source = Joint(relaxes=True)
    model, x = damped(0.05), SAMPLES.x[: doctor.NUM_IMAGES]
    with torch.no_grad():
        settled = (
            judge_clean(model, x, SAMPLES.y[: doctor.NUM_IMAGES]).known(model, x, Margin(SAMPLES.y[: len(x)])).settled
        )
    problem = Classification(model, x, Margin(SAMPLES.y[: len(x)]))
    relaxation = source.start(problem, torch.zeros_like(x), settled).relaxation
    assert relaxation is not None and f"{float(relaxation.median()):.2g}" == said[3]
    plain = Sound()
    eigenvalues = torch.linalg.eigvals(torch.eye(6) - plain.a.detach()).abs()
    assert float(said[3]) == pytest.approx(1 / (0.05 * float(eigenvalues.max())), rel=0.05)


def test_hard_images_are_audited_as_the_doctor_says() -> None:
    """And not finished: a threat too small to fool anything."""
    model = having(cell=lambda self, z, u: u - 1.5 * z)
    finding = found_in(model)["contraction"]
    num = doctor.NUM_IMAGES
    plan = f"joint-pgd audits the {num} of {num} that are hard with full solves, and may finish with them"
    assert finding.grade is NOTE and finding.fix == f"{plan}; Jacobian regularisation helps"
    record = attacked(model, Threat(Norm.L2, 1e-4))
    assert record.num_attacked is not None and record.num_attacked > 10
    expected = {"num_audited": record.num_attacked, "num_audit_fooled": 0, "num_finished": 0}
    assert expected.items() <= record.diagnostics.items() and record.finished_by == "joint"


def test_what_is_not_hard_is_audited_in_a_share_alone() -> None:
    assert found_in(Sound())["contraction"].grade is GOOD
    record = attacked(Sound(), Threat(Norm.L2, 1e-4))
    assert record.num_attacked == doctor.NUM_IMAGES
    assert record.diagnostics["num_audited"] < doctor.NUM_IMAGES / 3 and record.diagnostics["num_finished"] == 0


def test_a_cell_that_ignores_its_state_contracts() -> None:
    findings = found_in(having(cell=lambda self, z, u: u))
    assert {finding.grade for finding in findings.values()} <= {GOOD, NOTE}
    assert "spectral radius 0.00" in findings["contraction"].found
    assert "takes 2 steps" in findings["contraction"].found


def test_solvers_are_ranked_by_cell_evaluations() -> None:
    found = found_in(having(cell=lambda self, z, u: u + 0.9 * z))["solver"].found
    listed = [entry.rsplit(" ", 1) for entry in found.split(": ")[1].split(", ")]
    counts = [int(count) for _, count in listed]
    assert counts == sorted(counts) and len(counts) > 3
    assert found.startswith(f"use {listed[0][0]};") and listed[0][0] not in ("picard", "damped-picard")


def test_a_good_solver_is_said_how_to_choose() -> None:
    finding = found_in(Sound())["solver"]
    best = finding.found.removeprefix("use ").split(";")[0]
    assert f"--set solver={best} " in finding.fix and f"model.solve = Solve(SOLVERS.get('{best}')())" in finding.fix


class Slow(Sound):
    """`f(z, u) = r Q z + u` with an orthogonal Q of 120 dimensions, whose spectrum fills the circle of radius r."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.linalg.qr(torch.randn(120, 120, generator=draw))[0])
        self.b = nn.Parameter(torch.randn(16, 120, generator=draw) / 4)
        self.c = nn.Parameter(torch.randn(120, 3, generator=draw))

    def radius(self, u: Tensor) -> Tensor | float:
        return 0.97

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self.radius(u) * (z @ self.a) + u


@pytest.fixture(scope="module")
def slow_findings() -> dict[str, Finding]:
    return found_in(Slow(), labelled(Slow()))


def test_no_quick_solver_is_a_note_that_names_the_judges(slow_findings: dict[str, Finding]) -> None:
    finding = slow_findings["solver"]
    assert finding.grade is NOTE and "max_steps" in finding.fix
    missed = finding.found.split("(missed: ")[1].split(")")[0].split(", ")
    assert sorted(missed) == sorted(f"{name} 32" for name in SOLVERS)
    assert "; the judge needs Broyden on 32 images (up to 1" in finding.found  # of 200 steps


def test_a_gradient_whose_adjoint_is_not_found_is_not_judged(slow_findings: dict[str, Finding]) -> None:
    finding = slow_findings["gradient"]
    assert (finding.grade, finding.found) == (NOTE, "not judged: its solves reach 1e-05 on none of 8 images")
    assert "contract" in finding.fix


def test_a_gradient_is_judged_where_its_adjoint_is_found() -> None:
    def radius(self: Slow, u: Tensor) -> Tensor:
        return torch.where(u[:, :1] > 0, 0.97, 0.5)

    def half(self: Slow, z: Tensor) -> Tensor:
        return Slow.head(self, z.detach()) / 2 + Slow.head(self, z) / 2

    model = having(Slow, radius=radius)
    data = labelled(model)
    with torch.no_grad():
        num_slow = int((model.inject(data.x[: doctor.NUM_DIFFERENTIATED])[:, 0] > 0).sum())
    assert 0 < num_slow < doctor.NUM_DIFFERENTIATED
    finding = found_in(model, data)["gradient"]
    assert finding.grade is NOTE and finding.found.startswith("finite differences agree to 0.")
    assert finding.found.endswith(f"on the {8 - num_slow} of 8 images whose solves reach 1e-05")
    finding = found_in(having(Slow, radius=radius, head=half), data)["gradient"]
    assert finding.is_bad and f"differ by 50% on the {8 - num_slow} of 8 images" in finding.found


def test_no_solver_that_runs_is_a_finding() -> None:
    class Choosy(Sound):
        """Works until its equilibria are known."""

        is_settled = False

        def cell(self, z: Tensor, u: Tensor) -> Tensor:
            if self.is_settled:
                raise RuntimeError("not again")
            return Sound.cell(self, z, u)

    model = Choosy()
    x = SAMPLES.x[:4]
    with torch.no_grad():
        case = doctor.Case(model, x, SAMPLES.y[:4], model.inject(x), model.equilibrium(x).value)
    model.is_settled = True
    grade, found, fix, _ = doctor._solver(case)
    assert grade is BAD and found.startswith("every solver raises; RuntimeError: not again, in ") and fix


def test_ranges_that_do_equally_well_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unseen = having(inject=lambda self, x: Sound.inject(self, torch.where((x < 0) | (x > 1), x - 3, 0.5)))
    monkeypatch.setattr(doctor, "RANGES", {"one": lambda x: x + 3, "none": lambda x: 0 * x, "other": lambda x: x + 3})
    finding = found_in(unseen)["accuracy"]
    assert finding.is_bad and finding.fix.endswith("pixels one or other")


def test_the_models_own_solver_and_adjoint_are_not_needed_for_the_gradient_of_the_parts() -> None:
    model = Sound()
    model.adjoint = Implicit(Solve(Anderson(), rtol=1.0, max_steps=1))
    assert found_in(model)["gradient"].grade is GOOD


def test_data_that_are_no_split_are_one_line(make_model) -> None:
    with pytest.raises(UsageError, match=r"^data: expected a Split, got 'digits'; pass for example load\("):
        examine(make_model("test-linear"), "digits")
