"""Bad input for the command line, by the thousand: every call must end as the exit codes say.

    python -m tests.fuzz --count 10000 --workers 2     # a process a call; an hour or so on two cores

A call is good when it ends within `MAX_SECONDS` with exit code 0, or with 1 or 2 and one line that begins with
`Error:`. Bad are tracebacks, "the run failed with ..." (bad input is told as such), more lines, lines of more than
`MAX_LINE` characters, hangs, and what a call leaves behind: after exit code 2 anything at all, else temporary files.
Case `i` of a seed is the same each time; `--only i` makes it again and shows what was said.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from click.testing import CliRunner

from robustbench_deq.commands import main as cli
from robustbench_deq.data import load

MAX_SECONDS = 20
"""Of computing; a call that waits is killed after three times as long."""
MAX_LINE = 2000
MAX_MEMORY = 10 * 2**30
BEFORE = re.compile(r"  \d+/\d+( shards)?$|^dataset \S+: uint8 images of |: line \d+ is torn and was ignored$")
"""Lines that may precede the error: that work has begun, and what was odd about files that could be read."""

SUITE = {
    "name": "small",
    "models": ["test-linear.tiny"],
    "data": "digits",
    "threats": [{"norm": "l2", "epsilons": [0.3, "1/2"]}],
    "attacks": [
        {"name": "joint-pgd", "label": "joint", "config": {"steps": 2}},
        {"name": "noise", "grid": {"restarts": [1, 2]}},
    ],
    "limit": 6,
    "seeds": [0],
    "batch_size": 4,
    "num_snapshots": 1,
    "split": "test",
}
TRAINING = {
    "name": "mine",
    "model": {"family": "deq-fc", "config": {"hidden": 4, "activation": "tanh"}},
    "data": "digits",
    "learning_rate": 0.01,
    "forward": {"solver": "anderson", "tolerance": 0.01, "max_steps": 5},
    "attack": {"name": "joint-pgd", "threat": {"norm": "l2", "epsilon": 0.3}, "config": {"steps": 2}},
    "validation": {"limit": 8},
    "evaluation": {"limit": 8},
}
MODEL = """
import torch
from torch import nn
from robustbench_deq import EquilibriumModel

class Mine(EquilibriumModel):
    def __init__(self):
        super().__init__()
        self.input_shape, self.num_classes = {shape}, {classes}
        self.into, self.out = nn.Linear(64, 5), nn.Linear(5, 10)

    def inject(self, x):
        return {inject}

    def cell(self, z, u):
        return {cell}

    def head(self, z):
        return {head}

    def initial_state(self, u):
        return {start}

def build():
    {build}
    return Mine()
