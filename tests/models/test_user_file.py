"""`file.py:function` builds a model beside its own modules, and disturbs nothing around it."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robustbench_deq.errors import UsageError
from robustbench_deq.models import load_model
from robustbench_deq.models.user_file import digest_of_file

ROOT = Path(__file__).parents[2]
SOURCE = """
import torch
from robustbench_deq.models import Linear, LinearConfig

def build():
    return Linear(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=5)).train()

def other():
    return torch.nn.Linear(3, 3)

def fails():
    raise RuntimeError("no weights here\\nsecond line")

def needs(argument):
    return build()

constant = 3
"""


def test_a_function_in_a_file_builds_a_model(tmp_path: Path, make_images) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    model = load_model(f"{path}:build")
    assert not model.training
    assert model(make_images(2, torch.float32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fails", f"mine.py line {1 + SOURCE[: SOURCE.index('no weights')].count(chr(10))}; correct the file"),
        ("missing", "expected a function 'missing' in the file, got none"),
        ("constant", "expected a function 'constant' in the file, got none"),
        ("other", "expected an EquilibriumModel, got Linear"),
        ("needs", "expected a model, got TypeError"),
        ("", "expected a function '' in the file"),
    ],
)
def test_a_function_that_gives_no_model_is_refused(function: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    with pytest.raises(UsageError) as caught:
        load_model(f"{path}:{function}")
    assert said in str(caught.value)


@pytest.mark.parametrize("source", ["1 / 0", "def build(:", "import no_such_module", "raise SystemExit(3)"])
def test_a_file_that_cannot_be_run_is_refused(source: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(UsageError, match="expected a model, got"):
        load_model(f"{path}:build")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected file\.py:function, got no such file"):
        load_model(f"{tmp_path}/none.py:build")


# ---------------------------------------------------------------- what lies beside it

MODEL = """
import torch
from layers import WIDTH
from parts.more import Mine

def build():
    from later import BIAS
    torch.manual_seed(0)
    print("building", flush=True)
    return Mine(WIDTH, BIAS)

print("importing", flush=True)
"""
PART = """
from robustbench_deq.models import Linear, LinearConfig

class Mine(Linear):
    def __init__(self, width, bias):
        super().__init__(LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=width))
        self.bias = bias
"""


def write_project(folder: Path, width: int) -> str:
    (folder / "parts").mkdir(parents=True)
    (folder / "mine.py").write_text(MODEL)
    (folder / "layers.py").write_text(f"WIDTH = {width}")
    (folder / "later.py").write_text(f"BIAS = {10 * width}")
    (folder / "parts" / "more.py").write_text(PART)
    return f"{folder / 'mine.py'}:build"


def test_files_of_the_same_names_in_two_folders_do_not_meet(tmp_path: Path) -> None:
    path, modules = list(sys.path), set(sys.modules)
    sources = [write_project(tmp_path / name, width) for name, width in (("one", 3), ("two", 4))]
    models = [load_model(source) for source in (*sources, sources[0])]
    assert [(model.config.hidden, model.bias) for model in models] == [(3, 30), (4, 40), (3, 30)]
    assert sys.path == path
    left = {name for name in sys.modules.keys() - modules if not name.startswith("robustbench_deq")}
    assert len(left) == 2 and all(name.startswith("_robustbench_deq_user_mine_") for name in left)


def test_modules_of_the_surroundings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that the file is the first to import is kept; so is one that was there before, whatever its name."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "their_library.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    source = write_project(tmp_path / "mine", 3)
    with (tmp_path / "mine" / "layers.py").open("a") as file:
        file.write("\nimport their_library")
    load_model(source)
    assert sys.modules.pop("their_library").__file__.startswith(str(tmp_path / "library"))


def test_what_the_file_prints_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    load_model(write_project(tmp_path / "mine", 3))
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "importing\nbuilding\n"


def test_a_file_that_seeds_leaves_the_random_state_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(write_project(tmp_path / "mine", 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_its_classes_are_pickled_by_name(tmp_path: Path) -> None:
    """Another process that has loaded the same file reads them."""
    path = tmp_path / "mine.py"
    path.write_text(SOURCE + "\nclass Note:\n    text = 'here'\n")
    load_model(f"{path}:build")
    module = next(module for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(path))
    (tmp_path / "note").write_bytes(pickle.dumps(module.Note()))
    script = (
        "import pathlib, pickle, sys\n"
        "from robustbench_deq.models import load_model\n"
        "load_model(sys.argv[1] + ':build')\n"
        "print(pickle.loads(pathlib.Path(sys.argv[2]).read_bytes()).text)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "note")], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == "here\n", found.stderr


IMPORTS = {
    "import helper": "helper.py",
    "from helper import x": "helper.py",
    "def build():\n    import helper": "helper.py",
    "from package import part": "package/part.py",
    "import package.part": "package/__init__.py",
    "import package": "package/deep/below.py",  # which its __init__ imports, relatively
    "from plain.part import *": "plain/part.py",  # a folder without an __init__
    "import importlib\nimportlib.import_module('helper')": "helper.py",
}


@pytest.mark.parametrize(("source", "place"), IMPORTS.items(), ids=IMPORTS)
def test_digest_is_also_of_what_the_file_imports_from_beside_it(source: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    files = {
        "mine.py": f"import torch\n{source}\n",
        "helper.py": "x = 1\n",
        "package/__init__.py": "from .deep import below\n",
        "package/part.py": "from . import deep\n",
        "package/deep/__init__.py": "",
        "package/deep/below.py": "import helper, mine\nfrom ... import beyond\n",
        "plain/part.py": "",
        "torch/other.py": "",  # no module of this name lies here
        "unused.py": "def (",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = digest_of_file(path)
    for name in ("unused.py", "torch/other.py"):
        (tmp_path / name).write_text("y = 2\n")
    assert digest_of_file(path) == before
    (tmp_path / place).write_text(files[place] + "y = 2\n")
    assert digest_of_file(path) != before


@pytest.mark.parametrize("source", ["import torch\n", "def (", "x = '\0'", "from .. import beyond"])
def test_digest_of_a_file_that_stands_alone_is_its_own(source: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    assert digest_of_file(path) == hashlib.sha256(source.encode()).hexdigest()


def test_an_error_is_told_with_the_file_and_line_it_is_in(tmp_path: Path) -> None:
    """Of the user's files, wherever a library raises it; a syntax error too, which has no frame."""
    (tmp_path / "beside.py").write_text("import json\n\n\ndef read():\n    return json.loads('{')\n")
    (tmp_path / "spoilt.py").write_text("x = 1\nx = (\n")
    (tmp_path / "mine.py").write_text(
        "def build():\n    import beside\n    return beside.read()\n\ndef other():\n    import spoilt\n"
    )
    for function, said in (
        ("build", "JSONDecodeError: .*beside.py line 5"),
        ("other", "SyntaxError: .*spoilt.py line 2"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            load_model(f"{tmp_path / 'mine.py'}:{function}")
        assert caught.value.__cause__ is not None


def test_a_name_that_no_file_can_have_is_told() -> None:
    for name in ("x" * 5000, "a\0b"):
        for source in (f"{name}.py:build", name):
            with pytest.raises(UsageError, match="expected"):
                load_model(source)
