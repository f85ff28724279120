"""The tests that every attack and every solver has to pass, on those that CONTRIBUTING shows: run as they are pasted.

python -m tests.pasted -k heavy-ball     # words go to pytest
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "attacks/mi_fgsm.py": None,
    "robustbench_deq/solvers/heavy_ball.py": r'SOLVERS\.register\("[\w-]+"\)\(\w+\)',
}
"""Modules of CONTRIBUTING, with the line that registers what they define, as the text says it; None: they do it."""
CONTRACTS = ["tests/attacks/test_contract.py", "tests/attacks/test_leaving.py", "tests/solvers/test_solvers.py"]


def paste(folder: Path) -> list[str]:
    """Write the examples to `folder`, import and register them; what they add to the registries."""
    from robustbench_deq.attacks import ATTACKS
    from robustbench_deq.solvers import SOLVERS

    text, before = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), {*ATTACKS, *SOLVERS}
    for name, line in EXAMPLES.items():
        source = re.search(rf"^```python\n(# {re.escape(name)}\n.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
        path = folder / Path(name).name
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"pasted_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if line is not None:
            exec(re.search(line, text)[0], {"SOLVERS": SOLVERS, **vars(module)})
    return [name for name in (*ATTACKS, *SOLVERS) if name not in before]


def main(words: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        names = paste(Path(folder))
        print("pasted:", *names)
        chosen = words or ["-k", " or ".join(names)]
        return pytest.main(
            ["-q", "-n", "0", "-p", "no:cacheprovider", *chosen, *(str(ROOT / path) for path in CONTRACTS)]
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