"""
GOOD_PARTS = {
    "shape": "(1, 8, 8)",
    "classes": "10",
    "inject": "self.into(x.flatten(1))",
    "cell": "torch.tanh(0.3 * z + u)",
    "head": "self.out(z)",
    "start": "torch.zeros_like(u)",
    "build": "pass",
}
BAD_PARTS = {
    "shape": ["None", "(8, 8)", "64", "(1, 8, '8')", "(1, 9, 8)", "(0, 8, 8)", "torch.ones(3)"],
    "classes": ["None", "'ten'", "-3", "0", "1", "10.0", "True", "10**30", "2"],
    "inject": [
        "None",
        "x",
        "self.into(x)",
        "x.flatten(1)",
        "1 / 0",
        "missing",
        "(x, x)",
        "self.into(x.flatten(1))[:1]",
    ],
    "cell": ["None", "z[:, :3]", "u @ z", "z / 0 + u", "[z]", "self.cell(z, u)", "z.double()"],
    "head": ["None", "z.sum()", "{'logits': z}", "self.out(z)[0]", "self.out(z).tolist()", "self.out(u)"],
    "start": ["None", "0", "torch.zeros(3)", "u.tolist()", "torch.zeros(len(u), 7)"],
    "build": [
        "raise SystemExit(3)",
        "return 3",
        "import nowhere",
        "raise EOFError",
        "raise KeyError('a\\nb')",
        "exit()",
    ],
}
TEXTS = [
    *("", " ", "~", "null", "yes", "x", "[/x]", "[warm]", "${x}", "*", "*a", "&a", "!!bool x", "!x", "%s", "{}", "[]"),
    *("2024-13-45", "2024-01-01", "1:30", "0x_", "0b_", ".inf", ".nan", "-.inf", "1e400", "1e39", "-1e-400", "1_0"),
    *(
        "a" * 300,
        "9" * 5000,
        "[" * 5000,
        "{a: " * 100,
        "../x",
        "/",
        "/dev/null",
        "a/b",
        ".",
        "a\x00b",
        "a\nb",
        "\x1b[31m",
    ),
    *("npz:", "npz:none", "npz:.", "digits", "file.py:f", "x.py:", "é" * 200, "\ud800", "l1", "linf", "8/255", "1/0"),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        0.5,
        -0.5,
        1e-30,
        1e39,
        1e308,
        float("inf"),
        float("nan"),
        2**31,
        2**63,
        -(2**64),
    ),
    *(10**30, 10**400, [], {}, [[]], {"": 1}, ["x"] * 50, {"a": {"b": {"c": 1}}}, [0] * 3, ["x", "x"], [1, "x", None]),
]
OPTIONS = [
    *(
        "--attack",
        "--norm",
        "--epsilon",
        "--data",
        "--split",
        "--limit",
        "--steps",
        "--batch-size",
        "--seed",
        "--label",
    ),
    *("--device", "--set", "--out"),
]
SETTINGS = [
    *("steps", "restarts", "step_size", "rounds", "inner_steps", "accelerator", "history_size", "tolerance", "solver"),
    *("max_evaluations", "max_seconds", "objective", "adjoint", "preset", "schedule", "x", "steps.y", "random_start"),
]


class Outcome(NamedTuple):
    """How a call ended. `complaint` is empty when it was well."""

    kind: str
    code: int | None
    complaint: str
    said: str


# ---------------------------------------------------------------- cases


def make_material(folder: Path) -> None:
    """A finished suite with its baseline, a saved model and an npz file, for cases to damage."""
    from robustbench_deq.models import load_model, save_model

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    save_model(load_model("test-linear.tiny"), folder / "saved", "mine")
    rng = np.random.default_rng(0)
    np.savez(folder / "mine.npz", images=rng.random((12, 1, 8, 8), dtype=np.float32), labels=np.arange(12) % 3)
    for words in (
        ["bench", str(folder / "suite.yaml"), "--out", str(folder / "run")],
        ["check", "--baseline", str(folder / "baseline.json"), str(folder / "run"), "--update", "first"],
    ):
        result = CliRunner().invoke(cli.main, words)
        assert result.exit_code == 0, result.output


def make_case(number: int, seed: int, material: Path, folder: Path) -> tuple[str, list[str]]:
    """Files in `folder`, which is empty and where the call is made; the kind of the case and the words of the call."""
    rng = random.Random(f"{seed}:{number}")
    kinds = list(_KINDS)
    kind = rng.choices(kinds, [_KINDS[kind][0] for kind in kinds])[0]
    return kind, _KINDS[kind][1](rng, material, folder)


def _suite(rng: random.Random, material: Path, folder: Path) -> list[str]:
    _write_yaml(rng, SUITE, folder / "suite.yaml")
    return ["bench", "suite.yaml", *_assignments(rng, ["limit", "seeds", "attacks", "name", "x"]), "--dry-run"]


def _train(rng: random.Random, material: Path, folder: Path) -> list[str]:
    _write_yaml(rng, TRAINING, folder / "training.yaml")
    short = ["--set", "epochs=1", "--set", "batch_size=32", "--set", "train_limit=32"]
    return [
        "train",
        "training.yaml",
        *short,
        *_assignments(rng, ["seed", "model.config.hidden", "attack.name", "data"]),
    ]


def _attack(rng: random.Random, material: Path, folder: Path) -> list[str]:
    words = ["attack", "test-linear.tiny", "--epsilon", "0.5", "--limit", "6", "--steps", "2", "--batch-size", "4"]
    for _ in range(rng.randint(1, 3)):
        option = rng.choice(OPTIONS)
        words += [option, _set_of(rng, SETTINGS) if option == "--set" else _argument(rng)]
    if rng.random() < 0.1:
        words[1] = _argument(rng)
    return words


def _model_file(rng: random.Random, material: Path, folder: Path) -> list[str]:
    bad = rng.sample(list(BAD_PARTS), rng.randint(1, 2))
    source = MODEL.format(**GOOD_PARTS | {part: rng.choice(BAD_PARTS[part]) for part in bad})
    if rng.random() < 0.1:
        source = _spoil(rng, source.encode()).decode(errors="replace")
    (folder / "mine.py").write_text(source, errors="replace")
    if rng.random() < 0.2:
        return ["models", "mine.py:build", "--check", "digits"]
    return ["attack", "mine.py:build", "--epsilon", "0.5", "--limit", "4", "--attack", rng.choice(["noise", "pgd"])]


def _saved(rng: random.Random, material: Path, folder: Path) -> list[str]:
    shutil.copytree(material / "saved", folder / "saved")
    _damage(rng, folder / "saved")
    return ["attack", "saved", "--epsilon", "0.5", "--limit", "4", "--steps", "2"]


def _npz(rng: random.Random, material: Path, folder: Path) -> list[str]:
    if rng.random() < 0.5:
        shutil.copy(material / "mine.npz", folder)
        (folder / "mine.npz").write_bytes(_spoil(rng, (folder / "mine.npz").read_bytes()))
    else:
        shape = rng.choice([(12, 1, 8, 8), (12, 8, 8), (12, 8, 8, 1), (0, 1, 8, 8), (12, 64), (), (1, 1, 8, 8)])
        kind = rng.choice(
            ["float32", "float64", "float16", "uint8", "int64", "bool", "complex64", "U3", "M8[s]", "f4,i4"]
        )
        labels = rng.choice(
            [np.arange(12), np.arange(12.0), np.eye(12), np.array(3), -np.arange(12), np.full(12, 2**62)]
        )
        np.savez(folder / "mine.npz", images=np.ones(shape).astype(kind), labels=labels)
    return ["attack", "test-linear.tiny", "--epsilon", "1", "--steps", "2", "--limit", "3", "--data", "npz:mine.npz"]


def _judge(rng: random.Random, material: Path, folder: Path) -> list[str]:
    """Images for the command `judge`: arrays of wrong shapes and kinds, some missing, or a damaged file."""
    ids = load("digits", limit=6).sample_ids.numpy()
    good: dict[str, Any] = {"x_adv": np.full((6, 1, 8, 8), 0.5, "float32"), "sample_ids": ids, "labels": np.arange(6)}
    bad = [
        np.ones((6, 8, 8)),
        np.full((6, 1, 8, 8), np.nan),
        np.array("text"),
        np.arange(6) - 1,
        np.zeros((0, 1, 8, 8)),
    ]
    bad += [np.ones((6, 1, 8, 8), "M8[s]"), np.eye(6), np.array([2**63] * 6, "uint64"), np.full(6, "x"), np.array(1j)]
    for name in rng.sample(["x_adv", "sample_ids", "labels", "x", "attack"], rng.randint(1, 2)):
        good[name] = rng.choice(bad)
    if rng.random() < 0.3:
        del good[rng.choice(list(good))]
    np.savez(folder / "theirs.npz", **good)
    if rng.random() < 0.3:
        (folder / "theirs.npz").write_bytes(_spoil(rng, (folder / "theirs.npz").read_bytes()))
    return ["judge", "test-linear.tiny", "theirs.npz", "--epsilon", "0.5", "--data", "digits", "--limit", "6"]


def _run_folder(rng: random.Random, material: Path, folder: Path) -> None:
    shutil.copytree(material / "run", folder / "run")
    _damage(rng, folder / "run")


def _check(rng: random.Random, material: Path, folder: Path) -> list[str]:
    shutil.copytree(material / "run", folder / "run")
    shutil.copy(material / "baseline.json", folder)
    _damage(rng, folder / "run" if rng.random() < 0.6 else folder)
    return ["check", "--baseline", "baseline.json", "run", *rng.choice([[], ["--json"], ["--update", "why"]])]


def _compare(rng: random.Random, material: Path, folder: Path) -> list[str]:
    _run_folder(rng, material, folder)
    shutil.copytree(material / "run", folder / "other")
    return ["report", "--compare", "run", "other"]


def _report(rng: random.Random, material: Path, folder: Path) -> list[str]:
    _run_folder(rng, material, folder)
    return ["report", "run", "--out", "page"]


def _resume(rng: random.Random, material: Path, folder: Path) -> list[str]:
    _run_folder(rng, material, folder)
    shutil.copy(material / "suite.yaml", folder)
    if rng.random() < 0.5:
        (folder / "run" / "records.jsonl").unlink(missing_ok=True)
    return ["bench", "suite.yaml", "--out", "run", "--resume"]


_KINDS: dict[str, tuple[float, Callable[[random.Random, Path, Path], list[str]]]] = {
    "suite": (30, _suite),
    "train": (10, _train),
    "attack": (20, _attack),
    "judge": (6, _judge),
    "model file": (10, _model_file),
    "saved model": (8, _saved),
    "npz": (8, _npz),
    "check": (8, _check),
    "compare": (3, _compare),
    "report": (1, _report),
    "resume": (2, _resume),
}
"""How often, and what makes such a case."""


def _write_yaml(rng: random.Random, values: dict[str, Any], path: Path) -> None:
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        _change(rng, values)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if rng.random() < 0.4:
        lines = text.splitlines()
        place = rng.randrange(len(lines))
        key = lines[place].partition(":")[0]
        lines[place] = rng.choice(
            [lines[place] + "\n" + lines[place], f"{key}: {rng.choice(TEXTS)}", rng.choice(TEXTS)]
        )
        text = "\n".join(lines) + "\n"
    data = text.encode(errors="replace")
    path.write_bytes(_spoil(rng, data) if rng.random() < 0.1 else data)


def _change(rng: random.Random, values: Any) -> None:
    """Replace, remove, rename or nest one node of a tree."""
    places = list(_places(values))
    parent, key = rng.choice(places)
    what = rng.random()
    if what < 0.7:
        parent[key] = rng.choice([*VALUES, *TEXTS])
    elif what < 0.8:
        del parent[key]
    elif what < 0.9 and isinstance(parent, dict):
        parent[rng.choice([*TEXTS, 1, None, True])] = parent.pop(key)
    else:
        node = parent[key]
        for _ in range(rng.choice([1, 3, 100])):
            node = rng.choice([[node], {"a": node}])
        parent[key] = node


def _places(values: Any) -> Any:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield values, key
        yield from _places(value)


def _argument(rng: random.Random) -> str:
    """A word that a shell can pass."""
    word = rng.choice([*TEXTS, *map(str, filter(lambda value: value != 10**400, VALUES))])
    return word.replace("\x00", "").encode(errors="replace").decode()


def _set_of(rng: random.Random, names: list[str]) -> str:
    return f"{rng.choice([*names, _argument(rng)])}={_argument(rng)}"


def _assignments(rng: random.Random, names: list[str]) -> list[str]:
    return ["--set", _set_of(rng, names)] if rng.random() < 0.2 else []


def _damage(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.5:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        place = rng.randrange(len(lines))
        values = json.loads(lines[place])
        _change(rng, values)
        lines[place] = json.dumps(values) if rng.random() < 0.9 else "[" * 100_000
        path.write_text("\n".join(lines) + "\n", errors="replace")
        return
    path.write_bytes(_spoil(rng, path.read_bytes()))


def _spoil(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one kind of damage."""
    if not data or rng.random() < 0.1:
        return rng.choice([b"", b"\x00" * 50, b"PK\x03\x04", rng.randbytes(200)])
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.choice([1, 1, 8, 100]))
    middle = rng.choice([b"", rng.randbytes(end - begin), rng.randbytes(5), data[begin:end] * 3])
    return data[:begin] if rng.random() < 0.2 else data[:begin] + middle + data[end:]


