"""What a family's config may choose: a size, normalisations, and how `forward` solves and is differentiated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit, Neumann, Phantom, Unrolled, jacobian_free
from robustbench_deq.configs import validate
from robustbench_deq.errors import UsageError
from robustbench_deq.models import FAMILIES, MODELS, load_folder, load_model, save_model
from robustbench_deq.models.base import SizedConfig
from robustbench_deq.solvers import SOLVERS, Anderson, Broyden, CellMap, Picard, Solve
from robustbench_deq.specs import AdjointSpec, SolveSpec
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.session import TrainingSession

SIZED = [
    (family, size)
    for family in FAMILIES
    if issubclass(FAMILIES.get(family).config_type, SizedConfig)
    for size in FAMILIES.get(family).config_type.sizes
]
QUARTER_OF_BASE = {
    "size": "base",
    "channels": (8, 16, 32, 64),
    "head_channels": (4, 8, 14, 28),
    "groups": 4,
    "expansion": 5,
}
NORMALISED = pytest.mark.parametrize(
    ("family", "config"),
    [
        ("deq-fc", {"groups": 2, "hidden": 16, "init_norm": 0.3}),
        ("deq-fc", {"has_weight_norm": True}),
        ("deq-fc", {"groups": 1, "hidden": 16, "init_norm": 0.3, "has_weight_norm": True}),
        ("deq-conv", {"groups": 0}),
        ("deq-conv", {"has_weight_norm": True}),
        ("deq-conv", {"groups": 0, "has_weight_norm": True}),
        ("mdeq", {"has_weight_norm": True}),
        ("mdeq", QUARTER_OF_BASE),
    ],
)


def config_of(family: str, **values: object):
    return validate(FAMILIES.get(family).config_type, {"input_shape": (1, 8, 8), **values}, f"model {family}")


# ---------------------------------------------------------------- sizes


def test_the_sizes_are_those_that_were_asked_for() -> None:
    assert [size for family, size in SIZED if family == "deq-fc"] == ["tiny", "small", "base"]
    assert [size for family, size in SIZED if family == "deq-conv"] == ["tiny", "small", "base"]
    assert config_of("mdeq", size="small").channels == (24, 24)
    assert config_of("mdeq", size="base").channels == (32, 64, 128, 256)


@pytest.mark.parametrize(("family", "size"), SIZED)
def test_a_size_gives_what_is_not_given_itself(family: str, size: str) -> None:
    settings = FAMILIES.get(family).config_type.sizes[size]
    config = config_of(family, size=size, pixel_mean=0.25)
    assert {key: getattr(config, key) for key in settings} == settings and config.pixel_mean == 0.25
    assert config_of(family, **config.model_dump(mode="json")) == config


def test_a_key_overrides_its_size() -> None:
    config = config_of("deq-conv", size="tiny", channels=32)
    assert (config.size, config.channels, config.groups) == ("tiny", 32, 4)


@pytest.mark.parametrize("family", ["deq-fc", "deq-conv", "mdeq"])
def test_the_default_is_the_small_size(family: str) -> None:
    assert config_of(family, size="small").model_copy(update={"size": None}) == config_of(family)


@pytest.mark.parametrize(("family", "size"), SIZED)
def test_every_size_builds_solves_and_reads_out(family: str, size: str, make_images) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES.get(family).build(config_of(family, size=size)).eval()
    with torch.no_grad():
        solution = model.equilibrium(make_images(2, torch.float32, shape=(1, 8, 8)))
        logits = model.head(solution.value)
    assert bool(solution.is_converged.all())
    assert logits.shape == (2, 10) and bool(torch.isfinite(logits).all())
    assert float((logits[0] - logits[1]).abs().max()) > 1e-4


def test_four_branches_halve_the_resolution_thrice() -> None:
    model = FAMILIES.get("mdeq").build(config_of("mdeq", size="base", input_shape=(3, 32, 32)))
    assert model.sizes == [(32, 32), (16, 16), (8, 8), (4, 4)]
    assert model.initial_state(torch.zeros(1)).shape == (1, 32 * 32**2 + 64 * 16**2 + 128 * 8**2 + 256 * 4**2)


def test_a_training_config_may_name_a_size() -> None:
    spec = {"family": "deq-conv", "config": {"size": "tiny", "init_scale": 0.25}}
    config = validate(TrainingConfig, {"name": "mine", "model": spec, "train_limit": 64}, "here")
    model = TrainingSession(config, "", None, None, None, torch.device("cpu")).build_model()
    assert (model.config.channels, model.config.groups, model.config.init_scale) == (16, 4, 0.25)
    assert model.conv_1.weight.shape == (16, 16, 3, 3)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("huge", "model deq-fc: size: expected one of tiny, small, base, got 'huge'; correct it"),
        (3, "size: expected a valid string, got 3"),
        (["tiny"], "size: expected a valid string"),
    ],
)
def test_a_size_that_is_none_is_refused(size: object, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_of("deq-fc", size=size)
    assert said in str(caught.value)
    with pytest.raises(UsageError, match="unknown key 'size'"):
        config_of("mondeq-fc", size="tiny")


# ---------------------------------------------------------------- normalisations


@NORMALISED
def test_normalised_model_has_the_right_gradient_and_rows_of_its_own(family, config, make_model, make_images) -> None:
    model, x = make_model(family, **config), make_images(3)
    weights = torch.linspace(-1, 1, 3, dtype=x.dtype)

    def loss(images: Tensor) -> Tensor:
        return (model(images) * weights).sum()

    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf), leaf)[0]
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    step = 1e-7  # longer ones cross kinks of relu
    with torch.no_grad():
        slope = float(loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        torch.testing.assert_close(model(x[1:2])[0], model(x)[1], rtol=1e-8, atol=1e-9)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-7) and abs(slope) > 1e-4
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


@NORMALISED
def test_normalised_model_comes_back(family, config, make_model, tmp_path: Path) -> None:
    model = make_model(family, dtype=torch.float32, **config)
    save_model(model, tmp_path, "mine")
    again = load_folder(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@NORMALISED
def test_normalised_model_reaches_its_equilibrium(family, config, make_model, make_images) -> None:
    model, x = make_model(family, **config), make_images(3)
    with torch.no_grad():
        solution = model.equilibrium(x)
        assert bool(solution.is_converged.all())
        torch.testing.assert_close(model.cell(solution.value, model.inject(x)), solution.value, rtol=1e-8, atol=1e-9)


@NORMALISED
def test_normalised_cell_has_forward_derivatives(family, config, make_model, make_images) -> None:
    model = make_model(family, **config)
    with torch.no_grad():
        u = model.inject(make_images(2))
        z, step = model.equilibrium(make_images(2)).value, 1e-7
        tangent = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
        slope = (model.cell(z + step * tangent, u) - model.cell(z - step * tangent, u)) / (2 * step)
    torch.testing.assert_close(CellMap(model.cell, u).jvp(z, tangent), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["deq-fc", "deq-conv"])
def test_weight_norm_changes_the_parameters_and_not_the_model(family: str, make_model, make_images) -> None:
    plain, normed = make_model(family), make_model(family, has_weight_norm=True)
    x = make_images(2)
    with torch.no_grad():
        torch.testing.assert_close(normed(x), plain(x), rtol=1e-5, atol=1e-6)
    layer = normed.recurrence if family == "deq-fc" else normed.conv_1
    norms = layer.parametrizations.weight.original0
    with torch.no_grad():
        norms.mul_(0.5)
        torch.testing.assert_close(
            torch.linalg.vector_norm(layer.weight.flatten(1), dim=1), norms.flatten(), rtol=1e-6, atol=0
        )


def test_group_norm_follows_its_equation(make_model, make_images) -> None:
    model, x = make_model("deq-fc", groups=2, hidden=16, init_norm=0.3), make_images(3)
    with torch.no_grad():
        z, u = model.equilibrium(x).value, model.inject(x)
        halves = torch.tanh(z @ model.recurrence.weight.mT + u).view(3, 2, 8)
        centred = halves - halves.mean(2, keepdim=True)
        expected = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(z, expected.view(3, 16), rtol=1e-7, atol=1e-9)
    conv = make_model("deq-conv", groups=0)
    with torch.no_grad():
        u = conv.inject(x)
        torch.testing.assert_close(conv.cell(u, u), torch.relu(u + conv.conv_2(torch.relu(conv.conv_1(u)))))


def test_defaults_have_the_names_of_shipped_weights() -> None:
    for name in ("deq-fc.digits-standard", "deq-conv.digits-standard"):
        model = load_model(name)
        fresh = FAMILIES.get(model.family).build(model.config)
        assert not any("parametrizations" in key for key in fresh.state_dict())
        assert {key: value.shape for key, value in fresh.state_dict().items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }


@pytest.mark.parametrize(
    ("family", "values", "said"),
    [
        ("deq-fc", {"groups": 7}, r"expected hidden \(128\) that is a multiple of groups \(7\)"),
        ("deq-fc", {"groups": 128}, r"expected fewer groups than hidden \(128\)"),
        ("mdeq", {"head_channels": (3, 3)}, r"4 \* head_channels \(3, 3\) to be multiples of groups \(8\)"),
        ("unrolled", {"cell_config": {"num_classes": 5}}, "no num_classes, which belongs beside cell_config"),
        ("deq-conv", {"groups": 7}, r"expected channels \(48\) that are a multiple of 2 \* groups \(14\)"),
        ("deq-conv", {"groups": 0, "channels": 7}, r"expected channels \(7\) that are a multiple of 2"),
        ("deq-conv", {"groups": -1}, "groups: expected greater than or equal to 0"),
    ],
)
def test_groups_that_do_not_divide_are_refused(family: str, values: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        config_of(family, **values)


# ---------------------------------------------------------------- solver and adjoint


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_config_chooses_how_forward_solves_and_is_differentiated(family: str, tmp_path: Path, make_model) -> None:
    chosen = make_model(
        family, solve=SolveSpec(solver="picard", tolerance=1e-2, max_steps=7), adjoint=AdjointSpec(name="phantom")
    )
    model = FAMILIES.get(family).build(chosen.config)
    save_model(model, tmp_path, "mine")
    for found in (model, load_folder(tmp_path)):
        assert found.solve == Solve(Picard(), rtol=1e-2, max_steps=7)
        assert found.adjoint == Phantom()
    plain = FAMILIES.get(family).build(make_model(family).config)
    if plain.is_explicit:
        assert (plain.solve, plain.adjoint) == (Solve(Picard(), max_steps=2), jacobian_free())
    else:
        assert (plain.solve, plain.adjoint) == (Solve(Anderson()), Implicit())


def test_forward_uses_what_its_config_names(make_model, make_images) -> None:
    seeded = make_model("deq-fc", solve=SolveSpec(solver="picard", tolerance=1e-12, max_steps=3))
    model, x = FAMILIES.get("deq-fc").build(seeded.config).double(), make_images(2)
    model.load_state_dict(seeded.state_dict())
    with torch.no_grad():
        u = model.inject(x)
        z = model.initial_state(u)
        for _ in range(2):  # the third evaluation measures the residual
            z = model.cell(z, u)
        assert model.equilibrium(x).num_steps.tolist() == [3, 3]
        torch.testing.assert_close(model(x), model.head(z))


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_call_overrides_the_solver(solver: str, make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(2)
    chosen = Solve(SOLVERS.get(solver)(), rtol=1e-9, max_steps=300)
    model.solve = Solve(Picard(), rtol=1e-1, max_steps=1)
    with torch.no_grad():
        assert not bool(model.equilibrium(x).is_converged.any())
        solution = model.equilibrium(x, solve=chosen)
        z = solution.value
        torch.testing.assert_close(model.cell(z, model.inject(x)), z, rtol=1e-7, atol=1e-8)
    assert bool(solution.is_converged.all())


@pytest.mark.parametrize("adjoint", [Implicit(Solve(Anderson(), rtol=1e-12)), Neumann(3), Phantom(2), Unrolled(5)])
def test_a_call_overrides_the_adjoint(adjoint, make_model, make_images) -> None:
    """The gradient of a call with an adjoint is that of a model that has it; an exact and a rough one differ."""
    model, x = make_model("deq-fc"), make_images(2)
    model.adjoint = Neumann(1)

    def gradient(**how: object) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model.head(model.equilibrium(leaf, **how).value).square().sum(), leaf)[0]

    rough, called = gradient(), gradient(adjoint=adjoint)
    assert float((rough - called).abs().max()) > 1e-6
    model.adjoint = adjoint
    assert torch.equal(gradient(), called)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"solve": {"solver": "andersen"}}, "solve.solver: unknown solver: expected one of anderson"),
        ({"solve": {"tolerance": 0}}, "solve.tolerance: expected greater than 0, got 0"),
        ({"solve": {"stepz": 1}}, "unknown key 'solve.stepz'"),
        ({"adjoint": {"name": "implizit"}}, "adjoint.name: unknown adjoint: expected one of implicit"),
        ({"adjoint": {"name": "phantom", "solve": {}}}, "expected no solve with the adjoint phantom"),
        ({"adjoint": {"num_steps": 3}}, "expected no num_steps with the adjoint implicit"),
        ({"adjoint": {"name": "jacobian-free", "num_steps": 3}}, "no num_steps with the adjoint jacobian-free"),
        ({"adjoint": {"name": "neumann", "damping": 0.5}}, "no damping with the adjoint neumann"),
        (
            {"adjoint": {"name": "phantom", "damping": 1.5}},
            "adjoint.damping: expected less than or equal to 1, got 1.5",
        ),
        (
            {"solve": {"settings": {"histroy_size": 3}}},
            "solve: expected settings of anderson among history_size, damping, ridge, patience, and no 'histroy_size'",
        ),
        ({"solve": {"solver": "picard", "settings": {"ridge": 1}}}, "settings of picard among damping, and no 'ridge'"),
        ({"solve": {"settings": {"kind": 7}}}, "and no 'kind'"),
        ({"solve": {"settings": {"history_size": 2.5}}}, "an integer >= 1 as the setting history_size, and not 2.5"),
        ({"solve": {"settings": {"history_size": 0}}}, "an integer >= 1 as the setting history_size, and not 0"),
        ({"solve": {"settings": {"history_size": True}}}, "as the setting history_size, and not True"),
        ({"solve": {"settings": {"damping": -0.5}}}, "a number >= 0 as the setting damping, and not -0.5"),
        ({"solve": {"settings": {"damping": "much"}}}, "a number >= 0 as the setting damping, and not 'much'"),
        ({"solve": {"settings": {"damping": float("inf")}}}, "solve.settings.damping.float: expected a finite number"),
        ({"solve": {"settings": [3]}}, "solve.settings: expected a valid dictionary"),
    ],
)
def test_solves_and_adjoints_that_are_none_are_refused(values: dict, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_of("deq-fc", **values)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_sets_its_solver_up(make_model, tmp_path: Path) -> None:
    values = {"solver": "anderson-1", "settings": {"history_size": 3, "damping": 0.8, "ridge": 0}}
    backward = {"solver": "broyden", "settings": {"history_size": 4}}
    config = make_model("deq-fc", solve=values, adjoint={"solve": backward}).config
    save_model(FAMILIES.get("deq-fc").build(config), tmp_path, "mine")
    model = load_folder(tmp_path)
    assert model.solve == Solve(Anderson(kind=1, history_size=3, damping=0.8, ridge=0.0))
    assert model.adjoint == Implicit(Solve(Broyden(history_size=4)))


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS.get(name).folder])
def test_shipped_models_that_name_no_solve_have_the_default_one(name: str) -> None:
    model = load_model(name)
    if not model.is_explicit:
        assert (model.solve, model.adjoint) == (Solve(Anderson(), rtol=1e-4, max_steps=100), Implicit())
