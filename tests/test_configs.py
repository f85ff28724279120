"""Typed configs: what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from robustbench_deq.configs import Config, merge, parse_assignments, parse_fraction, read_yaml, validate
from robustbench_deq.errors import MAX_MESSAGE, UsageError
from robustbench_deq.threat_spec import ThreatSpec


class Inner(Config):
    tolerance: float = Field(1e-3, gt=0)
    solver: str = "anderson"


class Outer(Config):
    steps: int = Field(10, ge=1)
    name: str | None = None
    inner: Inner = Inner()


keys = st.sampled_from(["a", "b", "c"])


class Numbers(Config):
    count: int = 1
    size: float | None = 1.0
    is_on: bool = False
    radius: ThreatSpec = ThreatSpec()


trees = st.dictionaries(keys, st.recursive(st.integers(), lambda below: st.dictionaries(keys, below), max_leaves=6))


def test_valid_values_become_a_frozen_config() -> None:
    config = validate(Outer, {"steps": 3, "inner": {"tolerance": 0.5}}, "here")
    assert (config.steps, config.inner.tolerance, config.inner.solver) == (3, 0.5, "anderson")
    with pytest.raises(ValidationError):
        config.steps = 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, r"here: unknown key 'stepz': expected one of steps, name, inner; remove or correct it"),
        ({"zzz": 3}, r"unknown key 'zzz': expected one of steps, name, inner"),
        ({"inner": {"tolerence": 1}}, r"unknown key 'inner.tolerence': expected one of tolerance"),
        ({"steps": "many"}, r"here: steps: expected a valid integer.*, got 'many'; correct it"),
        ({"steps": 1.5}, r"steps: expected a valid integer.*, got 1.5"),
        ({"steps": 0}, r"steps: expected greater than or equal to 1, got 0"),
        ({"steps": None}, r"steps: expected a valid integer, got None"),
        ({"inner": {"tolerance": 0}}, r"inner.tolerance: expected greater than 0, got 0"),
        ({"inner": {"tolerance": float("nan")}}, r"inner.tolerance: expected .*, got nan"),
        ({"inner": {"tolerance": float("inf")}}, r"inner.tolerance: expected a finite number, got inf"),
        ({"inner": 3}, r"inner: expected .*, got 3"),
        ({"name": 3}, r"name: expected a valid string, got 3"),
        ({"name": "a\udcff"}, r"name: expected text in UTF-8, got 'a\\udcff'"),
    ],
)
def test_refusals_say_expected_and_got_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        validate(Outer, values, "here")
    assert "\n" not in str(caught.value)


def test_missing_key_is_named() -> None:
    class Needs(Config):
        must: int

    with pytest.raises(UsageError, match=r"^here: must: expected a value, got none; add it$"):
        validate(Needs, {}, "here")


class Entry(Config):
    width: list[float] = Field(description="of all, in metres")
    inner: Inner | None = None


class Listing(Config):
    entries: list[Entry]
    named: dict[str, Inner] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"entries": [{}]}, "here: entries.0.width: expected a value (of all, in metres), got none; add it"),
        (
            {"entries": [{"widht": 1}]},
            "here: unknown key 'entries.0.widht': expected one of width, inner; remove or correct it",
        ),
        (
            {"entries": [{"width": []}, {"zzz": 1, "width": [1]}]},
            "here: unknown key 'entries.1.zzz': expected one of width, inner; remove or correct it",
        ),
        (
            {"entries": [{"width": [], "inner": {"zzz": 1}}]},
            "here: unknown key 'entries.0.inner.zzz': expected one of tolerance, solver; remove or correct it",
        ),
        (
            {"entries": [], "named": {"a": {"zzz": 1}}},
            "here: unknown key 'named.a.zzz': expected one of tolerance, solver; remove or correct it",
        ),
        ({"entries": [{}], "zzz": 1}, "here: entries.0.width: expected a value (of all, in metres), got none; add it"),
        ({"zzz": 1}, "here: unknown key 'zzz': expected one of entries, named; remove or correct it"),
    ],
)
def test_missing_and_unknown_keys_are_named_with_those_of_their_own_place(values: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        validate(Listing, values, "here")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-3", 1e-3),
        ("a=-2.5E+1", -25.0),
        ("a=null", None),
        ("a=", None),
        ("a=true", True),
        ("a=false", False),
        ("a=anderson", "anderson"),
        ("a=8/255", "8/255"),
        ("a=x=y", "x=y"),
        ("a=[1:30, 010, 0, 0x10, 1.5]", ["1:30", "010", 0, 16, 1.5]),
        ("a=[1, 2]", [1, 2]),
        ("a=[1, 2", "[1, 2"),
        (" a =7", 7),
    ],
)
def test_assignment_reads_a_yaml_scalar(text: str, value: object) -> None:
    found = parse_assignments((text,))
    assert found == {"a": value}
    assert type(found["a"]) is type(value)


def test_dotted_keys_nest_and_later_ones_win() -> None:
    texts = ("steps=3", "inner.solver=picard", "inner.tolerance=1e-2", "steps=4")
    assert parse_assignments(texts) == {"steps": 4, "inner": {"solver": "picard", "tolerance": 0.01}}
    assert parse_assignments(()) == {}


@pytest.mark.parametrize("text", ["a", "=3", "", "a.b"])
def test_malformed_assignment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--set: expected key=value, got"):
        parse_assignments((text,))


def test_key_that_is_a_value_and_a_mapping_is_refused() -> None:
    with pytest.raises(UsageError):
        parse_assignments(("inner=3", "inner.solver=picard"))


def test_merge_goes_mapping_by_mapping() -> None:
    base = {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}
    merged = merge(base, {"b": {"c": 5}, "e": None, "g": {"h": 6}})
    assert merged == {"a": 1, "b": {"c": 5, "d": 3}, "e": None, "g": {"h": 6}}
    assert base == {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 4}}


@given(trees, trees)
def test_merge_is_idempotent_and_has_neutral_elements(base: dict[str, Any], changes: dict[str, Any]) -> None:
    assert merge(base, {}) == base
    assert merge({}, changes) == changes
    once = merge(base, changes)
    assert merge(once, changes) == once
    assert set(once) == set(base) | set(changes)


@pytest.mark.parametrize(
    ("text", "value"), [("0.5", 0.5), ("8/255", 8 / 255), (" 1 / 4 ", 0.25), ("1e-3", 1e-3), ("-1", -1.0)]
)
def test_fraction_is_read(text: str, value: float) -> None:
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["", "a", "1/0", "1/", "/2", "1/2/3", "8 255"])
def test_bad_fraction_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^number: expected a number or a fraction"):
        parse_fraction(text)
    with pytest.raises(UsageError, match=r"^radius: expected a number or a fraction"):
        parse_fraction(text, "radius")


def test_yaml_mapping_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text("steps: 3\ninner: {solver: picard}\n", encoding="utf-8")
    assert read_yaml(path) == {"steps": 3, "inner": {"solver": "picard"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "expected YAML, got a syntax error in line"),
        (b"- 1\n- 2\n", "expected a mapping of keys to values, got list"),
        (b"", "expected a mapping of keys to values, got NoneType"),
        (b"\xff\xfe\x00a", "expected a readable YAML file, got not UTF-8 text"),
        (b"a: !!bool x\n", "got a tag in line 1; remove the tag, or quote"),
        (b'a: 1\nb: ["\\ud800"]\n', "got an escape that is no letter in line 2; correct it"),
        (b"a: 1\nb: &x [1]\nc: *x\n", "got an alias or anchor in line 2; write the value out"),
        (b"a: 1\nb: {c: 1, c: 2}\n", "got the key 'c' twice in line 2; remove one"),
        (b"a: 1\na: 1\n", "got the key 'a' twice in line 2; remove one"),
        (b"1: a\n", "got a key that is not text in line 1; quote the key"),
        (b"a: " + b"[" * 5000, "got more than 32 levels in line 1"),
        (b"a: " + b"9" * 5000, "got a number that is not one or is too large in line 1"),
        (b"a: 0x_\n", "got a number that is not one"),
        (b"a: b\n" * 2**18, "expected at most 1048576 bytes, got a larger file"),
        (b"a: !!python/object/apply:os.getcwd []\n", "expected YAML .*, got a tag in line 1"),
    ],
)
def test_unusable_yaml_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_yaml(path)
    assert "bad.yaml" in str(caught.value)


def test_dates_and_merge_keys_are_text(tmp_path: Path) -> None:
    path = tmp_path / "dates.yaml"
    path.write_text("a: 2024-13-45\nb: 2024-01-01\n<<: {c: 1}\n")
    assert read_yaml(path) == {"a": "2024-13-45", "b": "2024-01-01", "<<": {"c": 1}}
    assert parse_assignments(("a=2024-13-45", "b=!!bool x", "c=*d")) == {"a": "2024-13-45", "b": "!!bool x", "c": "*d"}


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [[["x"] * 100] * 100] * 100, {"a": {"b": {"c": {}}}}, 10**5000],
    ids=["text", "list", "map", "int"],
)
def test_messages_are_of_a_bounded_length_whatever_the_value(value: Any) -> None:
    for values in ({"steps": value}, {"stepz": value}, {"s" * 10**5: value}):
        with pytest.raises(UsageError) as caught:
            validate(Outer, values, "here" * 1000)
        assert len(str(caught.value)) <= MAX_MESSAGE + 20
    assert len(str(UsageError.of("a", expected="b", got="x" * 10**6, fix="c"))) < 500


def test_integers_beyond_what_tensors_hold_are_refused() -> None:
    with pytest.raises(
        UsageError, match="steps: expected a valid integer from -2147483647 to 2147483647, got 10000000000"
    ):
        validate(Outer, {"steps": 10**10}, "here")


def test_missing_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a readable YAML file, got No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="expected a readable YAML file, got Is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": True}, "here: count: expected a valid integer, got True; correct it"),
        ({"count": "3"}, "here: count: expected a valid integer, got '3'; correct it"),
        ({"size": False}, "here: size: expected a valid number, got False; correct it"),
        ({"size": "0.5"}, "here: size: expected a valid number, got '0.5'; correct it"),
        ({"is_on": "yes"}, "here: is_on: expected true or false, got 'yes'; correct it"),
    ],
)
def test_what_only_looks_like_a_number_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        validate(Numbers, values, "here")
    assert str(error.value) == message


def test_numbers_of_either_kind_and_fractions_are_taken() -> None:
    config = validate(Numbers, {"size": 2, "is_on": True, "radius": {"epsilon": "8/255"}}, "here")
    assert (config.size, config.is_on, config.radius.epsilon) == (2.0, True, 8 / 255)