# ---------------------------------------------------------------- running them


def _files(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def outcome(number: int, seed: int, material: Path, leave_out: Collection[str] = ()) -> Outcome | None:
    """Make a case and call it here, in a folder of its own; None for one of the kinds to leave out."""
    with tempfile.TemporaryDirectory() as name:
        folder, before_folder = Path(name), Path.cwd()
        kind, words = make_case(number, seed, material, folder)
        if kind in leave_out:
            return None
        before = _files(folder)
        os.chdir(folder)
        try:
            result = CliRunner().invoke(cli.main, words)
        finally:
            os.chdir(before_folder)
        said = f"{words}\n{result.stderr[-3000:]}"
        complaint = _complaint(result) or _left(before, _files(folder), result.exit_code)
        return Outcome(kind, result.exit_code, complaint, said)


def _complaint(result: Any) -> str:
    *before, last = result.stderr.splitlines() or [""]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"traceback: {type(result.exception).__name__}"
    if "Traceback" in result.output:
        return "traceback"
    if result.exit_code not in (0, 1, 2):
        return f"exit code {result.exit_code}"
    if result.exit_code == 0 or (result.exit_code == 1 and result.stdout and not last):  # findings, as of the doctor
        return ""
    if not last.startswith("Error: ") or (result.exit_code == 2 and not all(map(BEFORE.search, before))):
        return "more or other than one line"
    if len(last) > MAX_LINE:
        return "a long line"
    if "the run failed with" in last or last == "Error: interrupted":
        return last.partition(";")[0][:80]
    return ""


def _left(before: dict[str, bytes | None], after: dict[str, bytes | None], code: int) -> str:
    changed = {name for name in after if name not in before or after[name] != before[name]}
    changed = {name for name in changed if "__pycache__" not in name}
    temporary = sorted(name for name in changed if name.endswith(".partial"))
    if temporary:
        return f"left {Path(temporary[0]).suffix or temporary[0]}"
    return f"changed {min(changed)} with exit code 2" if code == 2 and changed else ""


def _apart(number: int, seed: int, material: Path) -> Outcome:
    """The same in a forked process, which is killed when it hangs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
        try:
            found = outcome(number, seed, material)
        except BaseException as error:
            found = Outcome("driver", None, f"the driver failed: {error!r}", "")
        os.write(write, json.dumps(found).encode(errors="replace")[:60_000])
        os._exit(0)
    os.close(write)
    end = time.monotonic() + 3 * MAX_SECONDS  # others use the machine too
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.005)
    with os.fdopen(read, "rb") as file:
        content = file.read()
    return Outcome(*json.loads(content)) if content else Outcome("?", None, "a hang, or killed", "")


def run(count: int, seed: int, first: int, step: int, material: Path, log: Path) -> None:
    """Cases `first`, `first + step`, ... below `count`; a JSON line each."""
    with log.open("a") as file:
        for number in range(first, count, step):
            file.write(json.dumps([number, *_apart(number, seed, material)]) + "\n")
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", type=int, default=None, help="one case, with what it says")
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--material", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.part is not None:
        for name in ("attack", "bench", "check", "listings", "models", "report", "train"):
            importlib.import_module(f"robustbench_deq.commands.{name}")  # once, before processes are forked
        run(args.count, args.seed, args.part, args.workers, args.material, args.material / f"{args.part}.jsonl")
        return
    with tempfile.TemporaryDirectory() as name:
        material = Path(name)
        subprocess.run([sys.executable, "-c", f"from tests.fuzz import *; make_material(Path({name!r}))"], check=True)
        if args.only is not None:
            print(*_apart(args.only, args.seed, material), sep="\n")
            return
        words = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--material", name, "--part"]
        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda part: subprocess.run([*words, str(part)], check=True), range(args.workers)))
        lines = [line for part in material.glob("*.jsonl") for line in part.read_text().splitlines()]
    found = [(number, Outcome(*rest)) for number, *rest in sorted(map(json.loads, lines))]
    print(collections.Counter(f"exit code {one.code}" for _, one in found))
    bad = [(number, one) for number, one in found if one.complaint]
    for (kind, complaint), times in collections.Counter((one.kind, one.complaint) for _, one in bad).most_common():
        first = next(number for number, one in bad if (one.kind, one.complaint) == (kind, complaint))
        print(f"{times:6}  {kind}: {complaint}  (first: --only {first})")
    print(f"{len(bad)} of {len(found)} calls are bad")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
