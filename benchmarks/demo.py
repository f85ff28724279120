"""The demo: a shipped DEQ on embedded data, attacked by joint, warm and cold PGD side by side, and a page to look at.

make demo        or        python -m benchmarks.demo --out results/demo
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from benchmarks.timing import make_attack, say
from robustbench_deq.data import Split, load
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.evaluation import Evaluation, evaluate
from robustbench_deq.files import output_folder, whole_folder
from robustbench_deq.models import describe_model, load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import Attack
from robustbench_deq.records.images import choose_images, save_images
from robustbench_deq.records.store import RecordStore
from robustbench_deq.report.pages.report import write_report
from robustbench_deq.report.supplements import GalleryRow, read_supplements
from robustbench_deq.report.tables.summary import Format, render, summary_table
from robustbench_deq.threats import Threat

MODELS = ("deq-conv.digits-standard", "deq-conv.digits-joint-l2", "mondeq-fc.digits-joint-l2")
DATA, EPSILON = "digits", 0.5
DEFAULT_OUT = Path("results/demo")


def demo_attacks(threat: Threat) -> dict[str, Attack]:
    return {
        "joint PGD": make_attack("joint-pgd", threat),
        "warm PGD-10": make_attack("pgd", threat, steps=10, tolerance=5e-2, schedule="cosine", step_size=1.0),
        "cold PGD-20": make_attack("pgd", threat, steps=20, tolerance=1e-3, warm_start=False),
        "torchattacks PGDL2-20": make_attack("torchattacks-pgdl2", threat),
        "noise": make_attack("noise", threat),
    }


def gallery_of(result: Evaluation, data: Split, count: int) -> list[GalleryRow]:
    """Images that were classified correctly until they were perturbed."""
    samples = result.samples
    fooled = samples[samples["is_clean_correct"] & ~samples["is_robust"] & samples["is_converged"]].index[:count]
    return [
        GalleryRow(
            clean=data.x[i].numpy(),
            perturbation=(result.x_adv[i] - data.x[i]).numpy(),
            adversarial=result.x_adv[i].numpy(),
            label=str(samples["label"][i]),
            clean_prediction=str(samples["clean_prediction"][i]),
            adversarial_prediction=str(samples["adversarial_prediction"][i]),
        )
        for i in fooled
    ]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=DEFAULT_OUT, show_default=True)
@click.option("--limit", default=128, show_default=True)
def main(out: Path, limit: int) -> None:
    if out == DEFAULT_OUT:
        shutil.rmtree(out, ignore_errors=True)  # the demo's own folder: it is made again each time
    try:
        with output_folder(out):
            run(out, limit)
    except UsageError as error:
        raise click.UsageError(str(error)) from None


def run(out: Path, limit: int) -> None:
    data, threat = load(DATA, limit=limit), Threat(Norm.L2, EPSILON)
    store = RecordStore(out / "records")
    records, gallery = [], []
    for name in MODELS:
        model, sha256 = load_model(name), describe_model(name).sha256
        evaluate(model, make_attack("joint-pgd", threat, steps=1), data)  # the first call of a process is slower
        for label, attack in demo_attacks(threat).items():
            say(f"{name}: {label}")
            result = evaluate(model, attack, data, model_name=name, label=label, num_snapshots=8, model_sha256=sha256)
            store.append(result.record, result.samples)
            images = choose_images(result.samples, data.x.numpy(), result.x_adv.numpy())
            save_images(store.folder, result.record.record_id, images)
            records.append(result.record)
            if label == "joint PGD" and name.endswith("joint-l2") and not gallery:
                gallery = gallery_of(result, data, 6)
    with whole_folder(out / "report") as folder:
        cards = {name: describe_model(name).model_dump(mode="json") for name in MODELS}
        write_report(records, folder, gallery, read_supplements({store.folder: records}, cards))
    print(render(summary_table(records), Format.MARKDOWN))
    print(f"The page: {out / 'report' / 'index.html'}")


if __name__ == "__main__":
    main()
