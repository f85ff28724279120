"""Flags: what casts doubt on a robust accuracy, as pure functions of a record.

A red flag makes it unreliable: gradients do not show the way, or the model is not a fixed function of the image, so
that a better attack may break far more. The others are a word of warning. Only records with a panel have flags: of
others nobody has looked at the model.

Where the model draws at random or lets the images of a batch interact, no other number of the panel is to be trusted,
and flags that rest on the panel alone wait until that is fixed: one cause is reported once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from robustbench_deq.records.record import Record, StageRecord

PROBES = {
    "num_probed": "images that the panel looked at, the first of the run",
    "repeat_gap": "largest change of what a part of the model returns in a second call, relative to its largest value",
    "batch_gap": "the same, when other images share the batch",
    "gradient_gap": "median relative difference between the implicit gradient and central finite differences",
    "other_equilibrium": "share of the equilibria found from a random state that are not those found from the initial "
    "state",
    "other_prediction": "share of them that are read as another class",
    "zero_gradient": "share of images without a gradient at the clean image; this and what follows is over images that "
    "are classified correctly, and measured with exact gradients",
    "no_rise": "share of images that many short steps of ascent do not fool, and whose loss they do not raise",
    "missed": "share of images that the attack of the record has left robust, and many short steps fool, as the judge "
    "confirms",
    "one_step_wins": "share of images that many steps do not fool, and whose loss one step of length epsilon raises "
    "more",
    "noise_wins": "share of images that many steps do not fool, and whose loss the best of a few random points on the "
    "boundary raises more",
    "huge_accuracy": "share of images that many steps in the whole pixel box do not fool",
}
"""Names of `Record.probes`, and what they mean. `evaluate.panel` measures them; one that it could not is left out."""

EXACT_STAGES = ("pgd-toward", "apgd-ce", "apgd-t")
BLACK_BOX_STAGES = ("square", "square-audit")
OTHER_STAGES = (*BLACK_BOX_STAGES, "fab-t", "intermediate")

ROUNDING = 1e-4
SHARE = 0.1
"""Of the panel's images: four of 32."""
FEW = 0.05
"""Of all samples, or of those attacked."""
OFF = 0.05
LEFT = 0.03
NUM_LEFT = 2
"""A stage has broken more than chance would have it from this share, and this number, of the samples left to it."""


@dataclass(frozen=True)
class Flag:
    """One doubt.

    Attributes:
        name: as shown.
        raised_when: with its threshold.
        meaning: for whoever reads the number.
        is_red: whether it makes the number unreliable.
        rests_on: flags that explain this one, which is not raised beside them.
    """

    name: str
    raised_when: str
    meaning: str
    is_red: bool
    is_met: Callable[[Record], bool] = field(repr=False)
    rests_on: Collection[str] = ()


def flags(record: Record) -> list[Flag]:
    """The flags that `record` raises, in the order of `FLAGS`."""
    if record.probes is None:
        return []
    met = {flag.name for flag in FLAGS if flag.is_met(record)}
    return [flag for flag in FLAGS if flag.name in met and not met & set(flag.rests_on)]


def _probe(name: str, most: float) -> Callable[[Record], bool]:
    """Whether a number of the panel is above `most`; one that was not measured is not."""
    return lambda record: ((record.probes or {}).get(name) or 0.0) > most


def _num_attacked(record: Record) -> int:
    return record.data.num_samples if record.num_attacked is None else record.num_attacked


def _has_zero_gradients(record: Record) -> bool:
    return _probe("zero_gradient", SHARE)(record) or (record.num_zero_gradient or 0) > FEW * _num_attacked(record)


def _is_refuted(record: Record) -> bool:
    return (record.diagnostics.get("num_refuted") or 0) > SHARE * _num_attacked(record)


def _has_broken_much(stage: StageRecord) -> bool:
    return stage.num_broken >= NUM_LEFT and stage.num_broken > LEFT * stage.num_attacked


def _is_found_otherwise(record: Record) -> bool:
    return any(stage.name in OTHER_STAGES and _has_broken_much(stage) for stage in record.stages or [])


def _is_found_blindly(record: Record) -> bool:
    return any(stage.name in BLACK_BOX_STAGES and stage.num_broken for stage in record.stages or [])


def _is_still_falling(record: Record) -> bool:
    exact = [stage for stage in record.stages or [] if stage.name in EXACT_STAGES]
    if not exact:
        return False
    num_broken = sum(stage.num_broken for stage in exact)
    return num_broken >= NUM_LEFT and num_broken > LEFT * exact[0].num_attacked


_NOT_A_FUNCTION = ("random output", "batch mates")
_NO_SLOPE = (*_NOT_A_FUNCTION, "zero gradient")

