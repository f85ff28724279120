"""What a joint step costs beyond one bare evaluation of the cell and one bare VJP of the same batch.

    python -m benchmarks.step_overhead

Bare: `f = cell(z, inject(x + delta))` with a graph, then `autograd.grad(f, [z, delta], mu)`. A joint step adds the
head and the loss, both residual norms, the input step with its projection, the kept iterate, and the meter. Target: at
most 1.15. The bare step's own parts stand beside it: a joint step pays the injection and its gradient every time, a
sequential attack once per gradient step, so where the injection is dear a VJP of the former costs more seconds.
"""

from __future__ import annotations

import click
import torch

from benchmarks.timing import alternate, keep
from robustbench_deq.attacks import JointPGDConfig
from robustbench_deq.data import load
from robustbench_deq.meter import Meter
from robustbench_deq.models import MODELS, load_model
from robustbench_deq.optimise import Classification, Norm, ProjectedAscent, Settled, optimise
from robustbench_deq.protocol import frozen
from robustbench_deq.threats import Threat

STEPS = JointPGDConfig().steps


@click.command()
@click.option("--repeats", default=15, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--models", "pattern", default="*-*.*-*", show_default=True)
def main(repeats: int, batch_size: int, pattern: str) -> None:
    rows = []
    for name in MODELS.list(pattern):
        model, data = load_model(name), load("fashion-mnist" if "fashion" in name else "digits", limit=batch_size)
        config = JointPGDConfig(steps=STEPS, has_fallback=False)  # without the estimate before the first step
        problem = Classification(model, data.x, config.bind(data.y, None))
        parts = (config.source(), Threat(Norm.L2, 1.0).ball(data.x), ProjectedAscent(1.0), config.highest_loss())
        with frozen(model), Meter(model):
            u = model.inject(data.x)
            z = model.initial_state(u)
            mu, delta = torch.randn_like(z), torch.zeros_like(data.x)

            def bare(z=z, mu=mu, delta=delta, model=model, x=data.x) -> None:
                for _ in range(STEPS):
                    a, b = z.detach().requires_grad_(), delta.detach().requires_grad_()
                    torch.autograd.grad(model.cell(a, model.inject(x + b)), [a, b], mu)

            def joint(z=z, delta=delta, problem=problem, parts=parts) -> None:
                settled = Settled(z, torch.zeros_like(z), torch.ones(len(z)))
                optimise(problem, *parts, delta, num_steps=STEPS, settled=settled)

            def injection(u=u, delta=delta, model=model, x=data.x) -> None:
                for _ in range(STEPS):
                    b = delta.detach().requires_grad_()
                    torch.autograd.grad(model.inject(x + b), b, u)

            def cell(z=z, mu=mu, u=u, model=model) -> None:
                for _ in range(STEPS):
                    a = z.detach().requires_grad_()
                    torch.autograd.grad(model.cell(a, u), a, mu)

            joint_seconds, bare_seconds, ratio = alternate(joint, bare, repeats)
            injection_seconds, cell_seconds, _ = alternate(injection, cell, repeats)
        rows.append(
            {
                "model": name,
                "joint step (ms)": round(1e3 * joint_seconds / STEPS, 3),
                "bare evaluation and VJP (ms)": round(1e3 * bare_seconds / STEPS, 3),
                "ratio": str(ratio),
                "injection and its VJP (ms)": round(1e3 * injection_seconds / STEPS, 3),
                "cell and its VJP (ms)": round(1e3 * cell_seconds / STEPS, 3),
            }
        )
    keep(
        "step_overhead",
        f"Cost of one joint step, batch of {batch_size}",
        rows,
        {"rounds": repeats, "steps a round": STEPS, "joint step includes": "its share of the last, graph-free look"},
    )


if __name__ == "__main__":
    main()
