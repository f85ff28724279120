"""What every command takes and how it is completed. What it does is in the module of its name, imported when it runs.

Nothing here imports torch, which takes seconds: help, completion and `models` come at once. The names that they show
are written down here for that reason, and a test compares them with the registries.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from robustbench_deq.commands.interrupts import ending_at_once
from robustbench_deq.norm_names import NORM_NAMES

WEIGHTS_FOLDER = Path(__file__).parents[1] / "models" / "weights"
"""Of the registered models, as `models.zoo` has it."""
ATTACK_NAMES = (
    "pgd", "apgd", "apgd-t", "fgsm", "fmn", "intermediate-pgd", "joint-apgd", "joint-fmn", "joint-pgd", "noise", "fast",
    "standard", "torchattacks-pgd", "torchattacks-pgdl2", "yopo",
)  # fmt: skip
ATTACK_PREFIXES = ("advlib:", "foolbox:", "torchattacks:")
DATASET_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "svhn")
FAMILY_NAMES = (
    "deq-conv", "deq-fc", "unrolled", "resnet", "lben", "test-linear", "mdeq", "mondeq-conv", "mondeq-fc",
    "mondeq-multi",
)  # fmt: skip
MAX_COUNT = 2**31 - 1
"""The largest integer, as `configs` has it."""
SPLIT_NAMES = ("train", "validation", "test", "all")
COMMANDS: dict[str, click.Command] = {}
"""By name, in the order of the listing."""

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def model_names() -> list[str]:
    """The registered models."""
    return [*sorted(path.parent.name for path in WEIGHTS_FOLDER.glob("*/model.json")), "test-linear.tiny"]


def _complete(names: Callable[[], list[str]], takes_paths: bool = False) -> Complete:
    """Completes one of `names`, or a path where there is none."""

    def complete(_ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in names() if name.startswith(begun)]
        return found or ([CompletionItem(begun, type="file")] if takes_paths else [])

    return complete


_a_model = _complete(model_names, takes_paths=True)
_an_attack = _complete(lambda: [*ATTACK_NAMES, *ATTACK_PREFIXES])
_a_dataset = _complete(lambda: [*DATASET_NAMES, "npz:"])


def _declared(name: str, function: str | None = None) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorator of an empty function with options and help: the command `name`, for which `function` (None: of the
    same name) in the module of that name is called."""

    def declare(declaration: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(declaration)
        def run(**options: Any) -> None:
            with ending_at_once():
                imported = importlib.import_module(f"{__package__}.{name}")
            getattr(imported, function or name)(**options)

        COMMANDS[name] = click.command(name)(run)
        return declaration

    return declare


_norm = click.option(
    "--norm",
    default=None,
    help="l1, l2 or linf.  [default: the model card's, else l2]",
    shell_complete=_complete(lambda: list(NORM_NAMES)),
)
_epsilon = click.option("--epsilon", default=None, help="Radius in pixel units of [0, 1], such as 1.0 or 8/255.")
_data = click.option(
    "--data",
    default=None,
    help="A name from 'datasets' or npz:FILE.  [default: the model card's]",
    shell_complete=_a_dataset,
)
_split = click.option(
    "--split", default="test", type=click.Choice(SPLIT_NAMES), show_default=True, help="all: every image of npz:FILE."
)
_json = click.option("--json", "is_json", is_flag=True, help="One JSON object on standard output.")
_set_any = "Any key of the {}, dotted."


@_declared("attack")
@click.argument("model", shell_complete=_a_model)
@click.option(
    "--attack",
    "attack_name",
    default="joint-pgd",
    show_default=True,
    help="A name from 'attacks'.",
    shell_complete=_an_attack,
)
@_norm
@_epsilon
@_data
@_split
@click.option("--limit", type=int, default=None, help="Images.  [default: at most 1000; all of --split all]")
@click.option("--steps", type=int, default=None, help="The same as --set steps=K.")
@click.option("--batch-size", type=click.IntRange(1, MAX_COUNT), default=128, show_default=True)
@click.option("--seed", type=click.IntRange(0, MAX_COUNT), default=0, show_default=True)
@click.option("--targeted", "is_targeted", is_flag=True, help="Aim at the class after the true one.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting of the attack.")
@click.option("--label", default=None, help="Name of the row in reports.  [default: the attack's]")
@click.option("--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder for the record.")
@_json
def _attack() -> None:
    """Attack MODEL and judge the result.

    MODEL is a name from 'models', a folder with a saved model, or file.py:function. Such a file is run as code, with
    all your rights: name only one that you trust.
    """


@_declared("attacks")
@_json
def _attacks() -> None:
    """List attacks and what --set reaches in each; also solvers, adjoints and objectives, which settings name."""


@_declared("bench")
@click.argument("suite", type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help=_set_any.format("suite"))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder.  [default: results/runs/NAME]")
@click.option("--resume", is_flag=True, help="Go on in the folder: do what is missing. Begins where nothing is yet.")
@click.option("--workers", type=click.IntRange(1, 1024), default=None, help="Shards at a time.  [default: 1; Ray: all]")
@click.option("--executor", "kind", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--address", default=None, help="Of a Ray cluster, such as HOST:6379.  [default: one on this machine]")
@click.option("--dry-run", "is_dry", is_flag=True, help="Print the plan, with times from earlier records.")
@click.option("--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda where a worker sees one]")
def _bench() -> None:
    """Run SUITE, a YAML file of models, attacks and threats, and leave a folder of records.

    A run that was stopped, however, goes on with --resume. Several commands may work on one folder at a time.
    """


@_declared("check")
@click.option("--baseline", type=click.Path(path_type=Path), required=True, help="JSON file of the baseline.")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("results/runs/quick"))
@click.option("--update", "reason", default=None, metavar="REASON", help="Make FOLDER the baseline, for this reason.")
@_json
@click.option("--junit", type=click.Path(path_type=Path), default=None, help="JUnit XML file to write.")
def _check() -> None:
    """Compare the records in FOLDER with a baseline: exit code 0 when they agree, 1 when they do not.

    The tolerances stand in the baseline. It changes only by --update, which keeps the reason in it.
    """


@_declared("datasets")
@_json
def _datasets() -> None:
    """List datasets. Your own: npz:FILE with arrays 'images' and 'labels'."""


@_declared("evaluate", function="evaluate_by_standard")
@click.argument("model", shell_complete=_a_model)
@_norm
@_epsilon
@_data
@_split
@click.option("--limit", type=click.IntRange(1, MAX_COUNT), default=None, help="Images.  [default: at most 256]")
@click.option(
    "--version",
    "kind",
    type=click.Choice(["fast", "standard"]),
    default="standard",
    show_default=True,
    help="fast: the joint stages alone.",
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder for the record.")
@click.option("--resume", is_flag=True, help="Go on in the folder of --out. Begins where nothing is yet.")
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=None,
    help="Shards of 128 images at a time.  [default: 1; standard without a GPU: a CPU each; Ray: all]",
)
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--address", default=None, help="Of a Ray cluster, such as HOST:6379.  [default: one on this machine]")
@click.option("--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda where a worker sees one]")
@_json
def _evaluate() -> None:
    """The standard evaluation of MODEL: one robust accuracy, by a fixed sequence of attacks, each judged.

    Nothing can be set, so that numbers of one version are comparable. MODEL is as for 'attack'; a file.py:function is
    run as code, with all your rights.
    """


@_declared("judge", function="judge_file")
@click.argument("model", shell_complete=_a_model)
@click.argument("file", type=click.Path(path_type=Path))
@_norm
@_epsilon
@_data
@_split
@click.option(
    "--limit", type=int, default=None, help="Samples of the record.  [default: at most 1000; all of --split all]"
)
@click.option("--batch-size", type=click.IntRange(1, MAX_COUNT), default=128, show_default=True)
@click.option("--label", default=None, help="Name of the row in reports.  [default: the file's]")
@click.option("--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder for the record.")
@_json
def _judge() -> None:
    """Judge adversarial images that somebody else made, those in FILE, an npz.

    FILE has 'x_adv', images (n, channels, height, width), uint8 or numbers in [0, 1], and says whose they are: by
    'sample_ids', positions in the data set, as the rows of records have them, or by 'x', the clean images. 'labels'
    are compared where they are there, and 'attack', a text, is kept in the record. Nothing is unpickled.

    The record is over the first --limit samples of the split, as that of 'attack', and joins it in 'report'. Samples
    without an image are left as they are, and so are those whose image is outside the ball: it proves nothing.

    MODEL is as for 'attack'; a file.py:function is run as code, with all your rights: name only one that you trust.
    """


@_declared("models")
@click.argument("pattern", default="*", shell_complete=_a_model)
@click.option("--family", default=None, help="Models of this family only.")
@click.option("--data", "dataset", default=None, help="Models trained on this dataset only.", shell_complete=_a_dataset)
@click.option("--threat", type=click.Choice([*NORM_NAMES, "none"]), default=None, help="The norm trained against.")
@click.option(
    "--check",
    "checked",
    default=None,
    metavar="DATA",
    help="Examine one model on a dataset or npz:FILE.",
    shell_complete=_a_dataset,
)
@_json
def _models() -> None:
    """List registered models, and the families to train; PATTERN may hold wildcards.

    With --check, PATTERN is a model as for 'attack': a name, a folder or file.py:function, which is run as code.
    Exit code 1 means that a finding is bad.
    """


@_declared("report")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder.  [default: FOLDER/report]")
@click.option(
    "--compare",
    "compared",
    nargs=2,
    default=None,
    type=click.Path(path_type=Path),
    metavar="A B",
    help="What changed from the records in A to those in B, as Markdown; with --out as Markdown and HTML files.",
)
def _report() -> None:
    """Tables, figures, a page and a leaderboard from the records in FOLDERS."""


@_declared("train")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help=_set_any.format("config"))
@click.option("--out", type=click.Path(path_type=Path), default=None, help="New folder.  [default: results/runs/NAME]")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder of an interrupted run. Begins where nothing is yet.",
)
@click.option("--device", default=None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]")
def _train() -> None:
    """Train the model that CONFIG describes, evaluate it on the test split, and save it with its card."""