FLAGS = (
    Flag(
        "random output",
        f"a part of the model changes by more than {ROUNDING:g} of its largest value in a second call",
        "the model draws at random or keeps something between calls: one run proves nothing, attack its expectation",
        True,
        _probe("repeat_gap", ROUNDING),
    ),
    Flag(
        "batch mates",
        f"a part of the model changes by more than {ROUNDING:g} of its largest value with the images beside it",
        "a prediction depends on who else is in the batch: no verdict on a single image holds",
        True,
        _probe("batch_gap", ROUNDING),
        ("random output",),
    ),
    Flag(
        "other equilibrium",
        f"more than {SHARE:.0%} of the panel's equilibria, or of their classes, differ from those of a random start",
        "the equilibrium is not unique: attack, judge and user may each see another model",
        True,
        lambda record: _probe("other_equilibrium", SHARE)(record) or _probe("other_prediction", SHARE)(record),
        _NOT_A_FUNCTION,
    ),
    Flag(
        "zero gradient",
        f"more than {SHARE:.0%} of the panel's images, or {FEW:.0%} of those attacked, have a gradient of exactly zero",
        "there is nothing to climb (rounding, saturation): a loss or a smooth stand-in that has a slope may break more",
        True,
        _has_zero_gradients,
        _NOT_A_FUNCTION,
    ),
    Flag(
        "wrong gradient",
        f"implicit gradient and finite differences are more than {OFF:.0%} apart",
        "the gradient that attacks follow is not that of the model: something is detached, rounded or replaced",
        True,
        _probe("gradient_gap", OFF),
        _NOT_A_FUNCTION,
    ),
    Flag(
        "loss does not rise",
        f"many short steps neither fool nor raise the loss of more than {SHARE:.0%} of the panel's images",
        "ascent fails: gradients lead nowhere, and attacks that follow them prove little",
        True,
        _probe("no_rise", SHARE),
        _NO_SLOPE,
    ),
    Flag(
        "one step beats many",
        f"one step of length epsilon raises the loss of more than {SHARE:.0%} of the panel's images more than many do",
        "the loss is rugged, and short steps get stuck: restarts, smoothing or black-box attacks may break more",
        True,
        _probe("one_step_wins", SHARE),
        _NO_SLOPE,
    ),
    Flag(
        "noise beats gradients",
        f"noise raises the loss of more than {SHARE:.0%} of the panel's images more than many steps of ascent do",
        "gradients show a worse way than chance: black-box attacks may break more",
        True,
        _probe("noise_wins", SHARE),
        _NOT_A_FUNCTION,
    ),
    Flag(
        "huge radius",
        f"more than {SHARE:.0%} of the panel's images withstand many steps in the whole pixel box",
        "any image can become any other there: what is left measures the attack's weakness, not robustness",
        True,
        _probe("huge_accuracy", SHARE),
        _NO_SLOPE,
    ),
    Flag(
        "beats white box",
        f"black box, intermediate states or FAB-T break more than {LEFT:.0%} of the samples left to them, "
        f"at least {NUM_LEFT}",
        "gradients of the scored equilibrium miss what others find: they are masked, and more may be broken",
        True,
        _is_found_otherwise,
    ),
    Flag(
        "weak attack",
        f"the panel's few steps of ascent break more than {SHARE:.0%} of its images beyond those that the attack broke",
        "the attack is weaker than plain projected ascent: its settings or its gradients are to be looked at",
        True,
        _probe("missed", SHARE),
        _NOT_A_FUNCTION,
    ),
    Flag(
        "unreadable logits",
        f"the logits of more than {FEW:.0%} of the samples are NaN or infinite, and not masked",
        "no class was read there: they count as not robust although nothing broke them",
        True,
        lambda record: (record.num_nonfinite or 0) > FEW * record.data.num_samples,
    ),
    Flag(
        "lagging states",
        f"on more than {FEW:.0%} of the attacked samples the attack has left its state behind the equilibrium",
        "the attack did not see the model that is scored: what it has not broken is not shown to be robust",
        True,
        lambda record: (record.num_lagging or 0) > FEW * _num_attacked(record),
    ),
    Flag(
        "refuted",
        f"the judge refutes more than {SHARE:.0%} of the attacked samples, which the attack calls fooled",
        "attack and judge see different models: the attack's states or solves cannot be trusted",
        True,
        _is_refuted,
        _NOT_A_FUNCTION,
    ),
    Flag(
        "unconverged",
        f"the judge finds no equilibrium for more than {FEW:.0%} of the samples",
        "they count as not robust although nothing was read out: robust accuracy may be too low",
        False,
        lambda record: record.num_unconverged > FEW * record.data.num_samples,
    ),
    Flag(
        "black box finds more",
        "a black-box attack breaks any sample that gradients have left",
        "white-box attacks have missed something; the number counts it, and may still be a little too high",
        False,
        _is_found_blindly,
        ("beats white box",),
    ),
    Flag(
        "not exhausted",
        f"attacks with full solves break more than {LEFT:.0%} of what the stages before have left, at least "
        f"{NUM_LEFT} samples",
        "more steps and restarts still lowered the number when the evaluation ended: it may be a little too high",
        False,
        _is_still_falling,
    ),
)
"""All flags, red ones first."""
