"""Typed configs: frozen pydantic models that refuse unknown keys and wrong types with one clear line.

Every YAML file, every `--set key=value` and every attack's settings go through `validate`.
"""

from __future__ import annotations

import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from robustbench_deq import plain_yaml
from robustbench_deq.errors import MAX_MESSAGE, UsageError, excerpt, shortened
from robustbench_deq.registry import Registry, choice

M = TypeVar("M", bound=pydantic.BaseModel)
V = TypeVar("V")

MAX_FILE_SIZE = 2**20
MAX_COUNT = 2**31 - 1

MAX_FOLDER_NAME = 200
"""Bytes; temporary files beside it have longer names, and 255 is the limit of most file systems."""


def as_plain(value: object) -> object:
    """A scalar of NumPy or torch as Python's number, and a path as text; anything else as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def is_unicode(text: str) -> bool:
    """Whether files can hold `text`: bytes of arguments that are not UTF-8, and halves of pairs, they cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


class Config(pydantic.BaseModel):
    """Base of all configs: frozen, no unknown keys, no infinities, no truth value or text where a number belongs, no
    text that is not Unicode, and no integer beyond `MAX_COUNT`, which tensors and clocks could not hold.

    Scalars of NumPy and torch are as good as Python's numbers, and paths as text.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse_coercion(cls, value: object, info: pydantic.ValidationInfo) -> object:
        assert info.field_name is not None  # it is a validator of fields
        value = as_plain(value)
        annotation = cls.model_fields[info.field_name].annotation
        kinds = set(typing.get_args(annotation)) or {annotation}
        number = "a valid number" if float in kinds else "a valid integer"
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError(number)
        if isinstance(value, str) and kinds <= {int, float, bool, type(None)}:
            raise ValueError("true or false" if bool in kinds else number)
        if isinstance(value, str) and not is_unicode(value):
            raise ValueError("text in UTF-8")
        if type(value) is int and abs(value) > MAX_COUNT:
            raise ValueError(f"{number} from -{MAX_COUNT} to {MAX_COUNT}")
        return value


def named_in(registry: Registry[Any]) -> pydantic.AfterValidator:
    """Annotation of a field that holds a registered name, or None where the field allows it."""

    def check(name: str | None) -> str | None:
        if name is not None:
            registry.get(name)
        return name

    return pydantic.AfterValidator(check)


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name.encode()) > MAX_FOLDER_NAME:
        raise ValueError(f"a name of one folder: no /, no control characters, 1 to {MAX_FOLDER_NAME} bytes")
    return name


FolderName = Annotated[str, pydantic.AfterValidator(_folder_name)]
"""A name that is also that of a folder."""


def _check_distinct(values: V) -> V:
    if isinstance(values, list) and len(set(values)) < len(values):
        raise ValueError("every value once")
    return values


Distinct = pydantic.AfterValidator(_check_distinct)
"""Annotation of a list whose values are to differ, or of what may be one."""


def validate(schema: type[M], values: dict[str, Any], where: str) -> M:
    """`values` as a `schema`. Raises `UsageError` with the first thing that is wrong.

    Args:
        where: what is being read, for the message ("attack joint-pgd", a file's name).
    """
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise UsageError(shortened(_first_line(schema, error, shortened(where)), MAX_MESSAGE)) from None


def _first_line(schema: type[pydantic.BaseModel], error: pydantic.ValidationError, where: str) -> str:
    first = _most_telling(error)
    path = shortened(".".join(str(part) for part in first["loc"]))
    if first["type"] in ("extra_forbidden", "missing"):
        fields, key = _schema_at(schema, first["loc"][:-1]).model_fields, str(first["loc"][-1])
        if first["type"] == "missing":
            meaning = fields[key].description if key in fields else None
            return f"{where}: {path}: expected a value{f' ({meaning})' if meaning else ''}, got none; add it"
        expected = choice(key, fields, "another key")
        return f"{where}: unknown key {path!r}: expected {expected}; remove or correct it"
    if isinstance(first.get("ctx", {}).get("error"), UsageError):
        return f"{where}: {path}: {first['ctx']['error']}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":  # "Input should be x, got y" or "List should have x after validation, not y"
        message = re.sub(r"^\w+ should (be|have) |, got .*| after validation.*", "", message)
    if isinstance(first.get("input"), dict) and first["type"] == "value_error":  # of settings that do not go together
        return f"{where}: {path + ': ' if path else ''}expected {message}; correct it"
    return f"{where}: {path or 'the config'}: expected {message}, got {excerpt(first['input'])}; correct it"


def _most_telling(error: pydantic.ValidationError) -> Any:
    """The first error; of a missing key and an unknown one at the same place the latter, likely the former misspelt."""
    found = error.errors()
    first = found[0]
    if first["type"] != "missing":
        return first
    beside = (one for one in found if one["type"] == "extra_forbidden" and one["loc"][:-1] == first["loc"][:-1])
    return next(beside, first)


def _schema_at(schema: type[pydantic.BaseModel], place: tuple[int | str, ...]) -> type[pydantic.BaseModel]:
    """The schema of what stands at `place`, through lists, mappings and null."""
    for part in place:
        field = schema.model_fields.get(str(part))
        for inner in _schemas_in(field.annotation) if field else ():
            schema = inner
    return schema


def _schemas_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    parts = typing.get_args(annotation)
    if parts:
        return [schema for part in parts for schema in _schemas_in(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel) else []


def read_yaml(path: Path) -> dict[str, Any]:
    """A plain YAML file that holds one mapping (see `plain_yaml`).

    Raises:
        UsageError: for a missing, unreadable, malformed or large file, and for aliases, tags and keys given twice.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_SIZE + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError.of(str(path), expected="a readable YAML file", got=reason, fix="check the path") from None
    if len(data) > MAX_FILE_SIZE:
        raise UsageError.of(
            str(path), expected=f"at most {MAX_FILE_SIZE} bytes", got="a larger file", fix="split it, or check the path"
        )
    try:
        content = plain_yaml.read(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else ""
        expected, got, fix = "YAML", "a syntax error", "correct the file"
        if isinstance(error, plain_yaml.Unsupported):
            expected, got, fix = "YAML without aliases, tags and keys given twice", str(error.problem), str(error.note)
        raise UsageError.of(str(path), expected=expected, got=got + place, fix=fix) from None
    if not isinstance(content, dict):
        raise UsageError.of(
            str(path), expected="a mapping of keys to values", got=type(content).__name__, fix="correct the file"
        )
    return content


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, Any]:
    """`("a=1", "b.c=x")` as `{"a": 1, "b": {"c": "x"}}`; values are read as YAML scalars."""
    values: dict[str, Any] = {}
    for text in assignments:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UsageError.of("--set", expected="key=value", got=repr(text), fix="write for example --set steps=20")
        here = values
        *parents, last = key.strip().split(".")
        if len(parents) > plain_yaml.MAX_DEPTH:
            raise UsageError.of("--set", expected="a key of the config", got=repr(key), fix="correct the key")
        for parent in parents:
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):
                raise UsageError.of(
                    "--set", expected=f"either {parent} or keys below it", got=f"both ({text!r})", fix="drop one"
                )
        here[last] = _scalar(value)
    return values


def _scalar(text: str) -> Any:
    try:
        value = plain_yaml.read(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def plain_number(value: object, what: str = "number") -> object:
    """As `as_plain`, and text such as `8/255` as the number that it is. Raises `UsageError` about `what`."""
    value = as_plain(value)
    return parse_fraction(value, what) if isinstance(value, str) else value


def parse_fraction(text: str, what: str = "number") -> float:
    """A number written as `0.03` or `8/255`. Raises `UsageError` about `what`."""
    above, sign, below = text.partition("/")
    try:
        return float(above) / float(below) if sign else float(above)
    except (ValueError, ZeroDivisionError):
        raise UsageError.of(what, expected="a number or a fraction", got=repr(text), fix="write 0.5 or 8/255") from None
