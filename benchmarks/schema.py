"""The schema of the records in words, written into results/README.md from the classes that read and write them.

python -m benchmarks.schema
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import click
import pandas as pd
from pydantic import BaseModel

from benchmarks.marks import write_between
from robustbench_deq.records.flags import FLAGS, PROBES
from robustbench_deq.records.record import SAMPLE_COLUMNS, SCHEMA_VERSION, STANDARD_COLUMNS, Record
from robustbench_deq.report.tables.text import markdown_table

README = Path(__file__).parents[1] / "results" / "README.md"
BEGIN, END = "<!-- schema: python -m benchmarks.schema -->\n", "<!-- end of schema -->\n"
_NAMES = {float: "number", int: "integer", str: "text", types.NoneType: "null"}


def schema_text() -> str:
    """Markdown tables: the fields of a record, dotted, the columns of its samples, the numbers of the panel, and the
    flags that they raise."""
    fields = pd.DataFrame(list(_rows(Record)), columns=["field", "type", "meaning"])
    columns = pd.DataFrame(list((SAMPLE_COLUMNS | STANDARD_COLUMNS).items()), columns=["column", "meaning"])
    probes = pd.DataFrame(list(PROBES.items()), columns=["probe", "meaning"])
    doubts = [(flag.name, "yes" if flag.is_red else "no", flag.raised_when, flag.meaning) for flag in FLAGS]
    flags = pd.DataFrame(doubts, columns=["flag", "red", "raised when", "what it means"])
    return (
        f"A line of `records.jsonl`, schema version {SCHEMA_VERSION}:\n\n{markdown_table(fields, fields.columns)}\n"
        f"A row of `samples/<record_id>.parquet`:\n\n{markdown_table(columns, columns.columns)}\n"
        f"Numbers of the sanity panel in `probes`, on at most 32 images:\n\n{markdown_table(probes, probes.columns)}\n"
        "Flags that a record with `probes` raises; a red one makes it unreliable, and takes it out of the ranking:\n\n"
        f"{markdown_table(flags, flags.columns)}"
    )


def _rows(schema: type[BaseModel], prefix: str = "") -> typing.Iterator[tuple[str, str, str]]:
    for name, field in schema.model_fields.items():
        path, inner, mark = f"{prefix}{name}", _without_null(field.annotation), ""
        if typing.get_origin(inner) is list and _is_schema(typing.get_args(inner)[0]):
            text = "list" if inner is field.annotation else "list or null"
            yield f"`{path}`", text, str(field.description)
            inner, mark = typing.get_args(inner)[0], "[]"
        if _is_schema(inner):
            yield from _rows(inner, f"{path}{mark}.")
        else:
            yield f"`{path}`", _type_text(field.annotation), str(field.description)


def _without_null(annotation: Any) -> Any:
    kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return kinds[0] if is_union and len(kinds) == 1 else annotation


def _is_schema(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type_text(annotation: Any) -> str:
    """In the words of JSON."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type_text, arguments)))
    if origin is tuple:
        return f"{len(arguments)} {_type_text(arguments[0])}s"
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict:
        value = _type_text(arguments[1])
        return "object" if value == "anything" else f"object of {value}"
    return _NAMES.get(annotation, "anything")


@click.command()
def main() -> None:
    write_between(README, BEGIN, schema_text(), END)


if __name__ == "__main__":
    main()
