"""Diagnostics against closed forms on the affine cell."""

from __future__ import annotations

import pytest
import torch

from robustbench_deq.models.diagnostics import picard_solution, spectral_radius


@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_spectral_radius_is_the_largest_modulus_of_an_eigenvalue(angle: float, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with torch.no_grad():  # a leading real value, or a leading complex pair
        model.a.zero_()
        turn = torch.tensor([[torch.cos(torch.tensor(angle)), -torch.sin(torch.tensor(angle))],
                             [torch.sin(torch.tensor(angle)), torch.cos(torch.tensor(angle))]])  # fmt: skip
        model.a[:2, :2] = 0.8 * turn
        model.a[2, 3] = 0.5
        model.a[4, 4] = -0.3
        u = model.inject(x)
        z = model.equilibrium(x).value
    expected = float(torch.linalg.eigvals(model.a.detach()).abs().max())
    assert expected == pytest.approx(0.8, rel=1e-6)
    torch.testing.assert_close(spectral_radius(model, z, u), torch.full((3,), 0.8, dtype=x.dtype), rtol=1e-6, atol=0)


def test_picard_solution_counts_the_steps_of_plain_iteration(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with torch.no_grad():
        model.a.copy_(0.5 * torch.eye(5))
    solution = picard_solution(model, x, rtol=1e-3)
    # From z = 0 the residual halves: ||f(z_k) - z_k|| / ||f(z_k)|| = 2^-k / (2 - 2^-k) <= 1e-3 first at k = 9.
    assert solution.num_steps.tolist() == [10, 10, 10]
    assert bool(solution.is_converged.all())
    torch.testing.assert_close(solution.residual, torch.full((3,), 0.5**9 / (2 - 0.5**9), dtype=x.dtype))
