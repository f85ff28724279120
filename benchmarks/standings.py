"""The leaderboards of the suites `fast` and `fashion` in short, written into README.md from the tables of `report`.

Of each board its heading, what is the same in all its rows, and the rows of the first ten ranks.

python -m benchmarks.standings
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from benchmarks.marks import write_between

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SUITES = ("fast", "fashion")
END = "<!-- end of leaderboard -->\n"
LAST_RANK = 10


def begin_of(suite: str) -> str:
    return f"<!-- leaderboard of {suite}: python -m benchmarks.standings -->\n"


def table_of(suite: str) -> Path:
    return ROOT / "results" / suite / "report" / "leaderboard.md"


def standings_text(suite: str) -> str:
    """Markdown, without what the columns mean."""
    _, *boards = table_of(suite).read_text(encoding="utf-8").split("\n## ")
    return "\n".join(_board(board) for board in boards)


def _board(text: str) -> str:
    lines = [line for line in text.splitlines() if line and not line.startswith("- ")]
    heading, *rest = [line for line in lines if not _is_below(line)]
    table = [line for line in rest if line.startswith("|")]
    said = [line for line in rest if not line.startswith("|")]
    return "\n".join([f"**{heading}**", "", *said, *([""] if said else []), *table]) + "\n"


def _is_below(line: str) -> bool:
    rank = re.match(r"\| (\d+) ", line)
    return rank is not None and int(rank[1]) > LAST_RANK


@click.command()
def main() -> None:
    for suite in SUITES:
        write_between(README, begin_of(suite), standings_text(suite), END)


if __name__ == "__main__":
    main()
