"""A few SIGKILLs at random moments, the first of two workers; `benchmarks.kills` does a hundred."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_suites_end_with_the_records_of_an_undisturbed_one() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--kills", "4", "--seed", "57", "--no-keep"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stderr.splitlines()[-1])
    assert sum(row["times"] for row in found["rows"]) == 4
    assert found["facts"]["different from it"] == 0
    assert found["facts"]["folders compared with the undisturbed one"] >= 2
