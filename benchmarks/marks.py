"""Parts of pages that a command writes, between two marks that stay."""

from __future__ import annotations

from pathlib import Path

from robustbench_deq.errors import RunError
from robustbench_deq.files import write_text


def write_between(page: Path, begin: str, text: str, end: str) -> None:
    """Put `text` between the lines `begin` and `end` of a page. Raises `RunError` when it lacks them."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(end)
    if not end:
        raise RunError(f"{page}: expected the marks of the part to write, got none; put them back")
    write_text(page, f"{before}{begin}\n{text}\n{end}{after}")
