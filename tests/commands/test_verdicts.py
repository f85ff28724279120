"""What commands print of the sanity panel."""

from __future__ import annotations

from robustbench_deq.attacks import build_attack
from robustbench_deq.commands.verdicts import flag_lines
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.threats import Threat
from tests.evaluate.patients import Sound, labelled


def test_flags_are_printed_with_what_they_mean() -> None:
    model = Sound()
    record = evaluate(model, build_attack("noise", Threat("l2", 0.1), {}), labelled(model, 4)).record
    assert flag_lines(record) == []
    assert flag_lines(record.model_copy(update={"probes": {}})) == ["flags             none raised"]
    warned = record.model_copy(update={"probes": {}, "num_unconverged": 4})
    (line,) = flag_lines(warned)
    assert line.startswith("flag              unconverged: they count as not robust")
    *_, line, last = flag_lines(record.model_copy(update={"probes": {"repeat_gap": 1.0}}))
    assert line.startswith("red flag          random output: the model draws at random")
    assert last.endswith("unreliable: it is not ranked")
