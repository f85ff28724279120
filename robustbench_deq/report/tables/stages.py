"""The stages of a standard evaluation: what each was left, what it broke, what it cost."""

from __future__ import annotations

import pandas as pd

from robustbench_deq.records.record import Record
from robustbench_deq.report.tables.text import MISSING, amount, percent


def stage_frame(record: Record) -> pd.DataFrame:
    """A row a stage, as texts; empty where the record is none of a standard evaluation.

    `robust` is of all samples, after the stage, in percent. Evaluations and VJPs are means over the samples that the
    stage attacked; seconds are those of the stage. A last row has what the last verdict on all images took away.
    """
    count, rows = record.data.num_samples, []
    num_left = round(record.clean_accuracy * count)
    for stage in record.stages or ():
        num_left -= stage.num_broken
        each = count / stage.num_attacked if stage.num_attacked else 0.0
        rows.append(
            {
                "stage": stage.name,
                "attacked": str(stage.num_attacked),
                "broken": str(stage.num_broken),
                "robust (%)": percent(num_left / count),
                "evaluations": amount(stage.cell_evals * each),
                "VJPs": amount(stage.cell_vjps * each),
                "seconds": amount(stage.wall_seconds),
            }
        )
    num_robust = round(record.robust_accuracy * count)
    if rows and num_robust != num_left:  # the judge looks at all images once more at the end
        last = {"stage": "last verdict", "attacked": MISSING, "broken": str(num_left - num_robust)}
        costs = dict.fromkeys(("evaluations", "VJPs", "seconds"), MISSING)
        rows.append(last | {"robust (%)": percent(record.robust_accuracy)} | costs)
    return pd.DataFrame(rows)
